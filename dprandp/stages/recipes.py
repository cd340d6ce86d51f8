"""What each architecture's fine-tune does where the configuration leaves it open."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Defaults of an architecture that the configuration leaves open.

    Attributes:
        steps: of the joint training. lr: learning rate of the head. extractor_scale: see the module's docstring.
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
