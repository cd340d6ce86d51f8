"""One image file to one uint8 array: safely, and the same on every machine.

Ambiguous files are refused: rotation flags, 16-bit values, transparency, printing colours, several frames. A silent
conversion would be a silent change of the data.
"""

from __future__ import annotations

import io
import logging
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from dprandp.data.npz import read_array, read_headers
from dprandp.errors import InputError, UsageError

# ------------------------------------------------------------------------------------------------------------ complete
#
# Whether all pixels of an image file were in the file, or some were made up by the decoder.
#
# Pillow raises for a truncated file, but not for a file whose *image data* end early inside an intact container (for
# example, if a tool has rewritten a damaged file): decoders silently fill in the rest. The filling, and so the check,
# depends on the format.
#
# PNG, GIF, TIFF, BMP
#     The decoder writes what it finds into a canvas, and what it does not find keeps the canvas's colour. So the file
#     is decoded twice, on a black and on a white canvas: pixels that differ were not in the file.
# JPEG
#     The decoder makes what is missing grey. Bytes between the end of a complete scan and the next marker are skipped;
#     after a scan that ends early they are taken for image data. So the file is decoded as it is and with such bytes at
#     the end of each scan: pixels that differ were not in the file. Missing scans and missing restart intervals are
#     found by the headers. A TIFF may hold JPEG streams, to which the same applies.
# WebP
#     The library refuses streams that end early, but for the last byte or two. These are noticed as with JPEG, by bytes
#     at the end of the stream.
#
# Image data that were overwritten with other valid data, such as zeros in an uncompressed file, cannot be noticed.

#: Formats that Pillow may try; the extension only selects which files are meant to be images.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")

# Bytes that look like image data and hold no marker (0xFF). Where a JPEG's data have run out the decoder reads zeros;
# each of these decodes to something else, and to something else than the others. What one of them changes may be lost
# in rounding if hardly more than the last byte is missing, so small images, where that counts, are tried with all.
_FILLERS = (b"\xb6" * 512, b"\x55" * 512, bytes((n * n * 73 + n * 211 + 211) % 251 for n in range(512)))
_SMALL = 1_000_000
"""Pixels up to which all fillers are tried."""

_SOI, _EOI, _SOS, _DRI = 0xD8, 0xD9, 0xDA, 0xDD
_RESTARTS = range(0xD0, 0xD8)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # these three are tables and an extension
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_COEFFICIENTS = range(64)
_COMPRESSION, _STRIP_OFFSETS, _STRIP_BYTES, _TILE_OFFSETS, _TILE_BYTES, _JPEG_TABLES = 259, 273, 279, 324, 325, 347
_JPEG = 7
_NOT_CHECKABLE = (2, 3, 4, 6)  # three of fax, and a kind of JPEG that was given up in 1995


def cannot_be_checked(image: Image.Image) -> bool:
    """Whether the decoder of an opened file would fill in missing pixels in a way that ``decoded`` does not notice."""
    return image.format == "TIFF" and image.tag_v2.get(_COMPRESSION) in _NOT_CHECKABLE


def decoded(data: bytes) -> Image.Image | None:
    """The image of a file, or None where a part of its pixels is not in the file.

    Args:
        data: the whole file, in one of ``FORMATS``, of a size that the caller has found acceptable; none of which
            ``cannot_be_checked``.

    Returns:
        The decoded image, in its own mode; closed.

    Raises:
        Anything that Pillow raises for a file that it cannot decode; ValueError and IndexError for a JPEG without an
        end.
    """
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


# ----------------------------------------------------------------------------------------------------------------- JPEG


@dataclass(frozen=True)
class _Frame:
    """What a JPEG's frame header says: size in pixels, and component -> (horizontal, vertical) sampling factor."""

    progressive: bool
    width: int
    height: int
    sampling: dict[int, tuple[int, int]]

    def restarts(self, components: list[int], interval: int) -> int:
        """How many restart markers a scan of these components has, one after every ``interval`` units but the last."""
        across = max(h for h, _ in self.sampling.values())
        down = max(v for _, v in self.sampling.values())
        h, v = self.sampling[components[0]] if len(components) == 1 else (across, down)
        wide, high = (self.width, h / across), (self.height, v / down)
        if len(components) == 1:  # blocks of the component's own samples
            units = math.prod(math.ceil(math.ceil(pixels * part) / 8) for pixels, part in (wide, high))
        else:
            units = math.ceil(self.width / (8 * across)) * math.ceil(self.height / (8 * down))
        return math.ceil(units / interval) - 1


def _jpeg_is_complete(data: bytes, image: Image.Image) -> bool:
    ends = _ends_of_scans(data)
    if ends is None:
        return False
    parts = [data[start:end] for start, end in pairwise([0, *ends, len(data)])]
    fillers = _FILLERS if image.width * image.height <= _SMALL else _FILLERS[:1]
    return all(_same(image, _on_canvas(filler.join(parts), 0)) for filler in fillers)


def _ends_of_scans(data: bytes) -> list[int] | None:
    """Where each scan of a JPEG ends; None where its headers say that it lacks scans or parts of them.

    Raises:
        ValueError, IndexError: it has no end.
    """
    frame: _Frame | None = None
    interval, position = 0, 2
    ends: list[int] = []
    missing_bits: dict[tuple[int, int], int] = {}  # (component, coefficient) -> low bits that no scan has had so far
    while True:
        position = data.index(0xFF, position)
        while data[position] == 0xFF:
            position += 1
        marker = data[position]
        position += 1
        if marker == _EOI:
            break
        if marker in (0x00, 0x01, _SOI) or marker in _RESTARTS:  # no segment follows
            continue
        length = int.from_bytes(data[position : position + 2], "big")
        body, position = data[position + 2 : position + length], position + length
        if marker == _DRI:
            interval = int.from_bytes(body[:2], "big")
        elif marker in _FRAMES:
            sampling = {body[at]: (body[at + 1] >> 4, body[at + 1] & 15) for at in range(6, 6 + 3 * body[5], 3)}
            height, width = (int.from_bytes(body[at : at + 2], "big") for at in (1, 3))
            frame = _Frame(marker in _PROGRESSIVE, width, height, sampling)
            missing_bits = {(name, k): 16 for name in sampling for k in _COEFFICIENTS}
        elif marker == _SOS and frame is not None:
            components = [body[at] for at in range(1, 1 + 2 * body[0], 2)]
            first, last, bits = body[1 + 2 * body[0] :][:3]
            covered = range(first, last + 1) if frame.progressive else _COEFFICIENTS
            low = bits & 15 if frame.progressive else 0
            missing_bits |= {(name, k): low for name in components for k in covered}
            position, restarts = _end_of_scan(data, position)
            if interval and restarts < frame.restarts(components, interval):
                return None
            ends.append(position)
    if frame is None or any(missing_bits.values()):
        return None
    return ends


def _end_of_scan(data: bytes, position: int) -> tuple[int, int]:
    """Where the marker after a scan's data lies, and how many restart markers there are on the way."""
    restarts = 0
    while True:
        start = position = data.index(0xFF, position)
        while data[position + 1] == 0xFF:  # a marker may begin with any number of these
            position += 1
        after, position = data[position + 1], position + 2
        if after in _RESTARTS:
            restarts += 1
        elif after != 0x00:  # which stands for a byte 0xFF of the data
            return start, restarts


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
    for offset, length in zip(offsets, lengths, strict=True):
        stream = data[offset : offset + length]
        stream = tables + stream[2:] if tables else stream
        if not _jpeg_is_complete(stream, _on_canvas(stream, 0)):
            return False
    return True


# ----------------------------------------------------------------------------------------------------------------- WebP


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
"""The problem of an incomplete image, and the fix."""

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
        # A decoder may raise any exception for a hostile file.
        raise _refusal(what, "damaged or not an image", "replace or remove it", path, type(error).__name__) from error
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
        return "marked as rotated (EXIF orientation)", "rotate the pixels themselves and remove the mark"
    return None


def _bits_per_channel(image: Image.Image, path: Path) -> int:
    """Bits in the file; Pillow silently shows 16-bit RGB as 8-bit."""
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


# -------------------------------------------------------------------------------------------------------------- litter
#
# Litter: files that programs create in folders. They are never data, and are ignored wherever a folder is listed.
#
# Nothing else is ignored silently. In particular unfinished downloads (``scan.png.part``) are not litter: an image is
# missing, and N must be right.

_NAMES = frozenset(
    {
        "thumbs.db", "ehthumbs.db", "desktop.ini",  # Windows Explorer: thumbnails, folder settings
        "$recycle.bin", "system volume information",  # Windows: on every drive
        "__macosx", "icon\r",  # macOS: resource forks in a zip archive, a folder's own icon
        "@eadir", "#recycle", "@recycle",  # Synology and QNAP: thumbnails, deleted files
        "lost+found",  # ext4: at the root of a disk
    }
)  # fmt: skip


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is litter; what lies in a folder that is litter is litter, too.

    Beside the names above these are names that begin with a dot (``.DS_Store``, ``._scan.png`` of macOS,
    ``.ipynb_checkpoints``, ``.git``, ``.syncthing.scan.png.tmp``), that begin with ``~$`` (lock files of office
    programs), and that end with a tilde (back-up copies of editors).

    Args:
        name: of the file or folder alone, without its path. Upper and lower case are the same.
    """
    return name.startswith((".", "~$")) or name.endswith("~") or name.lower() in _NAMES


# ---------------------------------------------------------------------------------------------------------- unlabelled
#
# New images to classify: files, a folder of them, or one array of an ``.npz`` file. No labels, no splits.
#
# The guarantee does not cover these data, so messages name a file that cannot be read. In a folder, litter is ignored;
# other files without the name of an image are skipped and counted.

ARRAYS = ("images", "x", "x_test")
"""Names under which an ``.npz`` file may hold the images; exactly one of them has to be there."""

LINKED, SPECIAL, BARE = "links to folders", "no regular files", "no extension"
"""Kinds of skipped files without an extension."""

_LONGEST_EXTENSION = 16

_GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601 luma, as PIL's convert("L")


def read_unlabelled(
    paths: Sequence[Path],
    data: str | None,
    shape: tuple[int, int, int],
    on_skipped: Callable[[dict[str, int]], object] = lambda kinds: None,
) -> tuple[list[str], np.ndarray]:
    """Read new images and bring each to the shape of the images that a model was trained on.

    An image of other proportions loses its edges: the largest centred part is kept. Grey and colour are converted.

    Args:
        paths: image files.
        data: further images: ``folder:PATH`` (every image file below it, by path) or ``npz:PATH`` (uint8 [N, H, W],
            [N, H, W, 1] or [N, H, W, 3], in the array ``images``, ``x`` or ``x_test``); None for none.
        shape: height, width, channels (1 or 3).
        on_skipped: called once where a folder holds files that are no images by their names: how many of each kind
            (an extension such as ``.dcm``, or ``LINKED``, ``SPECIAL``, ``BARE``), the most frequent first.

    Returns:
        Names (paths as given; ``PATH[i]`` in an array), and uint8 [N, height, width, channels].

    Raises:
        InputError: missing, damaged or empty; the message names the file. UsageError: ``data`` is neither kind.
    """
    names, parts = [], []
    kind, _, rest = (data or "").partition(":")
    files = list(paths)
    if data is not None and (kind not in ("folder", "npz") or not rest):
        raise UsageError(f"--data {data!r} names no images to classify", fix="give npz:PATH, folder:PATH, or files")
    if kind == "folder":
        found, skipped = _below(Path(rest).expanduser())
        files += found
        if skipped:
            on_skipped(skipped)
    for path in files:
        if not path.is_file():
            raise InputError(f"there is no file {path}", fix="check the path")
        names.append(str(path))
        parts.append(_grey_or_rgb(read_image(path, shape[0], shape[1], str(path))[None], shape[2]))
    if kind == "npz":
        images = _from_npz(Path(rest).expanduser())
        names += [f"{rest}[{index}]" for index in range(len(images))]
        parts.append(brought_to(images, shape))
    if not names:
        raise UsageError("there is no image to classify", fix="name image files, or give --data npz:PATH | folder:PATH")
    return names, np.concatenate(parts)


def brought_to(images: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Images of any size as uint8 [N, height, width, channels] of ``shape``; cut and resized as files are.

    Args:
        images: uint8 [H, W], [H, W, C] or [N, H, W, C] with C = 1 or 3.

    Raises:
        InputError: the array holds no such images.
    """
    many = images[None] if images.ndim == 3 else images[None, ..., None] if images.ndim == 2 else images
    if many.dtype != np.uint8 or many.ndim != 4 or many.shape[3] not in (1, 3) or 0 in many.shape:
        raise InputError(
            f"an array of type {images.dtype} and shape {list(images.shape)} holds no images",
            fix="give uint8 [height, width, 3] or [N, height, width, 3], or one channel for grey",
        )
    sized = np.stack([_resized(image, (*shape[:2], image.shape[2])) for image in many])
    return _grey_or_rgb(sized, shape[2])


def skipped_text(kinds: Mapping[str, int]) -> str:
    """``skipped 3 files that are not images by name: .dcm (2), .txt (1); readable are .png ...``."""
    count = sum(kinds.values())
    listed = ", ".join(f"{kind} ({number})" for kind, number in kinds.items())
    what = "1 file that is not an image" if count == 1 else f"{count} files that are not images"
    return f"skipped {what} by name: {listed}; readable are {' '.join(EXTENSIONS)}"


def _below(folder: Path) -> tuple[list[Path], dict[str, int]]:
    """Every image file below a folder, by path, and how many other files of each kind; litter is in neither."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}", fix="check the path")
    found: list[Path] = []
    skipped: Counter[str] = Counter()
    for here, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not is_litter(name)]
        skipped[LINKED] += sum(os.path.islink(os.path.join(here, name)) for name in folders)
        for path in (Path(here, name) for name in files if not is_litter(name)):
            if not path.is_file():
                skipped[SPECIAL] += 1
            elif path.name.lower().endswith(EXTENSIONS):
                found.append(path)
            else:
                skipped[_kind(path)] += 1
    kinds = {kind: count for kind, count in sorted(skipped.items(), key=lambda item: (-item[1], item[0])) if count}
    if not found:
        raise InputError(
            f"{folder} holds no image" + (f": {skipped_text(kinds)}" if kinds else ""),
            fix=f"images are known by their names: {' '.join(EXTENSIONS)}",
        )
    return sorted(found), kinds


def _kind(path: Path) -> str:
    extension = path.suffix.lower()
    return extension if extension.isprintable() and 0 < len(extension) <= _LONGEST_EXTENSION else BARE


def _refuse(error: OSError) -> None:
    """A folder that cannot be listed would hide its images."""
    raise InputError(f"{error.filename} cannot be listed: {error.strerror}", fix="check its permissions") from error


def _from_npz(path: Path) -> np.ndarray:
    headers = read_headers(path)
    present = [name for name in ARRAYS if name in headers]
    if len(present) != 1:
        raise InputError(
            f"{path} holds {' and '.join(present) or 'none of the arrays ' + ', '.join(ARRAYS)}",
            fix="save the images to classify under one of these names, such as numpy.savez(path, images=…)",
        )
    header = headers[present[0]]
    grey = len(header.shape) == 3
    if header.dtype != np.uint8 or not (grey or (len(header.shape) == 4 and header.shape[3] in (1, 3))):
        raise InputError(
            f"{path}: {present[0]} is {header}; images must be uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3]",
            fix="put the channels last and scale the pixels to 0…255 as for the training images",
        )
    if 0 in header.shape:
        raise InputError(f"{path}: {present[0]} is {header}, which holds no image", fix="give at least one image")
    images = read_array(path, present[0])
    return images[..., None] if grey else images


def _grey_or_rgb(images: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [N, H, W, 1 or 3] with the wanted number of channels."""
    if images.shape[3] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=3)
    return np.round(images @ _GREY).clip(0, 255).astype(np.uint8)[..., None]


def _resized(image: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 [H, W, C] cut and resized as ``read_image`` does; untouched where it fits."""
    if image.shape == shape:
        return image
    top, left, rows, columns = centred(image.shape[:2], shape[:2])
    part = Image.fromarray(image[top : top + rows, left : left + columns].squeeze(-1) if shape[2] == 1 else
                           image[top : top + rows, left : left + columns])  # fmt: skip
    return np.asarray(part.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)).reshape(shape)
