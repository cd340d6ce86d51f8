"""A run knows its data by their content: any name of the same data is welcome, other data are refused uncharged."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from cli_process import NO_PIXELS, Dprandp, RunAfter, arrays, good, refused, state_of
from PIL import Image

from dprandp.data import hash_set
from dprandp.dpsgd import training_data
from dprandp.runs.directory import RunDir

OTHER = "not those that this run began with"
CONTINUE = ("continue", "--eps", 4, "--steps", 6, "--switch", 3, "--batch-size", 16, "--public-batch-size", 8)
KEPT = "private/training-data.json"


def ledger(run: Path) -> bytes:
    return (run / "privacy/ledger.jsonl").read_bytes()


def inverted(path: Path, train: int = 120) -> str:
    """The name of other data."""
    made = arrays(train=train)
    np.savez(path, **made | {"x_train": 255 - made["x_train"]})
    return f"npz:{path}"


@pytest.fixture
def moved(folder: Path, tmp_path: Path) -> str:
    """Another name of tiny.npz, by a copy."""
    return f"npz:{shutil.copy(folder / 'tiny.npz', tmp_path / 'moved.npz')}"


@pytest.fixture
def small(folder: Path) -> tuple[str, Path]:
    return "--config", folder / "small.toml"


# ------------------------------------------------------------------------------------------------- the same data


@pytest.mark.slow
def test_a_later_stage_takes_the_same_data_under_any_name(
    dprandp: Dprandp, run_after: RunAfter, small: tuple, moved: str, tmp_path: Path
) -> None:
    """Also where it was begun under the first name, and killed."""
    run = run_after("probe").rename(tmp_path / "moved-run")
    tune = ("finetune", *small, "--run", run, "--json")
    planned = good(dprandp(*tune, "--data", moved, "--plan", before=NO_PIXELS))
    assert dprandp(*tune, "--data", "npz:./tiny.npz", DPRANDP_FAULT="update-applied:2").code == -9
    result = good(dprandp(*tune, "--data", moved))
    assert (result["charged_steps"], result["lost_steps"] > 0) == (result["steps"], True)  # it went on
    assert result["epsilon"] <= planned["epsilon_after"] + 1e-9
    assert (result["data"], result["train_examples"]) == ("npz:tiny.npz", 120)  # the run's name of its data
    assert json.loads((run / "privacy/plan.json").read_text())["data"] == "npz:tiny.npz"
    assert json.loads((run / "model/config.json").read_text())["result"]["data"] == "npz:tiny.npz"
    assert good(dprandp("finetune", "--run", run, "--resume", "--data", moved, "--json")) == result
    before = state_of(run)
    for stage in ("probe", "finetune"):  # finished: nothing is done again
        command = (stage, *small, "--run", run, "--data", moved, "--json")
        assert dprandp(*command).code == 0
        assert good(dprandp(*command, "--plan", before=NO_PIXELS))["action"] == "skip"
    assert state_of(run) == before
    whole = ("run", *small, "--run", run, "--data", moved, "--eps", 2, "--resume", "--json")
    assert good(dprandp(*whole))["data"] == "npz:tiny.npz"
    assert ledger(run) == before["privacy/ledger.jsonl"]


def test_what_tells_the_data_stays_private(run_after: RunAfter) -> None:
    run = run_after("finetune")
    hashes = json.loads((run / KEPT).read_text())
    assert stat.S_IMODE((run / "private").stat().st_mode) == 0o700
    for name, content in state_of(run).items():
        if not name.startswith("private/"):
            assert not any(value.encode() in content for value in hashes.values()), name


def test_a_stopped_probe_goes_on_under_another_name(
    dprandp: Dprandp, run_after: RunAfter, small: tuple, moved: str
) -> None:
    command = ("probe", *small, "--run", run_after("pretrain"), "--eps", 2, "--json", "--data")
    assert dprandp(*command, "npz:tiny.npz", DPRANDP_FAULT="update-applied:2").code == -9
    result = good(dprandp(*command, moved))
    assert (result["charged_steps"], result["lost_steps"] > 0) == (result["steps"], True)


@pytest.mark.slow
def test_a_folder_under_another_name_and_with_new_litter(
    dprandp: Dprandp, run_after: RunAfter, small: tuple, tmp_path: Path
) -> None:
    root = write_folder(tmp_path / "scans")
    run = run_after("pretrain")
    assert dprandp("probe", *small, "--run", run, "--data", "folder:scans", folder=tmp_path).code == 0
    (root / "train/dark/._0.png").write_bytes(b"litter")
    done = dprandp("finetune", *small, "--run", run, "--data", f"folder:{root}/", "--json")
    assert good(done)["train_examples"] == 60
    (root / "train/dark/0.png").rename(root / "train/dark/zz.png")  # the same images in another order
    refused(dprandp("finetune", *small, "--run", run, "--data", f"folder:{root}"), 3, OTHER)


# ---------------------------------------------------------------------------------------------------- other data


def test_data_that_changed_behind_their_name_are_refused_uncharged(
    dprandp: Dprandp, run_after: RunAfter, small: tuple, tmp_path: Path
) -> None:
    run = run_after("probe")
    before = state_of(run)
    for change in ("pixel", "label", "order"):
        made = arrays()
        if change == "pixel":
            made["x_train"][0, 0, 0] ^= 1
        elif change == "label":
            made["y_train"][0] = 1
        else:
            made["x_train"][[0, 3]] = made["x_train"][[3, 0]]  # of one class
        np.savez(tmp_path / "tiny.npz", **made)
        commands = [["finetune"]] if change != "pixel" else [
            ["probe"], ["finetune"], ["finetune", "--overwrite"], ["probe", "--resume"]
        ]  # fmt: skip
        for stage, *flags in commands:
            done = dprandp(stage, *small, "--run", run, *flags, folder=tmp_path)
            refused(done, 3, OTHER, "npz:tiny.npz", "same data with --data", "new --run")
    assert state_of(run) == before


def test_another_test_split_behind_the_same_name_is_refused_uncharged(
    dprandp: Dprandp, run_after: RunAfter, small: tuple, tmp_path: Path
) -> None:
    """Or its figures, which are not noisy, could be those of training images."""
    made, run, path = arrays(), run_after("pretrain"), tmp_path / "set.npz"
    np.savez(path, **made)
    command = ("finetune", *small, "--run", run)
    good(dprandp("probe", *small, "--run", run, "--data", f"npz:{path}", "--eps", 2, "--json"))
    count = len(made["y_test"])
    swapped = {f"{kind}_test": made[f"{kind}_train"][:count] for kind in "xy"}
    before = state_of(run)
    for change in (swapped, {"y_test": made["y_test"][::-1]}):
        np.savez(path, **(made | change))
        refused(dprandp(*command), 3, "the test split is not the one that this run began with", "dprandp predict")
        assert state_of(run) == before
    np.savez(path, **made)
    good(dprandp(*command, "--json"))


def test_other_classes_behind_the_same_name_are_refused_uncharged(
    dprandp: Dprandp, run_after: RunAfter, small: tuple, tmp_path: Path
) -> None:
    """One more, without an image, and another name: the images and labels stay the same."""
    made, run, path = arrays(), run_after("pretrain"), tmp_path / "set.npz"
    np.savez(path, **made)
    good(dprandp("probe", *small, "--run", run, "--data", f"npz:{path}", "--eps", 2, "--json"))
    before = state_of(run)
    for classes in (["dark", "grey", "bright", "white"], ["dark", "grey", "light"]):
        np.savez(path, **(made | {"classes": np.array(classes)}))
        done = dprandp("finetune", *small, "--run", run)
        refused(done, 3, "the classes are not those that this run began with", "also those without images")
        assert state_of(run) == before


def test_another_number_of_images_behind_the_same_name_is_refused_unread(
    dprandp: Dprandp, run_after: RunAfter, small: tuple, tmp_path: Path
) -> None:
    run = run_after("probe")
    np.savez(tmp_path / "tiny.npz", **arrays(train=123))
    before = state_of(run)
    done = dprandp("finetune", *small, "--run", run, folder=tmp_path, before=NO_PIXELS)
    refused(done, 3, "N = 123 now, but had N = 120", "restore the earlier data", "new --run")
    assert state_of(run) == before
    (run / KEPT).unlink()  # a run whose record of its data is lost spends nothing more
    refused(dprandp("finetune", *small, "--run", run), 4, "training-data.json", "restore")
    assert ledger(run) == before["privacy/ledger.jsonl"]


def test_a_budget_that_is_spent_refuses_before_any_data_are_read(
    dprandp: Dprandp, run_after: RunAfter, small: tuple, tmp_path: Path
) -> None:
    run = run_after("finetune")
    before = state_of(run)
    for name in ("npz:./tiny.npz", inverted(tmp_path / "changed.npz")):
        command = ("finetune", *small, "--run", run, "--data", name, "--overwrite")
        refused(dprandp(*command, before=NO_PIXELS), 5, "ε")
    assert state_of(run) == before


def test_private_tuning_fixes_the_data_as_well(
    dprandp: Dprandp, run_after: RunAfter, small: tuple, tmp_path: Path
) -> None:
    run, tune = run_after("pretrain"), ("--trials", 2, "--on", "private", "--eps", 2)
    done = dprandp("tune", *small, "--run", run, *tune, "--data", "npz:tiny.npz", "--json")
    assert good(dprandp("tune", *small, "--run", run, *tune, "--data", "npz:./tiny.npz", "--json")) == done.json
    inverted(tmp_path / "tiny.npz")
    spent = ledger(run)
    refused(dprandp("probe", *small, "--run", run, "--data", "npz:tiny.npz", "--eps", 2, folder=tmp_path), 3, OTHER)
    assert ledger(run) == spent
    assert dprandp("probe", *small, "--run", run, "--data", "npz:./tiny.npz", "--eps", 2).code == 0


# --------------------------------------------------------------------------------- private here and public there


def write_folder(root: Path) -> Path:
    """60 training and 30 test images in class folders."""
    made = arrays(train=60)
    for split in ("train", "test"):
        for index, (image, label) in enumerate(zip(made[f"x_{split}"], made[f"y_{split}"], strict=True)):
            place = root / split / str(made["classes"][label])
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{index}.png")
    return root


def shuffled() -> dict[str, np.ndarray]:
    """The images of tiny.npz in another order, with other labels."""
    made = arrays()
    order = np.random.default_rng(1).permutation(120)
    return made | {"x_train": made["x_train"][order], "y_train": order % 3}


def test_private_data_are_not_public_under_another_name(
    dprandp: Dprandp, vit: Path, moved: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "shuffled.npz", **shuffled())
    before = state_of(vit)
    for name in ("npz:./tiny.npz", moved, f"npz:{tmp_path}/shuffled.npz"):
        for command in (CONTINUE, (*CONTINUE, "--mix", "public"), ("diagnose", "--eps", 4)):
            done = dprandp(*command, "--run", vit, "--data", "npz:tiny.npz", "--public", name)
            refused(done, 2, "is given both as private and as public data", "fraction:0.1")
        tuned = dprandp("tune", "--run", vit, "--config", "small.toml", "--data", "npz:tiny.npz", "--on", name)
        refused(tuned, 2, "holds images of the private data set")
    assert state_of(vit) == before


def test_the_images_that_a_run_is_about_are_never_public_in_it(
    dprandp: Dprandp, vit: Path, small: tuple, tmp_path: Path
) -> None:
    """Also where the command that calls them public names other data as the private ones, which it does not read."""
    np.savez(tmp_path / "shuffled.npz", **shuffled())
    name, other = f"npz:{tmp_path}/shuffled.npz", inverted(tmp_path / "other.npz")
    good(dprandp("probe", *small, "--run", vit, "--data", "npz:tiny.npz", "--eps", 4, "--json"))
    before = state_of(vit)
    done = dprandp(*CONTINUE, "--mix", "public", "--run", vit, "--data", other, "--public", name)
    refused(done, 2, "holds private images that this run is about", "fraction:0.1")
    refused(dprandp("tune", "--run", vit, *small, "--data", other, "--on", name), 2, "holds private images")
    assert state_of(vit) == before


@pytest.mark.parametrize("by", ["continue", "tune"])
def test_what_a_run_has_used_as_public_is_never_its_private_data(
    dprandp: Dprandp, vit: Path, small: tuple, tmp_path: Path, by: str
) -> None:
    """What was learned from them cost nothing then, and can no longer be counted. The control: other data are."""
    np.savez(tmp_path / "shuffled.npz", **shuffled())
    other = ("--data", inverted(tmp_path / "other.npz"))
    if by == "continue":
        good(dprandp(*CONTINUE, "--mix", "public", "--run", vit, *other, "--public", "npz:tiny.npz", "--json"))
    else:
        good(dprandp("tune", "--run", vit, *small, *other, "--on", "npz:tiny.npz", "--json"))
    probe = ("probe", *small, "--run", vit, "--eps", 4)
    refused(dprandp(*probe, "--data", f"npz:{tmp_path}/shuffled.npz"), 5, "has used images", "as public data")
    assert not (vit / "privacy/ledger.jsonl").exists()
    record = vit / "private/public-images.npy"
    for changed in (None, record.read_bytes().replace(b"<", b"|") + b"x"):
        kept = record.read_bytes()
        record.unlink() if changed is None else record.write_bytes(changed)
        refused(dprandp(*probe, "--data", f"npz:{tmp_path}/shuffled.npz"), 4, str(record), "used as public ones")
        refused(dprandp(*probe, *other), 4, str(record), "restore")
        record.write_bytes(kept)
    good(dprandp(*probe, *other, "--json"))


def in_colour() -> dict[str, np.ndarray]:
    """The images of tiny.npz with three equal channels."""
    made = arrays()
    return {**made, **{name: np.repeat(made[name][..., None], 3, axis=3) for name in ("x_train", "x_test")}}


def as_files(root: Path, colour: bool) -> str:
    """The images of tiny.npz as files."""
    made = in_colour() if colour else arrays()
    for split in ("train", "test"):
        for index, (image, label) in enumerate(zip(made[f"x_{split}"], made[f"y_{split}"], strict=True)):
            place = root / split / str(made["classes"][label])
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{index}.png")
    return f"folder:{root}"


def all_but_one() -> dict[str, np.ndarray]:
    """Other images than those of tiny.npz, but for the last."""
    made = arrays()
    return made | {"x_train": np.concatenate([made["x_train"][:-1, ::-1], made["x_train"][-1:]])}


def test_images_are_known_in_any_reading_and_one_by_one(
    dprandp: Dprandp, vit: Path, small: tuple, tmp_path: Path
) -> None:
    """In colour or grey, as arrays or files, whole or a single one of them; private first, or public first."""
    np.savez(tmp_path / "rgb.npz", **in_colour())
    np.savez(tmp_path / "one.npz", **all_but_one())
    sets = [f"npz:{tmp_path}/rgb.npz", as_files(tmp_path / "grey", colour=False), f"npz:{tmp_path}/one.npz"]
    fresh = shutil.copytree(vit, tmp_path / "fresh")
    good(dprandp("probe", *small, "--run", vit, "--data", "npz:tiny.npz", "--eps", 4, "--json"))
    for name in sets:
        for data in ("npz:tiny.npz", inverted(tmp_path / "other.npz")):
            tuned = dprandp("tune", "--run", vit, *small, "--data", data, "--on", name)
            refused(tuned, 2, "holds images of the private" if data == "npz:tiny.npz" else "holds private images")
    files = as_files(tmp_path / "colour", colour=True)
    good(dprandp("tune", "--run", fresh, *small, *("--data", inverted(tmp_path / "b.npz")), "--on", files, "--json"))
    for data in (("npz:tiny.npz",), (sets[0],), (sets[1], "--colour", "grey"), (files, "--colour", "grey")):
        refused(dprandp("probe", *small, "--run", fresh, "--eps", 4, "--data", *data), 5, "as public data")


def test_a_private_folder_is_not_public_under_another_name(dprandp: Dprandp, vit: Path, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "scans")
    shutil.copytree(root, tmp_path / "again")
    (tmp_path / "again/train/dark").rename(tmp_path / "again/train/a-dark")  # other class names
    shutil.rmtree(tmp_path / "again/test/dark")
    for name in (f"folder:{root}/", f"folder:{root}/../scans", f"folder:{tmp_path}/again"):
        done = dprandp(*CONTINUE, "--run", vit, "--data", "folder:scans", "--public", name, folder=tmp_path)
        refused(done, 2, "is given both as private and as public data")
    assert not (vit / "privacy").exists()


def test_a_finished_or_stopped_continue_knows_both_its_sets_by_content(
    dprandp: Dprandp, vit: Path, moved: str, tmp_path: Path
) -> None:
    public, other = inverted(tmp_path / "public.npz", train=90), inverted(tmp_path / "other-name.npz", train=90)
    command = (*CONTINUE, "--run", vit, "--json", "--data")
    assert dprandp(*command, "npz:tiny.npz", "--public", public, DPRANDP_FAULT="update-applied:2").code == -9
    result = good(dprandp(*command, moved, "--public", other))
    assert result["lost_steps"] > 0
    assert good(dprandp(*command, moved, "--public", other)) == result
    assert good(dprandp(*command, moved, "--public", other, "--plan", before=NO_PIXELS))["action"] == "skip"
    np.savez(tmp_path / "other-name.npz", **{**arrays(90), "x_train": arrays(90)["x_train"][:, ::-1]})
    refused(dprandp(*command, moved, "--public", other), 2, "public-images changed")


def test_a_part_declared_public_is_left_out_under_any_name_of_the_data(
    dprandp: Dprandp, vit: Path, moved: str, tmp_path: Path, small: tuple
) -> None:
    """Public steps alone are not charged, and all the same the part is nobody's secret afterwards."""
    command = (*CONTINUE, "--mix", "public", "--run", vit, "--public", "fraction:0.2", "--data")
    assert dprandp(*command, "npz:tiny.npz").code == 0
    assert dprandp(*command, moved).code == 0  # finished
    before = state_of(vit)
    probe = ("probe", *small, "--run", vit, "--eps", 4, "--json", "--data")
    refused(dprandp(*probe, inverted(tmp_path / "changed.npz")), 3, OTHER)
    assert {key: value for key, value in state_of(vit).items() if "statistics" not in key} == before
    assert good(dprandp(*probe, moved))["train_examples"] == 96


def test_every_part_that_was_declared_public_is_recorded(tmp_path: Path) -> None:
    """Not only the last one; equal parts once."""
    random, run = np.random.default_rng(0), RunDir.open(tmp_path / "run", create=True)
    parts = [random.integers(1, 256, (count, 1, 16), dtype=np.uint8) for count in (5, 3)]
    with run.lock():
        for part in (*parts, *parts):
            training_data.declare_public(run, part)
    assert training_data.public_images(run) == hash_set(np.concatenate(parts))
    assert len(np.load(run.path / "private/declared-public.npy")) == 8
