"""The two-dimensional MedMNIST sets: 28×28 pixels, official training and test splits; the validation split is not used.

The facts come from the medmnist package's own table. The files are read with ``npz.read_array``, which refuses pickles.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from dprandp.datasets.base import DataSpec
from dprandp.datasets.known import KnownSet, files_missing
from dprandp.datasets.npz import read_array
from dprandp.errors import InputError, UsageError

#: Flag → whether a mirrored image keeps its label. No, where left and right are anatomy: x-rays of the chest (the heart
#: is on one side) and organ slices (kidney-left and kidney-right are classes).
FLIP_OK = {
    "pathmnist": True,
    "dermamnist": True,
    "octmnist": True,
    "pneumoniamnist": False,
    "retinamnist": True,
    "breastmnist": True,
    "bloodmnist": True,
    "tissuemnist": True,
    "organamnist": False,
    "organcmnist": False,
    "organsmnist": False,
}
#: Flags that exist but are not taken, and why.
REFUSED = {
    "chestmnist": "has 14 yes-or-no labels per image; dprandp trains classifiers with one label per image",
}


def refuse_unsupported(name: str) -> None:
    """Raise UsageError for a MedMNIST flag that cannot be a one-label image classification."""
    if name in REFUSED:
        raise UsageError(
            f"{name} {REFUSED[name]}", fix="use pneumoniamnist for chest x-rays, or reduce it to one label as npz:PATH"
        )
    if name.endswith("mnist3d"):
        raise UsageError(f"{name} holds volumes; dprandp reads images", fix="use a two-dimensional set, as organamnist")


def _info(flag: str) -> dict[str, Any]:
    from medmnist import INFO

    return INFO[flag]


@functools.cache
def _spec(flag: str) -> DataSpec:
    info = _info(flag)
    return DataSpec(
        name=flag,
        title=f"{info['python_class']} (28×28)",
        classes=tuple(info["label"][str(index)] for index in range(len(info["label"]))),
        train_examples=info["n_samples"]["train"],
        test_examples=info["n_samples"]["test"],
        channels=info["n_channels"],
        height=28,
        width=28,
        source="https://medmnist.com (MedMNIST v2); official training and test splits"
        + ("; grades taken as plain classes" if info["task"] == "ordinal-regression" else ""),
        licence=info["license"],
        citation="Yang et al. 2023, Scientific Data 10:41, and the source data set",
        flip_ok=FLIP_OK[flag],
    )


def _read(data_dir: Path, spec: DataSpec, split: str) -> tuple[np.ndarray, np.ndarray]:
    path = data_dir / f"{spec.name}.npz"
    try:
        return read_array(path, f"{split}_images"), read_array(path, f"{split}_labels")
    except InputError as error:
        raise InputError(
            error.problem,
            fix=f"delete it and put the {spec.title} file of medmnist.com there again",
            private_detail=error.private_detail,
        ) from error


def _download(flag: str, data_dir: Path) -> None:
    """As medmnist's own ``download``, without its catch-all, which would swallow Ctrl-C and a full disk."""
    from torchvision.datasets.utils import download_url

    info = _info(flag)
    download_url(url=info["url"], root=str(data_dir), filename=f"{flag}.npz", md5=info["MD5"])


def _known(flag: str) -> KnownSet:
    return KnownSet(
        spec=lambda: _spec(flag),
        missing=files_missing(f"{flag}.npz"),
        read=_read,
        download=lambda data_dir: _download(flag, data_dir),
        put=f"{flag}.npz (the 28×28 file) of MedMNIST v2, which medmnist.com publishes",
    )


#: Flag → data set.
MEDICAL: dict[str, KnownSet] = {flag: _known(flag) for flag in FLIP_OK}
