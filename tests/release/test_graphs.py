"""Export as one graph: the same probabilities as the model, in torch and onnxruntime, and nothing beside them."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from released_models import ARCHITECTURES, CLASSES, pictures, released
from sklearn.datasets import load_sample_images

from dprandp.config.declared import Publication
from dprandp.errors import DprandpError, UsageError
from dprandp.release import Export, ReleasedModel, export, export_line, graph, load_model, predict

pytestmark = pytest.mark.slow

SMALL = (12, 10, 1)
"""Height, width, channels: smaller than the network's input, not square, grey."""
ROUNDED = 1e-4
"""Accepted: a resized pixel that lies between two levels may be rounded either way. Otherwise it is below 1e-6."""

SUFFIX = {"torch-export": ".pt2", "onnx": ".onnx"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ReleasedModel:
    return released(tmp_path_factory.mktemp("small") / "model", "patchnet", SMALL, mirror=True)


@pytest.fixture(scope="module")
def all_exported(model: ReleasedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    folder = tmp_path_factory.mktemp("out") / "deep"
    return {name: export(model, folder / f"classifier{suffix}", format=name) for name, suffix in SUFFIX.items()}


@pytest.fixture(params=SUFFIX)
def exported(request: pytest.FixtureRequest, all_exported: dict[str, Export]) -> Export:
    return all_exported[request.param]


def answers(path: Path, images: np.ndarray) -> np.ndarray:
    """Of an exported file, by torch or onnxruntime alone."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(torch.from_numpy(images)).numpy()
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"pixels": images})[0]


def metadata_of(path: Path) -> dict:
    if path.suffix == ".pt2":
        with zipfile.ZipFile(path) as archive:
            [name] = [name for name in archive.namelist() if "/extra/" in name]
            return json.loads(archive.read(name))
    [entry] = onnx.load(path).metadata_props
    return json.loads(entry.value)


def test_a_graph_has_the_probabilities_of_its_model(model: ReleasedModel, exported: Export) -> None:
    path = Path(exported.export)
    assert exported.bytes == path.stat().st_size
    assert exported.files == (path.name,)
    assert 0 <= exported.largest_difference < ROUNDED
    for count in (1, 9):  # any number of images
        images = pictures(count, SMALL)
        expected = model.probabilities(images).numpy()
        assert np.abs(answers(path, images) - expected).max() < ROUNDED
    assert expected.std(axis=0).max() > 0.02  # they differ from image to image


def test_a_graph_says_how_it_is_used_and_what_it_guarantees(model: ReleasedModel, exported: Export) -> None:
    about = metadata_of(Path(exported.export))
    assert about["classes"] == list(CLASSES)
    assert [about["input"][name] for name in ("height", "width", "channels", "colour")] == [12, 10, 1, "grey"]
    assert about["model_sha256"] == exported.sha256 == json.loads(model.content["config.json"])["sha256"][
        "model.safetensors"
    ]  # fmt: skip
    assert (about["private"], about["epsilon"], about["delta"]) == (True, 0.2991, 1e-5)
    assert (about["unit"], about["adjacency"]) == ("one image", "zero-out of one record")
    assert "NOT PRIVATE" not in about


def test_a_graph_holds_no_pickle_and_no_path(exported: Export) -> None:
    data = Path(exported.export).read_bytes()
    root = str(Path(graph.__file__).parents[2]).encode()
    assert root not in data
    assert b".py" not in data
    assert b"dprandp/" not in data
    if exported.format == "torch-export":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            starts = {entry.filename: archive.read(entry)[:4] for entry in archive.infolist()}
        assert [name for name, start in starts.items() if start[:2] in (b"PK", b"\x80\x02")] == []
        config = [name for name in starts if name.endswith("_config.json")]
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert len(config) == 2
            assert not any(b'"use_pickle": true' in archive.read(name) for name in config)


def test_a_graph_that_contradicts_its_model_is_not_written(
    model: ReleasedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = graph.resizing
    monkeypatch.setattr(graph, "resizing", lambda side, size: right(side, size).flip(1))
    with pytest.raises(DprandpError, match="contradicts the model"):
        export(model, tmp_path / "out.pt2", format="torch-export")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "format", "said"),
    [
        ("out.onnx", "safetensors", "--format onnx"),
        ("out.pt2", "safetensors", "--format torch-export"),
        ("out.tar", "safetensors", "a name ending in .zip, or a folder"),
        ("out.zip", "onnx", "--format safetensors"),
        ("out.pt", "torch-export", "a name ending in .pt2"),
        ("out", "onnx", "a name ending in .onnx"),
        ("out.onnx", "torch-export", "--format onnx"),
        ("out.onnx", "onxx", "'onnx'"),
        ("there.onnx", "onnx", "exists"),
    ],
)
def test_a_name_that_does_not_fit_the_format_is_refused(
    model: ReleasedModel, tmp_path: Path, name: str, format: str, said: str
) -> None:
    (tmp_path / "there.onnx").touch()
    with pytest.raises(UsageError) as caught:
        export(model, tmp_path / name, format=format)
    assert said in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]


def test_a_folder_may_have_a_version_in_its_name(model: ReleasedModel, tmp_path: Path) -> None:
    assert export(model, tmp_path / "scans-v1.2").format == "safetensors"
    (tmp_path / "tmp.Ab").mkdir()  # as mktemp makes them
    assert export(model, tmp_path / "tmp.Ab").largest_difference is None


def test_onnx_without_its_library(model: ReleasedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match=r"needs the library onnxscript\n.*dprandp\[onnx\]"):
        export(model, tmp_path / "out.onnx", format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_guarantee_keeps_its_stamp(tmp_path: Path) -> None:
    changes = {"epsilon": float("inf"), "noise_multiplier": 0, "private": False}
    model = released(tmp_path / "model", "patchnet", SMALL, mirror=False, **changes)
    with pytest.raises(UsageError, match="NOT PRIVATE"):
        export(model, tmp_path / "out.pt2", format="torch-export")
    export(model, tmp_path / "out.pt2", format="torch-export", allow_not_private=True)
    about = metadata_of(tmp_path / "out.pt2")
    assert about["private"] is False
    assert about["epsilon"] == "inf"
    assert about["NOT PRIVATE"]


def test_what_a_publisher_says_is_in_every_format(model: ReleasedModel, tmp_path: Path) -> None:
    about = Publication(title="Animals", license="mit", contact="zoo@example.org")
    export(model, tmp_path / "out", about=about)
    again = load_model(tmp_path / "out")  # its hashes are right
    assert json.loads(again.content["config.json"])["publication"] == about.said()
    assert again.content["model.safetensors"] == model.content["model.safetensors"]
    assert "* Contact: zoo@example.org" in again.content["MODEL_CARD.md"].decode()
    assert graph.metadata(model, about).items() >= about.said().items()


@pytest.mark.parametrize("format", SUFFIX)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_is_exported(arch: str, format: str, tmp_path: Path) -> None:
    """With and without whitening, at the input's size and above, in colour; on noise, and on parts of photographs."""
    for shape, whitened in (((32, 32, 3), True), ((50, 41, 3), False)):
        model = released(tmp_path / f"model{whitened}", arch, shape, mirror=whitened, whitened=whitened)
        path = tmp_path / f"out{whitened}{SUFFIX[format]}"
        assert export(model, path, format=format).largest_difference < ROUNDED
        height, width, _ = shape
        photographs = [photo[top : top + height, top : top + width] for photo in load_sample_images().images
                       for top in (0, 150, 300)]  # fmt: skip
        for images in (pictures(7, shape, seed=1), np.stack(photographs)):
            expected = model.probabilities(images).numpy()
            assert np.abs(answers(path, images) - expected).max() < ROUNDED
            assert expected.std(axis=0).max() > 1e-3


def test_a_model_in_bfloat16_is_exported_in_float32(tmp_path: Path) -> None:
    model = released(tmp_path / "model", "wrn", (32, 32, 3), mirror=True, precision="bfloat16")
    export(model, tmp_path / "out.onnx", format="onnx")
    about = metadata_of(tmp_path / "out.onnx")
    assert (about["precision"], about["precision_of_the_model"]) == ("float32", "bfloat16")
    # the line names what the user will see: how far the graph is from the model whose accuracy the card states
    made = export(model, tmp_path / "again.pt2", format="torch-export")
    assert made.evaluated_difference > 10 * made.largest_difference
    assert f"as it was evaluated, in bfloat16, within {made.evaluated_difference:.0e}" in export_line(made)
    images = pictures(7, (32, 32, 3), seed=1)
    expected = model.probabilities(images).numpy()
    assert 0 < np.abs(answers(tmp_path / "out.onnx", images) - expected).max() < 0.05


@pytest.mark.parametrize(
    ("library", "format"), [("onnxruntime", "onnx"), ("torch", "torch-export")]
)
def test_the_example_of_the_documentation_runs_without_dprandp(
    library: str, format: str, model: ReleasedModel, all_exported: dict[str, Export], tmp_path: Path
) -> None:
    """The page's own code, in a process that cannot import dprandp, on a photograph of another size."""
    page = Path(graph.__file__).parents[2] / "docs/export.md"
    examples = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    [decode] = [text for text in examples if "def pixels_of" in text]
    [example] = [text for text in examples if text.startswith(f"import {library}\n")]
    shutil.copy(all_exported[format].export, tmp_path)
    Image.fromarray(pictures(1, (45, 30, 3))[0]).save(tmp_path / "scan.png")
    source = f"import sys\nsys.modules['dprandp'] = None\n{decode}{example}"
    source += "assert 'dprandp.release' not in sys.modules\n"
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [row] = predict(model, [tmp_path / "scan.png"])
    name, _, probability = done.stdout.strip().rpartition(" ")
    assert name == row["class"]
    assert float(probability) == pytest.approx(row["probability"], abs=ROUNDED)
