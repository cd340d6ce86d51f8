"""Whether all pixels of an image file were in the file, or some were made up by the decoder.

A file that simply breaks off makes Pillow raise. A file whose *image data* end early inside a container that is in
order (a tool has rewritten what was left of a damaged file, say) does not: decoders fill in the rest and say nothing.
What the rest looks like depends on the format, and so does how it is noticed.

PNG, GIF, TIFF, BMP
    The decoder writes what it finds into a canvas, and what it does not find keeps the canvas's colour. So the file is
    decoded twice, on a black and on a white canvas: pixels that differ were not in the file.
JPEG
    The decoder makes what is missing grey. Bytes between the end of a complete scan and the next marker are skipped;
    after a scan that ends early they are taken for image data. So the file is decoded as it is and with such bytes at
    the end of each scan: pixels that differ were not in the file. Missing scans and missing restart intervals are found
    by the headers. A TIFF may hold JPEG streams, to which the same applies.
WebP
    The library refuses streams that end early, but for the last byte or two. These are noticed as with JPEG, by bytes
    at the end of the stream.

What cannot be noticed is image data that were overwritten with other data which decode, such as zeros in an
uncompressed file.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image

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
