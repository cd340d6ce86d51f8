"""Image files to uint8 arrays: safely, and the same on every machine.

Ambiguous files are refused: rotation flags, 16-bit values, transparency, printing colours, several frames. A silent
conversion would be a silent change of the data. A declared rule (``config/declared.py``) says how to take them. A
palette is not ambiguous: each of its entries is a colour.

Hashes of single images say which are equal, and which are in another data set too. They are as private as the images.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from dprandp.config.declared import REFUSE, Decoding
from dprandp.data.dicom import DICOM, MAX_PIXELS, give, read_dicom, windowed
from dprandp.errors import InputError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".mpo", *DICOM)

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
"""What Pillow may try; the extension only says which files are meant to be images."""

MAX_BYTES = 8 * MAX_PIXELS
"""Most bytes its file may have: of such an image without any compression, with as much again for metadata."""

TOO_MANY_PIXELS = (f"larger than {MAX_PIXELS // 10**6} million pixels", "make it smaller")
TOO_MANY_BYTES = (f"a file of more than {MAX_BYTES // 10**6} million bytes", "make it smaller")
INCOMPLETE = ("incomplete: a part of its pixels is missing", "replace or remove it")
"""The problem of an incomplete image, and the fix."""

# What Pillow logs about a single private image would otherwise reach stderr: Python's last resort prints it where
# nobody has set up logging, and other libraries set it up for everybody.
logging.getLogger("PIL").addHandler(logging.NullHandler())
logging.getLogger("PIL").propagate = False

_ORIENTATION, _BITS_PER_SAMPLE, _LENGTH, _PHOTOMETRIC = 0x0112, 258, 257, 262  # EXIF and TIFF tag numbers
_WHITE_IS_ZERO = 0
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""EXIF orientation -> what makes the picture upright."""
_BACK = {6: 8, 8: 6}
"""The marks whose turn is undone by that of another; every other turn undoes itself."""
_PNG_DEPTH_BYTE = 24  # signature 8, length 4, "IHDR" 4, width 4, height 4


def read_images(paths: Sequence[Path], size: int, what: str, rules: Decoding = REFUSE) -> np.ndarray:
    """Decode image files, each by itself, so that a result depends on its own file alone: centre square, resized, RGB.

    Args:
        paths: the files, in the order of the result.
        size: side of the resulting images in pixels, public.
        what: what these are, for messages that must not name a file ("the training images").
        rules: for ambiguous files.

    Returns:
        uint8 [len(paths), size, size, 3], 0–255; of grey images [len(paths), size, size, 1].

    Raises:
        InputError: a file is damaged or of a kind that is refused; ``private_detail`` alone names it.
    """
    images = np.empty((len(paths), size, size, rules.channels), np.uint8)
    for index, path in enumerate(paths):
        images[index] = read_image(path, size, size, f"one of {what}", rules)
    return images


def decode_all(
    paths: Sequence[Path], size: int, rules: Decoding
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str, str]]]:
    """As ``read_images``, but to the end: black where a file is refused.

    Returns:
        The images; ``grey_hash`` of each before it was resized, uint8 [N, 16]; kind, fix and name of each refused.
    """
    images, refused = np.zeros((len(paths), size, size, rules.channels), np.uint8), []
    hashes = np.zeros((len(paths), 16), np.uint8)
    with _warnings_as_errors():
        for index, path in enumerate(paths):
            made = _plain_or_why(path, rules)
            if isinstance(made, Image.Image):
                images[index] = _pixels(made, size, size, rules)
                grey = _in_mode(made, "L")
                hashes[index] = _hash_of(grey.tobytes(), (grey.height, grey.width))
            else:
                kind, fix, more = made
                refused.append((kind, fix, f"{path} {more}".strip()))
    return images, hashes, refused


def read_image(path: Path, height: int, width: int, what: str, rules: Decoding) -> np.ndarray:
    """The largest centred part of an image file that has the wanted proportions, resized.

    uint8 [height, width, 3], or [height, width, 1] where the rules say grey.
    """
    with _warnings_as_errors():
        made = _plain_or_why(path, rules)
    if isinstance(made, Image.Image):
        return _pixels(made, height, width, rules)
    kind, fix, more = made
    raise InputError(
        f"{what} is {kind}",
        fix=f"{fix}; --debug names the file (keep that output private)",
        private_detail=f"{path} {more}".strip(),
    )


@contextmanager
def _warnings_as_errors() -> Iterator[None]:
    """Pillow only warns about broken metadata and large images; on somebody's data that is a refusal."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        yield


def _plain_or_why(path: Path, rules: Decoding) -> Image.Image | tuple[str, str, str]:
    """The whole image, upright, 8-bit RGB or grey; or why not: kind of problem, fix, name of an exception.

    Called within ``_warnings_as_errors``.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            return (*TOO_MANY_BYTES, "")
        if path.name.lower().endswith(DICOM):
            made = read_dicom(path, rules)
            return (*made, "") if isinstance(made, tuple) else made
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=FORMATS) as header:
            bits = _bits_per_channel(header, data)
            objection = _objection(header, bits, rules)
            # read now: of a TIFF, Pillow turns the pixels when it decodes them, and forgets the mark
            mark = 1 if objection else header.getexif().get(_ORIENTATION, 1)
            image = None if objection else decoded(data, header)
        if image is not None:
            return _plain(image, mark, bits, rules)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return (*TOO_MANY_PIXELS, "")
    except Exception as error:
        # A decoder may raise any exception for a hostile file.
        return "damaged or not an image", "replace or remove it", type(error).__name__
    return (*(objection or INCOMPLETE), "")


def _pixels(image: Image.Image, height: int, width: int, rules: Decoding) -> np.ndarray:
    plain = _in_mode(image, "L" if rules.channels == 1 else "RGB")
    return np.asarray(sized(plain, height, width)).reshape(height, width, rules.channels)


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """Pillow's ``convert``, without a copy of what is of that mode."""
    return image if image.mode == mode else image.convert(mode)


def _plain(image: Image.Image, mark: int, bits: int, rules: Decoding) -> Image.Image:
    """A decoded image as upright 8-bit RGB, by the rules; ``mark``: its EXIF orientation, ``bits``: of a channel."""
    is_tiff = image.format == "TIFF"
    if _is_deep(image, bits):
        values, most = np.asarray(image).astype(np.int64), 2**bits - 1
        if is_tiff and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            values = most - values  # Pillow inverts 8-bit ones itself
        image = Image.fromarray(windowed(values, *(rules.window or (0, most))))
    elif _is_transparent(image):
        behind = Image.new("RGBA", image.size, (*rules.behind, 255))
        image = Image.alpha_composite(behind, image.convert("RGBA"))
    image = _in_mode(image, "RGB")
    if mark not in _TURN or is_tiff == (rules.orientation == "apply"):  # Pillow has turned a TIFF itself
        return image
    return image.transpose(_TURN[_BACK.get(mark, mark) if is_tiff else mark])


def _is_deep(image: Image.Image, bits: int) -> bool:
    """Whether it is unsigned greyscale of 9 to 16 bits; older versions of Pillow show a PNG of that kind as ``I``."""
    return image.mode in ("I;16", "I;16B", "I;16L") or (image.mode == "I" and image.format == "PNG" and bits == 16)


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def sized(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest centred part of the proportions height : width, resized."""
    if image.height * width <= image.width * height:
        across, down = max(1, image.height * width // height), image.height
    else:
        across, down = image.width, max(1, image.width * height // width)
    left, top = (image.width - across) // 2, (image.height - down) // 2
    # Cut first: with resize(box=…) the filter would still see the pixels just outside the part.
    part = image.crop((left, top, left + across, top + down))
    return part.resize((width, height), Image.Resampling.BICUBIC)


def _objection(image: Image.Image, bits: int, rules: Decoding) -> tuple[str, str] | None:
    """Why this image is not taken, and what to do; None when it is fine. Size first: later checks may decode."""
    if image.width * image.height > MAX_PIXELS:
        return TOO_MANY_PIXELS
    if _has_second_frame(image):
        # the first frame of an animated PNG or WebP cannot be checked for completeness
        known = image.format in ("MPO", "GIF", "TIFF")
        if not known or rules.frames is None:
            return "animated or has several pages", give("frames", "first", "keep one frame") if known else KEEP_ONE
        image.seek(0)
    if _is_deep(image, bits):
        if rules.grey_levels is None:
            return "16-bit", give("grey_levels", "window:LO,HI", "convert it to 8-bit with a fixed, public scale")
    elif image.mode == "CMYK":
        if rules.cmyk is None:
            return "in CMYK", give("cmyk", "convert", "convert it to 8-bit RGB")
    elif _is_transparent(image):
        if rules.background is None:
            return "transparent", give("background", "white", "put it on a background and save it as 8-bit RGB")
    elif image.mode not in ("1", "L", "P", "RGB"):
        kind = f"of the kind {image.mode!r} (signed, 32-bit or float numbers, or other colours)"
        return kind, "convert it to 8-bit RGB or grey"
    if bits > 8 and not _is_deep(image, bits):
        return "16-bit in colour", "convert it to 8-bit RGB or grey with a fixed, public scale"
    if image.format == "TIFF" and image.tag_v2.get(_COMPRESSION) in _NOT_CHECKABLE:
        return "a TIFF compressed as a fax or as old JPEG, where missing pixels go unnoticed", "save it as PNG"
    if image.getexif().get(_ORIENTATION, 1) != 1 and rules.orientation is None:
        return "marked as rotated (EXIF orientation)", give("orientation", "apply", "rotate the pixels and remove it")
    return None


KEEP_ONE = "keep one frame, as a file of its own"


def _bits_per_channel(image: Image.Image, data: bytes) -> int:
    """Bits in the file; Pillow silently shows 16-bit RGB as 8-bit."""
    if image.format == "PNG":
        return data[_PNG_DEPTH_BYTE]
    return int(np.max(image.tag_v2.get(_BITS_PER_SAMPLE, 1))) if image.format == "TIFF" else 8


def _has_second_frame(image: Image.Image) -> bool:
    """Whether there is more than one frame, without a walk to the last: a file can hold millions of tiny ones."""
    if image.format in ("GIF", "TIFF"):
        try:
            image.seek(1)
        except EOFError:
            return False
        return True
    return getattr(image, "n_frames", 1) != 1


# ------------------------------------------------------------------------------------------------------------ complete
#
# Whether all pixels of an image were in the file. Pillow raises for a truncated file, but not where the *image data*
# end early inside an intact container: decoders silently fill in the rest, each format in its way.
#
# PNG, GIF, TIFF, BMP: what is missing keeps the colour of the decoder's canvas. So the file is decoded on a black and
# on a white canvas: pixels that differ were not in the file.
# JPEG: the decoder makes what is missing grey. Bytes between the end of a complete scan and the next marker are
# skipped; after a scan that ends early they are taken for image data. So the file is also decoded with such bytes at
# the end of each scan. Missing scans and restart intervals are found by the headers. A TIFF may hold JPEG streams.
# That takes several times as long as to read the image. So a large JPEG of one scan is first decoded from the scan
# and a few further bytes alone, without an end: where data are missing the decoder waits for more, and Pillow raises.
# Of a scan that lacks its last 20 bytes or less, 1 to 5 in 100 pass: a few blocks of 8 pixels in the last corner.
# WebP: the library refuses streams that end early, but for the last byte or two: noticed by bytes at the stream's end.
#
# Image data that were overwritten with other valid data, such as zeros in an uncompressed file, cannot be noticed.

# Bytes that look like image data and hold no marker (0xFF). Where a JPEG's data have run out the decoder reads zeros;
# each of these decodes to something else, and to something else than the others. What one of them changes may be lost
# in rounding if hardly more than the last byte is missing, so small images, where that counts, are tried with all.
_FILLERS = (b"\xb6" * 512, b"\x55" * 512, bytes((n * n * 73 + n * 211 + 211) % 251 for n in range(512)))
_SMALL = 1_000_000
"""Pixels up to which all fillers are tried."""
_TINY = 128 * 128
"""Pixels up to which a few blocks matter."""
_READ_AHEAD = b"\xfe" * 8
"""As many bytes as libjpeg reads beyond those that it needs; of the longest codes, so that they fill few blocks."""

_MARKER = re.compile(rb"\xff+([^\xff])", re.DOTALL)
# any number of 0xFF may come before a marker; patterns that begin with one of them are searched for fifty times as fast
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_AFTER_SCAN = re.compile(rb"\xff[^\xff\x00\xd0-\xd7]", re.DOTALL)  # 0xFF 0x00 stands for a byte 0xFF of the data
_EOI, _SOS, _DRI = 0xD9, 0xDA, 0xDD
_ALONE = {0x00, 0x01, *range(0xD0, 0xD9)}  # markers without a segment
_COMPRESSION, _STRIP_OFFSETS, _STRIP_BYTES = 259, 273, 279
_TILE_OFFSETS, _TILE_BYTES, _JPEG_TABLES = 324, 325, 347
_JPEG = 7
_NOT_CHECKABLE = (2, 3, 4, 6)  # three of fax, and a kind of JPEG that was given up in 1995


def decoded(data: bytes, header: Image.Image) -> Image.Image | None:
    """The image of a file of ``FORMATS``, in its own mode; None where a part of its pixels is not in the file.

    Args:
        header: as Pillow opens the file, before it decodes the pixels.

    Raises:
        Anything that Pillow raises for a file that it cannot decode; ValueError, IndexError: a JPEG without an end.
    """
    if (image := _large_jpeg(data, header)) is not None:
        return image
    image = _on_canvas(data, 0)
    if image.format in ("JPEG", "MPO"):  # the latter is what some cameras write
        return image if _jpeg_is_complete(data, image) else None
    if image.format == "WEBP":
        others = (_on_canvas(_longer_webp(data, filler), 0) for filler in _FILLERS[:2])
        return image if all(_same(image, other) for other in others) else None
    if image.format == "TIFF" and not _tables_are_complete(image, data):
        return None
    return image if _same(image, _on_canvas(data, 255)) else None


def _on_canvas(data: bytes, value: int) -> Image.Image:
    """The image, decoded on a canvas of one colour: 0 is what Pillow takes by itself."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        prepare = image.load_prepare

        def prepare_canvas() -> None:
            prepare()
            bands = image.im.bands
            image.im.paste(value if bands == 1 else (value,) * bands, (0, 0, *image.im.size))

        if value:
            image.load_prepare = prepare_canvas
        image.load()
    return image


def _same(one: Image.Image, other: Image.Image) -> bool:
    return (one.mode, one.size) == (other.mode, other.size) and one.tobytes() == other.tobytes()


def _large_jpeg(data: bytes, header: Image.Image) -> Image.Image | None:
    """A complete JPEG of one scan and more than ``_TINY`` pixels; None for another file, or one that seems incomplete.

    Raises ValueError, IndexError: a JPEG without an end.
    """
    if header.format != "JPEG" or "progressive" in header.info or header.width * header.height <= _TINY:
        return None
    ends = _ends_of_scans(data, header)
    if ends is None or len(ends) != 1:
        return None
    header.fp = io.BytesIO(data[: ends[0]] + _READ_AHEAD)  # opening it anew takes a tenth as long as decoding it
    try:
        header.load()
    except OSError:
        return None
    return header


def _jpeg_is_complete(data: bytes, image: Image.Image) -> bool:
    ends = _ends_of_scans(data, image)
    if ends is None:
        return False
    parts = [data[start:end] for start, end in pairwise([0, *ends, len(data)])]
    fillers = _FILLERS if image.width * image.height <= _SMALL else _FILLERS[:1]
    return all(_same(image, _on_canvas(filler.join(parts), 0)) for filler in fillers)


def _ends_of_scans(data: bytes, image: Image.Image) -> list[int] | None:
    """Where each scan of a JPEG ends; None where its headers say that it lacks scans or restart intervals."""
    progressive = "progressive" in image.info
    # low bits of a coefficient that were in no scan yet; without progression a scan has all of its components' ones
    missing_bits = {(name, k): 16 for name, *_ in image.layer for k in range(64 if progressive else 1)}
    interval, position = 0, 2
    ends: list[int] = []
    while (marker := _found(_MARKER, data, position))[1][0] != _EOI:
        kind, position = marker[1][0], marker.end()
        if kind in _ALONE:
            continue
        length = int.from_bytes(data[position : position + 2], "big")
        body, position = data[position + 2 : position + length], position + length
        if kind == _DRI:
            interval = int.from_bytes(body[:2], "big")
        elif kind == _SOS:
            scanned = [body[at] for at in range(1, 1 + 2 * body[0], 2)]
            first, last, bits = body[1 + 2 * body[0] :][:3] if progressive else (0, 0, 0)
            missing_bits |= {(name, k): bits & 15 for name in scanned for k in range(first, last + 1)}
            end = _found(_AFTER_SCAN, data, position).start()
            while data[end - 1] == 0xFF:
                end -= 1
            if interval and len(_RESTART.findall(data, position, end)) < _restarts(image, scanned, interval):
                return None
            ends.append(end)
            position = end
    return None if any(missing_bits.values()) else ends


def _found(pattern: re.Pattern[bytes], data: bytes, position: int) -> re.Match[bytes]:
    match = pattern.search(data, position)
    if match is None:
        raise ValueError("the JPEG has no end")
    return match


def _restarts(image: Image.Image, scanned: list[int], interval: int) -> int:
    """How many restart markers a scan of these components has, one after every ``interval`` units but the last."""
    sampling = {name: (h, v) for name, h, v, _ in image.layer}
    across, down = (max(factors) for factors in zip(*sampling.values(), strict=True))
    if len(scanned) == 1:  # blocks of the component's own samples
        h, v = sampling[scanned[0]]
        sides = math.ceil(image.width * (h / across)), math.ceil(image.height * (v / down))
        units = math.prod(math.ceil(side / 8) for side in sides)
    else:
        units = math.ceil(image.width / (8 * across)) * math.ceil(image.height / (8 * down))
    return math.ceil(units / interval) - 1


def _tables_are_complete(image: Image.Image, data: bytes) -> bool:
    """Whether a TIFF names a length for each of its parts, and the JPEG streams that it may hold are complete."""
    tags = image.tag_v2
    offsets = tags.get(_STRIP_OFFSETS) or tags.get(_TILE_OFFSETS) or ()
    lengths = tags.get(_STRIP_BYTES) or tags.get(_TILE_BYTES) or ()
    if lengths and len(lengths) != len(offsets):
        return False
    if tags.get(_COMPRESSION) != _JPEG:
        return True
    tables = bytes(tags.get(_JPEG_TABLES, b""))[:-2]  # without its end of image
    rows = 0
    for offset, length in zip(offsets, lengths, strict=True):
        stream = data[offset : offset + length]
        stream = tables + stream[2:] if tables else stream
        part = _on_canvas(stream, 0)
        if not _jpeg_is_complete(stream, part):
            return False
        rows += part.height
    return rows >= tags[_LENGTH]  # rows without a stream would be black on any canvas


def _longer_webp(data: bytes, more: bytes) -> bytes:
    """A WebP whose stream of pixels goes on with further bytes (of even number), in a container that says so."""
    chunks, position = [], 12  # after "RIFF", a length, "WEBP"
    while position + 8 <= len(data):
        name, length = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        body = data[position + 8 : position + 8 + length]
        position += 8 + length + length % 2
        if name in (b"VP8 ", b"VP8L"):
            body += more
        chunks += [name, len(body).to_bytes(4, "little"), body, bytes(len(body) % 2)]
    content = b"WEBP" + b"".join(chunks)
    return b"RIFF" + len(content).to_bytes(4, "little") + content


# -------------------------------------------------------------------------------------------------------------- litter

_LITTER = {
    "thumbs.db", "ehthumbs.db", "desktop.ini",  # Windows Explorer: thumbnails, folder settings
    "$recycle.bin", "system volume information",  # Windows: on every drive
    "__macosx", "icon\r",  # macOS: resource forks in a zip archive, a folder's own icon
    "@eadir", "#recycle", "@recycle",  # Synology and QNAP: thumbnails, deleted files
    "lost+found",  # ext4: at the root of a disk
}  # fmt: skip


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is one that programs create, never data; so is what lies in such a folder.

    Beside the names above these are names that begin with a dot (``.DS_Store``, ``._scan.png`` of macOS, ``.git``) or
    with ``~$`` (lock files of office programs), and that end with a tilde (back-up copies of editors). Unfinished
    downloads (``scan.png.part``) are not litter: an image is missing, and N must be right.
    """
    return name.startswith((".", "~$")) or name.endswith("~") or name.lower() in _LITTER


# ---------------------------------------------------------------------------------------------- hashes of single images

_LUMA = np.array([19595, 38470, 7471])
"""ITU-R BT.601 in 65,536ths, as Pillow converts colour to grey."""


def image_digests(images: np.ndarray) -> list[bytes]:
    """A 128-bit hash of each image; uint8 [N, ...]."""
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in np.ascontiguousarray(images)]


def grey_hashes(images: np.ndarray) -> np.ndarray:
    """``grey_hash`` of each image: uint8 [N, H, W, 1 or 3] to uint8 [N, 16]. In colour and in grey it is the same."""
    out = np.empty((len(images), 16), np.uint8)
    for row, image in zip(out, images, strict=True):
        wide = image.astype(np.int64)
        row[:] = grey_hash((wide[..., 0] if image.shape[-1] == 1 else wide @ _LUMA + 0x8000 >> 16).astype(np.uint8))
    return out


def grey_hash(grey: np.ndarray) -> np.ndarray:
    """A 128-bit hash of the values and the size of an image, uint8 [H, W]: uint8 [16].

    Zeros for an image of a single value, which belongs to nobody, and may be in many sets.
    """
    return _hash_of(grey.tobytes(), grey.shape)


def _hash_of(values: bytes, shape: tuple[int, ...]) -> np.ndarray:
    if values == values[:1] * len(values):
        return np.zeros(16, np.uint8)
    return np.frombuffer(hashlib.blake2b(values, digest_size=16, key=str(shape).encode()).digest(), np.uint8)


def hash_set(hashes: np.ndarray) -> frozenset[bytes]:
    """``Dataset.hashes`` as a set, without images of a single value: sets with a common hash share an image."""
    return frozenset(row.tobytes() for row in hashes[hashes[:, 0].any(axis=1)].reshape(-1, 16))
