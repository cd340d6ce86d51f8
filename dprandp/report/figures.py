"""Learning curves and large confusion matrices as SVG inside the page, with text as text.

Matplotlib draws with placeholder colours, which are then replaced by the page's CSS variables, for the light and the
dark page.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup
from PIL import Image

from dprandp.errors import CheckpointError
from dprandp.report.run import Measured

POINTS = 600
"""Most points of a curve; a longer one is thinned out."""

PREVIEW_WIDTH = 1280
"""Pixels; a wider contact sheet is made smaller."""

_COLOURS = {"#010203": "var(--ink)", "#040506": "var(--line)", "#070809": "var(--accent)"}
_INK, _LINE, _ACCENT = _COLOURS


def curve(name: str, steps: Sequence[float], values: Sequence[float | None], title: str, label: str) -> Markup:
    """A line over steps; None and NaN are gaps.

    Args:
        name: unique in the page; prefix of the drawing's ids.
        title: of the drawing, for screen readers.
        label: of the y axis.
    """
    every = -(-len(steps) // POINTS)
    x = np.asarray(steps, dtype=float)[::every]
    y = np.asarray([np.nan if value is None else value for value in values], dtype=float)[::every]
    figure = _figure(4.6, 2.5)
    axes = figure.add_subplot()
    axes.plot(x, y, color=_ACCENT, linewidth=1.6, marker="o" if len(x) < 15 else None, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.margins(x=0.02)
    axes.locator_params(axis="x", nbins=6, integer=True)
    axes.grid(axis="y", color=_LINE, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure, name, title)


def accuracy_points(name: str, stages: Sequence[Measured], others: Sequence[Measured]) -> Markup:
    """Test accuracy with its 95 % interval against ε: of a run's stages, which are named, and of other runs."""
    figure = _figure(6.4, 2.9)
    axes = figure.add_subplot()
    for each in (*others, *stages):
        own = each in stages
        low, high = each.interval or (each.accuracy, each.accuracy)
        axes.plot([each.epsilon] * 2, [100 * low, 100 * high], color=_ACCENT, linewidth=1.2)
        fill = {"markerfacecolor": _ACCENT if own else "none"}
        axes.plot([each.epsilon], [100 * each.accuracy], color=_ACCENT, marker="o", markersize=5, **fill)
        if own:
            place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(each.name, (each.epsilon, 100 * each.accuracy), color=_INK, fontsize=9, **place)
    axes.set_xlabel("ε")
    axes.set_ylabel("test accuracy, %")
    axes.margins(x=0.15, y=0.1)
    axes.grid(axis="y", color=_LINE, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure, name, "Test accuracy against ε")


def heat_picture(name: str, confusion: Sequence[Sequence[int]], title: str) -> Markup:
    """A confusion matrix with more classes than a table can show: shade = share of the true class."""
    counts = np.asarray(confusion, dtype=float)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # colour in alpha, so that an empty cell shows the page, light or dark
    picture = np.zeros((*share.shape, 4))
    picture[..., :3] = np.array([0xD9, 0x5F, 0x02]) / 255
    diagonal = np.eye(len(share), dtype=bool)
    picture[diagonal, :3] = np.array([0x2F, 0x7F, 0xC4]) / 255
    picture[..., 3] = np.sqrt(share)  # small shares would not be seen
    figure = _figure(4.6, 4.6)
    axes = figure.add_subplot()
    axes.imshow(picture, interpolation="nearest")
    axes.set_xlabel("predicted class (number)")
    axes.set_ylabel("true class (number)")
    return _svg(figure, name, title)


def preview_image(path: Path, alternative: str, kind: str = "JPEG") -> Markup:
    """A picture file as an ``img`` with its data inside; decoded and encoded again, so that only pixels pass.

    Args:
        kind: JPEG, or PNG for a few flat colours.

    Raises:
        CheckpointError: the file is no whole picture.
    """
    try:
        with Image.open(path, formats=["PNG"]) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CheckpointError(
            f"{path} is not a whole PNG file",
            fix="remove it: the report then leaves it out; or run the public stage again with --overwrite",
        ) from error
    if picture.width > PREVIEW_WIDTH:
        picture = picture.resize((PREVIEW_WIDTH, max(1, round(picture.height * PREVIEW_WIDTH / picture.width))))
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **({"quality": 88} if kind == "JPEG" else {}))
    data = base64.b64encode(buffer.getvalue()).decode()
    image = Markup('<img src="data:image/{};base64,{}" alt="{}" width="{}" height="{}">')
    return image.format(kind.lower(), data, alternative, picture.width, picture.height)


def _figure(width: float, height: float):
    from matplotlib.figure import Figure  # late: it takes half a second

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure, name: str, title: str) -> Markup:
    """The drawing as an ``svg`` element without any outside reference."""
    import matplotlib

    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.tick_params(colors=_INK, labelsize=9)
        axes.xaxis.label.set(color=_INK, fontsize=9)
        axes.yaxis.label.set(color=_INK, fontsize=9)
        for spine in axes.spines.values():
            spine.set_color(_LINE)
    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    # the salt makes the ids reproducible
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": ["DejaVu Sans"]}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawing = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", buffer.getvalue())
    drawing = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", drawing)
    for placeholder, variable in _COLOURS.items():
        drawing = drawing.replace(placeholder, variable)
    # a new opening tag: without the namespaces, which HTML does not need, and without a fixed size
    view, inner = re.search(r'<svg [^>]*(viewBox="[^"]*")[^>]*>(.*)</svg>', drawing, re.DOTALL).groups()
    opening = Markup('<svg {} role="img" aria-labelledby="{}-title"><title id="{}-title">{}</title>')
    return opening.format(Markup(view), name, name, title) + Markup(inner) + Markup("</svg>")
