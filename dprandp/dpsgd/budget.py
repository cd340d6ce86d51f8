"""The run's privacy budget: fixed before the data are first read, kept with the plans in ``privacy/plan.json``.

*What accuracy to expect* of a private head, before anything is spent, follows from N, ε, δ and the number of classes
alone. A head starts at zero. What N records teach it about one of K classes is a sum over about N/K of them, each of a
bounded length. The noise of all steps together is that of one Gaussian mechanism: its standard deviation is 1/μ of that
bound. So signal over noise is μN/K, up to a constant. The dimension does not enter: a score is the product with one
feature vector of length 1, along which the noise is as large in a thousand dimensions as in ten.

The constant was measured: ``scripts/small_data.py`` simulates the probe on parts of Fashion-MNIST (training split; N =
100 to 3,000, ε = .5 to 8, K = 2, 4, 10), and compares the gain over guessing with that of the same head on the same
images without noise. The part that is kept is about s/(s + 7) for s = μN/K (docs/stages.md has the table).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from dprandp.config.schema import same_data_name
from dprandp.errors import BudgetError, CheckpointError, InputError, UsageError
from dprandp.privacy.accounting import advised_delta
from dprandp.privacy.gaussian_dp import gaussian_dp_mu
from dprandp.privacy.mechanism import PrivatePlan, validate_budget
from dprandp.privacy.selection import SelectionPlan
from dprandp.runs.directory import RunDir, frozen
from dprandp.runs.files import from_json
from dprandp.runs.ledger import open_run_ledger, plan_file
from dprandp.runs.tuning import TUNE

ADJACENCY = "zero-out of one record"
"""Neighbours are data sets in one of which a record's slot is empty: the record contributes nothing to any sum, while
N, q and all other positions stay the same. A record is one unit of privacy: one image, or all images of one patient,
say (``DataSpec.unit``)."""
BUDGET_KEYS = ("data", "epsilon", "delta", "examples", "unit")
NO_PUBLIC_PART = "none"
NEW_RUN = "start a new --run and add up the ε of both"
ROUNDING = 1e-9
"""Tolerance of ε for rounding, as a stage's target is computed from the budget."""


@dataclass(frozen=True)
class Budget:
    """The budget of the whole run, fixed before the data are first read.

    One chosen after seeing a result would need a privacy odometer instead of the composition that is accounted here, so
    a changed budget is refused.
    """

    data: str  # the name under which the data were first given
    epsilon: float
    delta: float
    examples: int  # N, units of privacy
    unit: str  # of privacy, in words
    public_part: str = NO_PUBLIC_PART  # of the training images, in words

    @property
    def declared_part(self) -> str | None:
        """The public part; None where no part is public."""
        return None if self.public_part == NO_PUBLIC_PART else self.public_part

    def refuse_other(self, other: Budget) -> None:
        """Raise if a command's budget differs from the run's; ``training_data.py`` compares the data by content later.

        Raises:
            BudgetError: ε, δ or the unit of privacy differ. UsageError: N does.
            InputError: N does, and the data lie where the run's data lay.
        """
        moved = not same_data_name(self.data, other.data)
        if moved and self.examples != other.examples:
            raise UsageError(
                f"this run is about {self.data} with N = {self.examples}, not {other.data} with N = {other.examples}",
                fix="give another --run for other data",
            )
        if self.unit != other.unit:
            raise BudgetError(
                f"this run's unit of privacy was fixed as {self.unit}; {other.unit} was asked for",
                fix=f"give the same --unit-column, or {NEW_RUN}",
            )
        if self.public_part != other.public_part:
            raise BudgetError(
                f"of this run's training images, the public part was fixed as {self.public_part}; {other.public_part} "
                "was asked for",
                fix=f"give the same --public and --seed, or {NEW_RUN}",
            )
        if self.examples != other.examples:
            raise InputError(
                f"{other.data} has N = {other.examples} now, but had N = {self.examples} when this run began",
                fix="restore the earlier data, or start a new --run for these",
            )
        if (self.epsilon, self.delta) != (other.epsilon, other.delta):
            raise BudgetError(
                f"this run's budget was fixed at ε = {self.epsilon:g}, δ = {self.delta:g} before the data were "
                f"read; ε = {other.epsilon:g}, δ = {other.delta:g} was asked for",
                fix=f"leave --eps and --delta out, or {NEW_RUN}",
            )


@dataclass(frozen=True, kw_only=True)
class PlanEntry:
    """A mechanism in the plan file."""

    attempt: int  # from 1
    started: str | None  # when its stage was begun: ISO 8601, UTC
    parent_attempt: int | None = None  # of the stage that this is a further mechanism of
    plan: PrivatePlan | SelectionPlan


@dataclass(frozen=True)
class PlanFile:
    """``privacy/plan.json``: the run's budget, and the plan of each mechanism by name.

    Attributes:
        data_record: sha256 of ``private/training-data.json``, which holds a secret salt; None in runs of before.
    """

    budget: Budget
    stages: dict[str, PlanEntry]
    data_record: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the inverse of ``read_plan_file``."""
        budget = self.budget
        numbers = {"data": budget.data, "epsilon": budget.epsilon, "delta": budget.delta, "examples": budget.examples}
        public = {} if budget.declared_part is None else {"public_part": budget.declared_part}
        entries = {name: frozen(replace(entry, plan=entry.plan.to_dict())) for name, entry in self.stages.items()}
        record = {} if self.data_record is None else {"data_record": self.data_record}
        return {
            "format": 1, **numbers, "adjacency": ADJACENCY, "unit": budget.unit, **public, **record, "stages": entries,
        }  # fmt: skip


def default_delta(examples: int, published: float | None = None) -> float:
    """The default δ for N records: the one at which results for the data set are published, if it is below 1/N; else
    what is advised."""
    return published if published is not None and published < 1 / examples else advised_delta(examples)


@dataclass(frozen=True, kw_only=True)
class BudgetUse:
    """A run's budget, and what is spent of it."""

    data: str
    epsilon: float
    delta: float
    examples: int  # N
    unit: str
    spent: float  # upper bound of ε
    private: bool


def read_budget(rundir: RunDir) -> BudgetUse | None:
    """Read-only; None before the run's first private stage."""
    ledger, planned = open_run_ledger(rundir), read_plan_file(rundir)
    if planned is None or ledger is None:
        return None
    budget = planned.budget
    return BudgetUse(
        data=budget.data,
        epsilon=budget.epsilon,
        delta=budget.delta,
        examples=budget.examples,
        unit=budget.unit,
        spent=ledger.spent(budget.delta).upper,
        private=ledger.private and math.isfinite(budget.epsilon),
    )


def read_plan_file(rundir: RunDir) -> PlanFile | None:
    """Budget and plans of a run; None before its first private stage.

    Raises:
        CheckpointError: the file is damaged. InputError: it is of another format.
    """
    path = plan_file(rundir)
    if not path.exists():
        return None
    try:
        document = from_json(path.read_bytes())
        document["epsilon"] = float(document["epsilon"])  # infinity is stored as "inf"
        if document["format"] != 1:
            raise InputError(f"{path} has format {document['format']}, this version reads 1", fix="update dprandp")
        budget = _budget_in(document)
        stages = {name: _entry(name, entry, budget) for name, entry in document["stages"].items()}
        if not isinstance(record := document.get("data_record"), str | None):
            raise TypeError("the hash of the data's record is no text")
        return PlanFile(budget, stages, record)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, UsageError) as error:
        raise CheckpointError(
            f"{path} is damaged", fix="restore it from a copy: without it this run's budget is unknown"
        ) from error


# These two raise ValueError, KeyError, TypeError, UsageError or CheckpointError for what was not written so.


def _budget_in(document: dict[str, Any]) -> Budget:
    kinds = {"data": str, "epsilon": float, "delta": float, "examples": int, "unit": str, "stages": dict}
    public = document.get("public_part", NO_PUBLIC_PART)
    if any(type(document[key]) is not kind for key, kind in kinds.items()) or type(public) is not str:
        raise TypeError("an entry has another type")
    validate_budget(document["epsilon"], document["delta"], document["examples"])
    return Budget(**{key: document[key] for key in BUDGET_KEYS}, public_part=public)


def _entry(name: str, entry: dict[str, Any], budget: Budget) -> PlanEntry:
    selection = name == TUNE
    plan = (SelectionPlan if selection else PrivatePlan).from_dict(entry["plan"])
    counts = plan.steps if selection else (plan.steps, plan.views)
    whole = (entry["attempt"], entry.get("parent_attempt", 1), plan.examples, *counts)
    if any(type(value) is not int or value < 1 for value in whole):
        raise TypeError(f"the plan of {name} counts in other than whole numbers")
    if not isinstance(entry["started"], str | None):
        raise TypeError(f"the plan of {name} has no time")
    if (plan.stage, plan.examples, plan.delta) != (name, budget.examples, budget.delta):
        raise ValueError(f"the plan of {name} is of another budget")
    if plan.epsilon_target > budget.epsilon * (1 + ROUNDING):
        raise ValueError(f"the plan of {name} would spend more than the budget")
    parent = entry.get("parent_attempt")
    return PlanEntry(attempt=entry["attempt"], started=entry["started"], parent_attempt=parent, plan=plan)


# ------------------------------------------------------------------------------------------------- what to expect of it

HALF = 7.0
"""The signal μN/K at which half of the gain over guessing is kept."""

LITTLE = 0.2
"""Of the gain: with less than this, accuracy is near guessing."""


def kept_gain(epsilon: float, delta: float, examples: int, classes: int) -> float:
    """The part of the gain over guessing that a head keeps under noise, in [0, 1]; 1 for an infinite ε."""
    if math.isinf(epsilon):
        return 1.0
    signal = gaussian_dp_mu(epsilon, delta) * examples / classes
    return signal / (signal + HALF)


def too_few(
    epsilon: float, delta: float, examples: int, classes: int, *, unit: str = "image", whole: float | None = None
) -> str | None:
    """What to say before a stage with too few records for its ε; None where half of the gain or more is kept.

    Args:
        epsilon: of the stage. examples: N.
        unit: the noun of a record.
        whole: the run's ε, where the stage gets only a part of it.
    """
    kept, guess = kept_gain(epsilon, delta, examples, classes), f"guessing, {100 / classes:.3g} %"
    if kept >= 0.5:
        return None
    what = f"about {100 * kept:.0f} % of the gain over {guess}, that the same head would have without noise"
    if kept < LITTLE:
        what = f"an accuracy near {guess}"
    said = f"N = {examples} is small for ε = {epsilon:.3g} and {classes} classes: expect {what}"
    if whole is not None:
        better = kept_gain(whole, delta, examples, classes)
        said += f"; with the run's whole ε = {whole:g} (--share 1) it would keep about {100 * better:.0f} % of the gain"
    return f"{said}. More {unit}s, fewer classes or a larger ε help"
