"""Single image files: what is decoded, and what is refused because it would need a guess; no message names a file."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dprandp.data import open_dataset
from dprandp.data.decode import MAX_PIXELS, read_images
from dprandp.errors import InputError

SECRET = "patient-4711"


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def opened(root: Path):
    return open_dataset(f"folder:{root}", root)


def test_centre_square_is_cut_and_nothing_outside_leaks_in(root):
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[..., 2] = 255
    wide[:, 30:70] = (200, 10, 0)
    Image.fromarray(wide).save(root / "train/owl/0.png")
    small = opened(root).train().images[0]
    assert small.shape == (32, 32, 3)
    assert (small == (200, 10, 0)).all()


def test_resizing_averages(root):
    """A 128×128 chequerboard of 2×2 blocks becomes even grey at 32×32: no aliasing."""
    board = np.kron(np.indices((64, 64)).sum(0) % 2, np.ones((2, 2), int)).astype(np.uint8) * 255
    Image.fromarray(board).save(root / "train/owl/0.png")
    middle = opened(root).train().images[0][2:-2, 2:-2].astype(int)
    assert abs(middle - 127).max() < 12


def test_each_image_is_read_by_itself(root):
    paths = sorted((root / "train/owl").iterdir())
    together = read_images(paths, 20, "the images")
    for index, path in enumerate(paths):
        np.testing.assert_array_equal(together[index], read_images([path], 20, "the images")[0])


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.png", "L"), ("a.png", "1"), ("a.png", "P"), ("a.JPG", "RGB"), ("a.jpeg", "L"), ("a.bmp", "RGB"),
     ("a.gif", "P"), ("a.tif", "RGB"), ("a.TIFF", "L"), ("a.webp", "RGB")],
)  # fmt: skip
def test_formats_taken(root, name, mode):
    image = Image.fromarray(picture(99)).convert(mode)
    options: dict = {"lossless": True} if name.endswith("webp") else {}
    if name == "a.JPG":  # a camera's photograph that stands upright
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 1
    image.save(root / "train/owl" / name, **options)
    got = opened(root).train().images[3].astype(int)  # "a" sorts after "0" … "2"
    difference = abs(got - np.asarray(image.convert("RGB"), int)).max()
    assert difference == 0 or (name.lower().endswith(("jpg", "jpeg")) and difference > 0)


def png_of(body: bytes, width: int, height: int, bits: int = 8, colour: int = 0) -> bytes:
    """A PNG that claims a size and kind, and holds what it holds."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def write_bad(path: Path, kind: str) -> None:
    image = Image.fromarray(picture(1))
    if kind in ("rotated", "rotated-png"):
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path if kind == "rotated-png" else path.with_suffix(".jpg"), exif=exif)
    elif kind == "grey-16":
        Image.fromarray(np.full((32, 32), 1000, np.uint16)).save(path)
    elif kind == "rgb-16":
        path.write_bytes(png_of(b"".join(b"\0" + b"\x12\x34" * 24 for _ in range(8)), 8, 8, 16, 2))
    elif kind == "float":
        Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(path.with_suffix(".tif"))
    elif kind == "cmyk":
        image.convert("CMYK").save(path.with_suffix(".jpg"))
    elif kind == "alpha":
        image.convert("RGBA").save(path)
    elif kind == "palette-transparent":
        image.convert("P").save(path, transparency=0)
    elif kind in ("animated", "pages"):
        more = [Image.fromarray(picture(2))]
        image.save(path.with_suffix(".gif" if kind == "animated" else ".tif"), save_all=True, append_images=more)
    elif kind == "bomb":
        path.write_bytes(png_of(bytes(100), 60_000, 60_000))
    elif kind == "large":
        path.write_bytes(png_of(bytes(100), 8_000, MAX_PIXELS // 8_000 + 1))
    elif kind == "corrupt":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"garbage" * 20)
    elif kind == "script":
        path.with_suffix(".jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    elif kind == "other-format":
        image.save(path, format="PPM")  # one that Pillow could read, behind a name that promises another


@pytest.mark.parametrize(
    ("kind", "says"),
    [("rotated", "rotated"), ("rotated-png", "rotated"), ("grey-16", "16-bit"), ("rgb-16", "16-bit"),
     ("float", "float"), ("cmyk", "CMYK"), ("alpha", "transparent"), ("palette-transparent", "transparent"),
     ("animated", "animated"), ("pages", "pages"), ("bomb", "50 million"), ("large", "50 million"),
     ("corrupt", "damaged"), ("script", "damaged"), ("other-format", "damaged")],
)  # fmt: skip
def test_refused_image_is_not_named(root, kind, says):
    write_bad(root / "train" / "wren" / f"{SECRET}.png", kind)
    dataset = opened(root)
    with pytest.raises(InputError, match=says) as caught:
        dataset.train()
    assert caught.value.exit_code == 3
    assert SECRET not in str(caught.value)
    assert "wren" not in str(caught.value)
    assert SECRET in caught.value.private_detail
    dataset.test()  # its own files are fine
