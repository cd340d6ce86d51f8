"""DICOM files: rescaled, windowed and inverted by the standard's formulas, or refused by name."""

from __future__ import annotations

import os
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from dprandp.config.declared import Decoding
from dprandp.data import open_dataset, read_unlabelled
from dprandp.data.decode import read_images
from dprandp.errors import InputError

pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed (the extra dicom)")
from pydicom import uid  # noqa: E402
from pydicom.dataset import FileDataset, FileMetaDataset  # noqa: E402

SIDE = 16
SECRET = "Patient^4711"


def write(path: Path, pixels: np.ndarray, kind: str = "MONOCHROME2", syntax: str | None = None, **more: object) -> Path:
    """A file of pixels [rows, columns], [rows, columns, 3] or [frames, rows, columns]."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = uid.SecondaryCaptureImageStorage, "1.2.3"
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID, file.PatientName = meta.MediaStorageSOPClassUID, "1.2.3", SECRET
    colour, frames = kind in ("RGB", "YBR_FULL"), pixels.ndim == 3 and pixels.shape[2] != 3
    file.Rows, file.Columns = pixels.shape[1:3] if frames else pixels.shape[:2]
    file.PhotometricInterpretation, file.SamplesPerPixel = kind, 3 if colour else 1
    bits = pixels.dtype.itemsize * 8
    file.BitsAllocated, file.BitsStored, file.HighBit = bits, bits, bits - 1
    file.PixelRepresentation = int(pixels.dtype.kind == "i")
    if colour:
        file.PlanarConfiguration = 0
    if frames:
        file.NumberOfFrames = len(pixels)
    for name, value in more.items():
        setattr(file, name, value)
    file.PixelData = pixels.tobytes()
    if syntax == "rle":
        file.compress(uid.RLELossless)
    file.save_as(path, enforce_file_format=True)
    return path


def read(path: Path, **rules: str) -> np.ndarray:
    return read_images([path], SIDE, "the images", Decoding(**rules))[0].astype(int)


def stored(low: int = -900, high: int = 1500) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, (SIDE, SIDE)).astype(np.int16)


def expected(pixels: np.ndarray, slope: float, intercept: float, low: Fraction, high: Fraction) -> np.ndarray:
    """The slow way, exactly."""

    def one(value: int) -> int:
        x = value * Fraction(slope) + Fraction(intercept)
        return min(255, max(0, ((x - low) * 255 / (high - low) + Fraction(1, 2)).__floor__()))

    return np.array([[one(int(value)) for value in row] for row in pixels])


@pytest.mark.parametrize("syntax", [None, "rle"])
def test_rescaled_and_through_the_files_own_window(tmp_path: Path, syntax: str | None) -> None:
    facts = {"RescaleSlope": "1.5", "RescaleIntercept": "-24", "WindowCenter": "40", "WindowWidth": "401"}
    path = write(tmp_path / "a.dcm", stored(), syntax=syntax, **facts)
    # ((x - (c - 0.5)) / (w - 1) + 0.5) * 255 is 0 and 255 at these two
    low, high = (Fraction(40) - Fraction(1, 2) + sign * Fraction(400, 2) for sign in (-1, 1))
    got = read(path)
    assert (got == got[..., :1]).all()
    np.testing.assert_array_equal(got[..., 0], expected(stored(), 1.5, -24, low, high))
    unscaled = expected(stored(), 1, 0, low, high)  # the control
    assert (got[..., 0] != unscaled).any()
    exact = write(tmp_path / "b.dcm", stored(), VOILUTFunction="LINEAR_EXACT", **facts)
    bounds = Fraction(40) - Fraction(401, 2), Fraction(40) + Fraction(401, 2)
    np.testing.assert_array_equal(read(exact)[..., 0], expected(stored(), 1.5, -24, *bounds))


def test_a_declared_window_replaces_that_of_the_file(tmp_path: Path) -> None:
    facts = {"RescaleSlope": "2", "RescaleIntercept": "10", "WindowCenter": "5", "WindowWidth": "9"}
    path = write(tmp_path / "a.dcm", stored(), **facts)
    got = read(path, grey_levels="window:-100,900")[..., 0]
    np.testing.assert_array_equal(got, expected(stored(), 2, 10, Fraction(-100), Fraction(900)))
    full = read(path, grey_levels="full")[..., 0]
    bounds = Fraction(2 * -32768 + 10), Fraction(2 * 32767 + 10)
    np.testing.assert_array_equal(full, expected(stored(), 2, 10, *bounds))


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    for kind, sign in (("MONOCHROME2", 1), ("MONOCHROME1", -1)):
        got = read(write(tmp_path / f"{kind}.dcm", pixels, kind))[..., 0]  # 8 bits need no window
        np.testing.assert_array_equal(got, pixels if sign == 1 else 255 - pixels.astype(int))


def test_colour_and_first_frames(tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    np.testing.assert_array_equal(read(write(tmp_path / "a.dcm", pixels, "RGB")), pixels)
    grey = np.full((SIDE, SIDE, 3), (77, 128, 128), np.uint8)
    assert (read(write(tmp_path / "b.dcm", grey, "YBR_FULL")) == 77).all()
    frames = np.random.default_rng(3).integers(0, 256, (4, SIDE, SIDE), dtype=np.uint8)
    path = write(tmp_path / "c.dcm", frames)
    with pytest.raises(InputError, match="several frames"):
        read(path)
    np.testing.assert_array_equal(read(path, frames="first")[..., 0], frames[0])


@pytest.mark.parametrize(
    ("facts", "said", "fix"),
    [({}, "without a window", "--grey-levels window:LO,HI"),
     ({"WindowCenter": ["1", "2"], "WindowWidth": ["3", "4"]}, "several windows", "--grey-levels"),
     ({"WindowCenter": "1", "WindowWidth": "9", "VOILUTFunction": "SIGMOID"}, "SIGMOID", "--grey-levels"),
     ({"WindowCenter": "1", "WindowWidth": "0"}, "empty window", "--grey-levels"),
     ({"PhotometricInterpretation": "PALETTE COLOR"}, "PALETTE COLOR", "PNG")],
)  # fmt: skip
def test_what_is_not_clear_is_refused(tmp_path: Path, facts: dict[str, object], said: str, fix: str) -> None:
    path = write(tmp_path / "4711.dcm", stored(), **facts)
    with pytest.raises(InputError, match=said) as caught:
        read(path)
    assert fix in caught.value.fix
    assert "4711" not in str(caught.value)
    if "--grey-levels" in fix:
        assert read(path, grey_levels="window:0,100").shape == (SIDE, SIDE, 3)


def test_other_transfer_syntaxes_are_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", np.zeros((SIDE, SIDE), np.uint8))
    file = pydicom.dcmread(path)
    file.file_meta.TransferSyntaxUID = uid.JPEG2000Lossless
    file.PixelData = pydicom.encaps.encapsulate([b"\0" * 8])
    file["PixelData"].is_undefined_length = True
    file.save_as(path)
    with pytest.raises(InputError, match="compressed as JPEG 2000"):
        read(path)


def test_truncated_files_and_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for syntax in (None, "rle"):
        path = write(tmp_path / "a.dcm", stored(), syntax=syntax, WindowCenter="1", WindowWidth="9")
        whole = path.read_bytes()
        picture, ends = read(path), (*range(10, len(whole) - 12, 23), len(whole) - 12, len(whole) - 3)
        taken = 0
        for end in ends:
            path.write_bytes(whole[:end])
            try:
                cut = read(path)
            except InputError:
                continue
            taken += 1  # it lacks no pixel, but bytes at its end that say so
            assert (cut == picture).all()
        assert taken <= 1
    path.write_bytes(whole)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(InputError, match="needs pydicom") as caught:
        read(path)
    assert "dprandp[dicom]" in caught.value.fix


def test_a_folder_of_them_and_new_ones(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            write(tmp_path / f"set/{split}/{name}/0.dcm", stored())
    rules = Decoding(grey_levels="window:-900,1500")
    dataset = open_dataset(f"folder:{tmp_path}/set", tmp_path, decoding=rules)
    assert dataset.train().images.shape == (2, 32, 32, 3)
    new = read_unlabelled(tmp_path / "set/test/a/0.dcm", (32, 32, 3), rules)[None]
    np.testing.assert_array_equal(new[0], dataset.train().images[0])


@pytest.mark.skipif("DPRANDP_REAL_DATA" not in os.environ, reason="DPRANDP_REAL_DATA names no folder with odd-files/")
def test_real_files() -> None:
    """Each is read, or refused; one slice in three encodings is the same picture."""
    folder, taken = Path(os.environ["DPRANDP_REAL_DATA"], "odd-files"), {}
    for path in sorted(folder.glob("*.dcm")):
        try:
            taken[path.name] = read(path, grey_levels="full", frames="first")
        except InputError:
            continue
    assert len(taken) >= 8
    same = [taken[f"dcm_MR_small{kind}.dcm"] for kind in ("", "_RLE", "_bigendian")]
    assert (same[0] == same[1]).all()
    assert (same[0] == same[2]).all()
