"""Declared rules for ambiguous image files: each does what it says, and without it the file is refused by name."""

from __future__ import annotations

import io
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dprandp.config.declared import Decoding
from dprandp.data import open_dataset
from dprandp.data.decode import EXTENSIONS, read_images, windowed
from dprandp.errors import InputError, UsageError

SIDE = 16
EXIF_ORIENTATION, TIFF_PHOTOMETRIC = 274, 262

real_data = pytest.mark.skipif(
    "DPRANDP_REAL_DATA" not in os.environ, reason="DPRANDP_REAL_DATA names no folder with odd-files/"
)


def picture(channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (SIDE, SIDE, channels) if channels > 1 else (SIDE, SIDE)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def read(path: Path, **rules: str) -> np.ndarray:
    """The one image, int [SIDE, SIDE, 3]."""
    return read_images([path], SIDE, "the images", Decoding(**rules))[0].astype(int)


# --------------------------------------------------------------------------------------------------------------- colour


@pytest.mark.parametrize("stored", ["L", "RGB", "P", "1"])
def test_grey_is_the_luma_of_what_is_read_without_the_rule(tmp_path: Path, stored: str) -> None:
    Image.fromarray(picture(1 if stored == "L" else 3)).convert(stored).save(tmp_path / "a.png")
    colour = read(tmp_path / "a.png")
    assert (read(tmp_path / "a.png", colour="rgb") == colour).all()
    grey = read(tmp_path / "a.png", colour="grey")
    assert grey.shape == (SIDE, SIDE, 1)
    luma = colour @ np.array([0.299, 0.587, 0.114])
    assert np.abs(grey[..., 0] - luma).max() <= 1
    assert stored != "RGB" or np.abs(grey[..., 0] - colour.mean(axis=2)).max() > 3  # the control: plain means


def test_a_folder_of_grey_images(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(picture()).save(tmp_path / split / name / "0.png")
    dataset = open_dataset(f"folder:{tmp_path}", tmp_path, decoding=Decoding(colour="grey"))
    assert dataset.spec.image_shape == (32, 32, 1)
    assert dataset.train().images.shape == (2, 32, 32, 1)
    assert str(dataset.spec.decoding) == "--colour grey"


def test_grey_files_without_a_declaration_are_noticed(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(picture(1)).save(tmp_path / split / name / "0.png")
    name = f"folder:{tmp_path}"
    assert open_dataset(name, tmp_path).examine().looks_grey
    for colour in ("grey", "rgb"):
        assert not open_dataset(name, tmp_path, decoding=Decoding(colour=colour)).examine().looks_grey
    Image.fromarray(picture(3)).save(tmp_path / "train/a/1.png")
    assert not open_dataset(name, tmp_path).examine().looks_grey


# --------------------------------------------------------------------------------------------------------------- 16-bit


def grey_of(value: int, low: float, high: float) -> int:
    """The slow way, without rounding errors."""
    exact = (value - Fraction(low)) * 255 / (Fraction(high) - Fraction(low))
    return min(255, max(0, (exact + Fraction(1, 2)).__floor__()))


@pytest.mark.parametrize("window", [(0, 65535), (0, 4095), (1000, 1001), (-1024, 3071), (12.5, 700.25)])
def test_windowing_is_the_exact_formula(window: tuple[float, float]) -> None:
    values = np.unique(np.concatenate([np.arange(0, 5000, 7), np.arange(0, 65536, 97), [65535]]))
    expected = [grey_of(int(value), *window) for value in values]
    assert windowed(values, *window).tolist() == expected
    cut = np.clip((values - window[0]) * 255 // (window[1] - window[0]), 0, 255)  # the control does not round
    assert window == (1000, 1001) or cut.tolist() != expected


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big-endian.tif", "white-is-zero.tif"])
def test_16_bit_greyscale(tmp_path: Path, name: str) -> None:
    values = np.random.default_rng(1).integers(0, 65536, (SIDE, SIDE)).astype(np.uint16)
    path = tmp_path / name
    stored = 65535 - values if "zero" in name else values
    if name == "big-endian.tif":
        Image.frombytes("I;16B", (SIDE, SIDE), stored.astype(">u2").tobytes()).save(path)
    else:
        Image.fromarray(stored).save(path)
    if "zero" in name:  # the entry of the tag: its number, the type short, one value
        entry = TIFF_PHOTOMETRIC.to_bytes(2, "little") + b"\x03\x00\x01\x00\x00\x00"
        assert path.read_bytes().count(entry + b"\x01\x00") == 1
        path.write_bytes(path.read_bytes().replace(entry + b"\x01\x00", entry + b"\x00\x00"))
    for rule, window in (("full", (0, 65535)), ("window:500,40000", (500, 40000))):
        expected = [[grey_of(int(value), *window) for value in row] for row in values]
        got = read(path, grey_levels=rule)
        assert (got == got[..., :1]).all()
        np.testing.assert_array_equal(got[..., 0], expected)


# ---------------------------------------------------------------------------------------------------------- orientation



def as_stored(upright: np.ndarray, mark: int) -> np.ndarray:
    """The file's rows and columns, pixel by pixel: stored[i][j] = upright[r][c]."""
    side = len(upright)
    where = {
        1: lambda i, j: (i, j), 2: lambda i, j: (i, side - 1 - j), 3: lambda i, j: (side - 1 - i, side - 1 - j),
        4: lambda i, j: (side - 1 - i, j), 5: lambda i, j: (j, i), 6: lambda i, j: (j, side - 1 - i),
        7: lambda i, j: (side - 1 - j, side - 1 - i), 8: lambda i, j: (side - 1 - j, i),
    }[mark]  # fmt: skip
    return np.array([[upright[where(i, j)] for j in range(side)] for i in range(side)], np.uint8)


@pytest.mark.parametrize("kind", ["png", "tif", "webp"])
@pytest.mark.parametrize("mark", range(1, 9))
def test_orientation(tmp_path: Path, kind: str, mark: int) -> None:
    upright, path = picture(), tmp_path / f"a.{kind}"
    stored = as_stored(upright, mark)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = mark
    options = {"tif": {"tiffinfo": {EXIF_ORIENTATION: mark}}, "webp": {"lossless": True, "exif": exif}}
    Image.fromarray(stored).save(path, **options.get(kind, {"exif": exif}))
    np.testing.assert_array_equal(read(path, orientation="apply"), upright)
    np.testing.assert_array_equal(read(path, orientation="ignore"), stored)
    assert mark == 1 or (stored != upright).any()


# ----------------------------------------------------------------------------------------- transparency, CMYK, frames


@pytest.mark.parametrize(
    ("colour", "behind"),
    [("black", (0, 0, 0)), ("grey", (128,) * 3), ("white", (255,) * 3), ("#ff0080", (255, 0, 128))],
)
def test_transparent_pixels_show_the_background(tmp_path: Path, colour: str, behind: tuple[int, ...]) -> None:
    image = picture(4)
    image[:4, ..., 3], image[4:8, ..., 3] = 0, 255
    Image.fromarray(image).save(tmp_path / "a.png")
    got = read(tmp_path / "a.png", background=colour)
    weight = image[..., 3:] / 255
    assert abs(got - (image[..., :3] * weight + np.array(behind) * (1 - weight))).max() <= 1
    assert (got[:4] == behind).all()
    np.testing.assert_array_equal(got[4:8], image[4:8, :, :3])


def test_a_transparent_entry_of_a_palette(tmp_path: Path) -> None:
    indices = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 3
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "a.png", transparency=1)
    image.save(tmp_path / "a.gif", transparency=1)
    colours = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]])
    np.testing.assert_array_equal(read(tmp_path / "plain.png"), colours[indices])  # needs no rule
    colours[1] = 255
    for name in ("a.png", "a.gif"):
        np.testing.assert_array_equal(read(tmp_path / name, background="white"), colours[indices])


def test_cmyk(tmp_path: Path) -> None:
    ink = picture(4)
    Image.fromarray(ink, "CMYK").save(tmp_path / "a.tif")
    expected = (255 - ink[..., :3].astype(float)) * (255 - ink[..., 3:].astype(float)) / 255
    assert abs(read(tmp_path / "a.tif", cmyk="convert") - expected).max() <= 1


@pytest.mark.parametrize("name", ["a.gif", "a.tif", "a.mpo", "a.jpg"])
def test_the_first_of_several_pictures(tmp_path: Path, name: str) -> None:
    first, second = (Image.fromarray(picture(seed=seed)) for seed in (1, 2))
    if name == "a.gif":
        first, second = first.convert("P"), second.convert("P")
    kind = "MPO" if name in ("a.mpo", "a.jpg") else None  # cameras give theirs the extension .jpg
    first.save(tmp_path / name, kind, save_all=True, append_images=[second])
    stream = io.BytesIO()
    first.save(stream, "JPEG" if kind else "PNG")
    expected = np.asarray(Image.open(stream).convert("RGB"))
    np.testing.assert_array_equal(read(tmp_path / name, frames="first"), expected)
    whole = (tmp_path / name).read_bytes()
    for end in range(20, len(whole) // 3, 40):  # it breaks off within the first picture
        (tmp_path / name).write_bytes(whole[:end])
        with pytest.raises(InputError):
            read(tmp_path / name, frames="first")


# -------------------------------------------------------------------------------------------------------------- refusal


def write_ambiguous(folder: Path, rule: str) -> Path:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    path = folder / "patient-4711.tif"
    if rule == "grey_levels":
        Image.fromarray(np.full((SIDE, SIDE), 1000, np.uint16)).save(path)
    elif rule == "orientation":
        Image.fromarray(picture()).save(path, tiffinfo={EXIF_ORIENTATION: 6})
    elif rule == "frames":
        Image.fromarray(picture()).save(path, save_all=True, append_images=[Image.fromarray(picture(seed=1))])
    else:
        Image.fromarray(picture(4), {"cmyk": "CMYK", "background": "RGBA"}[rule]).save(path)
    return path


VALUES = {"grey_levels": "full", "orientation": "apply", "background": "black", "cmyk": "convert", "frames": "first"}


@pytest.mark.parametrize("rule", VALUES)
def test_a_refusal_names_the_rule_that_resolves_it(tmp_path: Path, rule: str) -> None:
    path = write_ambiguous(tmp_path, rule)
    others = {name: value for name, value in VALUES.items() if name != rule}
    for rules in ({}, others):
        with pytest.raises(InputError) as caught:
            read(path, **rules)
        assert f"--{rule.replace('_', '-')} " in caught.value.fix
        assert "4711" not in str(caught.value)
    assert read(path, **{rule: VALUES[rule]}).shape == (SIDE, SIDE, 3)


def test_rules_change_no_file_that_needs_none(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png", **VALUES), picture())


def test_what_no_rule_resolves(tmp_path: Path) -> None:
    frames = [Image.fromarray(picture(seed=seed)) for seed in (1, 2)]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    Image.fromarray(np.ones((SIDE, SIDE), np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.ones((SIDE, SIDE), np.int32)).save(tmp_path / "signed.tif")
    for name, said in (("moving.png", "animated"), ("float.tif", "float"), ("signed.tif", "32-bit")):
        with pytest.raises(InputError, match=said):
            read(tmp_path / name, **VALUES)


@pytest.mark.parametrize(
    ("rule", "value"),
    [("grey_levels", "window:5,5"), ("grey_levels", "window:9,1"), ("grey_levels", "window:a,b"),
     ("grey_levels", "window:0,inf"), ("grey_levels", "window:1"), ("grey_levels", "0,5"), ("background", "mauve"),
     ("background", "#12345"), ("background", "")],
)  # fmt: skip
def test_wrong_values(rule: str, value: str) -> None:
    with pytest.raises(UsageError, match=rule):
        Decoding(**{rule: value})


def test_rules_are_for_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--orientation .* digits is not a folder"):
        open_dataset("digits", tmp_path, decoding=Decoding(orientation="apply"))


@real_data
def test_real_odd_files() -> None:
    """With all rules no more files are refused, and those that were taken before are unchanged."""
    taken = {}
    for rules in (Decoding(), Decoding(**VALUES)):
        for path in sorted(Path(os.environ["DPRANDP_REAL_DATA"], "odd-files").iterdir()):
            if path.name.lower().endswith(EXTENSIONS) and path.suffix != ".dcm":  # which have windows of their own
                try:
                    image = read_images([path], 32, "the images", rules)
                except InputError:
                    assert path not in taken
                else:
                    assert path not in taken or (image == taken[path]).all()
                    taken.setdefault(path, image)
    assert len(taken) >= 40
