"""The data sets that are known by name, and the one place where a download can happen.

To add a set, add a row to ``BUILTIN``: its declared facts, the files it needs below the data root (where torchvision
keeps them), how they are read, and where a user without a network gets them.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import http.client
import socket
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dprandp.data.base import Dataset, DataSpec
from dprandp.data.decode import read_images
from dprandp.data.files import Problem, UnusableData
from dprandp.data.folder import class_folders, list_images
from dprandp.data.npz import read_array
from dprandp.errors import InputError, StorageError, UsageError

#: Seconds without an answer after which a download gives up.
NETWORK_TIMEOUT_S = 30.0
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOTDIR}
_DOWNLOAD_ERRORS = (OSError, RuntimeError, http.client.HTTPException, zipfile.BadZipFile, tarfile.TarError, EOFError)

Arrays = tuple[np.ndarray, np.ndarray]
"""Images and labels as a file has them; ``check_split`` checks them."""


@dataclass(frozen=True)
class KnownSet:
    """A named data set.

    Attributes:
        spec: makes the declared facts (MedMNIST's are looked up in its package, which is slow to import).
        missing: data root -> files that are absent there, relative to it.
        read: (data root, facts, split) -> images and labels.
        put: which files to put into the data root without a network, and who publishes them.
        download: fetches them with the library's own downloader, which compares checksums; None: nothing to fetch.
    """

    spec: Callable[[], DataSpec]
    missing: Callable[[Path], list[str]]
    read: Callable[[Path, DataSpec, str], Arrays]
    put: str
    download: Callable[[Path], None] | None

    def open(self, data_dir: Path, *, download: bool) -> Dataset:
        """Name the data set; touches no file until something is asked of it."""
        spec = self.spec()

        def require() -> None:
            if self.missing(data_dir) and download and self.download is not None:
                self._fetch(spec.name, data_dir)
            if missing := self.missing(data_dir):
                shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
                raise InputError(
                    f"{spec.name} is not in {data_dir}: {shown} missing",
                    fix=f"into {data_dir}, put {self.put}; or add --download where there is a network",
                )

        return Dataset(spec, lambda split: self.read(data_dir, spec, split), require)

    def _fetch(self, name: str, data_dir: Path) -> None:
        """Run the downloader: its chatter to stderr, no network to InputError, a full disk to StorageError."""
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(NETWORK_TIMEOUT_S)  # the libraries set none and would wait for ever
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout carries results only
                data_dir.mkdir(parents=True, exist_ok=True)
                self.download(data_dir)
        except _DOWNLOAD_ERRORS as error:
            if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                raise StorageError(
                    f"{name} could not be written to {data_dir}: {error.strerror}",
                    fix="make room, or name another data folder that may be written to",
                ) from error
            raise InputError(
                f"{name} could not be downloaded ({type(error).__name__})",
                fix=f"check the network and try again, or without one: into {data_dir}, put {self.put}",
            ) from error
        finally:
            socket.setdefaulttimeout(before)


def _files(*names: str) -> Callable[[Path], list[str]]:
    """A ``KnownSet.missing`` for a fixed list of files."""
    return lambda data_dir: [name for name in names if not (data_dir / name).is_file()]


def _damaged(spec: DataSpec, error: BaseException, files: str) -> InputError:
    return InputError(
        f"the files of {spec.name} ({files}) are damaged or incomplete",
        fix="delete them and put the originals there again",
        private_detail=f"{type(error).__name__}: {error}",
    )


# -------------------------------------------------------------------------------------------------------------- readers


def digits_test_positions(count: int = 1797) -> np.ndarray:
    """Which of the digits are the test split: every fifth block of ten, by position alone; bool [count].

    The set has no official split. Its writers wrote the digits mostly in runs of 0-9, so every fifth run of ten holds
    all of them (33 to 39 examples a class). The rule looks at no label, so that it is public. Most writers occur in
    both splits: accuracy is that for known writers, as customary for this set.
    """
    return np.arange(count) // 10 % 5 == 4


def _read_digits(data_dir: Path, spec: DataSpec, split: str) -> Arrays:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # the files count ink from 0 to 16
    mask = digits_test_positions(len(images)) == (split == "test")
    return images[mask], bunch.target[mask]


def _torchvision(name: str):
    from torchvision import datasets

    return getattr(datasets, name)


def _cifar_missing(kind: str, data_dir: Path) -> list[str]:
    if kind == "CIFAR10" and (data_dir / "cifar10.npz").is_file():
        return []
    source = _torchvision(kind)
    names = [*(row[0] for row in (*source.train_list, *source.test_list)), source.meta["filename"]]
    return _files(*(f"{source.base_folder}/{name}" for name in names))(data_dir)


def _read_cifar(data_dir: Path, spec: DataSpec, split: str) -> Arrays:
    """``cifar10.npz`` when it is there, else the official batches.

    The batches are pickles. torchvision compares every one of them with the MD5 of the official file before it opens
    it, so only the publisher's own bytes are ever unpickled; the npz holds plain arrays.
    """
    packed = data_dir / "cifar10.npz"
    if spec.name == "cifar10" and packed.is_file():
        return read_array(packed, f"x_{split}"), read_array(packed, f"y_{split}")
    source = _torchvision("CIFAR10" if spec.name == "cifar10" else "CIFAR100")
    try:
        loaded = source(str(data_dir), train=split == "train", download=False)
    except (OSError, RuntimeError) as error:
        raise _damaged(spec, error, source.base_folder) from error
    return loaded.data, np.array(loaded.targets)


def _idx_names(kind: str) -> list[str]:
    parts = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return [f"{kind}/raw/{part}-ubyte" for part in parts]


def _read_idx(kind: str, data_dir: Path, spec: DataSpec, split: str) -> Arrays:
    """The idx files of MNIST: magic number, one big-endian length per dimension, then bytes."""
    names = _idx_names(kind)[:2] if split == "train" else _idx_names(kind)[2:]
    count = spec.examples(split)
    arrays = []
    for name, shape in zip(names, ((count, spec.height, spec.width), (count,)), strict=True):
        header = np.array([0x800 + len(shape), *shape], ">u4").tobytes()
        try:
            content = np.fromfile(data_dir / name, np.uint8)
        except OSError as error:
            raise _damaged(spec, error, name) from error
        if content[: len(header)].tobytes() != header or content.size != len(header) + np.prod(shape):
            raise _damaged(spec, ValueError("its header or its length is not the official file's"), name)
        arrays.append(content[len(header) :].reshape(shape))
    return arrays[0], arrays[1]


def _read_svhn(data_dir: Path, spec: DataSpec, split: str) -> Arrays:
    try:
        loaded = _torchvision("SVHN")(str(data_dir), split=split, download=False)  # compares the file's MD5 first
    except (OSError, RuntimeError, ValueError) as error:
        raise _damaged(spec, error, f"{split}_32x32.mat") from error
    return loaded.data.transpose(0, 2, 3, 1), loaded.labels


_EUROSAT = "eurosat/2750"
_LAND = "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake"


def _eurosat_missing(data_dir: Path) -> list[str]:
    return [f"{_EUROSAT}/{name}" for name in _LAND.split() if not (data_dir / _EUROSAT / name).is_dir()]


def _read_eurosat(data_dir: Path, spec: DataSpec, split: str) -> Arrays:
    """Every fifth image of each class, by file name, is the test split (there is no official one)."""
    root = data_dir / _EUROSAT
    problems: list[Problem] = []
    if class_folders(root, root, problems) != spec.classes:
        raise _damaged(spec, ValueError("other class folders"), _EUROSAT)
    listing = list_images(root, root, spec.classes, problems)
    if problems:
        raise UnusableData(spec.name, problems)
    if len(listing.paths) != spec.train_examples + spec.test_examples:
        raise InputError(
            f"{root} holds {len(listing.paths)} images; the official archive has 27000",
            fix="delete the folder and unpack the archive again; for a subset use folder:PATH",
        )
    # Class sizes are multiples of five, so a running index splits each class alike.
    chosen = [i for i in range(len(listing.paths)) if (i % 5 == 4) == (split == "test")]
    images = read_images([listing.paths[i] for i in chosen], spec.height, f"the {split} images of {spec.name}")
    return images, np.array([listing.labels[i] for i in chosen])


def _read_medical(data_dir: Path, spec: DataSpec, split: str) -> Arrays:
    try:
        path = data_dir / f"{spec.name}.npz"
        return read_array(path, f"{split}_images"), read_array(path, f"{split}_labels")
    except InputError as error:
        fix = f"delete it and put the {spec.title} file of medmnist.com there again"
        raise InputError(error.problem, fix=fix, private_detail=error.private_detail) from error


# ----------------------------------------------------------------------------------------------------------- the table

PUBLISHED_DELTA = 1e-5
"""Of De et al. 2022 and Tang et al. 2023 for CIFAR-10 and CIFAR-100, of Tramèr & Boneh 2021 for CIFAR-10, MNIST and
Fashion-MNIST. With N = 50,000 or 60,000 that is a half or more of 1/N; results are compared at it all the same."""

_TEN_DIGITS = tuple("0123456789")
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm"""
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CIFAR_PUT = "the unpacked folder {folder}/ of the {title} python version that Krizhevsky's CIFAR page publishes"


def _row(spec: DataSpec, read: Callable[..., Arrays], missing: Callable[[Path], list[str]], put: str,
         download: str | None) -> KnownSet:  # fmt: skip
    """A row; ``download`` names torchvision's class."""

    def fetch(data_dir: Path) -> None:
        for choice in ({"split": "train"}, {"split": "test"}) if download == "SVHN" else ({},):
            _torchvision(str(download))(str(data_dir), download=True, **choice)

    return KnownSet(lambda: spec, missing, read, put, None if download is None else fetch)


_ROWS = (
    _row(DataSpec("digits", "Optical recognition of handwritten digits", _TEN_DIGITS, 1440, 357, 1, 8, 8, flip_ok=False,
                  split_rule="every fifth block of ten images in the test split"),
         _read_digits, _files(), "nothing (it comes with scikit-learn)", None),
    _row(DataSpec("cifar10", "CIFAR-10", tuple(_CIFAR10.split()), 50_000, 10_000, 3, 32, 32, flip_ok=True,
                  published_delta=PUBLISHED_DELTA),
         _read_cifar, functools.partial(_cifar_missing, "CIFAR10"),
         "cifar10.npz (plain arrays x_train y_train x_test y_test, uint8 [N, 32, 32, 3]) or "
         + _CIFAR_PUT.format(folder="cifar-10-batches-py", title="CIFAR-10"), "CIFAR10"),
    _row(DataSpec("cifar100", "CIFAR-100 (fine labels)", tuple(_CIFAR100.split()), 50_000, 10_000, 3, 32, 32,
                  flip_ok=True, published_delta=PUBLISHED_DELTA),
         _read_cifar, functools.partial(_cifar_missing, "CIFAR100"),
         _CIFAR_PUT.format(folder="cifar-100-python", title="CIFAR-100"), "CIFAR100"),
    _row(DataSpec("mnist", "MNIST", _TEN_DIGITS, 60_000, 10_000, 1, 28, 28, flip_ok=False,
                  published_delta=PUBLISHED_DELTA),
         functools.partial(_read_idx, "MNIST"), _files(*_idx_names("MNIST")),
         "the four unpacked idx files (…-ubyte) of LeCun's MNIST page under MNIST/raw/", "MNIST"),
    _row(DataSpec("fashion-mnist", "Fashion-MNIST", _FASHION, 60_000, 10_000, 1, 28, 28,
                  flip_ok=True, published_delta=PUBLISHED_DELTA),
         functools.partial(_read_idx, "FashionMNIST"), _files(*_idx_names("FashionMNIST")),
         "the four unpacked idx files (…-ubyte) of Zalando's Fashion-MNIST under FashionMNIST/raw/", "FashionMNIST"),
    _row(DataSpec("svhn", "Street View House Numbers, cropped digits", _TEN_DIGITS, 73_257, 26_032, 3, 32, 32,
                  flip_ok=False),
         _read_svhn, _files("train_32x32.mat", "test_32x32.mat"),
         "train_32x32.mat and test_32x32.mat (format 2, cropped digits) of Stanford's housenumbers page", "SVHN"),
    _row(DataSpec("eurosat", "EuroSAT (RGB)", tuple(_LAND.split()), 21_600, 5_400, 3, 64, 64, flip_ok=True,
                  split_rule="every fifth image of a class, by file name, in the test split"),
         _read_eurosat, _eurosat_missing,
         f"the ten class folders of the RGB archive of Helber's EuroSAT under {_EUROSAT}/", "EuroSAT"),
)  # fmt: skip
BUILTIN: dict[str, KnownSet] = {known.spec().name: known for known in _ROWS}
"""scikit-learn's digits, and the sets that torchvision knows."""

FLIP_OK = {
    "pathmnist": True, "chestmnist": False, "dermamnist": True, "octmnist": True, "pneumoniamnist": False,
    "retinamnist": True, "breastmnist": True, "bloodmnist": True, "tissuemnist": True, "organamnist": False,
    "organcmnist": False, "organsmnist": False,
}  # fmt: skip
"""The two-dimensional MedMNIST sets: whether a mirrored image keeps its label. No where left and right are anatomy:
x-rays of the chest (the heart is on one side) and organ slices (kidney-left and kidney-right are classes)."""


def _medmnist(flag: str) -> dict:
    """The medmnist package's own table row of a set."""
    from medmnist import INFO

    return INFO[flag]


@functools.cache
def _medical_spec(flag: str, side: int = 28) -> DataSpec:
    """Official training and test splits; the validation split is not used."""
    info = _medmnist(flag)
    return DataSpec(
        name=flag if side == 28 else f"{flag}_{side}",
        title=f"{info['python_class']} ({side}×{side})",
        classes=tuple(info["label"][str(index)] for index in range(len(info["label"]))),
        train_examples=info["n_samples"]["train"],
        test_examples=info["n_samples"]["test"],
        channels=info["n_channels"],
        height=side,
        width=side,
        flip_ok=FLIP_OK[flag],
        multi_label=info["task"].startswith("multi-label"),
        ordinal=info["task"] == "ordinal-regression",
        split_rule="the validation images are not used",
    )


def _medical(flag: str, side: int = 28) -> KnownSet:
    name, suffix = (flag, "") if side == 28 else (f"{flag}_{side}", f"_{side}")

    def download(data_dir: Path) -> None:
        """As medmnist's own ``download``, without its catch-all, which would swallow Ctrl-C and a full disk."""
        from torchvision.datasets.utils import download_url

        info = _medmnist(flag)
        download_url(url=info[f"url{suffix}"], root=str(data_dir), filename=f"{name}.npz", md5=info[f"MD5{suffix}"])

    put = f"{name}.npz (the {side}×{side} file) of MedMNIST v2, which medmnist.com publishes"
    return KnownSet(lambda: _medical_spec(flag, side), _files(f"{name}.npz"), _read_medical, put, download)


def larger_medical(name: str) -> KnownSet | None:
    """A MedMNIST set in another size than 28×28, such as ``pneumoniamnist_224``; they are not listed one by one."""
    flag, _, side = name.rpartition("_")
    return _medical(flag, int(side)) if flag in FLIP_OK and side in ("64", "128", "224") else None


KNOWN: dict[str, KnownSet] = BUILTIN | {flag: _medical(flag) for flag in FLIP_OK}
"""Name -> data set, for everything but ``folder:`` and ``npz:``."""


def refuse_unsupported(name: str) -> None:
    """Raise UsageError for a MedMNIST set of volumes."""
    if name.endswith("mnist3d"):
        raise UsageError(f"{name} holds volumes; dprandp reads images", fix="use a two-dimensional set, as organamnist")
