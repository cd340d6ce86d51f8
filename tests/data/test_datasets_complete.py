"""An image file that is not all there is refused, whatever its format and wherever it ends: no pixel is made up.

Two kinds of cut. A file may break off; or its image data end early in a container that is in order, as where a tool has
rewritten what was left of a damaged file. Decoders say nothing about the second kind.
"""

from __future__ import annotations

import io
import struct
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from dprandp.data import open_dataset, read_unlabelled
from dprandp.data.decode import decoded, read_images
from dprandp.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow; where images are read it is a refusal

SIDE = 40


def picture(kind: str = "noise") -> Image.Image:
    """A SIDE×SIDE image: noise, a smooth one, or one whose colour is that of an empty canvas."""
    if kind == "noise":
        return Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    if kind == "smooth":
        down, across = np.mgrid[:SIDE, :SIDE] * 6
        return Image.fromarray(np.stack([across, down, across ^ down], axis=-1).astype(np.uint8))
    return Image.new("RGB", (SIDE, SIDE), kind)


def file_of(image: Image.Image, kind: str, mode: str = "RGB", **options: object) -> bytes:
    stream = io.BytesIO()
    image.convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def read(content: bytes) -> Image.Image | None:
    with Image.open(io.BytesIO(content)) as header:
        return decoded(content, header)


def pixels(content: bytes) -> np.ndarray | None:
    """What is read from a file; None where it is refused."""
    try:
        image = read(content)
    except Exception:  # a decoder may raise anything; ``read_images`` makes one refusal of it
        return None
    return None if image is None else np.asarray(image.convert("RGB"))


def spread(length: int, count: int = 40) -> list[int]:
    """Places to cut at: some all over, and all of the last few."""
    return sorted({*np.linspace(1, length - 1, count).astype(int).tolist(), *range(max(1, length - 8), length)})


def assert_refused_or_the_same(whole: bytes, cuts: list[bytes]) -> float:
    """Which part of the cuts was refused."""
    expected = pixels(whole)
    assert expected is not None
    found = [pixels(cut) for cut in cuts]
    for index, got in enumerate(found):
        assert got is None or np.array_equal(got, expected), f"cut {index} of {len(cuts)} is read, and not as it was"
    return sum(got is None for got in found) / len(cuts)


FORMATS: dict[str, tuple[str, str, dict[str, object]]] = {
    "png": ("PNG", "RGB", {}),
    "png, palette": ("PNG", "P", {}),
    "jpeg": ("JPEG", "RGB", {"quality": 95}),
    "jpeg, progressive": ("JPEG", "RGB", {"progressive": True}),
    "jpeg, restarts": ("JPEG", "L", {"restart_marker_blocks": 3}),
    "bmp": ("BMP", "RGB", {}),
    "gif": ("GIF", "P", {}),
    "tiff": ("TIFF", "RGB", {}),
    "tiff, lzw": ("TIFF", "RGB", {"compression": "tiff_lzw", "tiffinfo": {278: 8}}),
    "tiff, deflate": ("TIFF", "L", {"compression": "tiff_deflate", "tiffinfo": {278: 8}}),
    "tiff, packbits": ("TIFF", "RGB", {"compression": "packbits", "tiffinfo": {278: 8}}),
    "tiff, jpeg": ("TIFF", "RGB", {"compression": "jpeg", "tiffinfo": {278: 8}}),
    "webp": ("WEBP", "RGB", {}),
    "webp, lossless": ("WEBP", "RGB", {"lossless": True}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_breaks_off(name: str) -> None:
    kind, mode, options = FORMATS[name]
    for image in ("noise", "black", "white"):
        whole = file_of(picture(image), kind, mode, **options)
        cuts = [whole[:length] for length in spread(len(whole))]
        assert assert_refused_or_the_same(whole, cuts) > 0.5  # a PNG without its last chunk has all pixels


# ----------------------------------------------------------------- image data that end early in a file that is in order


def taller(content: bytes, kind: str) -> bytes:
    """The file, declaring twice the rows that it holds."""
    changed, high = bytearray(content), 2 * SIDE
    if kind == "PNG":
        changed[20:24] = high.to_bytes(4, "big")
        changed[29:33] = zlib.crc32(changed[12:29]).to_bytes(4, "big")
    elif kind == "GIF":
        place = content.index(b"," + bytes(4) + struct.pack("<HH", SIDE, SIDE))
        changed[8:10] = changed[place + 7 : place + 9] = struct.pack("<H", high)
    elif kind == "JPEG":
        place = next(content.index(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if marker in content)
        changed[place + 5 : place + 7] = struct.pack(">H", high)
    else:
        (table,) = struct.unpack("<I", content[4:8])
        for place in range(table + 2, table + 2 + 12 * content[table], 12):
            if content[place : place + 2] in (b"\x01\x01", b"\x16\x01"):  # ImageLength, RowsPerStrip
                rows = int.from_bytes(content[place + 8 : place + 10], "little")
                changed[place + 8 : place + 10] = struct.pack("<H", 2 * rows)
    return bytes(changed)


def short_webp(whole: bytes, length: int) -> bytes:
    """A WebP whose one chunk, and the file, say that they are shorter."""
    body = whole[20 : 20 + length] + bytes(length % 2)
    return b"RIFF" + struct.pack("<I", 12 + len(body)) + b"WEBP" + whole[12:16] + struct.pack("<I", length) + body


def test_a_png_of_fewer_rows_than_it_declares_is_made_up_by_its_decoder() -> None:
    """The control: there is something to notice."""
    with Image.open(io.BytesIO(taller(file_of(picture(), "PNG"), "PNG"))) as image:
        made_up = np.asarray(image)
    assert made_up[:SIDE].any(axis=(1, 2)).all()
    assert not made_up[SIDE:].any()


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.startswith(("webp", "bmp"))])
def test_a_file_that_declares_more_rows_than_it_holds(name: str) -> None:
    kind, mode, options = FORMATS[name]
    for image in ("noise", "smooth", "black", "white"):
        whole = file_of(picture(image), kind, mode, **options)
        assert pixels(whole) is not None
        assert pixels(taller(whole, kind)) is None, image


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("tiff, ")])
def test_a_tiff_that_names_fewer_strips_or_lengths(name: str) -> None:
    kind, mode, options = FORMATS[name]
    whole = file_of(picture(), kind, mode, **options)
    (table,) = struct.unpack("<I", whole[4:8])
    places = [place for place in range(table + 2, table + 2 + 12 * whole[table], 12)
              if whole[place : place + 2] in (b"\x11\x01", b"\x17\x01")]  # StripOffsets, StripByteCounts
    cuts = [whole[: place + 4] + struct.pack("<I", count) + whole[place + 8 :] for place in places for count in (2, 4)]
    assert assert_refused_or_the_same(whole, cuts) == 1


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith(("jpeg", "webp"))])
def test_a_stream_that_ends_early(name: str) -> None:
    """A JPEG that was given an end, a WebP whose chunk ends early."""
    kind, mode, options = FORMATS[name]
    for image in ("noise", "smooth"):
        whole = file_of(picture(image), kind, mode, **options)
        if kind == "WEBP":
            cuts = [short_webp(whole, shorter) for shorter in spread(struct.unpack("<I", whole[16:20])[0])]
        else:
            cuts = [whole[:length] + b"\xff\xd9" for length in spread(len(whole) - 4, 100)]
            cuts += [whole[:length] + bytes(len(whole) - length) for length in spread(len(whole) - 4)]
        assert assert_refused_or_the_same(whole, cuts) > 0.9


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"restart_marker_blocks": 3}, {"progressive": True}])
def test_a_large_jpeg_that_ends_early(options: dict[str, object]) -> None:
    """Of a large one, a few blocks in the last corner may be lost, and nothing else."""
    for image in ("noise", "smooth"):
        large = picture(image).resize((200, 150))
        for mode in ("RGB", "L"):
            whole = file_of(large, "JPEG", mode, **options)
            np.testing.assert_array_equal(pixels(whole), np.asarray(Image.open(io.BytesIO(whole)).convert("RGB")))
            for lost in (*range(1, 30), *range(30, len(whole) - 700, 211)):
                got = pixels(whole[: -2 - lost] + b"\xff\xd9")
                if got is None:
                    continue
                assert lost < 24
                changed = (got != pixels(whole)).any(axis=-1)
                assert not changed[:-16].any()
                assert not changed[:, :-64].any()


def test_a_marker_may_have_any_number_of_bytes_before_it() -> None:
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 3}):
        for side in (SIDE, 200):
            whole = file_of(picture().resize((side, side)), "JPEG", **options)
            longer = whole[:-2] + b"\xff\xff\xff" + whole[-2:]
            np.testing.assert_array_equal(pixels(longer), pixels(whole))


def test_a_large_jpeg_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, load = [], JpegImagePlugin.JpegImageFile.load
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", lambda image: opened.append(image) or load(image))
    assert read(file_of(picture().resize((200, 150)), "JPEG")) is not None
    assert len({id(image) for image in opened}) == 1
    opened.clear()
    assert read(file_of(picture(), "JPEG")) is not None  # a positive control: a small one is compared
    assert len({id(image) for image in opened}) > 2


# ------------------------------------------------------------------------------------------------- files that are whole


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 17)])
def test_every_kind_of_jpeg_that_is_whole_is_taken(mode: str, size: tuple[int, int]) -> None:
    kinds = ({}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 2})
    for image, quality, subsampling, more in product(("noise", "grey"), (1, 100), (0, 1, 2), kinds):
        options = {"quality": quality, "subsampling": subsampling, **more}
        assert pixels(file_of(picture(image).resize(size), "JPEG", mode, **options)) is not None, (image, options)


def test_what_follows_the_end_of_an_image_does_not_count() -> None:
    for kind in ("PNG", "JPEG", "GIF", "BMP"):
        whole = file_of(picture(), kind)
        np.testing.assert_array_equal(pixels(whole + b"\xff\xd8 and more"), pixels(whole))


# ---------------------------------------------------------------------------------------------- training and predicting


def test_neither_training_nor_predict_takes_an_image_that_is_not_all_there(root: Path) -> None:
    short = {f"a.{kind.lower()}": taller(file_of(picture(), kind), kind) for kind in ("PNG", "GIF", "JPEG")}
    for name, content in short.items():
        path = root / "train/owl" / name
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"1 of the train images: (incomplete|damaged)") as caught:
            open_dataset(f"folder:{root}", root).train()
        assert name not in str(caught.value)
        assert name in caught.value.private_detail
        with pytest.raises(InputError, match=rf"{name} is (incomplete|damaged)"):  # not private: it is named
            read_unlabelled(path, (32, 32, 3))
        path.unlink()


def test_compressions_that_hide_missing_pixels_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "fax.tif"
    path.write_bytes(file_of(picture(), "TIFF", "1", compression="group4"))
    with pytest.raises(InputError, match="compressed as a fax") as caught:
        read_images([path], 32, "the images")
    assert "PNG" in caught.value.fix
