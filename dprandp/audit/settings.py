"""How much an audit tries."""

from __future__ import annotations

from dataclasses import dataclass

from dprandp.errors import UsageError

SIGNIFICANCE = 1e-3
"""Of each lower bound: how often a sound mechanism may be accused."""

MOST_TRIALS = 20_000_000
MOST_CANARIES = 200_000


@dataclass(frozen=True)
class AuditSettings:
    """How much is tried.

    Attributes:
        trials: of the distinguishing game, with the canary and as many without; None: as many as the claim needs.
        canaries: of the one run; None: as many as the game has trials, at most 200,000.
        controls: whether the controls are run.
        seed: public randomness: labels, which canaries are in, simulated power. Never the noise.
        with_data: replay on the run's private data as well.
        black_box: play the game on released heads too, where a mechanism fits one on full batches.
        images: images of one made-up record: more than 1 where the run protects units of several.
    """

    trials: int | None = None
    canaries: int | None = None
    controls: bool = True
    seed: int = 0
    with_data: bool = False
    black_box: bool = False
    images: int = 1

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("trials", self.trials, 100, MOST_TRIALS), ("canaries", self.canaries, 20, MOST_CANARIES),
            ("seed", self.seed, 0, 2**63 - 1),
        ):  # fmt: skip
            if value is not None and not low <= value <= high:
                raise UsageError(f"--{name} {value} is out of range", fix=f"give a number from {low} to {high}")
