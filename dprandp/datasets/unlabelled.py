"""New images to classify: files, a folder of them, or one array of an ``.npz`` file. No labels, no splits.

These are not the data that a guarantee speaks of, so a file that cannot be read is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dprandp.datasets.images import EXTENSIONS, centred, read_image
from dprandp.datasets.npz import read_array, read_headers
from dprandp.errors import InputError, UsageError

ARRAYS = ("images", "x", "x_test")
"""Names under which an ``.npz`` file may hold the images; exactly one of them has to be there."""

_GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601 luma, as PIL's convert("L")


def read_unlabelled(
    paths: Sequence[Path], data: str | None, shape: tuple[int, int, int]
) -> tuple[list[str], np.ndarray]:
    """Read new images and bring each to the shape of the images that a model was trained on.

    An image of other proportions loses its edges: the largest centred part is kept. Grey and colour are converted.

    Args:
        paths: image files.
        data: further images: ``folder:PATH`` (every image file below it, by path) or ``npz:PATH`` (uint8 [N, H, W],
            [N, H, W, 1] or [N, H, W, 3], in the array ``images``, ``x`` or ``x_test``); None for none.
        shape: height, width, channels (1 or 3).

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
        files += _below(Path(rest).expanduser())
    for path in files:
        if not path.is_file():
            raise InputError(f"there is no file {path}", fix="check the path")
        names.append(str(path))
        parts.append(_grey_or_rgb(read_image(path, shape[0], shape[1], str(path))[None], shape[2]))
    if kind == "npz":
        images = _from_npz(Path(rest).expanduser())
        names += [f"{rest}[{index}]" for index in range(len(images))]
        parts += [_resized(_grey_or_rgb(image[None], shape[2])[0], shape)[None] for image in images]
    if not names:
        raise UsageError("there is no image to classify", fix="name image files, or give --data npz:PATH | folder:PATH")
    return names, np.concatenate(parts)


def _below(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}", fix="check the path")
    found = sorted(path for path in folder.rglob("*") if path.name.lower().endswith(EXTENSIONS) and path.is_file())
    if not found:
        raise InputError(f"{folder} holds no image", fix=f"images are known by their names: {' '.join(EXTENSIONS)}")
    return found


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
