"""Many images: folders as they are, images that cannot be read, the files of ``--out``, bounded memory."""

from __future__ import annotations

import csv
import json
import os
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from released_models import CLASSES, pictures, released

from dprandp.errors import InputError, StorageError, UsageError
from dprandp.release import ReleasedModel, predict, predictions
from dprandp.runs.files import from_json

SHAPE = (12, 10, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ReleasedModel:
    return released(tmp_path_factory.mktemp("small") / "model", "patchnet", SHAPE, mirror=False)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder of any depth and mix; two of seven images cannot be read."""
    images = pictures(5, (20, 15, 3))
    for index, name in enumerate(["a.png", "deep/b.JPG", "deep/er/c.bmp", "deep/er/d.tiff", "z/e.webp"]):
        path = tmp_path / "scans" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index]).save(path)
    (tmp_path / "scans/deep/bad.png").write_text("no image")
    Image.fromarray(np.zeros((4, 4, 4), np.uint8)).save(tmp_path / "scans/z/clear.png")  # transparent
    (tmp_path / "scans/deep/notes.txt").touch()
    (tmp_path / "scans/.hidden.png").touch()
    return tmp_path / "scans"


def rows_of(model: ReleasedModel, *images: Path, **options: object) -> list[dict]:
    return [row for block in predictions.predictions(model, images, **options) for row in block]


def test_a_folder_is_taken_as_it_is(model: ReleasedModel, mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skipped: dict[str, int] = {}
    rows = rows_of(model, mixed, on_skipped=skipped.update)
    names = ["a.png", "deep/b.JPG", "deep/bad.png", "deep/er/c.bmp", "deep/er/d.tiff", "z/clear.png", "z/e.webp"]
    assert [Path(row["image"]).relative_to(mixed).as_posix() for row in rows] == names
    assert skipped == {".txt": 1}
    assert rows == rows_of(model, data=f"folder:{mixed}")
    assert {name: row["error"] for name, row in zip(names, rows, strict=True) if "error" in row} == {
        "deep/bad.png": f"{mixed}/deep/bad.png is damaged or not an image",
        "z/clear.png": f"{mixed}/z/clear.png is transparent",
    }
    good = [row for row in rows if "error" not in row]
    for row in good:  # each by itself
        assert predict(model, [Path(row["image"])])[0]["probabilities"] == pytest.approx(row["probabilities"], abs=1e-6)
    monkeypatch.setattr(predictions, "BLOCK", 2)  # in any blocks
    again = rows_of(model, mixed)
    assert [row["image"] for row in again] == [row["image"] for row in rows]
    assert [row["class"] for row in again] == [row["class"] for row in rows]
    with pytest.raises(InputError, match="damaged"):
        predict(model, [mixed])
    assert rows_of(model, mixed / "none.png")[0]["error"] == f"there is no file or folder {mixed / 'none.png'}"


def test_files_hold_every_row(model: ReleasedModel, mixed: Path, tmp_path: Path) -> None:
    rows = rows_of(model, mixed)
    texts = {}
    for suffix in (".csv", ".json"):
        blocks = predictions.predictions(model, [mixed])
        out = tmp_path / f"out{suffix}"
        made = predictions.answer(model, blocks, out, keep=True, say=print, skipped={})
        assert (made["images"], made["unreadable"], made["predictions"]) == (7, 2, None)
        texts[suffix] = out.read_text(encoding="utf-8")
    document = from_json(texts[".json"])
    assert document == {"data": "npz:animals.npz", "private": True, "predictions": rows}
    table = list(csv.DictReader(texts[".csv"].splitlines()))
    assert list(table[0]) == ["image", "class", "probability", *CLASSES, "error"]
    for line, row in zip(table, rows, strict=True):
        assert (line["image"], line["error"]) == (row["image"], row.get("error", ""))
        if "error" in row:
            assert {line[name] for name in ("class", "probability", *CLASSES)} == {""}
        else:
            numbers = [float(line[name]) for name in CLASSES]
            assert numbers == pytest.approx(list(row["probabilities"].values()), rel=1e-5)


def test_names_of_any_bytes_are_written(model: ReleasedModel, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    Image.fromarray(pictures(1, SHAPE)[0, ..., 0]).save(folder / "plain.png")
    name = os.fsencode(folder) + b"/caf\xe9\n.png"  # not UTF-8
    os.rename(folder / "plain.png", name)
    for suffix in (".csv", ".json"):
        blocks = predictions.predictions(model, [folder])
        predictions.answer(model, blocks, tmp_path / f"out{suffix}", keep=False, say=print, skipped={})
    [row] = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["predictions"]
    assert os.fsencode(row["image"]) == name
    assert "caf\\udce9" in (tmp_path / "out.csv").read_text(encoding="utf-8")


def test_a_file_that_cannot_be_finished_is_not_there(model: ReleasedModel, tmp_path: Path) -> None:
    def fail():
        yield [predictions.failed("x", "y", False)]
        raise OSError(28, "full")

    with pytest.raises(StorageError, match="the disk is full"):
        predictions.answer(model, fail(), tmp_path / "out.json", keep=False, say=print, skipped={})
    assert list(tmp_path.iterdir()) == []
    for name in ("out", "out.txt", "out.csv.gz"):
        with pytest.raises(UsageError, match=r"a name ending in \.csv or \.json"):
            predictions.refuse_target(tmp_path / name, overwrite=True)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(
    model: ReleasedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large images, of which few are in memory at a time; the control has them all in one block."""
    def read(path, shape, rules):
        return np.zeros((500, 400, 1), np.uint8)

    large = ReleasedModel(**{**vars(model), "shape": (500, 400, 1)})
    monkeypatch.setattr(predictions, "read_unlabelled", read)
    files = [Path(f"{index}.png") for index in range(120)]
    np.savez(tmp_path / "x.npz", images=np.zeros((120, 500, 400), np.uint8))
    sources = {"files": lambda: predictions.predictions(large, files),
               "npz": lambda: predictions.predictions(large, data=f"npz:{tmp_path / 'x.npz'}")}  # fmt: skip

    def answered(source: str) -> int:
        made = predictions.answer(large, sources[source](), tmp_path / "x.csv", keep=False, say=print, skipped={})
        return made["images"]

    for source in sources:
        answered(source)  # loads what is loaded on first use
        peaks = {}
        for block in (4, 120):
            monkeypatch.setattr(predictions, "BLOCK", block)
            tracemalloc.start()
            assert answered(source) == 120
            peaks[block] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peaks[4] < 8e6 < 40e6 < peaks[120], source


def test_the_example_in_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The page's own code, on a model/ folder in the place of a run."""
    page = Path(predictions.__file__).parents[2] / "docs/export.md"
    [example] = re.findall(r"^```python\n(import dprandp\n.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    model = released(tmp_path / "runs/default", "patchnet", SHAPE, mirror=False)
    Image.fromarray(pictures(1, (30, 20, 3))[0]).save(tmp_path / "scan.png")
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    [row] = predict(model, [Path("scan.png")])
    assert capsys.readouterr().out == f"{row['class']} {row['probability']} {row['probabilities']}\n"
