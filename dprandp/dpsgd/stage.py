"""The common part of the private stages: one budget, one ledger, and private pixels read only after a plan is accepted.

The order matters and is the same in both stages:

    1. name the data set (declared facts only)      4. read the private pixels: refuse other data than the run's
    2. read the run's budget and ledger             5. write plan and ledger (``fix_plan``)
    3. plan: σ from what is left, or refuse         6. train through ``mechanism()`` alone
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dprandp.config.schema import (
    DEFAULT_SHARE,
    ContinueConfig,
    FinetuneConfig,
    PrivateConfig,
    ProbeConfig,
    as_dict,
    build,
    fraction_of,
)
from dprandp.data import Dataset, DataSpec, open_dataset, without_public_part
from dprandp.dpsgd import training_data
from dprandp.dpsgd.budget import ADJACENCY, NO_PUBLIC_PART, Budget, budget_of, default_delta, read_plan_file
from dprandp.dpsgd.units import unit_reminder
from dprandp.errors import BudgetError, CheckpointError, UsageError
from dprandp.privacy.accounting import Event, GaussianEvent, compose
from dprandp.privacy.adaptive import Stage, calibrate_stage, compose_stages
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.mechanism import PrivateMechanism, PrivatePlan, make_plan, validate_budget
from dprandp.privacy.randomness import InsecureSeed, RandomSource, SystemRandom
from dprandp.privacy.selection import SelectionPlan
from dprandp.privacy.tuning import TuningEvent
from dprandp.runs import faults
from dprandp.runs.context import Context, recorded
from dprandp.runs.directory import RunDir, result_digest
from dprandp.runs.files import atomic_write, storage_errors, to_json
from dprandp.runs.ledger import ledger_file, open_run_ledger, plan_file, sealed_budget

CONTINUE = "continue"

LEDGER_FAULTS = {
    "ledger.appended": lambda: faults.point("ledger-appended"),
    "ledger.fsynced": lambda: faults.point("ledger-fsynced"),
}


class PrivateStage:
    """A private stage that may begin: its plan fits the budget, and no private pixel has been read.

    Attributes:
        name: 'continue', 'probe' or 'finetune'.
        dataset: named, not read.
        budget: the run's.
        plan: accepted.
        attempt: 1, or one more for every restart of the stage.
    """

    def __init__(self, name: str, dataset: Dataset, budget: Budget, context: Context) -> None:
        self.name, self.dataset, self.budget, self.context = name, dataset, budget, context
        self.plan: PrivatePlan | SelectionPlan
        self.attempt = 1
        self._ledger: Ledger | None = None  # None until the run's first plan is fixed
        self._further: list[PrivateStage] = []
        self._fingerprint: str | None = None  # None until the private pixels are read

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

    def open_ledger(self, *, write: bool) -> list[list[Event]]:
        """Open the run's ledger, if any, and count this attempt; returns the stages charged so far.

        Raises:
            CheckpointError: the ledger is damaged, or there is one without its plan or the other way round.
        """
        path, planned = ledger_file(self.context.rundir), plan_file(self.context.rundir).exists()
        ledger = open_run_ledger(self.context.rundir, write=write, **self._ledger_options)
        if ledger is None or not planned:
            return []  # not begun, or stopped between making the ledger and writing the plan: nothing was charged
        if ledger.data_unit != _data_unit(self.spec):
            raise CheckpointError(
                f"{path} is of another unit of privacy than {plan_file(self.context.rundir)}",
                fix="restore the run's privacy folder from a copy",
            )
        self._ledger = ledger
        self.attempt = ledger.last_attempt(self.name) + 1
        return ledger.stages()

    @property
    def _ledger_options(self) -> dict[str, Any]:
        warn = self.context.console.warn
        return {"warn": warn, "fault_point": lambda name: LEDGER_FAULTS[name]()}

    @property
    def epsilon_alone(self) -> float:
        """ε of this stage's plan by itself, which is public and may determine its learning rate."""
        return compose([self.plan.event], self.plan.delta, self.context.console.warn).upper

    def private_inputs(self) -> dict[str, str]:
        """Read the training data, refuse any but the run's, and return their hash for ``RunDir.begin``.

        The run is held to its data once a plan is fixed, or once ``continue`` has declared a part of them public.

        Raises:
            InputError: the data are unusable, or others. BudgetError: the run has used the same images as public ones.
            CheckpointError: the record of the run's data is lost.
        """
        if self._fingerprint is None:
            found, rundir = training_data.fingerprint_of(self.dataset), self.context.rundir
            own = self.name == CONTINUE
            if plan_file(rundir).exists() or (self.budget.public_part != NO_PUBLIC_PART and not own):
                training_data.refuse_other(rundir, self.budget.data, found)
            training_data.refuse_public(rundir, self.dataset)
            self._fingerprint = found
        return {"train": self._fingerprint}

    def keep_data(self) -> None:
        """Record the hash of the run's data, if no plan has done so yet."""
        fingerprint = self.private_inputs()["train"]
        if not plan_file(self.context.rundir).exists():
            training_data.keep(self.context.rundir, self.dataset, fingerprint)

    def fix_plan(self, **notes: int) -> None:
        """Write budget and plan to ``privacy/plan.json``, before the first charge.

        Guarantee:
            The first plan records what the run's data are; a later one is fixed for the same data alone.

        Raises:
            As ``private_inputs``.
        """
        if not self.context.ranks.is_first:
            return  # rank 0 writes
        self.keep_data()  # before the plan: a plan without it would look like a lost record
        document = read_plan_file(self.context.rundir) or {
            "format": 1,
            "data": self.budget.data,
            "epsilon": self.budget.epsilon,
            "delta": self.budget.delta,
            "examples": self.spec.train_units,
            "adjacency": ADJACENCY,
            "unit": self.budget.unit,
            **({} if self.budget.public_part == NO_PUBLIC_PART else {"public_part": self.budget.public_part}),
            "stages": {},
        }
        if self._ledger is None:  # the ledger first: a plan without a ledger would look like a lost ledger
            _ = self.context.rundir.privacy_dir  # makes the folder
            path = ledger_file(self.context.rundir)
            with storage_errors(path, "replace"):
                path.unlink(missing_ok=True)  # at most a header without charges: see open_ledger
            self._ledger = Ledger.create(
                path,
                self.spec.train_units,
                _data_unit(self.spec),
                budget=sealed_budget(document),
                **self._ledger_options,
            )
        document["stages"][self.name] = {
            "attempt": self.attempt,
            "started": started(self.context.rundir, self.name),
            **notes,
            "plan": self.plan.to_dict(),
        }
        atomic_write(plan_file(self.context.rundir), to_json(document, indent=1) + "\n")
        self.keep_head()

    def keep_head(self) -> str:
        """Record the ledger's head in run.json, and return it, for a checkpoint that is about to be written.

        Guarantee:
            From now on a ledger that lacks what was charged by now is refused (``runs/ledger.py``).
        """
        self.context.rundir.keep_ledger_head(self.ledger.head)
        return self.ledger.head

    def finish(self, outputs: Sequence[str], result: dict[str, Any]) -> None:
        """Seal the stage's result in the ledger and record the stage as done.

        Args:
            outputs: files below the stage's folder that later stages are made from.
            result: with the keys of ``disclosure``.
        """
        rundir = self.context.rundir
        self.ledger.seal_result(stage=self.name, attempt=self.attempt, digest=result_digest(result))
        rundir.finish(self.name, rundir.hash_outputs(self.name, outputs), result, ledger_head=self.ledger.head)

    def replan(self, steps: int) -> None:
        """Another number of steps for the same part of the budget, with the noise that they need.

        For a stage that learns from public images when its private steps begin; before anything of it is charged.

        Raises:
            BudgetError: too little is left. CheckpointError: steps of the plan were charged already.
        """
        if steps == self.plan.steps:
            return
        if self._ledger is not None and self._ledger.charged_steps(self.name, self.attempt):
            raise CheckpointError(
                f"the ledger holds steps of stage {self.name!r} that were planned as {self.plan.steps}, and now "
                f"{steps} are planned",
                fix="restore the stage's folder together with the privacy folder, or restart the stage with "
                    "--overwrite",
            )
        plan = self.plan
        self.plan = make_plan(
            stage=self.name,
            epsilon=self.budget.epsilon,
            delta=self.budget.delta,
            epsilon_target=plan.epsilon_target,
            spent=[] if self._ledger is None else self._ledger.stages(),
            examples=plan.examples,
            sample_rate=plan.sample_rate,
            steps=steps,
            clip_norm=plan.clip_norm,
            views=plan.views,
            noise=plan.noise,
            warn=self.context.console.warn,
        )

    def following(self, name: str, *, sample_rate: float, steps: int, clip_norm: float) -> PrivateStage:
        """A further mechanism of the same stage, planned with the remaining budget of the run.

        Args:
            name: as the ledger will call it, such as 'finetune.head'.
            sample_rate, steps, clip_norm: of the further mechanism; one view.

        Returns:
            A stage with its plan written. After a crash it is the plan that was written then.

        Raises:
            BudgetError: the budget is spent.
        """
        further = PrivateStage(name, self.dataset, self.budget, self.context)
        further._ledger, further._fingerprint = self.ledger, self._fingerprint
        self._further.append(further)
        recorded = (read_plan_file(self.context.rundir) or {"stages": {}})["stages"].get(name)
        if recorded and recorded.get("parent_attempt") == self.attempt:
            further.plan, further.attempt = PrivatePlan.from_dict(recorded["plan"]), recorded["attempt"]
            return further
        further.attempt = self.ledger.last_attempt(name) + 1
        further.plan = make_plan(
            stage=name,
            epsilon=self.budget.epsilon,
            delta=self.budget.delta,
            epsilon_target=self.budget.epsilon,
            spent=self.ledger.stages(),
            examples=self.budget.examples,
            sample_rate=sample_rate,
            steps=steps,
            clip_norm=clip_norm,
            noise=self.plan.noise,
            warn=self.context.console.warn,
        )
        further.fix_plan(parent_attempt=self.attempt)
        return further

    def mechanism(self, updates_done: int, ledger_head: str | None = None) -> PrivateMechanism:
        """The only way to gradients of the data: it charges before it hands out a batch, and returns noise.

        Args:
            updates_done: updates that the caller's checkpoint holds. Steps charged beyond it were lost in a crash; they
                stay charged and are not made up for.
            ledger_head: ``ledger.head`` as that checkpoint recorded it; None for a fresh start.

        Raises:
            CheckpointError: the ledger is older than the checkpoint: lines were cut off its end.
        """
        if ledger_head is not None and not self.ledger.includes(ledger_head):
            raise CheckpointError(
                f"{ledger_file(self.context.rundir)} is older than the checkpoint of stage {self.name!r}, whose "
                "updates were charged by lines that it does not hold",
                fix="restore the run's privacy folder as it was when the checkpoint was written",
            )
        return PrivateMechanism(
            self.plan, self.ledger, self.random_source(), self.attempt, updates_done, warn=self.context.console.warn
        )

    def random_source(self) -> RandomSource:
        """The operating system, unless --insecure-seed was given."""
        seed = self.context.insecure_seed
        if seed is None:
            return SystemRandom()
        charged = self.ledger.charged_steps(self.name, self.attempt)
        return InsecureSeed(seed, self.attempt, charged, len(self.name))

    def disclosure(self, updates: int) -> dict[str, Any]:
        """The privacy part of a stage's result: what the run has spent, and how.

        Args:
            updates: updates that the released parameters have seen; steps charged beyond them were lost in crashes.
        """
        bound = self.ledger.spent(self.plan.delta)
        charged = self.ledger.charged_steps(self.name, self.attempt)
        return {
            "epsilon": bound.upper,
            "delta": self.plan.delta,
            "epsilon_target": self.plan.epsilon_target,
            "epsilon_total": self.budget.epsilon,
            "accountant": bound.accountant,
            "noise_multiplier": self.plan.noise_multiplier,
            "sample_rate": self.plan.sample_rate,
            "steps": self.plan.steps,
            "attempt": self.attempt,
            "charged_steps": charged,
            "lost_steps": charged - updates,
            "clip_norm": self.plan.clip_norm,
            "views": self.plan.views,
            "expected_batch": self.plan.expected_batch,
            "adjacency": ADJACENCY,
            "unit": self.budget.unit,
            "train_units": self.plan.examples,
            **({} if self.budget.public_part == NO_PUBLIC_PART else {"public_part": self.budget.public_part}),
            "noise": self.plan.noise,
            "also_charged": self._also_charged(),
            "ledger_head": self.ledger.head,
            "random": self.ledger.random,
            "private": self.ledger.private and math.isfinite(bound.upper),
            "device": self.context.device.type,
        }

    def _also_charged(self) -> list[dict[str, Any]]:
        """The ledger's charges other than this stage's own mechanisms, a dict of public facts each, in order.

        A selection among private trials is not in this list: the result's ``tuned`` names it.
        """
        own = {(stage.name, stage.attempt) for stage in (self, *self._further)}
        found: dict[tuple[Any, ...], int] = {}
        for charge in self.ledger.charges:
            if (charge.stage, charge.attempt) not in own:
                key = (charge.stage, charge.attempt, charge.sample_rate, charge.noise_multiplier, charge.clip_norm)
                found[key] = found.get(key, 0) + charge.steps
        names = ("stage", "attempt", "sample_rate", "noise_multiplier", "clip_norm")
        return [{**dict(zip(names, key, strict=True)), "charged_steps": steps} for key, steps in found.items()]


def _data_unit(spec: DataSpec) -> str:
    """The unit as the ledger's header names it: ``image``, or ``patient (column patient_train)``."""
    return spec.unit.removeprefix("one ")


def started(rundir: RunDir, name: str) -> str | None:
    """When the stage was begun; a plan of an earlier beginning does not count."""
    return next((row["started"] for row in rundir.status() if row["stage"] == name), None)


# -------------------------------------------------------------------------------------------------------- private plan
#
# The plan of a private stage, from the budget, the ledger and public facts.
#
# The order matters: name the data set (declared facts only), read the run's budget and ledger, find σ for the
# remaining budget, or refuse. This file reads no pixel.


def name_private_stage(
    name: str, config: PrivateConfig, context: Context, *, fetch: bool = True
) -> tuple[PrivateStage, dict[str, Any] | None]:
    """A stage on named data within the run's budget, without a plan; and the document of the plans before it.

    Args:
        name: as the ledger will call it.
        config: the stage's configuration.
        context: whether downloads are allowed, among others.
        fetch: False for ``--plan``: nothing is fetched, and what the stage will fetch may be absent.

    Raises:
        As ``open_private_stage``; like that, it reads no pixel.
    """
    dataset = open_dataset(
        config.data,
        context.data_dir,
        download=context.download and fetch,
        num_classes=config.classes,
        unit_column=config.unit_column,
    )
    part = _public_part(config, context)
    if part is not None:
        dataset = without_public_part(dataset, *part)
    examples, document = dataset.spec.train_units, read_plan_file(context.rundir)
    fixed = None if document is None else budget_of(document)
    # the run's, if it has one: the same data under another name may have another default
    delta = default_delta(examples, dataset.spec.published_delta) if fixed is None else fixed.delta
    budget = Budget(
        config.data,
        config.epsilon,
        config.delta or delta,
        examples,
        dataset.spec.unit,
        NO_PUBLIC_PART if part is None else f"fraction {part[0]!r} by seed {part[1]}",
    )
    validate_budget(budget.epsilon, budget.delta, examples)
    if fixed is not None:
        open_run_ledger(context.rundir, warn=lambda text: None)  # first: is the fixed budget unchanged?
        fixed.refuse_other(budget)
        budget = replace(budget, data=fixed.data)
    if fetch or not context.download:
        dataset.require()
    return PrivateStage(name, dataset, budget, context), document


def on_all_ranks(
    name: str, context: Context, begin: Callable[[], tuple[PrivateStage, PrivateConfig] | None]
) -> tuple[PrivateStage, PrivateConfig] | None:
    """Let rank 0 begin a private stage, and give every rank its plan and its configuration.

    Args:
        name: of the stage.
        begin: on rank 0, plans the stage and begins it in the run directory; None where it is done already.

    Returns:
        What ``begin`` returned, on every rank. The stage of another rank than rank 0 has a plan and the named data, and
        no ledger: it cannot charge, so it cannot draw or release either.

    Guarantee:
        No other rank has read a pixel before the plan was accepted on rank 0. All have the same training data, which
        are those that rank 0 recorded or compared: else no rank comes back.

    Raises:
        As ``begin``. InputError: a rank has no data, or others.
    """

    def told(begun: tuple[PrivateStage, PrivateConfig] | None) -> dict[str, Any] | None:
        return begun and {"plan": begun[0].plan.to_dict(), "config": as_dict(begun[1])}

    begun = context.ranks.first(begin, told)
    if isinstance(begun, dict):
        config = build(name, begun["config"])
        stage, _ = name_private_stage(name, config, context)
        stage.plan = PrivatePlan.from_dict(begun["plan"])
        begun = stage, config
    if begun is not None:
        context.ranks.refuse_different("training data", lambda: training_data.fingerprint_of(begun[0].dataset))
    return begun


def open_private_stage(
    name: str,
    config: PrivateConfig,
    context: Context,
    *,
    steps: int | None = None,
    batch_part: float = 1.0,
    budget_part: float = 1.0,
    write: bool = True,
    planned: Sequence[Stage] = (),
) -> PrivateStage:
    """Plan a private stage from public facts, or refuse.

    Args:
        name: 'continue', 'probe' or 'finetune'.
        config: the stage's configuration.
        steps: where the configuration names none; of ``continue``, whose own count holds public ones too, always.
        batch_part: expected batch as a part of N where the configuration names none; 1 is full batch.
        budget_part: part of what is left that another stage than a probe may spend on its first mechanism (see
            ``following``).
        write: False for ``--plan``: nothing is created, and nothing is fetched.
        planned: stages that are themselves only planned (``--plan``); they count as charged.

    Guarantee:
        No pixel and no label has been read when this returns or raises.

    Raises:
        InputError: the data's files are not there. UsageError: values out of range, other data than the run's.
        BudgetError: the remaining budget is too small for the stage.
    """
    stage, document = name_private_stage(name, config, context, fetch=write)
    dataset, budget, examples = stage.dataset, stage.budget, stage.budget.examples
    recorded = (document or {}).get("stages", {}).get(name)
    spent = [*stage.open_ledger(write=write), *planned]
    if write and (reminder := unit_reminder(dataset.spec, config.unit_column)):
        context.console.say(reminder)
    if recorded and recorded["started"] == started(context.rundir, name) and not context.overwrite:
        stage.plan, stage.attempt = PrivatePlan.from_dict(recorded["plan"]), recorded["attempt"]
        return stage
    public = {
        "stage": name,
        "examples": examples,
        "delta": budget.delta,
        "sample_rate": _sample_rate(config, examples, batch_part),
        "steps": steps if isinstance(config, ContinueConfig) else config.steps or steps,
        "clip_norm": config.clip_norm,
        "views": config.views,
        "noise": config.noise,
    }
    if isinstance(config, ProbeConfig):
        share = DEFAULT_SHARE if config.share is None else config.share
        stage.plan = _plan_probe(public, budget.epsilon, share, spent, context)
    else:
        before = compose_stages(spent, budget.delta, context.console.warn).upper
        target = before + budget_part * (budget.epsilon - before) if math.isfinite(budget.epsilon) else math.inf
        if before >= budget.epsilon:
            target = budget.epsilon  # the planner refuses
        stage.plan = make_plan(
            **public, epsilon=budget.epsilon, epsilon_target=target, spent=spent, warn=context.console.warn
        )
    return stage


def _public_part(config: PrivateConfig, context: Context) -> tuple[float, int] | None:
    """(fraction, seed) of the training images that the run's ``continue`` declares public: they are public in every
    later stage of the run, and not counted in its N. Later stages must use the same data, compared by content."""
    if not isinstance(config, ContinueConfig):
        row = next(row for row in context.rundir.status() if row["stage"] == "continue")
        if row["config"] is None:
            return None
        config = recorded("continue", row["config"])
    fraction = fraction_of(config.public)
    return None if fraction is None else (fraction, config.seed)


def _plan_probe(
    public: dict[str, Any], epsilon: float, share: float, spent: list[Stage], context: Context
) -> PrivatePlan:
    """The budget fraction of the probe, including private tuning; a repeated probe takes it again, on top of earlier
    spending.

    A share of 1 is the whole remaining budget.
    """
    warn = context.console.warn
    own = epsilon * share
    discrete = public["noise"] == "discrete"
    if share == 1 or all(isinstance(event, TuningEvent) for stage in spent for event in stage):
        return make_plan(**public, epsilon=epsilon, epsilon_target=own, spent=spent, warn=warn)
    sigma = calibrate_stage(own, public["delta"], public["sample_rate"], public["steps"], (), warn, discrete)
    event = GaussianEvent(sigma, public["sample_rate"], public["steps"], discrete)
    total = compose_stages([*spent, [event]], public["delta"], warn).upper
    if total > epsilon:
        raise BudgetError(
            f"running the probe again for ε = {own:.4g} would bring this run to ε = {total:.4g}, above its budget of "
            f"{epsilon:g}",
            fix="give a smaller --share, keep the existing probe, or start a new --run and add up the ε of both",
        )
    return PrivatePlan(**public, noise_multiplier=sigma, epsilon_target=epsilon)


def _sample_rate(config: PrivateConfig, examples: int, batch_part: float) -> float:
    if config.batch_size is None:
        return batch_part
    if config.batch_size > examples:
        recipe = isinstance(config, FinetuneConfig) and config.recipe
        raise UsageError(
            f"--batch-size {config.batch_size} exceeds the {examples} training examples (units of privacy)"
            + (f": the recipe {config.recipe} is for a larger data set" if recipe else ""),
            fix=f"give at most {examples}, which is full batch"
            + (f"; {max(1, round(0.08192 * examples))} is its sampling rate for CIFAR-10" if recipe else ""),
        )
    return config.batch_size / examples
