"""How a private stage comes to its plan: from the budget, the ledger and public facts, or not at all.

The order matters: name the data set (declared facts only), read the run's budget and ledger, find σ from what is left,
or refuse. No pixel is read in this file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dprandp.config import ContinueConfig, FinetuneConfig, ProbeConfig
from dprandp.continual_config import fraction_of
from dprandp.datasets import open_dataset, without_public_part
from dprandp.errors import BudgetError, UsageError
from dprandp.privacy.accounting import GaussianEvent
from dprandp.privacy.adaptive import Stage, calibrate_stage, compose_stages
from dprandp.privacy.plan import PrivatePlan, make_plan, validate_budget
from dprandp.privacy.tuning import TuningEvent
from dprandp.runledger import open_run_ledger
from dprandp.stages.budget import NO_PUBLIC_PART, Budget, budget_of, default_delta, read_plan_file
from dprandp.stages.context import Context, recorded
from dprandp.stages.private import PrivateStage, started
from dprandp.stages.unit_rows import unit_reminder

PrivateConfig = ContinueConfig | ProbeConfig | FinetuneConfig

DEFAULT_SHARE = 0.3
"""Tang et al. 2023, figure on the budget's split: 20 to 40 % of ε for Phase II serve best."""


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
        open_run_ledger(context.rundir, warn=lambda text: None)  # first of all: is this the budget that was fixed?
        fixed.refuse_other(budget)
        budget = replace(budget, data=fixed.data)
    if fetch or not context.download:
        dataset.require()
    return PrivateStage(name, dataset, budget, context), document


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
        planned: stages that are themselves only planned (``--plan``); they count as paid.

    Guarantee:
        No pixel and no label has been read when this returns or raises.

    Raises:
        InputError: the data's files are not there. UsageError: values out of range, other data than the run's.
        BudgetError: what is left does not allow the stage.
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
            target = budget.epsilon  # let the planner refuse, with its own words
        stage.plan = make_plan(
            **public, epsilon_total=budget.epsilon, spend_epsilon=target, spent=spent, warn=context.console.warn
        )
    return stage


def _public_part(config: PrivateConfig, context: Context) -> tuple[float, int] | None:
    """(fraction, seed) of the training images that the run's ``continue`` declares public: they are nobody's secret in
    any later stage of the run, and no record of its N. Later stages are held to the same data by their content."""
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
    """The probe takes its share, paid tuning included; run again, it takes it again, on top of all before.

    A share of 1 is all that is left, whatever spent the rest.
    """
    warn = context.console.warn
    own = epsilon * share
    discrete = public["noise"] == "discrete"
    if share == 1 or all(isinstance(event, TuningEvent) for stage in spent for event in stage):
        return make_plan(**public, epsilon_total=epsilon, spend_epsilon=own, spent=spent, warn=warn)
    sigma = calibrate_stage(own, public["delta"], public["sample_rate"], public["steps"], (), warn, discrete)
    event = GaussianEvent(sigma, public["sample_rate"], public["steps"], discrete)
    total = compose_stages([*spent, [event]], public["delta"], warn).upper
    if total > epsilon:
        raise BudgetError(
            f"running the probe again for ε = {own:.4g} would bring this run to ε = {total:.4g}, above its budget of "
            f"{epsilon:g}",
            fix="give a smaller --share, keep the probe there is, or start a new --run and add up what both release",
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
