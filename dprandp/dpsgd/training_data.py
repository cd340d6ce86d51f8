"""The identity of a run's data: their content, not their name.

    private/training-data.json   hashes of the training and of the test split; from the run's first private stage on, or
                                 from the first stage that declares a part of the former public
    private/training-images.npy  ``Dataset.hashes`` of its images, one by one
    private/training-units.npy   the unit of privacy of each of these, int64 [N], where a unit may have several
    private/public-images.npy    those of the images of whole sets that the run has used as public ones
    private/declared-public.npy  those of the part of its own data that was declared public
    private/data-check.txt       problems found before the first charge, with the names of files

A hash of private data lets anyone confirm a guess at them, so it is stored only in ``private/``. A run's data are those
whose hash is equal. Whether an image is in another set too is asked of each image: of the bytes of its file, and of its
grey values at the file's size. An image that was resized, cut or edited is another image.

Guarantee:
    Public sets are refused where they hold a private image. Whether they do can depend on a single record. But where
    nothing is refused, nothing would be with a record emptied: the guarantee is about the data sets that pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import secrets
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dprandp.config.schema import FRACTION, SYNTHETIC, ContinueConfig, same_data_name
from dprandp.data import Dataset, UnusableData, hash_set, listed
from dprandp.dpsgd.budget import read_plan_file
from dprandp.errors import BudgetError, CheckpointError, InputError, UsageError
from dprandp.runs.console import Console
from dprandp.runs.directory import DATA, IGNORED, RunDir, read_hashes
from dprandp.runs.files import atomic_path, atomic_write, storage_errors, to_json
from dprandp.runs.ledger import ledger_file

KEPT, IMAGES, UNITS = "training-data.json", "training-images.npy", "training-units.npy"
PUBLIC, DECLARED = "public-images.npy", "declared-public.npy"


def fingerprint_of(dataset: Dataset) -> str:
    """Hash of private images, labels and units, in order; reads them."""
    return dataset.fingerprint()


@contextlib.contextmanager
def no_counts_after_a_charge(rundir: RunDir) -> Iterator[None]:
    """Data that cannot be read are refused with kinds and counts only until the run has a ledger.

    Raises:
        UnusableData: before that, with all problems. InputError: after it, without them.
    """
    try:
        yield
    except UnusableData as error:
        if not ledger_file(rundir).exists():
            raise
        raise InputError(
            f"{error.name}: some of the training data that this run began with cannot be read any more",
            fix="restore them; `dprandp datasets --check` tells what is wrong (keep that private)",
            private_detail=error.private_detail,
        ) from None


CHECK = "data-check.txt"


def examine(rundir: RunDir, dataset: Dataset, console: Console) -> None:
    """Find everything that is wrong with a run's data, before the run charges anything.

    The terminal gets kinds and counts. ``private/data-check.txt`` gets the names. What is refused depends on the data,
    so this is never done once something about them may have been released.

    Raises:
        UnusableData: with all problems. InputError: the only one, of data that are no files.
    """
    if ledger_file(rundir).exists():
        return
    path = rundir.private_dir / CHECK
    try:
        found = dataset.examine()
    except UnusableData as error:
        atomic_write(path, listed(error.problems) + "\n")
        raise UnusableData(error.name, error.problems, str(path)) from error
    text = found.listed()
    if text.encode() == (path.read_bytes() if path.exists() else b""):
        return  # told already
    atomic_write(path, text)
    if found.looks_grey:
        console.say("note: all training images are grey, and are read as RGB: with --colour grey the extractor is one "
                    "for grey images")  # fmt: skip
    for said, _ in found.notes():
        console.warn(f"{said}: the test split is not protected, and such results are too good; {path} (private)")


def keep(rundir: RunDir, dataset: Dataset, fingerprint: str) -> None:
    """Record the hashes of the run's data: of everything in order, and of single images."""
    _write(rundir.private_dir / IMAGES, dataset.hashes())
    hashes = {"train": fingerprint, "images": _sha256(rundir.private_dir / IMAGES), "test": dataset.test_fingerprint}
    hashes["classes"] = _classes_of(dataset)
    hashes["salt"] = secrets.token_hex(16)  # so that ``record_of``, which is not private, confirms no guess
    if (units := dataset.grouping()) is not None:
        _write(rundir.private_dir / UNITS, units.of_image.astype(np.int64))
        hashes["units"] = _sha256(rundir.private_dir / UNITS)
    atomic_write(rundir.private_dir / KEPT, to_json(hashes, indent=1) + "\n")


def record_of(rundir: RunDir) -> str:
    """The hash of the record itself, by which plan and ledger know it; tells nothing about the data, for its salt."""
    return _sha256(rundir.path / "private" / KEPT)


def _recorded(rundir: RunDir) -> dict[str, str]:
    """The hashes that were recorded.

    Raises:
        CheckpointError: they are damaged, or not those that the run's plan was made with.
    """
    path, planned = rundir.path / "private" / KEPT, read_plan_file(rundir)
    if planned is not None and planned.data_record not in (None, record_of(rundir)):
        raise CheckpointError(
            f"{path} is not the record that this run's budget was fixed with: it is damaged, or of another run",
            fix="restore the run's private folder from a copy, or start a new run",
        )
    return read_hashes(path)


def hashes_of(rundir: RunDir) -> tuple[str, frozenset[bytes]] | None:
    """The recorded hashes of the run's data, and of their images; None where they are not recorded.

    Raises:
        CheckpointError: they are damaged, or the images are not those of the data.
    """
    path, images = rundir.path / "private" / KEPT, rundir.path / "private" / IMAGES
    if not (path.exists() and images.exists()):
        return None
    recorded = _recorded(rundir)
    if recorded.get("images") != _sha256(images):
        raise _damaged(images)
    return recorded.get("train", ""), hash_set(_read(images))


def units_of(rundir: RunDir) -> dict[bytes, frozenset[int]] | None:
    """The units of privacy (numbers of this run's own) that each image belongs to, by its hashes.

    None where each image is a unit, or where this is not recorded.

    Raises:
        CheckpointError: the record is damaged.
    """
    path, images = rundir.path / "private" / UNITS, rundir.path / "private" / IMAGES
    if not path.exists():
        return None
    if _recorded(rundir).get("units") != _sha256(path):
        raise _damaged(path)
    found: dict[bytes, set[int]] = {}
    for unit, rows in zip(np.load(path, allow_pickle=False).tolist(), _read(images), strict=True):
        for digest in hash_set(rows[None]):
            found.setdefault(digest, set()).add(unit)
    return {digest: frozenset(units) for digest, units in found.items()}


def public_images(rundir: RunDir, *names: str) -> frozenset[bytes]:
    """The recorded hashes of images that the run has used as public ones, whole sets and a part of its own data."""
    rows = [_public_rows(rundir, name) for name in names or (PUBLIC, DECLARED)]
    return frozenset().union(*(hash_set(each) for each in rows if each is not None))


def _public_rows(rundir: RunDir, name: str) -> np.ndarray | None:
    content = rundir.read_kept(name)
    return None if content is None else _array(content, rundir.path / "private" / name)


def _add_public(rundir: RunDir, name: str, hashes: np.ndarray) -> None:
    """Record further images as used as public ones; the run refuses to go on without the record from now on."""
    if hash_set(hashes) <= public_images(rundir, name):
        return
    before = _public_rows(rundir, name)
    if before is not None:  # of files and of arrays in one table
        hashes = np.concatenate([before.reshape(-1, 1, 16), hashes.reshape(-1, 1, 16)])
    content = io.BytesIO()
    np.save(content, hashes, allow_pickle=False)
    rundir.write_kept(name, content.getvalue())


def declare_public(rundir: RunDir, hashes: np.ndarray) -> None:
    """Record which of a run's own images were declared public, beside those that were before.

    Another run may take them to be private; this one may not any more, see ``refuse_public``.
    """
    _add_public(rundir, DECLARED, hashes)


def refuse_other(rundir: RunDir, name: str, fingerprint: str, dataset: Dataset) -> None:
    """Raise InputError unless the given data have the hashes of the run's data, which the run calls ``name``.

    The test split must be the run's as well, although it is not protected: figures on images of the training split
    that were moved into it would tell of them without noise.

    Args:
        fingerprint: of the training split of ``dataset``.

    Raises:
        CheckpointError: the record is lost or damaged.
    """
    path = rundir.path / "private" / KEPT
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing, so it is unknown whether these are the data of this run",
            fix="restore the run's private folder from a copy, or start a new run",
        )
    recorded = _recorded(rundir)
    if recorded.get("train") != fingerprint:
        raise InputError(
            f"the training data are not those that this run began with ({name}): their content, order, labels or units "
            "differ",
            fix="give the same data with --data, from any path, and the same rules for their image files, or start a "
            "new --run for these",
        )
    if recorded.get("test") not in (None, dataset.test_fingerprint):
        raise InputError(
            f"the test split is not the one that this run began with ({name}): its content, order, labels or units "
            "differ",
            fix="give the same test split; `dprandp predict` classifies other images",
        )
    if recorded.get("classes") not in (None, _classes_of(dataset)):
        raise InputError(
            f"the classes are not those that this run began with ({name}): there are others, or they have other names",
            fix="give the classes that it began with, also those without images, or start a new --run",
        )


def use_as_public(rundir: RunDir, dataset: Dataset) -> None:
    """Refuse a whole set as public where it holds one of the run's private images; else record that it was public.

    Raises:
        UsageError: it does, under any name, order, labels and decoding.
    """
    hashes = dataset.hashes()
    own = hashes_of(rundir)
    if own is not None and not own[1].isdisjoint(hash_set(hashes)):
        raise UsageError(
            f"{dataset.spec.name} holds private images that this run is about, and was given as public",
            fix="give other public data, or --public fraction:0.1 to declare a part of the private ones public",
        )
    _add_public(rundir, PUBLIC, hashes.reshape(-1, 1, 16))


def refuse_public(rundir: RunDir, dataset: Dataset) -> None:
    """Raise BudgetError if the run has used any of these private images as public: that cost was never counted.

    They may have been of a whole set, or of a part of these data that was declared public for ``diagnose`` or
    ``continue``, and is another one now. Where it is the same part, copies of its images in the private rest are not
    looked for: they were there when it was declared.
    """
    known, declared = public_images(rundir, PUBLIC), public_images(rundir, DECLARED)
    if declared:
        own = hash_set(dataset.left_out())
        known |= frozenset() if declared == own else declared - own
    if known and not known.isdisjoint(hash_set(dataset.hashes())):
        raise BudgetError(
            f"this run has used images of {dataset.spec.name} as public data, so it cannot count what it tells about "
            "them",
            fix="give the same --public fraction and seed to continue, or start a new --run for these data, with other "
            "public data or none",
        )


def _classes_of(dataset: Dataset) -> str:
    """A hash of their names, in order: public, but the record holds hashes alone."""
    return hashlib.sha256(to_json(dataset.spec.classes).encode()).hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(path: Path, hashes: np.ndarray) -> None:
    with atomic_path(path) as temporary:
        np.save(temporary, hashes, allow_pickle=False)


def _read(path: Path) -> np.ndarray:
    with storage_errors(path, "read"):
        return _array(path.read_bytes(), path)


def _array(content: bytes, path: Path) -> np.ndarray:
    try:
        hashes = np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path) from error
    if hashes.dtype != np.uint8 or hashes.ndim != 3 or hashes.shape[2] != 16 or not hashes.shape[1]:
        raise _damaged(path)
    return hashes


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged, so it is unknown which images this run is about",
        fix="restore the run's private folder from a copy, or start a new run",
    )


def not_compared(config: ContinueConfig, rundir: RunDir) -> tuple[str, ...]:
    """Settings of ``continue`` of which another spelling is no change: their data are compared by content instead.

    Private data that only shape the images are not read, so their path is compared.
    """
    before = rundir.row("continue").config or {}
    part = config.public.startswith(FRACTION)
    sets = (config.public, before.get("public", SYNTHETIC))
    known = []
    if not any(what == SYNTHETIC or what.startswith(FRACTION) for what in sets):
        known.append("public")
    if config.mix != "public" or part or same_data_name(before.get(DATA, ""), config.data):
        known.append(DATA)
    return (*IGNORED, *known)
