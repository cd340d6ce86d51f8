"""New images to classify. The guarantee does not cover these data, so messages name a file that cannot be read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dprandp.config.decoding import REFUSE, Decoding
from dprandp.data.decode import EXTENSIONS, is_litter, read_image, sized
from dprandp.data.npz import image_shape, read_array, read_headers
from dprandp.errors import InputError, UsageError

ARRAYS = ("images", "x", "x_test")
"""Names under which an ``.npz`` file may hold the images; exactly one of them has to be there."""

LINKED, SPECIAL, BARE = "links to folders", "no regular files", "no extension"
"""Kinds of skipped files without an extension."""

_GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601 luma, as PIL's convert("L")


def read_unlabelled(
    paths: Sequence[Path],
    data: str | None,
    shape: tuple[int, int, int],
    on_skipped: Callable[[dict[str, int]], object] = lambda kinds: None,
    rules: Decoding = REFUSE,
) -> tuple[list[str], np.ndarray]:
    """Read new images and bring each to the shape of the images that a model was trained on.

    An image of other proportions loses its edges: the largest centred part is kept. Grey and colour are converted.

    Args:
        paths: image files.
        data: further images: ``folder:PATH`` (every image file below it, by path) or ``npz:PATH`` (uint8 [N, H, W],
            [N, H, W, 1] or [N, H, W, 3], in one of ``ARRAYS``); None for none.
        shape: height, width, channels (1 or 3).
        on_skipped: called once where a folder holds files that are no images by their names: how many of each kind
            (an extension such as ``.svs``, or ``LINKED``, ``SPECIAL``, ``BARE``), the most frequent first.
        rules: for ambiguous files.

    Returns:
        Names (paths as given; ``PATH[i]`` in an array), and uint8 [N, height, width, channels].

    Raises:
        InputError: missing, damaged or empty; the message names the file. UsageError: ``data`` is neither kind.
    """
    kind, _, rest = (data or "").partition(":")
    if data is not None and (kind not in ("folder", "npz") or not rest):
        raise UsageError(f"--data {data!r} names no images to classify", fix="give npz:PATH, folder:PATH, or files")
    names, parts, files = [], [], list(paths)
    if kind == "folder":
        found, skipped = image_files(Path(rest).expanduser())
        files += found
        if skipped:
            on_skipped(skipped)
    for path in files:
        if not path.is_file():
            raise InputError(f"there is no file {path}", fix="check the path")
        names.append(str(path))
        parts.append(_grey_or_rgb(read_image(path, shape[0], shape[1], str(path), rules)[None], shape[2]))
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


def _from_npz(path: Path) -> np.ndarray:
    headers = read_headers(path)
    present = [name for name in ARRAYS if name in headers]
    if len(present) != 1:
        raise InputError(
            f"{path} holds {' and '.join(present) or 'none of the arrays ' + ', '.join(ARRAYS)}",
            fix="save the images to classify under one of these names, such as numpy.savez(path, images=…)",
        )
    shape = image_shape(path, headers, present[0])
    return read_array(path, present[0]).reshape(-1, *shape)


def _grey_or_rgb(images: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [N, H, W, 1 or 3] with the wanted number of channels."""
    if images.shape[3] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=3)
    return np.round(images @ _GREY).clip(0, 255).astype(np.uint8)[..., None]
