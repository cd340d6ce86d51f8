"""What ``bench.py --quick`` must not fall short of: about half of what was measured, as a net for regressions.

They are no targets. A bound is crossed by losing the method (a dense loop instead of a closed form), not by a busy
machine: every figure is a ratio within one run. The key is ``Figure.key``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from benchmark.accounting import LIBRARY
from benchmark.cases import Figure, Limit
from benchmark.finetuning import PLAIN
from benchmark.generator import DENSE
from benchmark.patchnet import AUTOGRAD, LAYERS
from benchmark.peer_opacus import GHOST, HOOKS
from benchmark.pretraining import PURE

BOUNDS: dict[str, Limit] = {
    f"generator time {DENSE}": Limit(40),
    f"pretraining time {PURE}": Limit(0.4),
    f"patchnet time {LAYERS}": Limit(2),
    f"patchnet-gradients time {AUTOGRAD}": Limit(0.8),
    f"probe time {HOOKS}": Limit(1.5),
    f"probe time {GHOST}": Limit(0.6),
    f"finetune time {PLAIN}": Limit(2, at_most=True),
    f"finetune-opacus time {HOOKS}": Limit(1),
    f"one-view time {PLAIN}": Limit(5, at_most=True),
    f"accountant time {LIBRARY}": Limit(2),
}


def bounded(figures: Iterable[Figure]) -> list[Figure]:
    """The figures, each with its bound where it has one."""
    return [replace(figure, bound=BOUNDS.get(figure.key)) for figure in figures]


def regressions(figures: Iterable[Figure]) -> list[Figure]:
    """Those past their bound."""
    return [figure for figure in figures if figure.held is False]
