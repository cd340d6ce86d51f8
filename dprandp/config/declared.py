"""What an owner declares of data, and a publisher of a model: settings that several stages and commands share.

How an image file becomes 8-bit pixels, where that can be done in more than one way, is declared once: the rules are
public, a run records them, and a released model carries them, so that new images are decoded as the training images
were. How a user's own images are listed, and what their labels are (classes, splits and the columns of a table), is
declared once, as public settings. What a publisher says about a model are settings of ``dprandp export``, none of which
changes the model.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from dprandp.config.settings import DATA, OUTPUT, setting
from dprandp.errors import UsageError

# ------------------------------------------------------------------------------------------------------------- decoding

COLOURS = {"black": (0, 0, 0), "grey": (128, 128, 128), "white": (255, 255, 255)}
"""Names for --background, as RGB."""

_WINDOW, _COLOUR = re.compile(r"window:([^,]+),([^,]+)"), re.compile(r"#[0-9a-fA-F]{6}")


@dataclass(frozen=True)
class Decoding:
    """Rules for files that are otherwise refused (None: refused), and the colour of all files."""

    grey_levels: str | None = setting(
        None, "16-bit greyscale files: window:LO,HI makes values up to LO black and from HI on white, evenly between; "
        "full takes all values that the file's bits can hold (0 to 65535). For DICOM files, of rescaled values, "
        "instead of each file's own window.", True, panel=DATA,
        metavar="window:LO,HI|full", otherwise="such files are refused",
    )  # fmt: skip
    orientation: Literal["apply", "ignore"] | None = setting(
        None, "Files with an EXIF mark that they are to be turned or mirrored: apply or ignore it.", True, panel=DATA,
        otherwise="such files are refused",
    )  # fmt: skip
    background: str | None = setting(
        None, "Files with transparent pixels: put them on black, grey (128), white or #RRGGBB.", True, panel=DATA,
        metavar="COLOUR", otherwise="such files are refused",
    )  # fmt: skip
    cmyk: Literal["convert"] | None = setting(
        None, "Files in the printing colours CMYK: convert them to RGB by the plain formula, without a colour profile.",
        True, panel=DATA, otherwise="such files are refused",
    )  # fmt: skip
    frames: Literal["first"] | None = setting(
        None, "Files of several pictures (MPO of cameras, GIF, TIFF): take the first.", True, panel=DATA,
        otherwise="such files are refused",
    )  # fmt: skip
    colour: Literal["rgb", "grey"] | None = setting(
        None, "Read all files as rgb or as grey. Grey suits X-rays and the like: the extractor is then learned from "
        "grey images.", True, panel=DATA, otherwise="rgb",
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Raise UsageError for a window or a colour that is none."""
        if hasattr(super(), "__post_init__"):  # of other settings of the same stage
            super().__post_init__()
        if self.grey_levels not in (None, "full") and self.window is None:
            raise UsageError(
                f"grey_levels = {self.grey_levels!r} is neither full nor window:LO,HI with two numbers LO < HI",
                fix="give full, or a window such as window:0,4095",
            )
        if self.background is not None and self.background not in COLOURS and not _COLOUR.fullmatch(self.background):
            raise UsageError(
                f"background = {self.background!r} is no colour", fix=f"give {', '.join(COLOURS)} or #RRGGBB"
            )

    @property
    def window(self) -> tuple[float, float] | None:
        """LO and HI of a declared window; None where none was declared."""
        found = _WINDOW.fullmatch(self.grey_levels or "")
        try:
            low, high = map(float, found.groups()) if found else (0.0, 0.0)
        except ValueError:
            return None
        return (low, high) if math.isfinite(low) and math.isfinite(high) and low < high else None

    @property
    def behind(self) -> tuple[int, int, int]:
        """The declared background, RGB."""
        named = COLOURS.get(self.background or "")
        return named or tuple(bytes.fromhex(str(self.background)[1:]))  # type: ignore[return-value]

    @property
    def channels(self) -> int:
        """Of the decoded images."""
        return 1 if self.colour == "grey" else 3

    def as_dict(self) -> dict[str, str]:
        """The rules that were declared."""
        return {name: value for name in RULES if (value := getattr(self, name)) is not None}

    def __str__(self) -> str:
        return ", ".join(f"{flag(name)} {value}" for name, value in self.as_dict().items())


RULES = tuple(field.name for field in dataclasses.fields(Decoding))
"""Names of the settings above."""


REFUSE = Decoding()
"""No rule: every ambiguous file is refused."""


def decoding_of(settings: Any) -> Decoding:
    """The rules among the settings of a private stage."""
    return Decoding(**{name: getattr(settings, name) for name in RULES})


def flag(name: str) -> str:
    """The option that sets a rule."""
    return f"--{name.replace('_', '-')}"


# --------------------------------------------------------------------------------------------------------------- layout

COLUMNS = ("path", "label", "split")
"""Of a table, by their own names; the column of units is that of --unit-column, or group."""


def without_size(name: str) -> str:
    """The name of a known set without the size of its files: pneumoniamnist_224 has the images of pneumoniamnist."""
    return re.sub(r"(?<=mnist)_\d+$", "", name)


@dataclass(frozen=True)
class Layout:
    """What a listing leaves open; None: it is not needed, or refused."""

    class_names: str | None = setting(
        None, "Classes of csv: data, separated by commas; labels are these names.", True, panel=DATA,
        metavar="NAME,NAME,...", otherwise="0 to C-1 with --classes C; one of the two is needed for csv:",
    )  # fmt: skip
    columns: str | None = setting(
        None, "Columns of csv: data that have other names than path, label and split, such as path=file,label=finding.",
        True, panel=DATA, metavar="PART=NAME,...", otherwise="path, label and split",
    )  # fmt: skip
    label_separator: str | None = setting(
        None, "For csv: data with several labels an image (multi-label): what separates them in the column label, such "
        "as |. An empty cell is an image without any of them.", True, panel=DATA, metavar="TEXT", line=True,
        otherwise="each image has one class",
    )  # fmt: skip
    class_shares: str | None = setting(
        None, "Share of all images that each class has (of several labels an image: that have each label), in the "
        "order of the classes. The loss is weighted so that all classes count alike. Declare public knowledge, never "
        "counts of the private labels: ε would not cover them.", True, panel=DATA, metavar="S,S,...",
        otherwise="the loss is not weighted",
    )  # fmt: skip
    ordinal: bool | None = setting(
        None, "The classes are grades, in their order: adds a weighted kappa to the figures.", True, panel=DATA,
        otherwise="as a known data set declares, else no",
    )  # fmt: skip
    split_by: Literal["group", "image"] | None = setting(
        None, "For csv: data without a column split: draw the test split, whole groups (the values of --unit-column) "
        "or single images.", True, panel=DATA, otherwise="the column split",
    )  # fmt: skip
    test_fraction: float | None = setting(
        None, "With --split-by: chance that a group, or an image, is in the test split.", True, panel=DATA, above=0,
        below=1, otherwise="none, needed with --split-by",
    )  # fmt: skip
    split_seed: int | None = setting(None, "With --split-by: its public seed.", True, panel=DATA, low=0, otherwise="0")
    val: Literal["train", "test"] | None = setting(
        None, "Where the images of a validation split go (val/ of folder: data, val in the column split of csv: data).",
        True, panel=DATA, otherwise="such data are refused",
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Raise UsageError for settings that do not go together."""
        if (self.split_by is None) != (self.test_fraction is None) or (self.split_seed and self.split_by is None):
            raise UsageError(
                "--split-by and --test-fraction belong together, and --split-seed to them",
                fix="give both, such as --split-by group --test-fraction 0.2, or none of the three",
            )
        self.column_names()
        self.shares()

    def shares(self) -> tuple[float, ...] | None:
        """The declared shares of the classes, each in (0, 1)."""
        if self.class_shares is None:
            return None
        try:
            found = tuple(map(float, self.class_shares.split(",")))
        except ValueError:
            found = ()
        if not found or not all(0 < share < 1 for share in found):
            raise UsageError(
                f"class_shares = {self.class_shares!r} are not numbers between 0 and 1",
                fix="give one share for each class, separated by commas, such as 0.9,0.1",
            )
        return found

    def column_names(self) -> dict[str, str]:
        """Part -> name of its column."""
        names = {part: part for part in COLUMNS}
        for pair in (self.columns or "").split(",") if self.columns is not None else ():
            part, equals, name = (text.strip() for text in pair.partition("="))
            if part not in names or not equals or not name:
                raise UsageError(
                    f"columns = {self.columns!r}: {pair!r} names no column",
                    fix=f"write PART=NAME for one of {', '.join(COLUMNS)}; a column of patients is --unit-column NAME",
                )
            names[part] = name
        return names

    @property
    def split_rule(self) -> str:
        """How the splits are made, in words; empty where the data have them."""
        rules = [f"validation images taken for {self.val}"] if self.val else []
        if self.split_by:
            rules.append(
                f"each {self.split_by} in the test split with chance {self.test_fraction:g}, by the public seed "
                f"{self.split_seed or 0}"
            )
        return "; ".join(rules)

    def refuse_others(self, kind: str, allowed: tuple[str, ...]) -> None:
        """Raise UsageError for a declared setting that has no effect on data of this kind."""
        for name in PARTS:
            if getattr(self, name) is not None and name not in allowed:
                raise UsageError(
                    f"--{name.replace('_', '-')} has no effect on {kind} data",
                    fix="leave it out, or list the images in a table and give --data csv:PATH",
                )


PARTS = tuple(field.name for field in dataclasses.fields(Layout))
"""Names of the settings above."""

AS_LISTED = Layout()
"""Nothing was declared."""


def layout_of(settings: Any) -> Layout:
    """The declarations among the settings of a private stage."""
    return Layout(**{name: getattr(settings, name) for name in PARTS})


# ---------------------------------------------------------------------------------------------------------- publication


@dataclass(frozen=True)
class Publication:
    """What an export states on the model card, in config.json and in the metadata of a graph. Public."""

    title: str | None = setting(None, "Title of the model card.", True, panel=OUTPUT, metavar="TEXT", line=True,
                                otherwise="image classifier for the data set's title")  # fmt: skip
    license: str | None = setting(
        None, "Licence of the exported model: an identifier such as mit or cc-by-4.0, or a sentence.", True,
        panel=OUTPUT, metavar="TEXT", line=True, otherwise="none stated",
    )  # fmt: skip
    contact: str | None = setting(None, "Who answers questions about the model.", True, panel=OUTPUT, metavar="TEXT",
                                  line=True, otherwise="none stated")  # fmt: skip
    intended_use: str | None = setting(None, "What the model is for, in a sentence.", True, panel=OUTPUT,
                                       metavar="TEXT", line=True, otherwise="none stated")  # fmt: skip

    def said(self) -> dict[str, str]:
        """What was given, by name."""
        return {name: text for name, text in dataclasses.asdict(self).items() if text is not None}
