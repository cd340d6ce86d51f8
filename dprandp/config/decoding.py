"""How an image file becomes 8-bit pixels, where that can be done in more than one way.

Declared once, as settings: they are public, a run records them, and a released model carries them, so that new images
are decoded as the training images were.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from dprandp.config.settings import DATA, setting
from dprandp.errors import UsageError

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
