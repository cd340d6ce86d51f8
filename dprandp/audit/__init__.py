"""The audit of a run or of a bare plan: tries to contradict the claimed ε, and says what it could have seen.

    audit/audit.json       every outcome; public
    audit/audit.png        the lower bounds against the claims, and the controls
    private/audit.json     raw numbers of the replay on private data, where that was asked for (``--with-data``)

By default the records are synthetic images with random labels, so nothing private is read and everything may be
published. With ``--with-data`` the replay also runs on the private records. Of that only *passed* or *failed* is
published: that it passes is what the guarantee says of every data set, and so tells nothing about this one. That it
fails may tell something about the data; keep it to yourself until the fault is mended.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dprandp import finetune
from dprandp.audit.bounds import SIGNIFICANCE, AuditSettings
from dprandp.audit.games import (
    GAME,
    BlackBoxFound,
    Found,
    GameFound,
    OneRunFound,
    SelectionFound,
    try_mechanism,
    units,
)
from dprandp.audit.loops import IMAGES, Facts, Labels, on_made_up, on_private_data, passed
from dprandp.continual import loop
from dprandp.dpsgd.budget import PlanFile, default_delta, read_plan_file
from dprandp.errors import AuditError, InputError
from dprandp.privacy.accounting import rounded_up
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.mechanism import PrivatePlan, make_plan
from dprandp.privacy.randomness import NoiseKind
from dprandp.privacy.selection import SelectionPlan
from dprandp.runs.console import Console
from dprandp.runs.context import Context
from dprandp.runs.files import atomic_path, atomic_write, to_json
from dprandp.runs.ledger import ledger_file, open_run_ledger
from dprandp.runs.results import CONTRADICTION, ONE_IMAGE


def draw(result: AuditResult, path: Path) -> None:
    """Draw the result of ``audit_run`` as a PNG file: what was claimed, what was shown, which faults were seen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    mechanisms = result.mechanisms
    faults = list(dict.fromkeys(control.name for found in mechanisms for control in found.controls))
    figure = Figure(figsize=(11 if faults else 6, 2.2 + 0.7 * max(len(mechanisms), len(faults) / 2)),
                    layout="constrained")  # fmt: skip
    FigureCanvasAgg(figure)
    left, *right = figure.subplots(1, 2 if faults else 1, squeeze=False)[0]
    for place, found in enumerate(mechanisms):
        left.barh(place, found.epsilon_claimed, height=0.66, color="#d5dae0", label="claimed ε (upper bound)")
        left.barh(place - 0.17, found.two_world.epsilon_lower, height=0.28, color="#1f6fb5",
                  label="shown by the distinguishing game")  # fmt: skip
        one_run = found.one_run.epsilon_lower if found.one_run else 0.0
        left.barh(place + 0.17, one_run, height=0.28, color="#d95f02", label="shown by one run")
    left.set_yticks(range(len(mechanisms)), [found.name for found in mechanisms])
    left.set_xlabel("ε")
    left.set_title(f"{result.outcome} (significance {result.significance:g})", fontsize=10)
    handles, labels = left.get_legend_handles_labels()
    left.invert_yaxis()
    figure.legend(handles[:3], labels[:3], fontsize=8, ncols=3, loc="outside lower left")
    if right:
        _controls(right[0], mechanisms, faults)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _controls(axes: Any, mechanisms: list[Found], faults: list[str]) -> None:
    """One row a fault: its μ against the claim; hollow where only the replay saw it, a cross where nothing did."""
    for found in mechanisms:
        claimed = found.two_world.mu_claimed
        for control in found.controls:
            seen, place = control.by, faults.index(control.name)
            shape = {"marker": "o" if seen else "x", "fillstyle": "full" if GAME in seen else "none"}
            axes.plot((control.mu_lower or 0) / claimed, place, color="#1f6fb5" if seen else "#b3161d", **shape)
    axes.axvline(1, color="#1c2127", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_yticks(range(len(faults)), faults)
    axes.invert_yaxis()
    axes.set_xlabel("μ shown by the game / μ claimed")
    axes.set_xlim(left=0)
    axes.set_title("faults: ● game, ○ replay, × missed", fontsize=10)


@dataclass(frozen=True)
class Account:
    """One comparison of ledger, plan and budget."""

    name: str
    passed: bool


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """audit.json."""

    format: int = 1
    outcome: str  # in words
    passed: bool
    significance: float
    data: str  # what it was made on, in words
    trials: int | None  # None where the claims chose
    canaries: int | None
    seed: int
    accounts: list[Account]  # ledger against plan
    mechanisms: list[Found]
    run: str | None  # path; None for a bare plan
    ledger_head: str | None  # of the run when it was audited
    seconds: float


FOLDER = "audit"
UNIT_IMAGES = 3
"""Images of a made-up record where the run protects units of several."""

PUBLIC_DATA = "synthetic records with random labels; nothing private was read"
PRIVATE_DATA = "synthetic records, and the run's private records: of those, passed or failed alone is published"


def audit_run(settings: AuditSettings, context: Context) -> AuditResult:
    """Audit every finished mechanism of a run, and write ``audit/``.

    Raises:
        InputError: no private stage is finished, or the run makes no claim.
    """
    started = time.perf_counter()
    planned, plans = _claims(context)
    spec = Facts(context)
    if planned.budget.unit != ONE_IMAGE:
        settings = replace(settings, images=UNIT_IMAGES)
    parts = sum(units(settings) for _ in plans) + len(plans)
    mechanisms, raw = [], {}
    with context.console.progress(parts, "audit") as progress:
        for name, plan in plans.items():
            found = try_mechanism(
                plan, spec.features, spec.labels, settings, lambda: progress.advance(1), context.console.say
            )
            replay, controls = found.replay, found.controls
            if name in (finetune.STAGE, loop.STAGE):
                replay[name], more = on_made_up(name, plan, spec, settings, context)
                controls = controls + more
            if settings.with_data and "." not in name and isinstance(plan, PrivatePlan):
                raw[name] = on_private_data(name, plan, spec, context)
                replay["private_data"] = "passed" if passed(raw[name]) else "failed"
            checks = replay["head"] + replay.get(finetune.STAGE, []) + replay.get(loop.STAGE, [])
            replay["flagged"] = not passed(checks) or replay.get("private_data") == "failed"
            mechanisms.append(replace(found, attempt=planned.stages[name].attempt, controls=controls))
            progress.advance(1)
    if raw:
        atomic_write(context.rundir.private_dir / "audit.json", to_json(raw, indent=1) + "\n")
    ledger = Ledger.open(ledger_file(context.rundir), read_only=True)
    accounts = _accounts(planned, plans, ledger)
    result = _result(settings, mechanisms, accounts, started, run=str(context.rundir.path), ledger_head=ledger.head)
    folder = context.rundir.path / FOLDER
    folder.mkdir(exist_ok=True)
    draw(result, folder / "audit.png")
    atomic_write(folder / "audit.json", to_json(result, indent=1) + "\n")
    return result


def audit_plan(
    epsilon: float,
    delta: float | None,
    sample_rate: float,
    steps: int,
    examples: int,
    settings: AuditSettings,
    console: Console,
    noise: NoiseKind = "gaussian",
) -> AuditResult:
    """Audit the mechanism that a budget would get, without any run; writes nothing.

    Raises:
        UsageError: a value out of its range. BudgetError: no noise is enough.
    """
    started = time.perf_counter()
    if math.isinf(epsilon):
        raise _no_claim("A plan with ε = inf")
    plan = make_plan(
        stage="plan", epsilon=epsilon, delta=delta or default_delta(examples), epsilon_target=epsilon, spent=[],
        examples=examples, sample_rate=sample_rate, steps=steps, clip_norm=1.0, noise=noise,
        warn=console.warn,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(settings.seed)
    features = torch.nn.functional.normalize(torch.randn(IMAGES, 64, generator=generator), dim=1)
    with console.progress(units(settings), "audit") as progress:
        found = try_mechanism(plan, features, Labels(10), settings, lambda: progress.advance(1), console.say)
    return _result(settings, [found], [], started)


def line(result: AuditResult) -> str:
    """The result for people."""
    return (
        f"audit: {result.outcome} (significance {result.significance:g}). "
        + "; ".join(_line(found) for found in result.mechanisms)
        + ". A clean audit is no proof."
    )


def _line(found: Found) -> str:
    """One mechanism for people."""
    game, one, box = found.two_world, found.one_run, found.black_box

    def shown(bound: GameFound | SelectionFound | OneRunFound | BlackBoxFound) -> str:
        return f"ε ≥ {bound.epsilon_lower:.3g} = {100 * bound.ratio:.0f} % of the claim"

    power = ", ".join(f"{entry.flagged:.2g} for noise/{entry.factor:g}" for entry in game.power[1:])
    replayed = "exact" if found.replay["head"] else "not for tuning"
    parts = [
        f"{found.name} claims ε ≤ {rounded_up(found.epsilon_claimed)} at δ = {found.delta:g}: "
        f"replay {'FAILED' if found.replay['flagged'] else replayed}",
        f"{GAME} {shown(game)} ({game.trials:,} trials with and without the record; chance to flag too little noise: "
        f"{power})",
    ]
    if isinstance(game, SelectionFound):
        told = (f"{100 * each.ratio:.0f} % ({name.replace('_', ' ')})" for name, each in game.one_trial.items())
        parts.append(f"of the claimed μ of one trial {', '.join(told)}")
    if one:
        parts.append(f"one run {shown(one)} ({one.canaries:,} canaries; "
                     f"ε ≥ {one.epsilon_lower_if_independent:.3g} if they are independent)")  # fmt: skip
    if box:
        parts.append(f"released head alone {shown(box)}")
    caught = sum(control.flagged for control in found.controls)
    parts.append(f"{caught} of {len(found.controls)} controls flagged" if found.controls else "no controls run")
    return ", ".join(parts)


def _against(mechanisms: list[Found], accounts: list[Account]) -> list[str]:
    """What contradicts the claims: mechanism and test, or the account that does not hold."""
    against = []
    for found in mechanisms:
        tests = {GAME: found.two_world, "one run": found.one_run, "black box": found.black_box}
        titles = ["replay"] if found.replay["flagged"] else []
        titles += [title for title, test in tests.items() if test is not None and test.flagged]
        against += [f"{found.name}: {title}" for title in titles]
    return against + [f"accounts: {entry.name}" for entry in accounts if not entry.passed]


def _missed(mechanisms: list[Found]) -> list[str]:
    """Controls that no test flagged."""
    return [
        f"{found.name}: {control.name}"
        for found in mechanisms
        for control in found.controls
        if not control.flagged
    ]


def raise_unless_passed(result: AuditResult) -> None:
    """Turn a contradiction, or a control that was missed, into an AuditError (exit code 1) that names them."""
    if result.passed:
        return
    against = _against(result.mechanisms, result.accounts)
    if against:
        raise AuditError(
            f"The audit contradicts the privacy claim ({'; '.join(against)}).",
            fix="Do not release this model. Run the audit again: a sound mechanism is accused at most once in a "
            f"thousand tests (significance {result.significance:g}); if it stays, the mechanism has a fault.",
        )
    raise AuditError(
        f"The audit failed to flag a fault that it was shown ({'; '.join(_missed(result.mechanisms))}), so its "
        "silence means nothing.",
        fix="Give more --trials; if that does not help, the audit itself is broken.",
    )


def _result(
    settings: AuditSettings, mechanisms: list[Found], accounts: list[Account], started: float,
    run: str | None = None, ledger_head: str | None = None,
) -> AuditResult:  # fmt: skip
    contradicted, blind = bool(_against(mechanisms, accounts)), bool(_missed(mechanisms))
    outcome = CONTRADICTION if contradicted else "a control was missed" if blind else "nothing contradicts"
    return AuditResult(
        outcome=outcome,
        passed=not (contradicted or blind),
        significance=SIGNIFICANCE,
        data=PRIVATE_DATA if settings.with_data else PUBLIC_DATA,
        trials=settings.trials,
        canaries=settings.canaries,
        seed=settings.seed,
        accounts=accounts,
        mechanisms=mechanisms,
        run=run,
        ledger_head=ledger_head,
        seconds=round(time.perf_counter() - started, 2),
    )


def _no_claim(what: str) -> InputError:
    problem = f"{what} is NOT PRIVATE: it claims nothing that an audit could contradict."
    return InputError(problem, fix="Audit a run with a finite --eps and without --insecure-seed.")


def _claims(context: Context) -> tuple[PlanFile, dict[str, PrivatePlan | SelectionPlan]]:
    """The run's plan file, and the plans of finished stages; private tuning is finished once it is in the ledger."""
    ledger = open_run_ledger(context.rundir)
    done = {row.stage for row in context.rundir.status() if row.result}
    planned = read_plan_file(context.rundir)
    entries = {} if planned is None else planned.stages
    if ledger is not None:
        done |= {charge.stage for charge in ledger.tunings}
    plans = {name: entry.plan for name, entry in entries.items() if name.split(".")[0] in done}
    if not any(isinstance(plan, PrivatePlan) for plan in plans.values()):
        raise InputError(
            f"{context.rundir.path} has no finished private stage, so there is nothing to audit.",
            fix=f"Run: dprandp probe --run {context.rundir.path}",
        )
    if ledger is None or not ledger.private or any(
        isinstance(plan, PrivatePlan) and plan.noise_multiplier == 0 for plan in plans.values()
    ):
        raise _no_claim(f"The run {context.rundir.path}")
    return planned, plans


def _accounts(planned: PlanFile, plans: dict[str, PrivatePlan | SelectionPlan], ledger: Ledger) -> list[Account]:
    """What the ledger holds, against the plans and the budget."""
    found = []
    for name, plan in plans.items():
        attempt = planned.stages[name].attempt
        if isinstance(plan, SelectionPlan):
            charged = [one.event for one in ledger.tunings if (one.stage, one.attempt) == (name, attempt)]
            found.append(Account(f"{name}: the ledger holds the plan's selection", charged == [plan.event]))
            continue
        mine = [charge for charge in ledger.charges if (charge.stage, charge.attempt) == (name, attempt)]
        step = (plan.noise_multiplier, plan.sample_rate, plan.clip_norm)
        as_planned = all((c.noise_multiplier, c.sample_rate, c.clip_norm) == step for c in mine)
        count = sum(charge.steps for charge in mine)
        good = bool(mine) and as_planned and count <= plan.steps and plan.examples == ledger.examples
        found.append(Account(f"{name}: the ledger holds the steps of the plan", good))
    spent = ledger.spent(planned.budget.delta).upper
    found.append(Account("the ledger stays within the budget", spent <= planned.budget.epsilon))
    return found
