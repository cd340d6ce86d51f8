"""audit.png: what was claimed, what was shown, and which faults were seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dprandp.files import atomic_path


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw an audit's result as a PNG file.

    Args:
        result: of ``audit.audit_run``.
        path: the file.

    Raises:
        StorageError: the disk refuses.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    mechanisms = result["mechanisms"]
    faults = list(dict.fromkeys(control["name"] for found in mechanisms for control in found["controls"]))
    figure = Figure(figsize=(11 if faults else 6, 2.2 + 0.7 * max(len(mechanisms), len(faults) / 2)),
                    layout="constrained")  # fmt: skip
    FigureCanvasAgg(figure)
    left, *right = figure.subplots(1, 2 if faults else 1, squeeze=False)[0]
    for place, found in enumerate(mechanisms):
        left.barh(place, found["epsilon_claimed"], height=0.66, color="#d5dae0", label="claimed ε (upper bound)")
        left.barh(place - 0.17, found["two_world"]["epsilon_lower"], height=0.28, color="#1f6fb5",
                  label="shown by two worlds")  # fmt: skip
        left.barh(place + 0.17, found["one_run"]["epsilon_lower"], height=0.28, color="#d95f02",
                  label="shown by one run")  # fmt: skip
    left.set_yticks(range(len(mechanisms)), [found["name"] for found in mechanisms])
    left.set_xlabel("ε")
    left.set_title(f"{result['outcome']} (significance {result['significance']:g})", fontsize=10)
    handles, labels = left.get_legend_handles_labels()
    left.invert_yaxis()
    figure.legend(handles[:3], labels[:3], fontsize=8, ncols=3, loc="outside lower left")
    if right:
        _controls(right[0], mechanisms, faults)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _controls(axes: Any, mechanisms: list[dict[str, Any]], faults: list[str]) -> None:
    """One row a fault: its μ against the claim; hollow where only the replay saw it, a cross where nothing did."""
    for found in mechanisms:
        claimed = found["two_world"]["mu_claimed"]
        for control in found["controls"]:
            seen, place = control["by"], faults.index(control["name"])
            shape = {"marker": "o" if seen else "x", "fillstyle": "full" if "two worlds" in seen else "none"}
            axes.plot((control["mu_lower"] or 0) / claimed, place, color="#1f6fb5" if seen else "#b3161d", **shape)
    axes.axvline(1, color="#1c2127", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_yticks(range(len(faults)), faults)
    axes.invert_yaxis()
    axes.set_xlabel("μ shown by two worlds / μ claimed")
    axes.set_xlim(left=0)
    axes.set_title("faults: ● two worlds, ○ replay, × missed", fontsize=10)
