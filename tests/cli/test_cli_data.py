"""Data sets that are not as they must be: exit 3, nothing private in the message, nothing charged, nothing stuck."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_process import Dprandp, RunAfter, arrays, good, refused, state_of
from PIL import Image


def with_label(value: int) -> dict[str, np.ndarray]:
    made = arrays()
    made["y_train"][17] = value
    return made


def test_data_that_are_refused_bind_the_run_to_nothing(
    dprandp: Dprandp, run_after: RunAfter, folder: Path, tmp_path: Path
) -> None:
    """What is refused is tried in tests/data; here that nothing is told or kept of it, and other data are welcome."""
    run = run_after("pretrain")
    command = ("probe", "--config", folder / "small.toml", "--run", run)
    made, small = arrays(), arrays(train=90)
    before = state_of(run)
    for bad, *fragments in (
        (made | {"x_train": made["x_train"] / 255}, "float64 [120, 12, 12]", "must be uint8", "255"),
        (made | {"classes": made["classes"].astype(object)}, "object array", "not read", "plain"),
        ({key: value for key, value in made.items() if key != "classes"}, "how many classes", "num_classes=10"),
        (with_label(2**62), "outside 0…2", "number the classes"),
        (small | {"y_train": small["y_train"] + 1}, "outside 0…2", "number the classes"),
    ):
        np.savez(tmp_path / "bad.npz", **bad)
        done = dprandp(*command, "--data", "npz:bad.npz", folder=tmp_path)
        refused(done, 3, "bad.npz", *fragments)
        assert "17" not in done.err  # the position of the bad label is private
    np.savez(tmp_path / "bad.npz", **with_label(7))
    shown = dprandp(*command, "--data", "npz:bad.npz", "--debug", folder=tmp_path).err
    assert "do not publish: 1 labels; the first at position 17 is 7" in shown
    (tmp_path / "text.npz").write_text("not a zip")
    refused(dprandp(*command, "--data", f"npz:{tmp_path}/text.npz"), 3, "text.npz is no readable .npz", "numpy.savez")
    refused(dprandp(*command, "--data", "npz:none.npz"), 3, "there is no file none.npz", "check the path")
    refused(dprandp(*command, "--data", f"folder:{tmp_path}/none"), 3, str(tmp_path / "none"))
    refused(dprandp(*command, "--data", "cifar10", "--data-dir", tmp_path), 3, "cifar10.npz", str(tmp_path))
    assert state_of(run)["run.json"] == before["run.json"]
    assert not (run / "privacy/ledger.jsonl").exists()
    assert not (run / "private/features.npy").exists()
    assert good(dprandp(*command, "--data", "npz:tiny.npz", "--json"))["train_examples"] == 120


OF_THE_MODEL = ("per_class", "warnings")
"""Keys of what follows from a released model's answers, which its noise can change: a class that it never gives has no
precision, and a warning."""


def shape_of(value: Any) -> Any:
    """What a JSON value is made of: the keys of objects, the lengths of lists, and types; no value."""
    if isinstance(value, dict):
        return {key: None if key in OF_THE_MODEL else shape_of(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape_of(item) for item in value]
    return type(value).__name__


@pytest.mark.slow
def test_what_a_private_stage_does_does_not_tell_whether_a_class_is_empty(
    dprandp: Dprandp, run_after: RunAfter, folder: Path, tmp_path: Path
) -> None:
    """Two neighbours: the third class has one record in one, and none in the other. Nothing but numbers differs."""
    run, full, said = run_after("pretrain"), arrays(), {}
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
            words = re.sub(r"\d[\d.e+-]*", "0", re.sub(r"(?m)^warning: the model .*\n", "", done.err))
            files = sorted(str(path.relative_to(place)) for path in place.rglob("*"))
            said.setdefault(command, []).append((shape_of(good(done)), words, files))
    for command, (one, other) in said.items():
        assert one == other, command


def test_predict_ignores_litter_and_says_what_it_skips(
    dprandp: Dprandp, stages: dict[str, Path], tmp_path: Path
) -> None:
    place = tmp_path / "scans/ward"
    place.mkdir(parents=True)
    Image.fromarray(arrays()["x_test"][0]).save(place / "x.png")
    (place / "._x.png").write_bytes(b"\x00\x05\x16\x07")
    command = ("predict", "--run", stages["finetune"], "--data", "folder:scans")
    done = dprandp(*command, "--json", folder=tmp_path)
    assert [row["image"] for row in good(done)["predictions"]] == ["scans/ward/x.png"]
    assert (done.json["skipped_files"], done.json["skipped_kinds"], done.err) == (0, {}, "")
    for name in ("a.svs", "ward/b.svs", "notes.txt"):
        (tmp_path / "scans" / name).write_text("?")
    again = dprandp(*command, "--json", folder=tmp_path)
    assert again.json == done.json | {"skipped_files": 3, "skipped_kinds": {".svs": 2, ".txt": 1}}
    assert again.err.count("skipped 3 files that are not images by name: .svs (2), .txt (1); readable are .png") == 1
    out = dprandp(*command, "--out", tmp_path / "answers.csv", folder=tmp_path)
    assert out.out == f"predict: 1 images, written to {tmp_path}/answers.csv\n"
    assert "skipped 3 files" in out.err
