"""From files of other people's making to a released model. DPRANDP_REAL_DATA names the folder that holds them."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_process import Dprandp, good, refused
from PIL import Image

from dprandp.config.declared import REFUSE
from dprandp.data.decode import EXTENSIONS, decode_all

REAL = Path(os.environ.get("DPRANDP_REAL_DATA", "/nonexistent"))
PRIOR = ("--prior", "patchnet-tiny-grey")

needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="DPRANDP_REAL_DATA names no folder")


def xrays(split: str, most: int) -> list[tuple[Path, str, str]]:
    """Files of chest x-rays, half of them of each class, with class and patient, whose number is in the file's name."""
    found = []
    for name in ("NORMAL", "PNEUMONIA"):
        for path in sorted((REAL / "chest-xray" / split / name).iterdir())[: most // 2]:
            found.append((path, name, re.match(r"(IM-\d+|NORMAL2-IM-\d+|person\d+)", path.name)[1]))
    return found


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    """The x-rays as folders of patients, and as a table."""
    with open(tmp_path / "scans.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split", "patient"])
        for split, most in (("train", 400), ("test", 200)):
            for path, name, patient in xrays(split, most):
                rows.writerow([path, name, split, f"{split}-{patient}"])
                folder = tmp_path / "scans" / split / name / f"{split}-{patient}"
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, folder)
    return tmp_path


@needs_real_data
def test_x_rays_by_patient(dprandp: Dprandp, patients: Path) -> None:
    """As a table and as folders: the same units, and the same released accuracy up to the noise."""
    found = {}
    table = ("csv:scans.csv", "--class-names", "NORMAL,PNEUMONIA", "--unit-column", "patient")
    for kind, data in (("table", table), ("folder", ("folder:scans", "--unit-column", "folder"))):
        command = ("probe", *PRIOR, "--run", kind, "--data", *data, "--colour", "grey", "--eps", 8, "--share", 1)
        result = good(dprandp(*command, "--delta", 1e-4, "--json", folder=patients))
        assert result["train_examples"] == 400
        assert result["train_units"] < 400
        assert (result["epsilon"] <= 8, result["auc"] > 0.85) == (True, True)
        found[kind] = result
        test = sorted(map(str, (patients / "scans/test").rglob("*.jpeg")))[:3]
        answers = json.loads(dprandp("predict", *test, "--run", kind, "--json", folder=patients).out)
        assert len(answers["predictions"]) == 3
    assert found["table"]["train_units"] == found["folder"]["train_units"]
    assert abs(found["table"]["auc"] - found["folder"]["auc"]) < 0.1


@needs_real_data
def test_a_folder_with_ten_odd_files(dprandp: Dprandp, tmp_path: Path) -> None:
    for split, most in (("train", 60), ("test", 20)):
        for path, name, _ in xrays(split, most):
            (tmp_path / "scans" / split / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "scans" / split / name)
    images = [path for path in sorted((REAL / "odd-files").iterdir()) if path.name.lower().endswith(EXTENSIONS)]
    odd = [path for path in images if decode_all([path], 32, REFUSE)[2]][::5][:10]
    assert len(odd) == 10
    for path in odd:
        shutil.copy(path, tmp_path / "scans/train/NORMAL" / f"odd-{path.name}")
    command = ("run", *PRIOR, "--run", "run", "--data", "folder:scans", "--colour", "grey", "--eps", 2)
    refused(dprandp(*command, folder=tmp_path), 3, "data-check.txt")
    told = (tmp_path / "run/private/data-check.txt").read_text("utf-8")
    assert [path.name for path in odd if f"odd-{path.name}" not in told] == []
    for path in odd:
        (tmp_path / "scans/train/NORMAL" / f"odd-{path.name}").unlink()
    assert good(dprandp(*command, "--json", folder=tmp_path))["train_examples"] == 60


@needs_real_data
@pytest.mark.parametrize("name", ["pneumoniamnist", "breastmnist"])
def test_a_set_of_medmnist_by_its_key(dprandp: Dprandp, tmp_path: Path, name: str) -> None:
    command = ("run", *PRIOR, "--run", "run", "--data", name, "--data-dir", REAL, "--eps", 8, "--json")
    result = good(dprandp(*command, folder=tmp_path))
    assert (result["stage"], result["delta"] <= 1e-4) == ("probe", True)
    assert result["auc"] > {"pneumoniamnist": 0.94, "breastmnist": 0.7}[name]
    assert (tmp_path / "run/report.html").exists()


@needs_real_data
@pytest.mark.slow
def test_a_hundred_classes(dprandp: Dprandp, tmp_path: Path) -> None:
    """CIFAR-100's images, in a split of their own; a hundred classes need little noise."""
    command = ("run", "--prior", "patchnet-tiny", "--data", f"npz:{REAL / 'cifar100-split.npz'}", "--eps", 8, "--json")
    result = good(dprandp.start(*command, folder=tmp_path).end(timeout=3600))
    assert (result["train_examples"], result["classes"][99]) == (39_975, "99")
    assert result["accuracy"] > 0.25
    assert (tmp_path / "runs/default/report.html").exists()


@pytest.mark.slow
def test_a_rare_class_is_warned_of_before_and_after(dprandp: Dprandp, tmp_path: Path) -> None:
    """300 images of which 5 per cent are of one class: without signal all answers are the other's."""
    random = np.random.default_rng(0)
    for split, count in (("train", 300), ("test", 100)):
        for index in range(count):
            folder = tmp_path / "scans" / split / ("ill" if index % 20 == 0 else "healthy")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (32, 32), dtype=np.uint8)).save(folder / f"{index}.png")
    (tmp_path / "quick.toml").write_text("[probe]\nstatistics_images = 50\ndims = 64\n", encoding="utf-8")
    command = ("probe", *PRIOR, "--config", "quick.toml", "--run", "run", "--data", "folder:scans", "--colour", "grey",
               "--eps", 0.1, "--share", 1)  # fmt: skip
    before = dprandp(*command, "--plan", folder=tmp_path)
    assert "N = 300 is small for ε = 0.1 and 2 classes" in before.out
    after = dprandp(*command, folder=tmp_path)
    assert after.code == 0, after.err
    assert "WARNING" in after.out
    assert "most frequent class 95.0 %" in after.out
