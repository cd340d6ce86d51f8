"""One DICOM file to an 8-bit image: stored values, rescaled, through a window. Nothing else of the file is kept.

Pixels are read as pydicom itself decodes them: uncompressed, deflated and RLE. Decoders of JPEG fill in what is missing
of a truncated stream without a word, so these are refused by name.

First comes what the decoders of image files share: limits, the window of grey levels, and the words of a refusal.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dprandp.config.declared import Decoding, flag

# ------------------------------------------------------------------------- shared with the decoder of other image files

MAX_PIXELS = 50_000_000
"""Most pixels one image may have; more is taken for a decompression bomb."""


def windowed(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 of numbers: ``low`` and less to 0, ``high`` and more to 255, evenly between, halves rounded up."""
    scaled = np.floor((values - low) * 255 / (high - low) + 0.5)
    return np.clip(scaled, 0, 255).astype(np.uint8)


def give(rule: str, value: str, otherwise: str) -> str:
    """The fix of a refusal that a declared rule resolves."""
    return f"declare how to read such files with {flag(rule)} {value}, or {otherwise}"


# ---------------------------------------------------------------------------------------------------------------- DICOM

DICOM = (".dcm", ".dicom")
"""Extensions."""

# what pydicom logs about a private file would otherwise reach stderr
logging.getLogger("pydicom").addHandler(logging.NullHandler())
logging.getLogger("pydicom").propagate = False

CONVERT = "convert it to 8-bit PNG with a fixed, public scale"
_NATIVE = {
    "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2",
    "1.2.840.10008.1.2.5",
}  # fmt: skip
"""Transfer syntaxes: implicit, explicit, deflated and big-endian without compression of pixels, and RLE."""


def read_dicom(path: Path, rules: Decoding) -> Image.Image | tuple[str, str]:
    """The image of a file, grey or RGB; or why it is not taken, and what to do.

    Raises:
        Anything that pydicom raises for a file that it cannot decode.
    """
    try:
        import pydicom
        from pydicom.pixels import pixel_array
    except ImportError:
        return "DICOM, which needs pydicom", 'pip install "dprandp[dicom]", or convert it to PNG'
    file = pydicom.dcmread(path)
    if objection := _objection(file, rules):
        return objection
    # index 0 decodes one frame, also where there are more
    pixels = pixel_array(file, index=0)
    if file.SamplesPerPixel == 3:
        return Image.fromarray(np.ascontiguousarray(pixels))
    levels = _levels(file, rules)
    if isinstance(levels[0], str):
        return levels
    values = pixels.astype(np.float64) * float(file.get("RescaleSlope", 1)) + float(file.get("RescaleIntercept", 0))
    grey = windowed(values, *levels)
    return Image.fromarray(255 - grey if file.PhotometricInterpretation == "MONOCHROME1" else grey)


def _objection(file: Any, rules: Decoding) -> tuple[str, str] | None:
    if "PixelData" not in file:
        return "DICOM without pixels", "replace or remove it"
    if int(file.Rows) * int(file.Columns) > MAX_PIXELS:
        return f"larger than {MAX_PIXELS // 10**6} million pixels", "make it smaller"
    syntax = file.file_meta.TransferSyntaxUID
    if syntax not in _NATIVE:
        return f"DICOM compressed as {syntax.name}", "decompress it (dcmdjpeg of DCMTK does), or convert it to PNG"
    if int(file.get("NumberOfFrames") or 1) > 1 and rules.frames is None:
        return "DICOM of several frames", give("frames", "first", "keep one frame")
    kind, bits = file.PhotometricInterpretation, int(file.BitsAllocated)
    if kind in ("RGB", "YBR_FULL", "YBR_FULL_422") and bits == 8:
        return None
    if kind not in ("MONOCHROME1", "MONOCHROME2") or bits not in (8, 16):
        return f"DICOM of the kind {kind} with {bits} bits", CONVERT
    if file.get("ModalityLUTSequence"):
        return "DICOM whose values go through a lookup table", CONVERT
    return None


def _levels(file: Any, rules: Decoding) -> tuple[float, float] | tuple[str, str]:
    """Values, after rescaling, that become black and white; or an objection."""
    if rules.window is not None:
        return rules.window
    stored, signed = int(file.BitsStored), bool(file.PixelRepresentation)
    centre, width = file.get("WindowCenter"), file.get("WindowWidth")
    if rules.grey_levels == "full" or (centre is None and stored <= 8 and not signed):
        slope, intercept = float(file.get("RescaleSlope", 1)), float(file.get("RescaleIntercept", 0))
        low, high = (-(2 ** (stored - 1)), 2 ** (stored - 1) - 1) if signed else (0, 2**stored - 1)
        return tuple(sorted((low * slope + intercept, high * slope + intercept)))
    declare = give("grey_levels", "window:LO,HI", CONVERT)
    if centre is None or width is None or file.get("VOILUTSequence"):
        return "DICOM without a window of grey levels", declare
    function = file.get("VOILUTFunction") or "LINEAR"
    if not np.isscalar(centre) and not isinstance(centre, float | int):
        return "DICOM with several windows of grey levels", declare
    centre, width = float(centre), float(width)
    if function == "LINEAR" and width > 1:  # part 3 of the standard, C.11.2.1.2.1
        return centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    if function == "LINEAR_EXACT" and width > 0:
        return centre - width / 2, centre + width / 2
    return f"DICOM with the window function {function}, or an empty window", declare
