"""The common interface of data sets: a declared description, and two splits of uint8 images.

``DataSpec`` never comes from a pixel or a label: it is a constant, a flag, an array *header* or a folder listing. An
error about private data says *what kind* of thing is wrong; which example, value or file goes to ``private_detail``,
which only ``--debug`` prints.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dprandp.config.declared import REFUSE, Decoding, without_size
from dprandp.data.decode import grey_hashes, hash_set, image_digests
from dprandp.data.files import ImageFiles, Problem, Reading, UnusableData
from dprandp.data.units import Units, unit_text
from dprandp.errors import InputError, UsageError

#: The splits of every data set. A third, official validation split (MedMNIST) stays unused.
SPLITS = ("train", "test")

#: What declared shares may add up to more or less than 1, by rounding.
SHARES_APART = 0.02

#: Images whose bytes are hashed at a time.
FINGERPRINTED = 4096

#: More classes than this is a mistake in the declaration, not a classifier.
MAX_CLASSES = 100_000


@dataclass(frozen=True)
class DataSpec:
    """Public facts about a data set, known without reading a pixel or a label.

    Attributes:
        name: the value of ``--data``. title: the name people use.
        classes: class names; label ``i`` means ``classes[i]``. Of several labels an image, the names of the labels.
        multi_label: whether an image has several labels, each of them or not, instead of one class.
        ordinal: whether the classes are grades, in their order.
        class_shares: the share of images that have each class or label, by which the loss is weighted; None where no
            shares are declared.
        train_examples: N, treated as public, and disclosed as such.
        channels: 1 (grey) or 3 (RGB). height, width: in pixels.
        flip_ok: whether a mirrored image keeps its label. False for characters and for images where left and right
            carry meaning; also where it is not declared.
        unit_column: the column that says which images form one unit of privacy; None where each image is one.
        unit_count: the number of those units, public like N; None where each image is one.
        published_delta: the δ at which results for this data set are published; None where there is no such custom.
        decoding: the declared rules by which its image files are read.
        split_rule: how its splits are made, in words, where the data do not come with these.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    train_examples: int
    test_examples: int
    channels: int
    height: int
    width: int
    flip_ok: bool
    unit_column: str | None = None
    unit_count: int | None = None
    published_delta: float | None = None
    multi_label: bool = False
    ordinal: bool = False
    class_shares: tuple[float, ...] | None = None
    decoding: Decoding = REFUSE
    split_rule: str = ""

    @property
    def unit(self) -> str:
        """The unit of privacy in words."""
        return unit_text(self.unit_column)

    @property
    def label_rule(self) -> str:
        """What is declared about the labels beside the classes, in words; empty where nothing is."""
        said = {
            f"{len(self.classes)} labels an image": self.multi_label,
            "classes are grades": self.ordinal,
            "loss weighted by declared class shares": self.class_shares is not None,
        }
        return ", ".join(text for text, holds in said.items() if holds)

    @property
    def train_units(self) -> int:
        """The number of units of privacy in the training split: the N of the accounting."""
        return self.train_examples if self.unit_count is None else self.unit_count

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.height, self.width, self.channels

    def examples(self, split: str) -> int:
        """Declared number of examples of ``"train"`` or ``"test"``."""
        return {"train": self.train_examples, "test": self.test_examples}[split]


def users_spec(
    kind: str,
    path: Path,
    title: str,
    classes: tuple[str, ...],
    examples: tuple[int, int],
    shape: tuple[int, int, int],
    units: Units | None,
) -> DataSpec:
    """The declaration of ``npz:PATH`` or ``folder:PATH``: examples of train and test; height, width, channels."""
    height, width, channels = shape
    return DataSpec(
        f"{kind}:{path}", title, classes, *examples, channels, height, width, flip_ok=False,
        unit_column=units and units.column, unit_count=units and units.count,
    )  # fmt: skip


@dataclass(frozen=True)
class Split:
    """One split: images uint8 [N, H, W, C], 0–255, C-contiguous; labels int64 [N], 0 … classes-1, or, of several labels
    an image, [N, classes] of 0 and 1."""

    images: np.ndarray
    labels: np.ndarray


class Dataset:
    """A data set that has been named but not read.

    Args:
        spec: its declared facts.
        read: ``"train"`` or ``"test"`` -> images and labels as they come; ``check_split`` checks them.
        require: raises InputError when a file that ``read`` needs is absent (or fetches it, where that was allowed).
        units: which images form one unit of privacy; None where each image is one.
        files: the image files, where the data are some; ``read_with`` says how they are read.
        problems: of files that cannot be used; ``train`` and ``test`` raise them.
        hashes: split -> what the method of this name gives; None: ``grey_hashes`` of its images.
    """

    def __init__(
        self,
        spec: DataSpec,
        read: Callable[[str], tuple[np.ndarray, np.ndarray]],
        require: Callable[[], None] = lambda: None,
        units: Units | None = None,
        files: ImageFiles | None = None,
        problems: Sequence[Problem] = (),
        hashes: Callable[[str], np.ndarray] | None = None,
    ) -> None:
        self.spec, self.require = spec, require
        self._hashes = hashes if files is None else files.hashes
        self._files, self._problems = files, tuple(problems)
        self._units = units
        self.left_out: Callable[[], np.ndarray] = lambda: np.empty((0, 1, 16), np.uint8)
        self._read = read
        self._train: Split | None = None

    def train(self) -> Split:
        """The private training split; read once, then kept in memory.

        Raises:
            InputError: a file is missing or damaged, or its arrays contradict ``spec``.
        """
        self.require_sound()
        return self._load("train")

    def test(self) -> Split:
        """The test split; read again at each call and never kept, so that nothing uses it by accident.

        Raises:
            InputError: as ``train``.
        """
        self.require_sound()
        return self._load("test")

    def _load(self, split: str) -> Split:
        if split == "train" and self._train is not None:
            return self._train
        self.require()
        made = check_split(self.spec, split, *self._read(split))
        if split == "train":
            self._train = made
        return made

    def require_sound(self) -> None:
        """Raise UnusableData if the listing of the data, which reads no pixel, has shown problems."""
        if self._problems:
            raise UnusableData(self.spec.name, self._problems)

    def read_with(self, reading: Callable[[], Reading]) -> None:
        """Say how image files are read, if the data are some."""
        if self._files is not None:
            self._files.reading = reading()

    def for_input(self, size: int) -> None:
        """Say the side of the extractor's input, before anything is read: image files are resized to it at once."""
        if self._files is not None:
            self._files.side = size
            self.spec = dataclasses.replace(self.spec, height=size, width=size)

    def examine(self) -> Examination:
        """Read everything, and find everything that is wrong, before a run begins.

        Raises:
            UnusableData: with all problems. InputError: the only one, of data that are no files.
        """
        problems, only, found = list(self._problems), None, {}
        for split in SPLITS:
            try:
                found[split] = self._load(split)
            except UnusableData as error:
                problems += error.problems
            except InputError as error:
                only = error
                problems.append(Problem.of(error))
        if only is not None and len(problems) == 1:
            raise only
        if problems:
            raise UnusableData(self.spec.name, problems)
        digests = (image_digests(found[split].images) for split in SPLITS)
        return Examination(*digests, self._units, self._files, self._looks_grey(found["train"].images))

    def _looks_grey(self, images: np.ndarray) -> bool:
        """Whether image files that no colour was declared of are all grey."""
        undeclared = self._files is not None and self.spec.decoding.colour is None
        return undeclared and all(bool((image == image[..., :1]).all()) for image in images)

    def grouping(self) -> Units | None:
        """Which training images form one unit of privacy (private); None where each image is one."""
        return self._units

    def test_units(self) -> np.ndarray | None:
        """Which unit each test image is of, integers [N]; None where each is one, or none is declared."""
        return None if self._units is None else self._units.of_test_image

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the training pixels, labels and units, in order: equal only for equal training data.

        It identifies a run's data under any name. It is itself a function of private data (it can confirm a guess at
        the whole set), so it belongs under ``private/``. Computed once, from the images that are kept in memory.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return _fingerprint_of(self.train(), None if self._units is None else self._units.of_image)

    @cached_property
    def test_fingerprint(self) -> str:
        """As ``fingerprint``, of the test split, which is not kept in memory."""
        self.require_sound()
        return _fingerprint_of(self._load("test"), self.test_units())

    def hashes(self, split: str = "train") -> np.ndarray:
        """Hashes that show whether an image is in another set too; as private as the images.

        uint8 [N, 1, 16], ``grey_hashes``; or, of image files, [N, 2, 16]: of the grey values before they were resized,
        and of the file's bytes, which are the same whatever the rules of decoding.
        """
        images = self._load(split).images
        return grey_hashes(images)[:, None] if self._hashes is None else self._hashes(split)

    def shares_images_with(self, other: Dataset) -> bool:
        """Whether an image is in both training splits; reads both, unless they are two known sets."""
        if without_size(self.spec.name) == without_size(other.spec.name):
            return True
        if self.spec.name != other.spec.name and ":" not in self.spec.name + other.spec.name:
            return False
        return not hash_set(self.hashes()).isdisjoint(hash_set(other.hashes()))


def _fingerprint_of(split: Split, units: np.ndarray | None) -> str:
    digest = hashlib.sha256(f"dprandp-data-1 {split.images.shape} ".encode())
    for start in range(0, len(split.images), FINGERPRINTED):  # a block at a time: they may be a map of a file
        digest.update(np.ascontiguousarray(split.images[start : start + FINGERPRINTED]).data)
    digest.update(np.ascontiguousarray(split.labels, dtype="<i8").data)
    if units is not None:
        digest.update(np.ascontiguousarray(units, dtype="<i8").data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Examination:
    """What ``Dataset.examine`` has seen of data that can be used. Private."""

    train: list[bytes]  # ``image_digests``
    test: list[bytes]
    units: Units | None
    files: ImageFiles | None
    looks_grey: bool  # training images that are read as RGB

    def listed(self) -> str:
        """The notes with their names, a line each."""
        return "".join(f"{said}\n" + "".join(f"    {name}\n" for name in names) for said, names in self.notes())

    def notes(self) -> list[tuple[str, list[str]]]:
        """What makes test results too good, or tells of training images: a sentence with a count, and names."""
        seen, told = set(self.train), []
        if same := [index for index, digest in enumerate(self.test) if digest in seen]:
            names = same if self.files is None else [self.files.listings["test"].paths[index] for index in same]
            told.append((f"{len(same)} test images equal a training image, pixel by pixel", list(map(str, names))))
        if self.units is not None and self.units.shared_with_test:
            count = self.units.shared_with_test
            told.append((f"{count} units of {self.units.column} have images in both splits", []))
        return told


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """Counts of private images, without noise: not to be published."""

    private_output: bool = True
    # declared facts
    data: str
    unit: str
    train_examples: int
    train_units: int
    # private
    largest_unit: int  # its images
    repeated_images: int  # training images that equal an earlier one, pixel by pixel
    across_units: int  # training images of which a copy lies in another unit
    largest_copies: int  # units that hold the same image, at most
    contradicting_labels: int  # distinct images that occur with different labels
    in_test: int  # training images of which a copy lies in the test split
    units_in_test: int | None  # units with images in both splits; None where not declared
    units_alike: int | None  # named as another one but for case, spaces and the like; None without names
    empty_classes: list[str]  # declared ones that have no training image


def check_data(dataset: Dataset, examined: Examination | None = None) -> DataCheck:
    """Private facts for the owner before a run: exact duplicates, units, empty classes. Reads both splits.

    An image that occurs twice is protected only half as well as ε says, and so is a patient whose images are in several
    units. No ε covers these counts: a command of its own prints them on the terminal, and stores nothing.
    """
    examined = examined or dataset.examine()
    spec, train, units, digests = dataset.spec, dataset.train(), dataset.grouping(), examined.train
    of_image = np.arange(len(digests)) if units is None else units.of_image
    seen_in: dict[bytes, set[int]] = {}
    labels: dict[bytes, set[bytes]] = {}
    for digest, unit, label in zip(digests, of_image.tolist(), train.labels, strict=True):
        seen_in.setdefault(digest, set()).add(unit)
        labels.setdefault(digest, set()).add(label.tobytes())
    tested = set(examined.test)
    counts = train.labels.sum(0) if spec.multi_label else np.bincount(train.labels, minlength=len(spec.classes))
    return DataCheck(
        data=spec.name,
        unit=spec.unit,
        train_examples=spec.train_examples,
        train_units=spec.train_units,
        largest_unit=max(Counter(of_image.tolist()).values()),
        repeated_images=len(digests) - len(seen_in),
        across_units=sum(len(seen_in[digest]) > 1 for digest in digests),
        largest_copies=max(map(len, seen_in.values())),
        contradicting_labels=sum(len(found) > 1 for found in labels.values()),
        in_test=sum(digest in tested for digest in digests),
        units_in_test=units and units.shared_with_test,
        units_alike=units and units.alike,
        empty_classes=[spec.classes[index] for index in np.flatnonzero(counts == 0)],
    )


def check_split(spec: DataSpec, split: str, images: np.ndarray, labels: np.ndarray) -> Split:
    """Check the data against the declaration: shapes, types, and the range of the labels.

    The guarantee is about data sets of images with one of the declared labels, so a file with anything else in it is
    refused. The distribution of the records is not checked: single records decide whether a class has any examples, so
    a refusal would reveal it outside ε.

    Args:
        images: uint8 [N, H, W, C] or, when ``spec.channels`` is 1, [N, H, W].
        labels: integer [N] or [N, 1]; [N, classes] of 0 and 1 where ``spec`` declares several labels an image.

    Raises:
        InputError: wrong dtype, shape or count; a label outside the declared classes.
    """
    if images.ndim == 3:
        images = images[..., None]
    expected = (spec.examples(split), *spec.image_shape)
    if images.dtype != np.uint8 or images.shape != expected:
        raise InputError(
            f"the {split} images of {spec.name} are {images.dtype} {list(images.shape)}, not uint8 {list(expected)}",
            fix="restore the original file; for a subset or a variant of your own use npz:PATH",
        )
    known, shape, each = len(spec.classes), expected[:1], "one integer class index per image"
    if spec.multi_label:
        known, shape, each = 2, (*shape, known), "0 or 1 for each label of an image"
    elif labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind not in "iub" or labels.shape != shape:
        raise InputError(
            f"the {split} labels of {spec.name} are {labels.dtype} {list(labels.shape)}, not integers {list(shape)}",
            fix=f"give {each}, in the images' order",
        )
    outside = (labels < 0) | (labels >= known)  # before the cast: a uint64 label could wrap around to a valid one
    if outside.any():
        first = int(outside.argmax())
        raise InputError(
            f"the {split} labels of {spec.name} hold values outside 0…{known - 1}",
            fix=f"give {each}" if spec.multi_label else
                f"number the classes 0…{known - 1}, or declare the right number of classes",
            private_detail=f"{int(outside.sum())} labels; the first at position {first} is {int(labels.flat[first])}",
        )
    return Split(np.ascontiguousarray(images), labels.astype(np.int64))


def with_declared_labels(spec: DataSpec, ordinal: bool, shares: tuple[float, ...] | None) -> DataSpec:
    """The description with what its owner declares about the labels: that the classes are grades, and their shares.

    Raises:
        UsageError: it contradicts the classes.
    """
    if ordinal and spec.multi_label:
        raise UsageError("--ordinal is for one class an image; these images have several labels", fix="leave it out")
    if shares is not None and len(shares) != len(spec.classes):
        raise UsageError(
            f"--class-shares names {len(shares)} shares for {len(spec.classes)} classes",
            fix="give one share for each, in the order of the classes",
        )
    if shares is not None and not spec.multi_label and abs(sum(shares) - 1) > SHARES_APART:
        raise UsageError(
            f"the shares of --class-shares add up to {sum(shares):g}, not to 1",
            fix="give the share of all images that each class has, such as 0.9,0.1",
        )
    return dataclasses.replace(spec, ordinal=spec.ordinal or ordinal, class_shares=shares)


def check_class_names(classes: tuple[str, ...], origin: str) -> tuple[str, ...]:
    """The class list as it is; ``origin`` declared it.

    Raises:
        InputError: fewer than 2 or more than ``MAX_CLASSES`` names, a repeated, empty or unprintable name.
    """
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise InputError(
            f"{origin} declares {len(classes)} classes; a classifier needs 2…{MAX_CLASSES}",
            fix="declare every class once, also rare ones",
        )
    if any(not name.strip() or not name.isprintable() for name in classes) or len(set(classes)) != len(classes):
        raise InputError(
            f"{origin} has class names that are empty, repeated or not printable",
            fix="give each class its own plain-text name",
        )
    return classes


# ------------------------------------------------------------------------------------------------------------ fraction
#
# A random part of a training split that its owner declares public, and the rest, which stays private: a data set of its
# own, with a smaller N and the same test split. The choice depends only on a public seed and on the declared N.

_KEY = 0x7075626C6963  # "public": so that this permutation is nobody else's for the same seed


def public_positions(examples: int, fraction: float, seed: int) -> np.ndarray:
    """Positions of the public part, int64, ascending: ⌊fraction · examples + ½⌋ of them.

    Raises:
        UsageError: the part, or the rest, would be empty.
    """
    count = int(fraction * examples + 0.5)
    if not 0 < count < examples:
        raise UsageError(
            f"fraction:{fraction:g} of {examples} training images is {count}",
            fix="give a fraction that leaves images on either side",
        )
    return np.sort(np.random.default_rng([_KEY, seed]).permutation(examples)[:count])


def without_public_part(dataset: Dataset, fraction: float, seed: int) -> Dataset:
    """The private rest; ``fraction`` of the training images, in (0, 1), are public. No pixel and no label is read.

    Raises:
        UsageError: units of several images, or nothing left on one side.
    """
    _refuse_units(dataset)
    spec = dataset.spec
    chosen = public_positions(spec.train_examples, fraction, seed)
    kept = np.setdiff1d(np.arange(spec.train_examples), chosen)

    def read(split: str) -> tuple[np.ndarray, np.ndarray]:
        if split == "test":
            made = dataset._load("test")
            return made.images, made.labels
        whole = dataset._load("train")
        return whole.images[kept], whole.labels[kept]

    def hashes(split: str) -> np.ndarray:
        return dataset.hashes(split)[kept] if split == "train" else dataset.hashes(split)

    rest = dataclasses.replace(spec, train_examples=len(kept))
    made = Dataset(rest, read, dataset.require, problems=dataset._problems, hashes=hashes)
    made.left_out = lambda: dataset.hashes()[chosen]
    return made


def public_part(dataset: Dataset, fraction: float, seed: int) -> tuple[Split, np.ndarray]:
    """The images and labels that were declared public, and their ``hashes``; arguments as for ``without_public_part``.

    Raises:
        UsageError: as there. InputError: unusable files.
    """
    _refuse_units(dataset)
    chosen = public_positions(dataset.spec.train_examples, fraction, seed)
    whole = dataset.train()
    return Split(whole.images[chosen], whole.labels[chosen]), dataset.hashes()[chosen]


def _refuse_units(dataset: Dataset) -> None:
    if dataset.spec.unit_column is not None:
        raise UsageError(
            f"the unit of privacy of {dataset.spec.name} is {dataset.spec.unit}, and a random part of the images would "
            "split units into a public and a private half",
            fix="put the public units into a folder of their own and give --public folder:PATH",
        )
