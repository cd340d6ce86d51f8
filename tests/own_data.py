"""Small data sets of a user's own, as the commands of docs/own-data.md name them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image


def make_own_data(folder: Path) -> None:
    """Write all of them into ``folder``."""
    sample = pydicom.examples.get_path("ct")
    for split in ("train", "test"):
        for name in ("healthy", "ill"):
            (folder / "scans-dicom" / split / name).mkdir(parents=True)
            shutil.copy(sample, folder / f"scans-dicom/{split}/{name}/0.dcm")
    noise = np.random.default_rng(1)
    arrays = {f"{split}_images": noise.integers(0, 256, (12, 28, 28), dtype=np.uint8) for split in ("train", "test")}
    labels = {f"{split}_labels": np.arange(12)[:, None] % 2 for split in ("train", "test")}
    np.savez(folder / "medmnist-like.npz", **arrays, **labels)
    several = {f"y_{split}": noise.integers(0, 2, (12, 3)) for split in ("train", "test")}
    several |= {f"x_{split}": arrays[f"{split}_images"] for split in ("train", "test")}
    np.savez(folder / "several-labels.npz", **several, classes=np.array(["mass", "nodule", "edema"]))
    lines = ["path,label,split,group"]
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for label, name in enumerate(("healthy", "ill")):
            for root in ("scans", "scans-16-bit"):
                (folder / root / split / name).mkdir(parents=True)
            for index in range(count):
                values = 1200 * label + random.integers(0, 2400, (40, 36))
                Image.fromarray(values.astype(np.uint16)).save(folder / f"scans-16-bit/{split}/{name}/{index}.png")
                plain = Image.fromarray((values // 16).astype(np.uint8))
                plain.save(folder / f"scans/{split}/{name}/{index}.png")
                lines.append(f"scans/{split}/{name}/{index}.png,{name},{split},{split}-{index // 2}")
                for part in (split, "val"):
                    patient = folder / f"scans-by-patient/{part}/{name}/{part}-{index // 2}"
                    patient.mkdir(parents=True, exist_ok=True)
                    plain.save(patient / f"{split}-{index}.png")
    (folder / "scans.csv").write_text("\n".join(lines) + "\n")
    findings = ("", "mass", "mass|edema", "nodule")
    several = [f"{line.split(',')[0]},{findings[i % 4]},{line.split(',')[2]}" for i, line in enumerate(lines[1:])]
    (folder / "scans-findings.csv").write_text("\n".join(["path,label,split", *several]) + "\n")
    unsplit = [line.replace(",train,", ",").replace(",test,", ",") for line in lines[1:]]
    (folder / "scans-unsplit.csv").write_text("\n".join(["path,label,patient", *unsplit]) + "\n")
