"""What the two private stages share: one budget, one ledger, and private pixels read only once a plan is accepted.

The order matters and is the same in both stages:

    1. name the data set (declared facts only)      4. read the private pixels: their hash, for a later resume
    2. read the run's budget and ledger             5. write plan and ledger (``fix_plan``)
    3. plan: σ from what is left, or refuse         6. train through ``mechanism()`` alone
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dprandp import faults
from dprandp.config import FinetuneConfig, ProbeConfig
from dprandp.datasets import Dataset, DataSpec, open_dataset
from dprandp.errors import BudgetError, CheckpointError, UsageError
from dprandp.files import atomic_write, storage_errors, to_json
from dprandp.privacy.accounting import GaussianEvent, calibrate, compose
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.noise import InsecureSeed, RandomSource, SystemRandom
from dprandp.privacy.plan import PrivateMechanism, PrivatePlan, make_plan, validate_budget
from dprandp.rundir import RunDir
from dprandp.stages.budget import ADJACENCY, BUDGET_KEYS, UNIT, Budget, default_delta, plan_file, read_plan_file
from dprandp.stages.context import Context

DEFAULT_SHARE = 0.3
"""Tang et al. 2023, figure on the budget's split: 20 to 40 % of ε for Phase II serve best."""

LEDGER_FAULTS = {
    "ledger.appended": lambda: faults.point("ledger-appended"),
    "ledger.fsynced": lambda: faults.point("ledger-fsynced"),
}


class PrivateStage:
    """A private stage that may begin: its plan fits the budget, and no private pixel has been read.

    Attributes:
        name: 'probe' or 'finetune'.
        dataset: named, not read.
        budget: the run's.
        plan: accepted.
        attempt: 1, or one more for every time the stage was started afresh.
    """

    def __init__(self, name: str, dataset: Dataset, budget: Budget, context: Context) -> None:
        self.name, self.dataset, self.budget, self.context = name, dataset, budget, context
        self.plan: PrivatePlan
        self.attempt = 1
        self._ledger: Ledger | None = None  # None until the run's first plan is fixed

    @property
    def spec(self) -> DataSpec:
        """Declared facts about the data."""
        return self.dataset.spec

    @property
    def ledger(self) -> Ledger:
        """The run's ledger; it exists once a plan is fixed."""
        if self._ledger is None:
            raise RuntimeError("there is no ledger before fix_plan()")
        return self._ledger

    def open_ledger(self, *, write: bool) -> list[GaussianEvent]:
        """Open the ledger that the run has, if any, and count this attempt; returns what was paid so far.

        Raises:
            CheckpointError: the ledger is damaged, or there is one without its plan or the other way round.
        """
        path, planned = self._ledger_path, plan_file(self.context.rundir).exists()
        if not path.exists() and not planned:
            return []
        ledger = Ledger.open(path, read_only=not write, **self._ledger_options)
        if not planned:
            if ledger.charges:
                raise CheckpointError(
                    f"{plan_file(self.context.rundir)} is missing, but the ledger beside it holds charges",
                    fix="restore it from a copy: without it nobody knows this run's budget",
                )
            return []  # stopped between making the ledger and writing the plan: nothing was paid
        self._ledger = ledger
        self.attempt = ledger.last_attempt(self.name) + 1
        return ledger.events()

    @property
    def _ledger_path(self) -> Path:
        return self.context.rundir.path / "privacy" / "ledger.jsonl"

    @property
    def _ledger_options(self) -> dict[str, Any]:
        warn = self.context.console.warn
        return {"warn": warn, "fault_point": lambda name: LEDGER_FAULTS[name]()}

    @property
    def epsilon_alone(self) -> float:
        """ε of this stage's plan by itself; what its learning rate may be chosen by, being public."""
        return compose([self.plan.event], self.plan.delta, self.context.console.warn).upper

    def private_inputs(self) -> dict[str, str]:
        """Hash of the training data, by which a resumed stage notices other data. It is private, and stays so."""
        return {"train": self.dataset.fingerprint()}

    def fix_plan(self, **notes: int) -> None:
        """Write budget and plan to ``privacy/plan.json``, before the first charge."""
        if self._ledger is None:  # the ledger first: a plan without a ledger would look like a lost ledger
            _ = self.context.rundir.privacy_dir  # makes the folder
            with storage_errors(self._ledger_path, "replace"):
                self._ledger_path.unlink(missing_ok=True)  # at most a header without charges: see open_ledger
            self._ledger = Ledger.create(self._ledger_path, self.spec.train_examples, **self._ledger_options)
        document = read_plan_file(self.context.rundir) or {
            "format": 1,
            "data": self.budget.data,
            "epsilon": self.budget.epsilon,
            "delta": self.budget.delta,
            "examples": self.ledger.examples,
            "adjacency": ADJACENCY,
            "unit": UNIT,
            "stages": {},
        }
        document["stages"][self.name] = {
            "attempt": self.attempt,
            "started": _started(self.context.rundir, self.name),
            **notes,
            "plan": self.plan.to_dict(),
        }
        atomic_write(plan_file(self.context.rundir), to_json(document, indent=1) + "\n")

    def following(self, name: str, *, sample_rate: float, steps: int, clip_norm: float) -> PrivateStage:
        """A further mechanism of the same stage, planned with everything that is left of the run's budget.

        Args:
            name: as the ledger will call it, such as 'finetune.head'.
            sample_rate, steps, clip_norm: of the further mechanism; one view.

        Returns:
            A stage with its plan written. After a crash it is the plan that was written then.

        Raises:
            BudgetError: nothing is left.
        """
        further = PrivateStage(name, self.dataset, self.budget, self.context)
        further._ledger = self.ledger
        recorded = (read_plan_file(self.context.rundir) or {"stages": {}})["stages"].get(name)
        if recorded and recorded.get("parent_attempt") == self.attempt:
            further.plan, further.attempt = PrivatePlan.from_dict(recorded["plan"]), recorded["attempt"]
            return further
        further.attempt = self.ledger.last_attempt(name) + 1
        further.plan = make_plan(
            stage=name,
            epsilon_total=self.budget.epsilon,
            delta=self.budget.delta,
            spend_epsilon=self.budget.epsilon,
            spent=self.ledger.events(),
            examples=self.budget.examples,
            sample_rate=sample_rate,
            steps=steps,
            clip_norm=clip_norm,
            warn=self.context.console.warn,
        )
        further.fix_plan(parent_attempt=self.attempt)
        return further

    def mechanism(self, updates_done: int, ledger_head: str | None = None) -> PrivateMechanism:
        """The only way to gradients of the data: it pays before it hands out a batch, and returns noise.

        Args:
            updates_done: updates that the caller's checkpoint holds. Steps paid beyond it were lost in a crash; they
                stay paid and are not made up for.
            ledger_head: ``ledger.head`` as that checkpoint recorded it; None for a fresh start.

        Raises:
            CheckpointError: the ledger is older than the checkpoint: lines were cut off its end.
        """
        if ledger_head is not None and not self.ledger.includes(ledger_head):
            raise CheckpointError(
                f"{self._ledger_path} is older than the checkpoint of stage {self.name!r}, whose updates were paid "
                "for by lines that it does not hold",
                fix="restore the run's privacy folder as it was when the checkpoint was written",
            )
        return PrivateMechanism(
            self.plan, self.ledger, self._random(), self.attempt, updates_done, warn=self.context.console.warn
        )

    def _random(self) -> RandomSource:
        seed = self.context.insecure_seed
        if seed is None:
            return SystemRandom()
        paid = self.ledger.charged_steps(self.name, self.attempt)
        return InsecureSeed(seed, self.attempt, paid, len(self.name))

    def disclosure(self, updates: int) -> dict[str, Any]:
        """What the run has spent by now and how: the privacy part of a stage's result.

        Args:
            updates: updates that the released parameters have seen; steps paid beyond them were lost in crashes.
        """
        bound = self.ledger.spent(self.plan.delta)
        paid = self.ledger.charged_steps(self.name, self.attempt)
        return {
            "epsilon": bound.upper,
            "delta": self.plan.delta,
            "epsilon_target": self.plan.epsilon_target,
            "epsilon_total": self.budget.epsilon,
            "accountant": bound.accountant,
            "noise_multiplier": self.plan.noise_multiplier,
            "sample_rate": self.plan.sample_rate,
            "steps": self.plan.steps,
            "charged_steps": paid,
            "lost_steps": paid - updates,
            "clip_norm": self.plan.clip_norm,
            "views": self.plan.views,
            "expected_batch": self.plan.expected_batch,
            "adjacency": ADJACENCY,
            "unit": UNIT,
            "random": "insecure-seed" if any(c.random != "os-entropy" for c in self.ledger.charges) else "os-entropy",
            "private": self.ledger.private and math.isfinite(bound.upper),
            "device": self.context.device.type,
        }


def open_private_stage(
    name: str,
    config: ProbeConfig | FinetuneConfig,
    context: Context,
    *,
    steps: int | None = None,
    batch_part: float = 1.0,
    budget_part: float = 1.0,
    write: bool = True,
    planned: Sequence[GaussianEvent] = (),
) -> PrivateStage:
    """Plan a private stage from public facts, or refuse.

    Args:
        name: 'probe' or 'finetune'.
        config: the stage's configuration.
        steps: where the configuration names none.
        batch_part: expected batch as a part of N where the configuration names none; 1 is full batch.
        budget_part: part of what is left that a fine-tune may spend on its first mechanism (see ``following``).
        write: False for ``--plan``: nothing is created, and nothing is fetched.
        planned: events of stages that are themselves only planned (``--plan``); they count as paid.

    Guarantee:
        No pixel and no label has been read when this returns or raises.

    Raises:
        InputError: the data's files are not there. UsageError: values out of range, other data than the run's.
        BudgetError: what is left does not allow the stage.
    """
    dataset = open_dataset(
        config.data, context.data_dir, download=context.download and write, num_classes=config.classes
    )
    examples = dataset.spec.train_examples
    budget = Budget(config.data, config.epsilon, config.delta or default_delta(examples), examples)
    validate_budget(budget.epsilon, budget.delta, examples)
    document = read_plan_file(context.rundir)
    if document is not None:
        Budget(**{key: document[key] for key in BUDGET_KEYS}).refuse_other(budget)
    if write or not context.download:  # a plan fetches nothing, and does without what the stage will fetch
        dataset.require()
    stage = PrivateStage(name, dataset, budget, context)
    recorded = (document or {}).get("stages", {}).get(name)
    spent = [*stage.open_ledger(write=write), *planned]
    if recorded and recorded["started"] == _started(context.rundir, name) and not context.overwrite:
        stage.plan, stage.attempt = PrivatePlan.from_dict(recorded["plan"]), recorded["attempt"]
        return stage
    public = {
        "stage": name,
        "examples": examples,
        "delta": budget.delta,
        "sample_rate": _sample_rate(config, examples, batch_part),
        "steps": config.steps or steps,
        "clip_norm": config.clip_norm,
        "views": config.views,
    }
    if isinstance(config, ProbeConfig):
        share = DEFAULT_SHARE if config.share is None else config.share
        stage.plan = _plan_probe(public, budget.epsilon, share, spent, context)
    else:
        before = compose(spent, budget.delta, context.console.warn).upper
        target = before + budget_part * (budget.epsilon - before) if math.isfinite(budget.epsilon) else math.inf
        if before >= budget.epsilon:
            target = budget.epsilon  # let the planner refuse, with its own words
        stage.plan = make_plan(
            **public, epsilon_total=budget.epsilon, spend_epsilon=target, spent=spent, warn=context.console.warn
        )
    return stage


def _plan_probe(
    public: dict[str, Any], epsilon: float, share: float, spent: list[GaussianEvent], context: Context
) -> PrivatePlan:
    """The probe takes its share; run again, it takes it again, on top of all that was paid before."""
    warn = context.console.warn
    own = epsilon * share
    if not spent:
        return make_plan(**public, epsilon_total=epsilon, spend_epsilon=own, spent=[], warn=warn)
    sigma = calibrate(own, public["delta"], public["sample_rate"], public["steps"], warn=warn)
    event = GaussianEvent(sigma, public["sample_rate"], public["steps"])
    total = compose([*spent, event], public["delta"], warn).upper
    if total > epsilon:
        raise BudgetError(
            f"running the probe again for ε = {own:.4g} would bring this run to ε = {total:.4g}, above its budget of "
            f"{epsilon:g}",
            fix="give a smaller --share, keep the probe there is, or start a new --run and add up what both release",
        )
    return PrivatePlan(**public, noise_multiplier=sigma, epsilon_target=epsilon)


def _started(rundir: RunDir, name: str) -> str | None:
    """When the stage was begun; a plan of an earlier beginning is not this one's."""
    return next((row["started"] for row in rundir.status() if row["stage"] == name), None)


def _sample_rate(config: ProbeConfig | FinetuneConfig, examples: int, batch_part: float) -> float:
    if config.batch_size is None:
        return batch_part
    if config.batch_size > examples:
        raise UsageError(
            f"--batch-size {config.batch_size} exceeds the {examples} training examples",
            fix=f"give at most {examples}, which is full batch",
        )
    return config.batch_size / examples
