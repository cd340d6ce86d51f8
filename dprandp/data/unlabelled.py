"""New images to classify. The guarantee does not cover these data, so messages name a file that cannot be read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from dprandp.config.declared import REFUSE, Decoding
from dprandp.data.decode import EXTENSIONS, is_litter, read_image, sized
from dprandp.data.npz import array_blocks, image_shape, read_headers
from dprandp.errors import InputError

ARRAYS = ("images", "x", "x_test")
"""Names under which an ``.npz`` file may hold the images; exactly one of them has to be there."""

LINKED, SPECIAL, BARE = "links to folders", "no regular files", "no extension"
"""Kinds of skipped files without an extension."""

_GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601 luma, as PIL's convert("L")


def read_unlabelled(path: Path, shape: tuple[int, int, int], rules: Decoding = REFUSE) -> np.ndarray:
    """Read a new image and bring it to the shape of the images that a model was trained on.

    An image of other proportions loses its edges: the largest centred part is kept. Grey and colour are converted.

    Args:
        shape: height, width, channels (1 or 3). rules: for ambiguous files.

    Returns:
        uint8 [height, width, channels].

    Raises:
        InputError: missing or damaged; the message names the file.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}", fix="check the path")
    return _grey_or_rgb(read_image(path, shape[0], shape[1], str(path), rules), shape[2])


def npz_blocks(place: str, shape: tuple[int, int, int], rows: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """New images from an ``.npz`` file, treated as ``read_unlabelled`` treats files, in blocks of up to ``rows``.

    Args:
        place: the file, with uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3] under one of the names ``ARRAYS``.
        shape: height, width, channels (1 or 3).

    Returns:
        Blocks of names (``PATH[i]``) and uint8 [rows, height, width, channels].

    Raises:
        InputError: at once, where its headers show that it holds no images; later, where it is damaged.
    """
    path = Path(place).expanduser()
    headers = read_headers(path)
    present = [name for name in ARRAYS if name in headers]
    if len(present) != 1:
        raise InputError(
            f"{path} holds {' and '.join(present) or 'none of the arrays ' + ', '.join(ARRAYS)}",
            fix="save the images to classify under one of these names, such as numpy.savez(path, images=…)",
        )
    size = image_shape(path, headers, present[0])

    def blocks() -> Iterator[tuple[list[str], np.ndarray]]:
        start = 0
        for block in array_blocks(path, present[0], rows):
            names = [f"{place}[{index}]" for index in range(start, start + len(block))]
            yield names, brought_to(block.reshape(-1, *size), shape)
            start += len(block)

    return blocks()


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
    height, width, channels = shape
    plain = many[..., 0] if many.shape[3] == 1 else many
    small = np.stack([np.asarray(sized(Image.fromarray(image), height, width)) for image in plain])
    return _grey_or_rgb(small.reshape(len(many), height, width, many.shape[3]), channels)


def skipped_text(kinds: Mapping[str, int]) -> str:
    """``skipped 3 files that are not images by name: .svs (2), .txt (1); readable are .png ...``."""
    count = sum(kinds.values())
    listed = ", ".join(f"{kind} ({number})" for kind, number in kinds.items())
    what = "1 file that is not an image" if count == 1 else f"{count} files that are not images"
    return f"skipped {what} by name: {listed}; readable are {' '.join(EXTENSIONS)}"


def image_files(folder: Path) -> tuple[list[Path], dict[str, int]]:
    """Every image file below a folder, by path, and how many other files of each kind; litter is in neither."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}", fix="check the path")
    found: list[Path] = []
    skipped: Counter[str] = Counter()

    def refuse(error: OSError) -> None:  # a folder that cannot be listed would hide its images
        raise InputError(f"{error.filename} cannot be listed: {error.strerror}", fix="check its permissions") from error

    for here, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not is_litter(name)]
        skipped[LINKED] += sum(os.path.islink(os.path.join(here, name)) for name in folders)
        for path in (Path(here, name) for name in files if not is_litter(name)):
            extension = path.suffix.lower()
            if not path.is_file():
                skipped[SPECIAL] += 1
            elif path.name.lower().endswith(EXTENSIONS):
                found.append(path)
            else:
                skipped[extension if extension.isprintable() and 0 < len(extension) <= 16 else BARE] += 1
    kinds = {kind: count for kind, count in sorted(skipped.items(), key=lambda item: (-item[1], item[0])) if count}
    if not found:
        raise InputError(
            f"{folder} holds no image" + (f": {skipped_text(kinds)}" if kinds else ""),
            fix=f"images are known by their names: {' '.join(EXTENSIONS)}",
        )
    return sorted(found), kinds


def _grey_or_rgb(images: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [..., H, W, 1 or 3] with the wanted number of channels."""
    if images.shape[-1] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=-1)
    return np.round(images @ _GREY).clip(0, 255).astype(np.uint8)[..., None]
