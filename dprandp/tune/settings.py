"""The candidates of ``dprandp tune``, and its configuration; both are public."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from dprandp.config.schema import ProbeConfig
from dprandp.dpsgd.stage import budget_share
from dprandp.errors import UsageError
from dprandp.runs.context import Context, with_precision
from dprandp.runs.tuning import SYNTHETIC, Setting

LR_FACTORS = (1.0, 0.25, 0.5, 2.0, 4.0)
STEP_FACTORS = (1.0, 0.5, 2.0)
DIM_FACTORS = (1.0, 0.5)


@dataclass(frozen=True)
class TuneConfig:
    """How to tune."""

    on: str = SYNTHETIC  # or 'private', or the name of a public data set
    trials: int = 12  # settings to try; with 'private' the expected number of trials
    spend: float = 0.3  # with 'private': fraction of the probe's ε for tuning, in (0, 1)
    held_out: float = 0.2  # with 'private': chance that a record is scored on instead of fitted, in (0, 1)

    def __post_init__(self) -> None:
        if not 2 <= self.trials <= 1000:
            raise UsageError(f"--trials {self.trials} lies outside [2, 1000]", fix="give a number such as 12")
        for flag, value in (("--spend", self.spend), ("--held-out", self.held_out)):
            if not 0 < value < 1:
                raise UsageError(f"{flag} {value} lies outside (0, 1)", fix=f"give a {flag} such as 0.3")


def private_data(on: str) -> UsageError:
    """The error for tuning on the private data without charge."""
    return UsageError(
        f"--on {on} holds images of the private data set",
        fix="give --on private, which is charged to the budget, or the name of public data",
    )


def settings_for(config: ProbeConfig, dims: int) -> list[Setting]:
    """The public list of candidates, the configuration's own first; ``dims`` are those of the whitener."""
    made = itertools.product(LR_FACTORS, STEP_FACTORS, DIM_FACTORS)
    listed = [Setting(lr, max(1, round(t * config.steps)), max(1, round(d * dims))) for lr, t, d in made]
    return list(dict.fromkeys(listed))


def probe_epsilon(config: ProbeConfig) -> float:
    """ε of the probe, with its tuning; inf for no privacy."""
    return config.epsilon * budget_share(config)


def as_probe(config: ProbeConfig, context: Context) -> ProbeConfig:
    """The configuration with the precision that the probe will have."""
    return with_precision("probe", config, context)
