"""What a named data set has to offer, and the one place where a download can happen."""

from __future__ import annotations

import contextlib
import errno
import http.client
import socket
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dprandp.data.base import Dataset, DataSpec
from dprandp.data.decode import read_images
from dprandp.data.folder import class_folders, list_images
from dprandp.data.npz import read_array
from dprandp.errors import InputError, StorageError

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10
import functools
from typing import Any

from dprandp.errors import UsageError

#: Seconds without an answer after which a download gives up.
NETWORK_TIMEOUT_S = 30.0
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOTDIR}


@dataclass(frozen=True)
class KnownSet:
    """A named data set: a row of the registry.

    Attributes:
        spec: makes the declared facts (a function, because MedMNIST's are looked up in its package, which is slow to
            import).
        missing: ``(data_dir) -> `` paths of files that are absent, relative to ``data_dir``; empty when all are there.
        read: ``(data_dir, spec, split) -> (images, labels)``.
        download: fetches the files with the library's own downloader; None where nothing has to be fetched.
        put: one sentence for somebody without a network: which files, and who publishes them.
    """

    spec: Callable[[], DataSpec]
    missing: Callable[[Path], list[str]]
    read: Callable[[Path, DataSpec, str], tuple[np.ndarray, np.ndarray]]
    download: Callable[[Path], None] | None
    put: str

    def open(self, data_dir: Path, *, download: bool) -> Dataset:
        """Name the data set; touches no file until something is asked of it."""
        spec = self.spec()
        return Dataset(
            spec,
            read=lambda split: self.read(data_dir, spec, split),
            require=lambda: self.require(spec, data_dir, download=download),
        )

    def require(self, spec: DataSpec, data_dir: Path, *, download: bool) -> None:
        """Raise InputError when files are missing; fetch them first if ``download``."""
        if self.missing(data_dir) and download and self.download is not None:
            _fetch(spec.name, lambda: self.download(data_dir), data_dir, self.put)
        missing = self.missing(data_dir)
        if missing:
            shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            raise InputError(
                f"{spec.name} is not in {data_dir}: {shown} missing",
                fix=f"into {data_dir}, put {self.put}; or add --download where there is a network",
            )


def files_missing(*names: str) -> Callable[[Path], list[str]]:
    """A ``KnownSet.missing`` for a fixed list of files."""
    return lambda data_dir: [name for name in names if not (data_dir / name).is_file()]


def damaged(spec: DataSpec, error: BaseException, files: str) -> InputError:
    """The error for a file that is there but is not what its publisher made."""
    return InputError(
        f"the files of {spec.name} ({files}) are damaged or incomplete",
        fix="delete them and put the originals there again",
        private_detail=f"{type(error).__name__}: {error}",
    )


def _fetch(name: str, download: Callable[[], None], data_dir: Path, put: str) -> None:
    """Run a library's downloader: its chatter to stderr, no network to InputError, a full disk to StorageError."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT_S)  # the libraries set none and would wait for ever
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout carries results only
            data_dir.mkdir(parents=True, exist_ok=True)
            download()
    except (OSError, RuntimeError, http.client.HTTPException, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise StorageError(
                f"{name} could not be written to {data_dir}: {error.strerror}",
                fix="make room, or name another data folder that may be written to",
            ) from error
        raise InputError(
            f"{name} could not be downloaded ({type(error).__name__})",
            fix=f"check the network and try again, or without one: into {data_dir}, put {put}",
        ) from error
    finally:
        socket.setdefaulttimeout(before)


# ------------------------------------------------------------------------------------------------------------- builtin
#
# The digits that scikit-learn ships, and the sets that torchvision knows.
#
# All facts below are constants. Files are looked for where torchvision keeps them, with ``data_dir`` as its root.

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
_EUROSAT = "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake"
_EUROSAT_FOLDER = "eurosat/2750"


def _facts(
    name: str,
    title: str,
    classes: str | tuple[str, ...],
    examples: tuple[int, int],
    shape: tuple[int, int, int],
    source: str,
    licence: str,
    citation: str,
    *,
    flip_ok: bool,
    published_delta: float | None = None,
) -> DataSpec:
    names = tuple(classes.split()) if isinstance(classes, str) else classes
    height, width, channels = shape
    return DataSpec(
        name, title, names, *examples, channels, height, width, source, licence, citation, flip_ok,
        published_delta=published_delta,
    )  # fmt: skip


# --- digits -----------------------------------------------------------------------------------------------------------


def digits_test_positions(count: int = 1797) -> np.ndarray:
    """Which of the digits are the test split: every fifth block of ten, by position alone; bool [count].

    The set has no official split. Its writers wrote the digits mostly in runs of 0–9, so *every fifth example* would
    keep meeting the same few digits (21 to 52 examples a class), while every fifth run of ten meets all of them (33 to
    39). The rule looks at positions and never at labels, so that it is public. Most writers occur in both splits:
    accuracy is that for known writers, as customary for this set; on the last fifth, written by others, it is lower.
    """
    return np.arange(count) // 10 % 5 == 4


def _read_digits(data_dir: Path, spec: DataSpec, split: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # the files count ink from 0 to 16
    mask = digits_test_positions(len(images)) == (split == "test")
    return images[mask], bunch.target[mask]


# --- torchvision ------------------------------------------------------------------------------------------------------


def _cifar_files(source: type[CIFAR10]) -> list[str]:
    lists = [*source.train_list, *source.test_list]
    return [f"{source.base_folder}/{name}" for name in [*(row[0] for row in lists), source.meta["filename"]]]


def _cifar_class(name: str) -> type[CIFAR10]:
    from torchvision import datasets

    return datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100


def _cifar_missing(name: str, data_dir: Path) -> list[str]:
    if name == "cifar10" and (data_dir / "cifar10.npz").is_file():
        return []
    return files_missing(*_cifar_files(_cifar_class(name)))(data_dir)


def _read_cifar(data_dir: Path, spec: DataSpec, split: str) -> tuple[np.ndarray, np.ndarray]:
    """``cifar10.npz`` when it is there, else the official batches.

    The batches are pickles. torchvision compares every one of them with the MD5 of the official file before it opens
    it, so only the publisher's own bytes are ever unpickled; the npz holds plain arrays.
    """
    packed = data_dir / "cifar10.npz"
    if spec.name == "cifar10" and packed.is_file():
        return read_array(packed, f"x_{split}"), read_array(packed, f"y_{split}")
    source = _cifar_class(spec.name)
    try:
        loaded = source(str(data_dir), train=split == "train", download=False)
    except (OSError, RuntimeError) as error:
        raise damaged(spec, error, source.base_folder) from error
    return loaded.data, np.array(loaded.targets)


def _idx_names(folder: str) -> list[str]:
    kinds = ("images-idx3", "labels-idx1")
    return [f"{folder}/raw/{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in kinds]


def _read_idx(folder: str, data_dir: Path, spec: DataSpec, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The idx files of MNIST: magic number, one big-endian length per dimension, then bytes."""
    images_file, labels_file = _idx_names(folder)[:2] if split == "train" else _idx_names(folder)[2:]
    count = spec.examples(split)
    arrays = []
    for name, shape in ((images_file, (count, spec.height, spec.width)), (labels_file, (count,))):
        header = np.array([0x800 + len(shape), *shape], ">u4").tobytes()
        try:
            content = np.fromfile(data_dir / name, np.uint8)
        except OSError as error:
            raise damaged(spec, error, name) from error
        if content[: len(header)].tobytes() != header or content.size != len(header) + np.prod(shape):
            raise damaged(spec, ValueError("its header or its length is not the official file's"), name)
        arrays.append(content[len(header) :].reshape(shape))
    return arrays[0], arrays[1]


def _read_svhn(data_dir: Path, spec: DataSpec, split: str) -> tuple[np.ndarray, np.ndarray]:
    from torchvision import datasets

    try:
        loaded = datasets.SVHN(str(data_dir), split=split, download=False)  # compares the file's MD5 first
    except (OSError, RuntimeError, ValueError) as error:
        raise damaged(spec, error, f"{split}_32x32.mat") from error
    return loaded.data.transpose(0, 2, 3, 1), loaded.labels


def _eurosat_missing(data_dir: Path) -> list[str]:
    wanted = [f"{_EUROSAT_FOLDER}/{name}" for name in _EUROSAT.split()]
    return [name for name in wanted if not (data_dir / name).is_dir()]


def _read_eurosat(data_dir: Path, spec: DataSpec, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Every fifth image of each class, by file name, is the test split (there is no official one)."""
    root = data_dir / _EUROSAT_FOLDER
    if class_folders(root, root) != spec.classes:
        raise damaged(spec, ValueError("other class folders"), _EUROSAT_FOLDER)
    listing = list_images(root, root, spec.classes)
    if len(listing.paths) != spec.train_examples + spec.test_examples:
        raise InputError(
            f"{root} holds {len(listing.paths)} images; the official archive has 27000",
            fix="delete the folder and unpack the archive again; for a subset use folder:PATH",
        )
    # Class sizes are multiples of five, so a running index splits each class alike.
    chosen = [i for i in range(len(listing.paths)) if (i % 5 == 4) == (split == "test")]
    images = read_images([listing.paths[i] for i in chosen], spec.height, f"the {split} images of {spec.name}")
    return images, np.array([listing.labels[i] for i in chosen])


def _download(name: str, data_dir: Path) -> None:
    """torchvision's own downloaders; each compares checksums."""
    from torchvision import datasets

    root = str(data_dir)
    if name == "svhn":
        for split in ("train", "test"):
            datasets.SVHN(root, split=split, download=True)
    else:
        makers = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "mnist": datasets.MNIST,
                  "fashion-mnist": datasets.FashionMNIST, "eurosat": datasets.EuroSAT}  # fmt: skip
        makers[name](root, download=True)


# --- the registry -----------------------------------------------------------------------------------------------------

PUBLISHED_DELTA = 1e-5
"""Of De et al. 2022 and Tang et al. 2023 for CIFAR-10 and CIFAR-100, of Tramèr & Boneh 2021 for CIFAR-10, MNIST and
Fashion-MNIST. With N = 50,000 or 60,000 that is a half or more of 1/N; results are compared at it all the same."""

_KRIZ = "Krizhevsky 2009, Learning multiple layers of features from tiny images"
_SPECS = (
    _facts("digits", "Optical recognition of handwritten digits", _TEN_DIGITS, (1440, 357), (8, 8, 1),
           "the part of UCI optdigits that scikit-learn ships; test split: every fifth block of ten, by position",
           "CC BY 4.0", "Alpaydin & Kaynak 1998, UCI Machine Learning Repository", flip_ok=False),
    _facts("cifar10", "CIFAR-10", _CIFAR10, (50_000, 10_000), (32, 32, 3),
           "https://www.cs.toronto.edu/~kriz/cifar.html", "not stated", _KRIZ, flip_ok=True,
           published_delta=PUBLISHED_DELTA),
    _facts("cifar100", "CIFAR-100 (fine labels)", _CIFAR100, (50_000, 10_000), (32, 32, 3),
           "https://www.cs.toronto.edu/~kriz/cifar.html", "not stated", _KRIZ, flip_ok=True,
           published_delta=PUBLISHED_DELTA),
    _facts("mnist", "MNIST", _TEN_DIGITS, (60_000, 10_000), (28, 28, 1), "http://yann.lecun.com/exdb/mnist/",
           "not stated", "LeCun et al. 1998, Proceedings of the IEEE 86(11)", flip_ok=False,
           published_delta=PUBLISHED_DELTA),
    _facts("fashion-mnist", "Fashion-MNIST", _FASHION, (60_000, 10_000), (28, 28, 1),
           "https://github.com/zalandoresearch/fashion-mnist", "MIT", "Xiao et al. 2017, arXiv:1708.07747",
           flip_ok=True, published_delta=PUBLISHED_DELTA),
    _facts("svhn", "Street View House Numbers, cropped digits", _TEN_DIGITS, (73_257, 26_032), (32, 32, 3),
           "http://ufldl.stanford.edu/housenumbers/", "non-commercial use",
           "Netzer et al. 2011, NIPS workshop on deep learning", flip_ok=False),
    _facts("eurosat", "EuroSAT (RGB)", _EUROSAT, (21_600, 5_400), (64, 64, 3),
           "https://github.com/phelber/eurosat; test split: every fifth image of a class, by file name", "MIT",
           "Helber et al. 2019, IEEE JSTARS 12(7)", flip_ok=True),
)  # fmt: skip
_CIFAR_PUT = "the unpacked folder {folder}/ of the {title} python version that Krizhevsky's CIFAR page publishes"
_PUT = {
    "digits": "nothing (it comes with scikit-learn)",
    "cifar10": "cifar10.npz (plain arrays x_train y_train x_test y_test, uint8 [N, 32, 32, 3]) or "
    + _CIFAR_PUT.format(folder="cifar-10-batches-py", title="CIFAR-10"),
    "cifar100": _CIFAR_PUT.format(folder="cifar-100-python", title="CIFAR-100"),
    "mnist": "the four unpacked idx files (…-ubyte) of LeCun's MNIST page under MNIST/raw/",
    "fashion-mnist": "the four unpacked idx files (…-ubyte) of Zalando's Fashion-MNIST under FashionMNIST/raw/",
    "svhn": "train_32x32.mat and test_32x32.mat (format 2, cropped digits) of Stanford's housenumbers page",
    "eurosat": f"the ten class folders of the RGB archive of Helber's EuroSAT under {_EUROSAT_FOLDER}/",
}


def _known(spec: DataSpec) -> KnownSet:
    name = spec.name
    missing, read = {
        "digits": (files_missing(), _read_digits),
        "cifar10": (lambda data_dir: _cifar_missing(name, data_dir), _read_cifar),
        "cifar100": (lambda data_dir: _cifar_missing(name, data_dir), _read_cifar),
        "mnist": (files_missing(*_idx_names("MNIST")), lambda *args: _read_idx("MNIST", *args)),
        "fashion-mnist": (files_missing(*_idx_names("FashionMNIST")), lambda *args: _read_idx("FashionMNIST", *args)),
        "svhn": (files_missing("train_32x32.mat", "test_32x32.mat"), _read_svhn),
        "eurosat": (_eurosat_missing, _read_eurosat),
    }[name]
    download = None if name == "digits" else (lambda data_dir: _download(name, data_dir))
    return KnownSet(lambda: spec, missing, read, download, _PUT[name])


#: Name → data set.
BUILTIN: dict[str, KnownSet] = {spec.name: _known(spec) for spec in _SPECS}


# ------------------------------------------------------------------------------------------------------------- medical
#
# The two-dimensional MedMNIST sets: 28×28 pixels, official training and test splits; the validation split is not used.
#
# The facts come from the medmnist package's own table. The files are read with ``npz.read_array``, which refuses
# pickles.

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


def _download_medical(flag: str, data_dir: Path) -> None:
    """As medmnist's own ``download``, without its catch-all, which would swallow Ctrl-C and a full disk."""
    from torchvision.datasets.utils import download_url

    info = _info(flag)
    download_url(url=info["url"], root=str(data_dir), filename=f"{flag}.npz", md5=info["MD5"])


def _known_medical(flag: str) -> KnownSet:
    return KnownSet(
        spec=lambda: _spec(flag),
        missing=files_missing(f"{flag}.npz"),
        read=_read,
        download=lambda data_dir: _download_medical(flag, data_dir),
        put=f"{flag}.npz (the 28×28 file) of MedMNIST v2, which medmnist.com publishes",
    )


#: Flag → data set.
MEDICAL: dict[str, KnownSet] = {flag: _known_medical(flag) for flag in FLIP_OK}
