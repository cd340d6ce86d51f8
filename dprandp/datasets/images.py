"""One image file to one uint8 array: safely, and the same on every machine.

Whatever would need a guess is refused instead of guessed: rotation flags, 16-bit values, transparency, printing
colours, several frames. A silent conversion would be a silent change of the data.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dprandp.datasets.complete import FORMATS, cannot_be_checked, decoded
from dprandp.errors import InputError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp")

#: Most pixels one image may have; more is taken for a decompression bomb. And most bytes its file may have: of such an
#: image without any compression, with as much again for metadata.
MAX_PIXELS = 50_000_000
MAX_BYTES = 8 * MAX_PIXELS

# What Pillow logs about a single private image would otherwise reach stderr: Python's last resort prints it where
# nobody has set up logging, and other libraries set it up for everybody.
logging.getLogger("PIL").addHandler(logging.NullHandler())
logging.getLogger("PIL").propagate = False

INCOMPLETE = ("incomplete: a part of its pixels is missing", "replace or remove it")
"""What is wrong with an image that is not all there, and what to do."""

_ORIENTATION, _BITS_PER_SAMPLE = 0x0112, 258  # EXIF and TIFF tag numbers
_PNG_DEPTH_BYTE = 24  # signature 8, length 4, "IHDR" 4, width 4, height 4


def read_images(paths: Sequence[Path], size: int, what: str) -> np.ndarray:
    """Decode image files, each by itself: centre square, resized, RGB.

    Nothing is measured over several images, so each result depends on its own file alone.

    Args:
        paths: the files, in the order of the result.
        size: side of the resulting images in pixels, public.
        what: what these are, for messages that must not name a file ("the training images").

    Returns:
        uint8 [len(paths), size, size, 3], 0–255.

    Raises:
        InputError: a file is damaged or of a kind that is refused; ``private_detail`` alone names it.
    """
    images = np.empty((len(paths), size, size, 3), np.uint8)
    for index, path in enumerate(paths):
        images[index] = read_image(path, size, size, f"one of {what}")
    return images


def read_image(path: Path, height: int, width: int, what: str) -> np.ndarray:
    """One image file: the largest centred part of the wanted proportions, resized, RGB.

    Args:
        path: the file.
        height, width: of the result in pixels.
        what: what this is, for the message ("one of the training images").

    Returns:
        uint8 [height, width, 3], 0–255.

    Raises:
        InputError: as ``read_images``.
    """
    with warnings.catch_warnings():
        # Pillow only warns about broken metadata and large images; on somebody's data that is a refusal.
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        return _read_image(path, height, width, what)


def centred(have: tuple[int, int], want: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest centred part of an image that has the wanted proportions.

    Args:
        have: height and width of the image. want: height and width whose proportions count.

    Returns:
        top, left, height, width.
    """
    (height, width), (rows, columns) = have, want
    cut = (height, max(1, height * columns // rows)) if height * columns <= width * rows else (
        max(1, width * rows // columns), width
    )  # fmt: skip
    return (height - cut[0]) // 2, (width - cut[1]) // 2, *cut


def _read_image(path: Path, height: int, width: int, what: str) -> np.ndarray:
    try:
        with Image.open(path, formats=FORMATS) as image:
            objection = _objection(image, path)
        image = None if objection else decoded(path.read_bytes())
        if image is not None:
            top, left, rows, columns = centred((image.height, image.width), (height, width))
            # Cut first: with resize(box=…) the filter would still see the pixels just outside the part.
            part = image.convert("RGB").crop((left, top, left + columns, top + rows))
            return np.asarray(part.resize((width, height), Image.Resampling.BICUBIC))
    except Exception as error:
        # A decoder fed a hostile file may raise anything at all, and none of it is a bug of ours.
        raise _refusal(what, "damaged or no image", "replace or remove it", path, f"{type(error).__name__}") from error
    raise _refusal(what, *(objection or INCOMPLETE), path, "")


def _refusal(what: str, kind: str, fix: str, path: Path, more: str) -> InputError:
    return InputError(
        f"{what} is {kind}",
        fix=f"{fix}; --debug names the file (keep that output private)",
        private_detail=f"{path} {more}".strip(),
    )


def _objection(image: Image.Image, path: Path) -> tuple[str, str] | None:
    """Why this image is not taken, and what to do; None when it is fine. Size first: later checks may decode."""
    if image.width * image.height > MAX_PIXELS:
        return f"larger than {MAX_PIXELS // 10**6} million pixels", "make it smaller"
    if path.stat().st_size > MAX_BYTES:
        return f"a file of more than {MAX_BYTES // 10**6} million bytes", "make it smaller"
    if _has_second_frame(image):
        return "animated or has several pages", "keep one frame"
    if image.mode not in ("1", "L", "P", "RGB"):
        kinds = {"RGBA": "transparent", "LA": "transparent", "PA": "transparent", "CMYK": "in CMYK"}
        return kinds.get(image.mode, f"of the kind {image.mode!r} (16-bit or float)"), "convert it to 8-bit RGB or grey"
    if "transparency" in image.info:
        return "transparent", "put it on a background and save it as 8-bit RGB"
    if _bits_per_channel(image, path) > 8:
        return "16-bit", "convert it to 8-bit RGB or grey with a fixed, public scale"
    if cannot_be_checked(image):
        return "a TIFF compressed as a fax or as old JPEG, where missing pixels go unnoticed", "save it as PNG"
    if image.getexif().get(_ORIENTATION, 1) != 1:
        return "marked as rotated (EXIF orientation)", "turn the pixels themselves and drop the mark"
    return None


def _bits_per_channel(image: Image.Image, path: Path) -> int:
    """Bits in the file; Pillow shows 16-bit RGB as 8-bit and says nothing."""
    if image.format == "PNG":
        with path.open("rb") as stream:
            return stream.read(_PNG_DEPTH_BYTE + 1)[_PNG_DEPTH_BYTE]
    if image.format == "TIFF":
        return int(np.max(image.tag_v2.get(_BITS_PER_SAMPLE, 1)))
    return 8


def _has_second_frame(image: Image.Image) -> bool:
    """Whether there is more than one frame, without a walk to the last: a file can hold millions of tiny ones."""
    if image.format in ("GIF", "TIFF"):
        try:
            image.seek(1)
        except EOFError:
            return False
        return True
    return getattr(image, "n_frames", 1) != 1
