"""Options of the fine-tune beyond the plain DP-SGD: published recipes, public weights, masks, ingredients.

Everything is public and None by default: not used. ``config.FinetuneConfig`` inherits these fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import UsageError, nearest

LONGEST_TEXT = 500

OPTION_CHOICES = {
    "recipe": ("de2022",),
    "padding": ("symmetric", "same"),
    "pooling": ("1", "4", "1+4"),
    "layer_order": (
        "relu-norm-conv", "norm-relu-conv", "norm-relu-conv+relu-norm-skip", "relu-norm-conv+norm-relu-skip",
    ),
}  # fmt: skip

OPTIMIZERS = ("sgd", "adam")
"""See ``stages/private_optimizers.py``. Not those of public training, which is asked for by the same name."""

WITHOUT_PHASE_ONE = ("scratch", "init")
"""Sources that need neither Phase I nor Phase II: random weights, or public ones from a file."""


@dataclass(frozen=True)
class FinetuneOptions:
    """Fields that ``FinetuneConfig`` has beside its own."""

    recipe: str | None = None
    """'de2022': the hyper-parameters of De et al. 2022 for this architecture and ε (see ``published.py``)."""
    init: str | None = None
    """safetensors file with public weights of the network, for source = 'init'."""
    init_source: str | None = None
    """What they were learned from, in the user's words: she declares them public."""
    layer_order: str | None = None
    """Of a network that is not pretrained here; a key of ``vision.wrn.LAYER_ORDERS``. None: relu-norm-conv."""
    padding: str | None = None
    """'same': convolutions with stride 2 pad as De et al.'s do (below and right); None: 'symmetric'."""
    pooling: str | None = None
    """Grids that features are averaged over. None: '1+4'; '1' is the published global average."""
    optimizer: str | None = None
    """What is done with noisy gradients: 'sgd' (None: so) or 'adam'."""
    momentum: float | None = None
    """None: 0 for sgd, 0.9 for adam."""
    freeze: str | None = None
    """'random' or 'magnitude': train a part of the extractor's weights, chosen once (see ``stages/masks.py``); with
    scope = 'block' also 'last'."""
    select: str | None = None
    """The same, chosen anew every ``every`` steps."""
    keep: float | None = None
    """The part that is trained."""
    prune: str | None = None
    """With freeze: 'hold' leaves the other weights as they are (None: so), 'zero' removes them."""
    every: int | None = None
    """With select. None: 10."""
    scope: str | None = None
    """The part is taken of all weights together ('global'; None: so), of each tensor ('layer'), or of whole blocks
    ('block'; see ``stages/frozen_blocks.py``)."""


def validate_options(values: Mapping[str, Any]) -> None:
    """Refuse values out of range, and combinations that make no sense, in words.

    Args:
        values: settings of a fine-tune that are not None.

    Raises:
        UsageError: naming the value.
    """
    optimizer = values.get("optimizer", "sgd")
    if optimizer not in OPTIMIZERS:
        raise UsageError(f"[finetune] optimizer = {optimizer!r} is unknown", fix=nearest(optimizer, OPTIMIZERS))
    _validate_start(values)


def _validate_start(values: Mapping[str, Any]) -> None:
    source = values.get("source", "probe")
    if source == "init" and "init" not in values:
        raise UsageError("--from init needs a file of public weights", fix="give --init FILE.safetensors")
    if "init" in values and source != "init":
        raise UsageError(f"--init brings public weights, and --from {source} does not use them", fix="drop one of them")
    if ("init" in values) != ("init_source" in values):
        problem = "--init-source without --init says nothing"
        if "init" in values:
            problem = "nobody said where the weights of --init come from: that they are public is yours to declare"
        raise UsageError(problem, fix='give --init FILE with --init-source TEXT, such as "ImageNet-1k, from ..."')
    text = values.get("init_source")
    if text is not None and not (text.isprintable() and 0 < len(text) <= LONGEST_TEXT):
        raise UsageError(
            f"init_source is not one line of 1 to {LONGEST_TEXT} printable characters", fix="say it in one short line"
        )
    if source not in WITHOUT_PHASE_ONE:
        for key in ("layer_order", "padding", "pooling", "recipe"):
            if key in values:
                raise UsageError(
                    f"--{key.replace('_', '-')} is for a network that is made here; --from {source} has one already",
                    fix="give --from scratch or --init FILE with it, or drop it",
                )
