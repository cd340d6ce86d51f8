"""Everything that is wrong with a folder is told at once, before anything is made or charged; names stay private."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_process import NO_PIXELS, Dprandp, RunAfter, good, refused
from own_data import make_own_data
from PIL import Image

SECRET = "patient-4711"
SMALL = ("--count", 120, "--resolution", 32, "--eps", 3)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    make_own_data(tmp_path)
    return tmp_path / "scans"


def damage(scans: Path) -> None:
    """Nine files with six problems."""
    sick = scans / "train/ill"
    for index in range(3):
        Image.fromarray(np.full((40, 40), 1000, np.uint16)).save(sick / f"{SECRET}-deep-{index}.png")
    for split in ("train", "test"):
        Image.fromarray(np.zeros((40, 40, 4), np.uint8)).save(scans / split / "healthy" / f"{SECRET}-clear.png")
    whole = (sick / "0.png").read_bytes()
    (sick / f"{SECRET}-cut.png").write_bytes(whole[: len(whole) // 2])
    (sick / f"{SECRET}-empty.png").touch()
    (sick / f"{SECRET}.txt").write_text("?")
    (scans / "test" / f"{SECRET}.png").write_bytes(whole)


KINDS = (
    "3 of the train images: 16-bit", "1 of the train images: transparent", "1 of the test images: transparent",
    "1 of the train images: damaged", "an image file of 0 bytes", "no image by its name", "beside the class folders",
    "--grey-levels window:LO,HI", "--background white",
)  # fmt: skip


def test_a_run_names_all_problems_before_it_begins(dprandp: Dprandp, scans: Path, tmp_path: Path) -> None:
    damage(scans)
    command = ("run", "--data", "folder:scans", *SMALL)
    done = dprandp(*command, folder=tmp_path)
    refused(done, 3, *KINDS, "runs/default/private/data-check.txt names the files")
    assert SECRET not in done.err
    run = tmp_path / "runs/default"
    names = (run / "private/data-check.txt").read_text()
    assert sum(SECRET in line for line in names.splitlines()) == 9
    assert (run / "private").stat().st_mode & 0o777 == 0o700
    assert not any((run / name).exists() for name in ("1-generate", "privacy", "3-probe", "model"))
    for path in scans.rglob(f"{SECRET}*"):
        path.unlink()
    assert "1-generate" not in str(list(run.iterdir()))


def test_a_probe_and_a_fine_tune_from_scratch_do_so_too(
    dprandp: Dprandp, run_after: RunAfter, scans: Path, tmp_path: Path
) -> None:
    damage(scans)
    for command, run in (("probe", run_after("pretrain")), ("finetune", tmp_path / "new")):
        scratch = ("--from", "scratch") if command == "finetune" else ()
        done = dprandp(command, "--run", run, *scratch, "--data", "folder:scans", "--eps", 3, folder=tmp_path)
        refused(done, 3, *KINDS)
        assert SECRET in (run / "private/data-check.txt").read_text()
        assert not (run / "privacy").exists()
    plan = dprandp("probe", "--run", run_after("pretrain"), "--data", "folder:scans", "--plan", folder=tmp_path)
    refused(plan, 3, "an image file of 0 bytes", "no image by its name", "beside the class folders")


def test_check_names_them_where_it_is_told_to(dprandp: Dprandp, scans: Path, tmp_path: Path) -> None:
    damage(scans)
    refused(dprandp("datasets", "--check", "folder:scans", folder=tmp_path), 3, *KINDS, "--names FILE names the files")
    done = dprandp("datasets", "--check", "folder:scans", "--names", "names.txt", folder=tmp_path)
    refused(done, 3, *KINDS, "names.txt names the files")
    assert SECRET not in done.err
    assert (tmp_path / "names.txt").read_text().count(SECRET) == 9
    for path in scans.rglob(f"{SECRET}*"):
        path.unlink()
    (scans / "test/ill" / f"{SECRET}.png").write_bytes((scans / "train/ill/3.png").read_bytes())
    found = good(dprandp("datasets", "--check", "folder:scans", "--names", "names.txt", "--json", folder=tmp_path))
    assert found["in_test"] == 1
    assert f"test/ill/{SECRET}.png" in (tmp_path / "names.txt").read_text()


@pytest.mark.slow
def test_images_are_decoded_once_and_copies_in_both_splits_are_told_once(
    dprandp: Dprandp, run_after: RunAfter, scans: Path, tmp_path: Path, folder: Path
) -> None:
    run = run_after("pretrain")
    (scans / "test/ill" / f"{SECRET}.png").write_bytes((scans / "train/ill/3.png").read_bytes())
    command = ("--run", run, "--config", folder / "small.toml", "--json")
    first = dprandp("probe", *command, "--data", "folder:scans", "--eps", 3, folder=tmp_path)
    assert good(first)["train_examples"] == 40
    assert first.err.count("1 test images equal a training image") == 1
    assert SECRET not in first.err
    assert SECRET in (run / "private/data-check.txt").read_text()
    never = "import dprandp.data.files as files\nfiles.decode_all = None"
    control = shutil.copytree(run, tmp_path / "control")
    (control / "private/images-train.key").unlink()
    assert dprandp("finetune", "--run", control, *command[2:], folder=tmp_path, before=never).code == 1
    (control / "private/images-train.key").write_bytes(b"\xff")  # what a disk lost is no text: decoded again
    good(dprandp("finetune", "--run", control, *command[2:], folder=tmp_path))
    second = dprandp("finetune", *command, folder=tmp_path, before=never)
    assert good(second)["test_examples"] == 13
    assert "training image" not in second.err  # something was released: nothing is told any more


def test_what_can_be_refused_without_the_data_is_refused_before_a_pixel_is_read(
    dprandp: Dprandp, scans: Path, tmp_path: Path
) -> None:
    command = ("run", "--data", "folder:scans", *SMALL, "--delta", 0.5)
    refused(dprandp(*command, folder=tmp_path, before=NO_PIXELS + "Dataset.examine = read"), 2, "delta")
    command = ("run", "--data", "folder:scans", *SMALL)
    assert dprandp(*command, folder=tmp_path, before=NO_PIXELS + "Dataset.examine = read").code == 1  # here they are


def test_after_the_first_charge_neither_kinds_nor_counts_are_told(
    dprandp: Dprandp, run_after: RunAfter, scans: Path, tmp_path: Path, folder: Path
) -> None:
    run = run_after("pretrain")
    command = ("--run", run, "--config", folder / "small.toml")
    done = dprandp("probe", *command, "--data", "folder:scans", "--eps", 3, folder=tmp_path)
    assert done.code == 0, done.err
    first, whole = scans / "train/ill/0.png", (scans / "train/ill/0.png").read_bytes()
    first.write_bytes(whole[:10])
    cut = dprandp("finetune", *command, folder=tmp_path)
    (scans / "train/ill" / f"{SECRET}.txt").touch()  # which the listing sees, without a pixel
    both = dprandp("finetune", *command, folder=tmp_path)
    plan = dprandp("finetune", *command, "--plan", folder=tmp_path)
    refused(cut, 3, "cannot be read any more", "datasets --check")
    told = {done.err.partition("error: ")[2] for done in (cut, both, plan)}
    assert len(told) == 1, told
    (scans / "train/ill" / f"{SECRET}.txt").unlink()
    first.write_bytes(whole)
    assert dprandp("finetune", *command, folder=tmp_path).code == 0
