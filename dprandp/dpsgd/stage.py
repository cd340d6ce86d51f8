"""The common part of the private stages: one budget, one ledger, and private pixels read only after a plan is accepted.

    1. name the data set (declared facts only)      4. read the private pixels: refuse other data than the run's
    2. read the run's budget and ledger             5. write plan and ledger (``fix_plan``)
    3. plan: σ from what is left, or refuse         6. train through ``mechanism()`` alone
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dprandp.config.presets import INPUT_SIZE
from dprandp.config.schema import (
    DEFAULT_SHARE,
    WITHOUT_PHASE_ONE,
    ContinueConfig,
    FinetuneConfig,
    PrivateConfig,
    ProbeConfig,
    as_dict,
    build,
    data_options,
    fraction_of,
    input_size_of,
)
from dprandp.data import Dataset, DataSpec, Reading, open_dataset, without_public_part
from dprandp.dpsgd import training_data
from dprandp.dpsgd.budget import (
    ADJACENCY,
    NO_PUBLIC_PART,
    Budget,
    PlanEntry,
    PlanFile,
    default_delta,
    read_plan_file,
    too_few,
)
from dprandp.dpsgd.units import refuse_shared, unit_reminder
from dprandp.errors import BudgetError, CheckpointError, UsageError
from dprandp.privacy.accounting import GaussianEvent, compose, rounded_up
from dprandp.privacy.adaptive import Stage, calibrate_stage, compose_stages
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.mechanism import PrivateMechanism, PrivatePlan, make_plan, validate_budget
from dprandp.privacy.randomness import InsecureSeed, RandomSource, SystemRandom
from dprandp.privacy.selection import SelectionPlan
from dprandp.privacy.tuning import TuningEvent
from dprandp.report.disclosure import epsilon_text
from dprandp.runs import faults
from dprandp.runs.context import Context, recorded
from dprandp.runs.directory import REPORT, STAGES, RunDir, result_digest
from dprandp.runs.files import atomic_write, storage_errors, to_json
from dprandp.runs.ledger import TUNE, ledger_file, open_run_ledger, plan_file, remove_uncharged, sealed_budget
from dprandp.runs.results import Guarantee, OtherCharge, PrivateResult

CONTINUE = "continue"


@dataclass(frozen=True)
class PrivateStage:
    """A private stage on named data, within the run's budget. To open one reads no private pixel."""

    name: str  # as the ledger calls it: 'tune', 'continue', 'probe', 'finetune' or 'finetune.head'
    dataset: Dataset  # named, not read
    budget: Budget
    context: Context
    plan: PrivatePlan | SelectionPlan | None = None  # None before it is made, and for public images alone
    attempt: int = 1  # one more for every restart
    ledger: Ledger | None = None  # the run's; None until the run's first plan is fixed
    shared_units: bool = False  # units in both splits were allowed

    @property
    def spec(self) -> DataSpec:
        """Declared facts about the data."""
        return self.dataset.spec

    @property
    def spent(self) -> list[Stage]:
        """The stages charged so far."""
        return [] if self.ledger is None else self.ledger.stages()

    @property
    def epsilon_alone(self) -> float:
        """ε of this stage's plan by itself, which is public and may determine its learning rate."""
        return compose([self.plan.event], self.plan.delta, self.context.console.warn).upper

    @property
    def warning(self) -> str | None:
        """That N is small for ε, from public numbers; None where it is not, for ``continue``, before the head, and for
        several labels an image, of which nothing is known."""
        budget, part = self.budget, self.name == "probe" and self.plan.epsilon_target < self.budget.epsilon
        if self.name not in ("probe", "finetune") or self.spec.multi_label:
            return None
        unit = self.spec.unit.removeprefix("one ").split(" (column ")[0]
        classes, whole = len(self.spec.classes), budget.epsilon if part else None
        epsilon = self.epsilon_alone if self.name == "probe" else budget.epsilon
        return too_few(epsilon, budget.delta, budget.examples, classes, unit=unit, whole=whole)

    def spent_note(self) -> str:
        """ε of everything that the run has charged so far, for a progress bar."""
        if not self.ledger.private or math.isinf(self.budget.epsilon):
            return "NOT PRIVATE"
        return f"ε {epsilon_text(self.ledger.spent(self.plan.delta).upper)} of {self.budget.epsilon:g}"

    def private_inputs(self) -> dict[str, str]:
        """Read the training data, refuse any but the run's, and return their hash for ``RunDir.begin``.

        The run is held to its data once a plan is fixed, or once ``continue`` has declared a part of them public.
        Raises InputError for unusable or other data, BudgetError for images that the run has used as public ones.
        """
        self.examine()
        rundir = self.context.rundir
        with training_data.no_counts_after_a_charge(rundir):
            found = training_data.fingerprint_of(self.dataset)
        if plan_file(rundir).exists() or (self.budget.public_part != NO_PUBLIC_PART and self.name != CONTINUE):
            training_data.refuse_other(rundir, self.budget.data, found, self.dataset)
        training_data.refuse_public(rundir, self.dataset)
        return {"train": found}

    def examine(self) -> None:
        """Find everything that is wrong with a user's own data, unless the run has begun; see ``training_data``."""
        if self.spec.name.partition(":")[1]:
            training_data.examine(self.context.rundir, self.dataset, self.context.console)

    def keep_data(self) -> None:
        """Record the hash of the run's data, if no plan has done so yet; raises as ``private_inputs``."""
        fingerprint = self.private_inputs()["train"]
        if not plan_file(self.context.rundir).exists():
            training_data.keep(self.context.rundir, self.dataset, fingerprint)

    def fix_plan(self, parent_attempt: int | None = None) -> PrivateStage:
        """Write budget and plan to ``privacy/plan.json``, before the first charge; the stage with its ledger.

        Guarantee:
            The first plan records what the run's data are; a later one is fixed for the same data alone.
        """
        rundir, ledger = self.context.rundir, self.ledger
        if not self.context.ranks.is_first:
            return self  # rank 0 writes
        self.keep_data()  # before the plan: a plan without it would look like a lost record
        planned = read_plan_file(rundir) or PlanFile(self.budget, {}, training_data.record_of(rundir))
        if ledger is None:  # the ledger first: a plan without a ledger would look like a lost ledger
            path = rundir.privacy_dir / ledger_file(rundir).name
            remove_uncharged(path)
            unit, sealed = self.spec.unit.removeprefix("one "), sealed_budget(planned.to_dict())
            options = _ledger_options(self.context)
            ledger = Ledger.create(path, self.spec.train_units, unit, budget=sealed, **options)
        planned.stages[self.name] = PlanEntry(
            attempt=self.attempt,
            started=_started(rundir, self.name),
            parent_attempt=parent_attempt,
            plan=self.plan,
        )
        atomic_write(plan_file(rundir), to_json(planned.to_dict(), indent=1) + "\n")
        fixed = replace(self, ledger=ledger)
        fixed.keep_head()
        return fixed

    def keep_head(self) -> str:
        """Record the ledger's head in run.json, and return it, for a checkpoint that is about to be written.

        Guarantee:
            From now on a ledger that lacks what was charged by now is refused (``runs/ledger.py``).
        """
        self.context.rundir.keep_ledger_head(self.ledger.head, self.name.partition(".")[0])
        return self.ledger.head

    def finish(self, outputs: Sequence[str], result: PrivateResult) -> None:
        """Seal the result in the ledger and record the stage as done, with the files that later stages read."""
        rundir = self.context.rundir
        self.ledger.seal_result(stage=self.name, attempt=self.attempt, digest=result_digest(result))
        rundir.finish(self.name, rundir.hash_outputs(self.name, outputs), result, ledger_head=self.ledger.head)

    def planned(self, name: str, epsilon_target: float, spent: Sequence[Stage], **mechanism: Any) -> PrivatePlan:
        """A plan within the budget, as ``make_plan``."""
        budget = self.budget
        return make_plan(
            stage=name,
            epsilon=budget.epsilon,
            delta=budget.delta,
            epsilon_target=epsilon_target,
            spent=spent,
            examples=budget.examples,
            warn=self.context.console.warn,
            **mechanism,
        )

    def replanned(self, steps: int) -> PrivateStage:
        """The stage with another number of steps for the same part of the budget, and the noise that they need.

        Raises:
            BudgetError: too little is left. CheckpointError: steps of the plan were charged already.
        """
        plan = self.plan
        if steps == plan.steps:
            return self
        if self.ledger is not None and self.ledger.charged_steps(self.name, self.attempt):
            raise CheckpointError(
                f"the ledger holds steps of stage {self.name!r} that were planned as {plan.steps}, and now {steps} are "
                "planned",
                fix="restore the stage's folder together with the privacy folder, or restart the stage with "
                    "--overwrite",
            )
        mechanism = {key: getattr(plan, key) for key in ("sample_rate", "clip_norm", "views", "noise")}
        return replace(
            self, plan=self.planned(self.name, plan.epsilon_target, self.spent, steps=steps, **mechanism)
        )

    def following(self, name: str, *, sample_rate: float, steps: int, clip_norm: float) -> PrivateStage:
        """A further mechanism of the stage, of one view, on the run's remaining budget; its plan is written, or was."""
        earlier = _plans(self.context.rundir).get(name)
        if earlier and earlier.parent_attempt == self.attempt:
            return replace(self, name=name, plan=earlier.plan, attempt=earlier.attempt)
        mechanism = {"sample_rate": sample_rate, "steps": steps, "clip_norm": clip_norm, "noise": self.plan.noise}
        plan = self.planned(name, self.budget.epsilon, self.spent, **mechanism)
        further = replace(self, name=name, plan=plan, attempt=self.ledger.last_attempt(name) + 1)
        return further.fix_plan(parent_attempt=self.attempt)

    def mechanism(self, updates_done: int, ledger_head: str | None = None) -> PrivateMechanism:
        """The only way to gradients of the data: it charges before it hands out a batch, and returns noise.

        Args:
            updates_done: updates that the caller's checkpoint holds. Steps charged beyond it were lost in a crash, and
                stay charged.
            ledger_head: ``ledger.head`` as that checkpoint recorded it; None for a fresh start.

        Raises:
            CheckpointError: the ledger is older than the checkpoint.
        """
        if ledger_head is not None and not self.ledger.includes(ledger_head):
            raise CheckpointError(
                f"{ledger_file(self.context.rundir)} is older than the checkpoint of stage {self.name!r}, whose "
                "updates were charged by lines that it does not hold",
                fix="restore the run's privacy folder as it was when the checkpoint was written",
            )
        self.remove_report()
        return PrivateMechanism(
            self.plan, self.ledger, self.random_source(), self.attempt, updates_done, warn=self.context.console.warn
        )

    def remove_report(self) -> None:
        """Remove the run's report.html, if there is one, before a charge: it shows less ε than will be spent then."""
        path = self.context.rundir.path / REPORT
        with storage_errors(path, "remove"):
            if path.exists():
                path.unlink()
                self.context.console.say(f"{path} is removed: it shows the run as it was; dprandp report makes it anew")

    def random_source(self) -> RandomSource:
        """The operating system, unless --insecure-seed was given."""
        seed = self.context.insecure_seed
        if seed is None:
            return SystemRandom()
        charged = self.ledger.charged_steps(self.name, self.attempt)
        return InsecureSeed(seed, self.attempt, charged, len(self.name))

    def disclosure(self, updates: int) -> Guarantee:
        """The privacy part of a result, where the released parameters have seen so many updates."""
        plan, ledger = self.plan, self.ledger
        bound, charged = ledger.spent(plan.delta), ledger.charged_steps(self.name, self.attempt)
        return Guarantee(
            epsilon=bound.upper,
            delta=plan.delta,
            epsilon_target=plan.epsilon_target,
            epsilon_total=self.budget.epsilon,
            accountant=bound.accountant,
            noise_multiplier=plan.noise_multiplier,
            sample_rate=plan.sample_rate,
            steps=plan.steps,
            attempt=self.attempt,
            charged_steps=charged,
            lost_steps=charged - updates,
            clip_norm=plan.clip_norm,
            views=plan.views,
            expected_batch=plan.expected_batch,
            adjacency=ADJACENCY,
            unit=self.budget.unit,
            train_units=plan.examples,
            public_part=self.budget.declared_part,
            noise=plan.noise,
            also_charged=self._also_charged(),
            ledger_head=ledger.head,
            random=ledger.random,
            private=ledger.private and math.isfinite(bound.upper),
            device=self.context.device.type,
        )

    def _also_charged(self) -> tuple[OtherCharge, ...]:
        """The ledger's charges other than this stage's own mechanisms, in order. Private tuning is not among them."""
        own = {(self.name, self.attempt)}
        for name, entry in _plans(self.context.rundir).items():
            if name.startswith(f"{self.name}.") and entry.parent_attempt == self.attempt:
                own.add((name, entry.attempt))
        names = ("stage", "attempt", "sample_rate", "noise_multiplier", "clip_norm")
        found: dict[OtherCharge, int] = {}
        for charge in self.ledger.charges:
            if (charge.stage, charge.attempt) not in own:
                key = OtherCharge(**{name: getattr(charge, name) for name in names}, charged_steps=0)
                found[key] = found.get(key, 0) + charge.steps
        return tuple(replace(other, charged_steps=steps) for other, steps in found.items())


def _ledger_options(context: Context) -> dict[str, Any]:
    return {"warn": context.console.warn, "fault_point": lambda name: faults.point(name.replace(".", "-"))}


def _plans(rundir: RunDir) -> dict[str, PlanEntry]:
    """Mechanism -> its entry in plan.json."""
    planned = read_plan_file(rundir)
    return {} if planned is None else planned.stages


def _started(rundir: RunDir, name: str) -> str | None:
    """When the stage was begun; a plan of an earlier beginning does not count."""
    return rundir.row(name).started if name in STAGES else None


# ------------------------------------------------------------------------------------------------------------- opening


def name_private_stage(name: str, config: PrivateConfig, context: Context, *, write: bool = True) -> PrivateStage:
    """A stage on named data within the run's budget, without a plan; otherwise as ``open_private_stage``."""
    rundir = context.rundir
    download = context.download and write
    dataset = open_dataset(config.data, context.data_dir, download=download, strict=False, **data_options(config))
    dataset.read_with(lambda: _reading(context, write))
    dataset.for_input(_input_size(config, context))
    part = _public_part(config, context)
    shared = config.allow_shared_units is True
    if not shared:
        refuse_shared(dataset)
    if part is not None:
        dataset = without_public_part(dataset, *part)
    spec, planned = dataset.spec, read_plan_file(rundir)
    if name in (CONTINUE, TUNE):
        refuse_other_labels(name, spec)
    fixed = None if planned is None else planned.budget
    # the run's δ, if it has one: the same data under another name may have another default
    delta = default_delta(spec.train_units, spec.published_delta) if fixed is None else fixed.delta
    public_part = NO_PUBLIC_PART if part is None else f"fraction {part[0]!r} by seed {part[1]}"
    budget = Budget(config.data, config.epsilon, config.delta or delta, spec.train_units, spec.unit, public_part)
    validate_budget(budget.epsilon, budget.delta, budget.examples)
    ledger = open_run_ledger(rundir, write=write, **_ledger_options(context))  # first: is the fixed budget unchanged?
    if fixed is not None:
        fixed.refuse_other(budget)
        budget = replace(budget, data=fixed.data)
    if write:
        dataset.require()
    stage = PrivateStage(name, dataset, budget, context, shared_units=shared)
    if ledger is None or fixed is None:  # not begun, or stopped before its first plan: nothing was charged
        return stage
    return replace(stage, attempt=ledger.last_attempt(name) + 1, ledger=ledger)


def refuse_other_labels(stage: str, spec: DataSpec) -> None:
    """Raise UsageError for labels, or a loss, that only probe and fine-tune know."""
    if spec.multi_label or spec.class_shares is not None:
        what = "several labels per image" if spec.multi_label else "declared shares of the classes"
        raise UsageError(
            f"`{stage}` supports only one class per image and no --class-shares, and {spec.name} has {what}",
            fix=f"leave out {stage}; probe and finetune do" if spec.multi_label else "leave --class-shares out",
        )


def _input_size(config: PrivateConfig, context: Context) -> int:
    """Side of the input of the stage's extractor, in pixels; the default where there is none yet."""
    if isinstance(config, FinetuneConfig) and config.source in WITHOUT_PHASE_ONE:
        return input_size_of(config)
    pretrained = context.rundir.row("pretrain").config
    return input_size_of(recorded("pretrain", pretrained)) if pretrained else INPUT_SIZE


def _reading(context: Context, write: bool) -> Reading:
    rundir, ranks = context.rundir, context.ranks
    return Reading(
        folder=rundir.private_dir if write else rundir.path / "private",
        writable=write and ranks.is_first,
        workers=max(1, context.workers // ranks.size),
        progress=context.console.progress,
    )


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
        name, config: of the stage: 'continue', 'probe' or 'finetune'.
        steps: None for those of the configuration.
        batch_part: expected batch as a part of N where the configuration names none; 1 is full batch.
        budget_part: part of what is left that another stage than a probe may spend on its first mechanism (see
            ``following``).
        write: False for ``--plan``: nothing is created or fetched, and the data's files may be absent.
        planned: stages that are themselves only planned (``--plan``); they count as charged.

    Guarantee:
        No pixel and no label has been read when this returns or raises.

    Raises:
        InputError: the data's files are not there, or units are in both splits.
        UsageError: values out of range, other data than the run's.
        BudgetError: the remaining budget is too small for the stage.
        CheckpointError: the ledger is damaged, or there is one without its plan or the other way round.
    """
    stage = name_private_stage(name, config, context, write=write)
    budget, warn = stage.budget, context.console.warn
    if write and (reminder := unit_reminder(stage.spec, config.unit_column)):
        context.console.say(reminder)
    earlier = _plans(context.rundir).get(name)
    if earlier and earlier.started == _started(context.rundir, name) and not context.overwrite:
        return replace(stage, plan=earlier.plan, attempt=earlier.attempt)
    spent = [*stage.spent, *planned]
    mechanism = {
        "sample_rate": _sample_rate(config, budget.examples, batch_part),
        "steps": config.steps if steps is None else steps,
        "clip_norm": config.clip_norm,
        "views": config.views,
        "noise": config.noise,
    }
    if isinstance(config, ProbeConfig):
        return _warned(replace(stage, plan=_plan_probe(stage, budget_share(config), spent, mechanism)), write)
    before = compose_stages(spent, budget.delta, warn).upper
    target = budget.epsilon  # also where all is spent: the planner refuses
    if math.isfinite(target) and before < target:
        target = before + budget_part * (target - before)
    return _warned(replace(stage, plan=stage.planned(name, target, spent, **mechanism)), write)


def _warned(stage: PrivateStage, write: bool) -> PrivateStage:
    """The same stage, after its warning was printed; a plan prints its own."""
    if write and stage.warning:
        stage.context.console.warn(stage.warning)
    return stage


def begin_on_all_ranks(
    name: str, context: Context, opened: Callable[[], tuple[PrivateStage, PrivateConfig, dict[str, str]]]
) -> tuple[PrivateStage, PrivateConfig] | None:
    """Let rank 0 open a private stage and begin it in the run directory; every rank gets its plan and configuration.

    Args:
        name: of the stage.
        opened: on rank 0: the stage with its plan, its configuration, and the hashes of its public inputs.

    Returns:
        The stage and its recorded configuration; None where it is done already.

    Guarantee:
        No other rank has read a pixel before the plan was accepted on rank 0. All have the same training data, which
        are those that rank 0 recorded or compared: else no rank comes back. The stages of other ranks have no ledger:
        they cannot charge, so they cannot draw or release either.

    Raises:
        As ``opened``, ``RunDir.begin`` and ``private_inputs``. InputError: a rank has no data, others, or another
        run directory.
    """

    def begin() -> tuple[PrivateStage, PrivateConfig] | None:
        stage, config, inputs = opened()
        flags = {"resume": context.resume, "overwrite": context.overwrite}
        private = stage.private_inputs()
        begun = context.rundir.begin(name, as_dict(config), inputs, **flags, private_inputs=private)
        return None if begun.action == "skip" else (stage, recorded(name, begun.config))

    def told(begun: tuple[PrivateStage, PrivateConfig] | None) -> dict[str, Any] | None:
        return begun and {"plan": begun[0].plan.to_dict(), "config": as_dict(begun[1])}

    context.ranks.require_one_folder(context.rundir.path)
    begun = context.ranks.first(begin, told)
    if isinstance(begun, dict):
        config, plan = build(name, begun["config"]), PrivatePlan.from_dict(begun["plan"])
        begun = replace(name_private_stage(name, config, context, write=False), plan=plan, ledger=None), config
    if begun is not None:
        context.ranks.refuse_different("training data", lambda: training_data.fingerprint_of(begun[0].dataset))
    return begun


def budget_share(config: ProbeConfig) -> float:
    """The fraction of the run's ε for the probe and its tuning."""
    return DEFAULT_SHARE if config.share is None else config.share


def _public_part(config: PrivateConfig, context: Context) -> tuple[float, int] | None:
    """(fraction, seed) of the training images that the run's ``continue`` declares public. They are public in every
    later stage of the run too, and not counted in its N."""
    if not isinstance(config, ContinueConfig):
        row = context.rundir.row(CONTINUE)
        if row.config is None:
            return None
        config = recorded(CONTINUE, row.config)
    fraction = fraction_of(config.public)
    return None if fraction is None else (fraction, config.seed)


def _plan_probe(stage: PrivateStage, share: float, spent: list[Stage], mechanism: dict[str, Any]) -> PrivatePlan:
    """The budget fraction of the probe, including private tuning; a repeated probe takes it again, on top of earlier
    spending. A share of 1 is the whole remaining budget."""
    budget, warn = stage.budget, stage.context.console.warn
    epsilon, own = budget.epsilon, budget.epsilon * share
    if share == 1 or all(isinstance(event, TuningEvent) for earlier in spent for event in earlier):
        return stage.planned(stage.name, own, spent, **mechanism)
    rate, steps, discrete = mechanism["sample_rate"], mechanism["steps"], mechanism["noise"] == "discrete"
    sigma = calibrate_stage(own, budget.delta, rate, steps, (), warn, discrete)
    event = GaussianEvent(sigma, rate, steps, discrete)
    total = compose_stages([*spent, [event]], budget.delta, warn).upper
    if total > epsilon:
        raise BudgetError(
            f"running the probe for ε = {own:.4g}, after what this run has spent, would bring it to ε = "
            f"{rounded_up(total)}, above its budget of {epsilon:g}",
            fix="give a smaller --share, keep the existing probe, or start a new --run and add up the ε of both",
        )
    return PrivatePlan(
        stage.name, budget.examples, noise_multiplier=sigma, epsilon_target=epsilon, delta=budget.delta, **mechanism
    )


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
