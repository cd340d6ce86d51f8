"""Folders of images of all kinds: decoded, or refused without a word about any single private file."""

from __future__ import annotations

import io
import os
import random
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
from fuzzing import attempt, dice, explore, mutated_bytes, sizes
from PIL import Image

from dprandp.data import open_dataset
from dprandp.data.decode import read_images
from dprandp.errors import DprandpError

SECRET = "patient-4711"


def picture(draw: random.Random, mode: str = "RGB", size: tuple[int, int] | None = None) -> Image.Image:
    width, height = size or (draw.choice([1, 2, 9, 16, 40]), draw.choice([1, 3, 9, 16]))
    pixels = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def frames(draw: random.Random, kind: str, count: int) -> bytes:
    return saved(
        picture(draw, size=(8, 8)),
        kind,
        save_all=True,
        append_images=[picture(draw, size=(8, 8)) for _ in range(count - 1)],
    )


def hostile(draw: random.Random) -> bytes:
    """An image that is odd, large, animated, of another colour space, or none."""
    kinds = {
        "16-bit grey": lambda: saved(Image.fromarray(np.full((8, 8), 40_000, np.uint16)), "PNG"),
        "16-bit colour": lambda: png(4, 4, 16, 2, (b"\0" + b"\x12\x34" * 12) * 4),
        "1, 2, 4 bits": lambda: png(4, 4, draw.choice([1, 2, 4]), 0, (b"\0" + b"\xa5" * 2) * 4),
        "float with NaN": lambda: saved(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "TIFF"),
        "32-bit": lambda: saved(Image.fromarray(np.full((8, 8), 2**30, np.int32)), "TIFF"),
        "CMYK": lambda: saved(picture(draw, "CMYK"), draw.choice(["JPEG", "TIFF"])),
        "LAB": lambda: saved(picture(draw, "RGB").convert("LAB"), "TIFF"),
        "YCbCr": lambda: saved(picture(draw, "YCbCr"), "TIFF"),
        "transparent": lambda: saved(picture(draw, draw.choice(["RGBA", "LA"])), "PNG"),
        "palette": lambda: saved(picture(draw, "P"), draw.choice(["PNG", "GIF"])),
        "see-through palette": lambda: saved(picture(draw, "P"), "PNG", transparency=0),
        "GIF, animated": lambda: frames(draw, "GIF", 3),
        "WebP, animated": lambda: frames(draw, "WEBP", 3),
        "APNG": lambda: frames(draw, "PNG", 3),
        "TIFF, pages": lambda: frames(draw, "TIFF", 2),
        "bomb": lambda: png(
            draw.choice([60_000, 2**31 - 1, 8_000]), draw.choice([60_000, 6_300, 2**31 - 1]), 8, 0, bytes(100)
        ),
        "no area": lambda: png(0, draw.choice([0, 5]), 8, 0, b""),
        "text bomb": lambda: png(
            4, 4, 8, 0, (b"\0" + bytes(4)) * 4, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3 * 10**6)))
        ),
        "profile bomb": lambda: png(
            4, 4, 8, 0, (b"\0" + bytes(4)) * 4, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(3 * 10**6)))
        ),
        "pixels too many": lambda: png(4, 4, 8, 0, bytes(10**6)),
        "pixels too few": lambda: png(40, 40, 8, 2, bytes(100)),
        "empty": lambda: b"",
        "text": lambda: b"hello",
        "zip": lambda: b"PK\x03\x04" + bytes(30),
        "script": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "other format": lambda: saved(picture(draw), draw.choice(["PPM", "ICO", "TGA", "PCX"])),
        "plain": lambda: saved(picture(draw, draw.choice(["RGB", "L", "1"])), draw.choice(["PNG", "BMP", "TIFF"])),
        "JPEG": lambda: saved(picture(draw), "JPEG", progressive=draw.random() < 0.5),
        "WebP": lambda: saved(picture(draw), "WEBP"),
    }
    content = kinds[draw.choice(list(kinds))]()
    return mutated_bytes(draw, content) if content and draw.random() < 0.5 else content


SUFFIXES = [".png", ".jpg", ".JPEG", ".bmp", ".gif", ".tif", ".webp"]


def tells_nothing(error: DprandpError | None, *names: str) -> None:
    if error is not None:
        assert error.exit_code == 3
        for name in names:
            assert name not in str(error), str(error)


@sizes(80, 2200)
def test_images(tmp_path: Path, cases: int, record_property) -> None:
    """One file with any suffix."""

    def check(draw: random.Random) -> None:
        path = tmp_path / f"{SECRET}{draw.choice(SUFFIXES)}"
        path.write_bytes(hostile(draw))

        def read() -> None:
            images = read_images([path], 16, "the training images")
            assert (images.shape, images.dtype) == ((1, 16, 16, 3), np.uint8)

        tells_nothing(attempt(read), SECRET)
        path.unlink()

    record_property("cases tried", explore(dice, check, cases, cases < 1000))


def test_a_bomb_takes_little_memory_and_time(tmp_path: Path, record_property) -> None:
    """Many small frames, many directories in a circle: neither is walked to its end."""
    draw = random.Random(0)
    frame = saved(picture(draw, "P", (1, 1)), "GIF")
    start = frame.index(b",")
    (tmp_path / "a.gif").write_bytes(frame[:start] + frame[start:-1] * 300_000 + b";")
    error = attempt(lambda: read_images([tmp_path / "a.gif"], 16, "the images"))
    assert error is not None
    tiff = bytearray(saved(picture(draw, size=(4, 4)), "TIFF"))
    first = struct.unpack_from("<I", tiff, 4)[0]
    entries = struct.unpack_from("<H", tiff, first)[0]
    struct.pack_into("<I", tiff, first + 2 + 12 * entries, first)  # the directory after the first is the first
    (tmp_path / "a.tif").write_bytes(tiff)
    attempt(lambda: read_images([tmp_path / "a.tif"], 16, "the images"))
    record_property("cases tried", 2)


def spoilt(draw: random.Random, root: Path) -> str:
    """Do something to a good folder; returns a name that no message may hold."""
    name = SECRET
    place = draw.choice([root, root / "train", root / "train/owl", root / "test/wren", root / "train/wren"])
    if draw.random() < 0.25:
        (root / "test.txt").write_bytes(
            draw.choice([b"", b"train/owl\n", b"../../etc/passwd\n", b"\xff", b"a\0b\n", b"owl/0.png\n" * 3])
        )
        if draw.random() < 0.6:
            shutil.rmtree(root / "test")
    for _ in range(draw.randint(1, 3)):
        target = place / f"{name}{draw.choice(['', '.png', '.txt', '.npz', '.PNG', '.svg'])}"
        kind = draw.randrange(14)
        if kind in (10, 11) and (root / "train/owl/0.png").exists():
            (root / "train/owl/0.png").write_bytes(hostile(draw))
            continue
        if target.exists() or target.is_symlink() or not place.is_dir():
            continue
        if kind == 0:
            target.symlink_to("/etc/passwd")
        elif kind == 1:
            target.symlink_to(target.name)  # to itself
        elif kind == 2:
            target.symlink_to("../../../../../../etc")
        elif kind == 3:
            target.symlink_to(root / "train/owl/0.png")
        elif kind == 4:
            target.mkdir()
        elif kind == 5:
            os.mkfifo(target)
        elif kind == 6:
            target.touch()
        elif kind in (7, 8):
            target.write_bytes(hostile(draw))
        elif kind == 9:
            Path(os.fsdecode(os.fsencode(place) + b"/\xff\xfe" + name.encode() + b".png")).write_bytes(hostile(draw))
        elif kind == 12:
            (place / f"{name}\x1b[2J\n.png").write_bytes(hostile(draw))
        elif kind == 13 and place.name in ("owl", "wren"):
            shutil.rmtree(place)
    return name


@sizes(40, 1000)
def test_folders(tmp_path: Path, cases: int, record_property) -> None:
    """Links out of the folder and in circles, pipes, empty and nested things, odd names, missing splits."""
    good = saved(picture(random.Random(1), size=(16, 16)), "PNG")
    root = tmp_path / "birds"

    def check(draw: random.Random) -> None:
        shutil.rmtree(root, ignore_errors=True)
        for split, count in (("train", 2), ("test", 1)):
            for label in ("owl", "wren"):
                (root / split / label).mkdir(parents=True)
                for index in range(count):
                    (root / split / label / f"{index}.png").write_bytes(good)
        name = spoilt(draw, root)

        def read() -> None:
            dataset = open_dataset(f"folder:{root}", tmp_path)
            for split in ("train", "test"):
                assert getattr(dataset, split)().images.shape == (dataset.spec.examples(split), 32, 32, 3)

        tells_nothing(attempt(read), name)

    record_property("cases tried", explore(dice, check, cases, cases < 500))


def test_an_untouched_folder_is_read(tmp_path: Path) -> None:
    """The control: what is refused above is refused for what was done to it."""
    good = saved(picture(random.Random(1), size=(16, 16)), "PNG")
    for split in ("train", "test"):
        for label in ("owl", "wren"):
            (tmp_path / split / label).mkdir(parents=True)
            (tmp_path / split / label / "0.png").write_bytes(good)
    assert len(open_dataset(f"folder:{tmp_path}", tmp_path).train().images) == 2
