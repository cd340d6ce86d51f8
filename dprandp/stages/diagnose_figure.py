"""terms.png: the three terms over the public steps, and the loss of held-out public images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dprandp.files import atomic_path

TERMS = {
    "along_gradient": ("GᵀHG: curvature", "#1b9e77"),
    "sampling": ("tr(HΣ)/B: the batch", "#1f6fb5"),
    "decelerator": ("σ² tr(H)/(c²B²): privacy", "#d95f02"),
}


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a diagnosis as a PNG file.

    Args:
        result: of ``diagnose.run``.
        path: the file.

    Raises:
        StorageError: the disk refuses.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [row["step"] for row in result["terms"]]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, (label, colour) in TERMS.items():  # a logarithm shows no negative estimate: a gap is left there
        values = [row[name] if row[name] > 0 else math.nan for row in result["terms"]]
        left.plot(steps, values, color=colour, label=label, marker="o", markersize=3)
    left.set_yscale("log")
    left.set_title("terms of the denominator of ΔL*", fontsize=10)
    left.legend(fontsize=8)
    right.plot(steps, [row["loss"] for row in result["terms"]], color="#1c2127", marker="o", markersize=3)
    right.set_title("loss of held-out public images", fontsize=10)
    for rule, step in result["rules"].items():
        if step is not None:
            for axes in (left, right):
                axes.axvline(step, color="#7570b3", linewidth=0.8, linestyle="--" if rule == "plateau" else ":")
            right.annotate(f"{rule}: {step}", (step, 0.02 + 0.08 * (rule == "plateau")), fontsize=8,
                           xycoords=("data", "axes fraction"))  # fmt: skip
    for axes in (left, right):
        axes.set_xlabel("public steps")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
