"""The defaults of each stage at the sizes tiny, small and paper, and published recipes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dprandp.errors import UsageError

SIZES = ("tiny", "small", "paper")

PROJECTION = "projection"
"""Features of a WRN that are the first layer of its projection head."""

INPUT_SIZE = 32
"""Side of an extractor's input in pixels, where no other is asked for."""

SIZE_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "generate": {}, "pretrain": {"feature_stages": "all"}, "continue": {}, "probe": {}, "finetune": {},
    },
    "small": {
        "generate": {"count": 24_000},
        "pretrain": {
            "filters": 2400, "second_filters": 3200, "dictionary_patches": 400_000,
            "feature_stages": "all", "steps": 600, "batch_size": 64, "projection_hidden": 1024,
        },
        "continue": {"steps": 600, "instances": 2000},
        "probe": {"dims": 4096, "statistics_images": 2000, "steps": 200},
        "finetune": {},
    },
    # METHOD of Tang et al. 2023: 105,000 images, 200 epochs of batch 256, step schedule
    "paper": {
        "generate": {"count": 105_000, "resolution": 256},
        "pretrain": {
            "arch": "wrn-16-4", "filters": 6400, "second_filters": 6400, "dictionary_patches": 1_000_000,
            "steps": 82_031, "batch_size": 256, "schedule": "step", "projection_hidden": 4096, "checkpoint_every": 1000,
            "weight_standardisation": False, "pooling": "1", "feature_stages": "projection",
        },
        # Bu et al. 2024 train with B = 4096; steps and sizes are ours
        "continue": {"steps": 2000, "batch_size": 4096, "public_batch_size": 256, "instances": 10_000},
        "probe": {"dims": 4096, "statistics_images": 4000, "steps": 100},
        "finetune": {"recipe": "dp-randp", "steps": 779, "batch_size": 4096, "views": 16},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Defaults of a fine-tune that the configuration leaves open, by architecture.

    Attributes:
        steps: of the joint training. lr: learning rate of the head. extractor_scale: see ``dprandp/finetune``.
        batch_part: expected batch as a part of N. refit_steps: 0 for no refit.
    """

    steps: int
    lr: float
    extractor_scale: float
    batch_part: float
    refit_steps: int = 0


RECIPES: dict[str, Recipe] = {
    "patchnet": Recipe(steps=8, lr=4.0, extractor_scale=0.1, batch_part=0.02, refit_steps=120),
    "wrn": Recipe(steps=40, lr=0.4, extractor_scale=1.0, batch_part=0.08192),  # rates of Tang et al. 2023
    "scratch": Recipe(steps=100, lr=2.0, extractor_scale=1.0, batch_part=0.08192),  # rates of De et al. 2022
}


def recipe_for(arch: str, source: str) -> Recipe:
    """Defaults for an architecture; 'scratch' has its own."""
    return RECIPES["scratch" if source == "scratch" else "patchnet" if arch == "patchnet" else "wrn"]


def by_recipe(field: str, *names: str, form: str = "{:g}", named: bool = True) -> str:
    """A field of some recipes, for help texts: '8 (patchnet), 40 (wrn)'."""
    words = {"scratch": "from scratch"}
    said = {name: form.format(getattr(RECIPES[name], field)) for name in names}
    return ", ".join(f"{value} ({words.get(name, name)})" if named else value for name, value in said.items())


# ----------------------------------------------------------------------------------------------------------- published
#
# de2022: De et al. 2022, "Unlocking High-Accuracy Differentially Private Image Classification through Scale", arXiv
# 2204.13650. dp-randp: Tang et al. 2023, arXiv 2306.06076, with their released settings for CIFAR-10 at ε = 1 and the
# numbers of steps that their paper has for the other ε. Published σ are not used: σ is always calibrated for the run's
# own N, ε and δ. Where ε lies between two of the table the number of steps is interpolated, linearly in log ε, and
# ``note`` says so; outside there is no recipe.

RecipeName = Literal["ours", "de2022", "dp-randp"]
PRETRAINED = "pretrain"
"""Starting point of a fine-tune: the extractor of Phase I, without a probe."""


@dataclass(frozen=True)
class Row:
    """One setting of the table.

    Attributes:
        task: what it was tuned for. examples: N there.
        batch_size: expected batch B. lr: learning rate. views: K. steps: ε -> number of steps T.
    """

    task: str
    examples: int
    batch_size: int
    lr: float
    views: int
    steps: Mapping[float, int]


DE_2022: dict[tuple[str, str], Row] = {
    ("wrn-16-4", "scratch"): Row(
        "CIFAR-10 from scratch", 50_000, 4096, 2.0, 16, {1: 875, 2: 1125, 3: 1593, 4: 1687, 6: 1843, 8: 2500}
    ),
    ("wrn-40-4", "scratch"): Row(
        "CIFAR-10 from scratch", 50_000, 16384, 4.0, 16, {1: 906, 2: 1156, 3: 1656, 4: 1765, 6: 2007, 8: 2000}
    ),
    ("wrn-28-10", "init"): Row(
        "CIFAR-100 from public weights", 50_000, 16384, 1.0, 16, {1: 250, 2: 250, 4: 250, 8: 250}
    ),
    ("nf-resnet-50", "scratch"): Row("ImageNet from scratch", 1_281_167, 16384, 4.0, 4, {8: 71589}),
}
"""(architecture, source) -> its row."""

DP_RANDP = Row("CIFAR-10", 50_000, 4096, 0.4, 16, DE_2022["wrn-16-4", "scratch"].steps)

DP_RANDP_ONLY = {
    "source": PRETRAINED, "head_steps": 96, "head_lr": 15.0, "extractor_scale": 1.0, "refit_steps": 0,
    "clipping": "norm", "clip_norm": 1.0, "optimizer": "sgd", "momentum": 0.0, "ema": 0.9999,
}  # fmt: skip

COMMON = {
    "clipping": "rescaled", "clip_norm": 1.0, "optimizer": "sgd", "momentum": 0.0, "ema": 0.9999, "pooling": "1",
}  # fmt: skip
WRN_ONLY = {"padding": "same", "layer_order": "relu-norm-conv"}


def _row_of(recipe: str, arch: str, source: str) -> Row:
    row = DP_RANDP if recipe == "dp-randp" else DE_2022.get((arch, source))
    if row is None:
        known = "; ".join(f"--from {there} --arch {name}" for name, there in DE_2022)
        raise UsageError(
            f"the recipe {recipe} has no hyper-parameters for {arch} from {source}",
            fix=f"use one of these ({known}), or leave --recipe out",
        )
    return row


def settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a fine-tune that a recipe gives, from the recipe, arch, source and epsilon of a configuration.

    Returns:
        Nothing without a recipe, for a starting point that it does not know, or where a value has the wrong type (all
        of which is refused elsewhere).

    Raises:
        UsageError: no such row, or an ε outside the table.
    """
    recipe, arch = values.get("recipe"), values.get("arch", "wrn-16-4")
    source, epsilon = values.get("source"), values.get("epsilon", 1.0)
    known = {"de2022": ("scratch", "init"), "dp-randp": (None, PRETRAINED)}.get(str(recipe), ())
    if source not in known or not isinstance(arch, str):
        return {}
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or (epsilon != math.inf and epsilon > 1e300):
        return {}
    row = _row_of(recipe, arch, source)
    chosen = {"batch_size": row.batch_size, "lr": row.lr, "views": row.views, "steps": _steps(row, float(epsilon))[0]}
    if recipe == "dp-randp":
        return DP_RANDP_ONLY | chosen
    return COMMON | (WRN_ONLY if arch.startswith("wrn-") else {}) | chosen


def _steps(row: Row, epsilon: float) -> tuple[int, str]:
    """T for an ε, from the table or interpolated between two entries; and words for what is not in the table.

    Raises:
        UsageError: ε is outside the table.
    """
    known = sorted(row.steps)
    if epsilon == math.inf:
        return row.steps[known[-1]], f"; without privacy: the steps of ε = {known[-1]:g}"
    if epsilon in row.steps:
        return row.steps[epsilon], ""
    if not known[0] < epsilon < known[-1]:
        listed = ", ".join(f"{each:g}" for each in known)
        raise UsageError(
            f"the recipe has hyper-parameters for ε = {listed}, but not for ε = {epsilon:g}",
            fix="give --recipe ours, or --steps, --batch-size, --lr and --views of your own with it",
        )
    low = max(each for each in known if each < epsilon)
    high = min(each for each in known if each > epsilon)
    part = math.log(epsilon / low) / math.log(high / low)
    steps = round(row.steps[low] + part * (row.steps[high] - row.steps[low]))
    return steps, f"; ε = {epsilon:g} is not in its table: steps interpolated between ε = {low:g} and {high:g}"


def note(values: Mapping[str, Any], arch: str) -> str | None:
    """The published recipe of a fine-tune's configuration in words, for console and disclosure; None without one.

    What the configuration has otherwise than the recipe is named.

    Args:
        values: of the configuration, by name. arch: of its network.

    Raises:
        UsageError: no such row, or an ε outside the table.
    """
    recipe = values["recipe"]
    if recipe in (None, "ours"):
        return None
    published = settings(values)
    row = _row_of(recipe, arch, values["source"])
    of = {"de2022": "De et al. 2022", "dp-randp": "Tang et al. 2023"}[recipe]
    said = f"{recipe} ({of}, {row.task}, N = {row.examples:,}, {'wrn-16-4' if recipe == 'dp-randp' else arch})"
    said += _steps(row, values["epsilon"])[1]
    other = [f"{name} = {values[name]}" for name, value in published.items() if values[name] != value]
    if recipe == "dp-randp" and arch != "wrn-16-4":
        other.append(f"the network is {arch}")
    return said + ("" if not other else f", but {', '.join(other)}")
