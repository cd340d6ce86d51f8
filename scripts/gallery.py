#!/usr/bin/env python3
"""The README's picture of all random processes: one row of images each, under the name that --process takes.

    python scripts/gallery.py                                    # writes scripts/images/processes.jpg
    python scripts/gallery.py --out sheet.png --process perlin kml:perlin

The picture is a function of the seed alone; a JPEG is compressed until it is no larger than --max-kilobytes.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dprandp.synth import PROCESSES, RESOLUTIONS, process_named, render_block

COMPOSED = ("kml:stylegan-oriented", "kml-mixup:stylegan-oriented", "mixture:spectrum-color,dead-leaves,fractal")
LABEL_HEIGHT = 15  # pixels
GAP = 2


def main() -> None:
    """Render and save the sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images" / "processes.jpg")
    parser.add_argument("--process", nargs="+", default=[*PROCESSES, *COMPOSED], metavar="NAME")
    parser.add_argument("--columns", type=int, default=6, help="images of each process")
    parser.add_argument("--resolution", type=int, default=64, choices=RESOLUTIONS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-kilobytes", type=int, default=300)
    args = parser.parse_args()

    rows = []
    for name in args.process:
        spec = process_named(name)
        images = render_block(name, args.seed, 0, min(args.columns, spec.block_size), args.resolution)
        rows.append(labelled_row(spec.name, images, args.columns))
        print(f"{name}: {len(images)} images")
    save(in_two_columns(rows), args.out, args.max_kilobytes)
    print(f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB")


def labelled_row(name: str, images: np.ndarray, columns: int) -> np.ndarray:
    """Images uint8 [N, R, R, 3] side by side under their name: uint8 [R + 15 + 2, (R + 2)·columns, 3]."""
    resolution = images.shape[1]
    sheet = Image.new("RGB", ((resolution + GAP) * columns, resolution + LABEL_HEIGHT + GAP), "white")
    ImageDraw.Draw(sheet).text((0, 0), name, fill="black", font=ImageFont.load_default(size=LABEL_HEIGHT - 3))
    for column, image in enumerate(images):
        sheet.paste(Image.fromarray(image), (column * (resolution + GAP), LABEL_HEIGHT))
    return np.asarray(sheet)


def in_two_columns(rows: list[np.ndarray]) -> Image.Image:
    """Rows below one another, the second half beside the first."""
    half = -(-len(rows) // 2)
    blank = [np.full_like(rows[0], 255)] * (2 * half - len(rows))
    left, right = np.concatenate(rows[:half]), np.concatenate([*rows[half:], *blank])
    gap = np.full((len(left), 6 * GAP, 3), 255, dtype=np.uint8)
    return Image.fromarray(np.concatenate([left, gap, right], axis=1))


def save(sheet: Image.Image, path: Path, max_kilobytes: int) -> None:
    """Write the sheet; as a JPEG with the best quality that stays within the limit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix not in (".jpg", ".jpeg"):
        sheet.save(path)
        return
    for quality in range(92, 20, -4):
        buffer = io.BytesIO()
        sheet.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= 1000 * max_kilobytes:
            path.write_bytes(buffer.getvalue())
            return
    raise SystemExit(f"the sheet does not fit in {max_kilobytes} kB; take fewer --columns or processes")


if __name__ == "__main__":
    main()
