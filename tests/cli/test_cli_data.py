"""Data sets that are not as they must be: exit 3, nothing private in the message, nothing charged, nothing stuck."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_process import Dprandp, arrays, refused, state_of
from PIL import Image


def charges(run: Path) -> list[dict[str, Any]]:
    """What the run's ledger holds, without the header."""
    ledger = run / "privacy" / "ledger.jsonl"
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == "charge"]


def without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in arrays().items() if key != name}


def changed(name: str, change: Callable[[np.ndarray], Any]) -> dict[str, np.ndarray]:
    made = arrays()
    return made | {name: change(made[name])}


def with_label(value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(labels: np.ndarray) -> np.ndarray:
        labels = labels.astype(np.int64)
        labels[17] = value
        return labels

    return change


BAD_ARRAYS: dict[str, tuple[Callable[[], dict[str, np.ndarray]], tuple[str, ...]]] = {
    "float images": (lambda: changed("x_train", lambda x: x / 255), ("float64 [120, 12, 12]", "must be uint8", "255")),
    "flat images": (lambda: changed("x_train", lambda x: x.reshape(120, -1)), ("uint8 [120, 144]", "[N, H, W, 3]")),
    "channels first": (
        lambda: changed("x_train", lambda x: np.repeat(x[:, None], 3, 1)),
        ("uint8 [120, 3, 12, 12]", "transpose"),
    ),
    "sizes differ": (lambda: changed("x_test", lambda x: x[:, :8, :8]), ("[120, 12, 12]", "[30, 8, 8]", "one size")),
    "no images": (lambda: changed("x_test", lambda x: x[:0]), ("holds no image", "at least one")),
    "labels missing": (lambda: without("y_train"), ("lacks y_train", "numpy.savez")),
    "labels too few": (lambda: changed("y_train", lambda y: y[:-1]), ("int64 [119] for 120 images", "one integer")),
    "float labels": (lambda: changed("y_train", lambda y: y * 1.0), ("float64", "must be integers")),
    "one-hot labels": (lambda: changed("y_train", lambda y: np.eye(3, dtype=int)[y]), ("[120, 3]", "must be integers")),
    "label too large": (lambda: changed("y_train", with_label(3)), ("outside 0…2", "number the classes")),
    "label negative": (lambda: changed("y_train", with_label(-1)), ("outside 0…2", "number the classes")),
    "label huge": (lambda: changed("y_train", with_label(2**62)), ("outside 0…2", "number the classes")),
    "classes undeclared": (lambda: without("classes"), ("does not say how many classes", "num_classes=10")),
    "object labels": (lambda: changed("y_train", lambda y: y.astype(object)), ("object array", "not read", "plain")),
    "object classes": (lambda: changed("classes", lambda c: c.astype(object)), ("object array", "not read", "plain")),
    "class named twice": (lambda: changed("classes", lambda c: ["a", "a", "b"]), ("repeated", "its own")),
}


@pytest.fixture
def run(run_after: Callable[[str], Path]) -> Path:
    """A run that is ready for its first private stage."""
    return run_after("pretrain")


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_npz_refused(dprandp: Dprandp, run: Path, folder: Path, tmp_path: Path, name: str) -> None:
    make, fragments = BAD_ARRAYS[name]
    np.savez(tmp_path / "bad.npz", **make())
    before = state_of(run)
    command = ("probe", "--config", folder / "small.toml", "--run", run, "--data", "npz:bad.npz")
    done = dprandp(*command, folder=tmp_path)
    refused(done, 3, "bad.npz", *fragments)
    assert "17" not in done.err  # the position of the bad label is private
    assert charges(run) == []
    assert state_of(run).get("run.json") == before["run.json"]
    assert not (run / "private" / "features.npy").exists()


def test_private_detail_only_with_debug(dprandp: Dprandp, run: Path, folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", **changed("y_train", with_label(7)))
    command = ("probe", "--config", folder / "small.toml", "--run", run, "--data", "npz:bad.npz")
    assert "position 17" not in dprandp(*command, folder=tmp_path).err
    shown = dprandp(*command, "--debug", folder=tmp_path).err
    assert "do not publish: 1 labels; the first at position 17 is 7" in shown


def test_no_file_or_no_zip(dprandp: Dprandp, run: Path, tmp_path: Path) -> None:
    command = ("probe", "--config", "small.toml", "--run", run)
    refused(dprandp(*command, "--data", "npz:none.npz"), 3, "there is no file none.npz", "check the path")
    (tmp_path / "text.npz").write_text("not a zip")
    refused(dprandp(*command, "--data", f"npz:{tmp_path}/text.npz"), 3, "text.npz is no readable .npz", "numpy.savez")
    refused(dprandp(*command, "--data", f"folder:{tmp_path}/none"), 3, str(tmp_path / "none"))
    refused(dprandp(*command, "--data", "cifar10", "--data-dir", tmp_path), 3, "cifar10.npz", str(tmp_path))
    assert charges(run) == []


def test_classes_of_a_set_that_declares_them_are_not_passed_over(dprandp: Dprandp, run: Path) -> None:
    done = dprandp("probe", "--config", "small.toml", "--run", run, "--data", "digits", "--classes", 7)
    refused(done, 2, "classes", "digits", "leave")


def test_a_refused_data_set_binds_the_run_to_nothing(
    dprandp: Dprandp, run_after: Callable[[str], Path], tmp_path: Path
) -> None:
    """Nothing was released about the bad data, so other data with another N must be welcome afterwards."""
    run = run_after("pretrain")
    made = arrays(train=90)
    np.savez(tmp_path / "bad.npz", **(made | {"y_train": made["y_train"] + 1}))
    refused(dprandp("probe", "--config", "small.toml", "--run", run, "--data", f"npz:{tmp_path}/bad.npz"), 3, "outside")
    done = dprandp("probe", "--config", "small.toml", "--run", run, "--data", "npz:tiny.npz", "--json")
    assert done.code == 0, done.err
    assert done.json["train_examples"] == 120


def shape_of(value: Any) -> Any:
    """What a JSON value is made of: the keys of objects, the lengths of lists, and types; no value."""
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape_of(item) for item in value]
    return type(value).__name__


def test_what_a_private_stage_does_does_not_tell_whether_a_class_is_empty(
    dprandp: Dprandp, run: Path, folder: Path, tmp_path: Path
) -> None:
    """Two neighbours: the third class has one record in one, and none in the other. Nothing but numbers differs."""
    full, said = arrays(), {}
    full["y_train"] = full["y_train"] % 2
    full["y_train"][17] = 2
    empty = full | {"y_train": np.where(full["y_train"] == 2, 0, full["y_train"])}
    commands = {
        "tune": ["--on", "private", "--trials", 2, "--data", "npz:set.npz", "--eps", 2],
        "probe": ["--data", "npz:set.npz", "--eps", 2],
        "finetune": [],
        "report": [],
    }
    for name, made in (("full", full), ("empty", empty)):
        place = tmp_path / name
        shutil.copytree(run, place / "run")
        np.savez(place / "set.npz", **made)
        for command, more in commands.items():
            config = [] if command == "report" else ["--config", folder / "small.toml"]
            done = dprandp(command, "--run", "run", *config, "--json", *more, folder=place)
            assert done.code == 0, done.err
            words = re.sub(r"\d[\d.e+-]*", "0", done.err)
            files = sorted(str(path.relative_to(place)) for path in place.rglob("*"))
            said.setdefault(command, []).append((shape_of(done.json), words, files))
    for command, (one, other) in said.items():
        assert one == other, command


@pytest.mark.parametrize("stage", ["probe", "finetune"])
def test_changed_data(
    dprandp: Dprandp, run_after: Callable[[str], Path], folder: Path, tmp_path: Path, stage: str
) -> None:
    """Same name, same N, one pixel differs: refused, though the configuration is the same."""
    run = run_after("finetune")
    before = state_of(run)
    made = arrays()
    made["x_train"][0, 0, 0] ^= 1
    np.savez(tmp_path / "tiny.npz", **made)
    done = dprandp(stage, "--config", folder / "small.toml", "--run", run, folder=tmp_path)
    refused(done, 3, "not those that this run began with", "new --run")
    refused(dprandp(stage, "--run", run, "--resume", folder=tmp_path), 3, "not those that this run began with")
    assert state_of(run) == before


def test_predict_ignores_litter_and_says_what_it_skips(
    dprandp: Dprandp, stages: dict[str, Path], tmp_path: Path
) -> None:
    place = tmp_path / "scans/ward"
    (place / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("x.png", ".ipynb_checkpoints/x-checkpoint.png", "y.jpg"):
        Image.fromarray(arrays()["x_test"][0]).save(place / name)
    (place / "y.jpg").rename(place / "y.jfif")
    (place / "._x.png").write_bytes(b"\x00\x05\x16\x07")
    command = ("predict", "--run", stages["finetune"], "--data", "folder:scans")
    done = dprandp(*command, "--json", folder=tmp_path)
    assert done.code == 0, done.err
    assert [row["image"] for row in done.json["predictions"]] == ["scans/ward/x.png", "scans/ward/y.jfif"]
    assert (done.json["skipped_files"], done.json["skipped_kinds"], done.err) == (0, {}, "")
    for name in ("a.dcm", "ward/b.dcm", "notes.txt"):
        (tmp_path / "scans" / name).write_text("?")
    again = dprandp(*command, "--json", folder=tmp_path)
    assert again.json == done.json | {"skipped_files": 3, "skipped_kinds": {".dcm": 2, ".txt": 1}}
    assert again.err.count("skipped 3 files that are not images by name: .dcm (2), .txt (1); readable are .png") == 1
    out = dprandp(*command, "--out", tmp_path / "answers.csv", folder=tmp_path)
    assert out.out == f"predict: 2 images, written to {tmp_path}/answers.csv\n"
    assert "skipped 3 files" in out.err
