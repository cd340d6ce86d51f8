"""``dprandp verify``: check, like an outsider, whether a run's claims follow from its ledger.

Reads run.json, ``privacy/`` and ``model/``; needs neither the private data nor ``private/``. It recomputes the chain of
hashes, and ε by other libraries than those that reported it (prv-accountant, whose lower bound is certified, and
Opacus' Rényi DP; with private tuning dp-accounting's Rényi DP), so that an error of this program's ledger or accountant
would show.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dprandp.dpsgd.budget import read_budget, read_plan_file
from dprandp.dpsgd.release import card_of
from dprandp.errors import AuditError, CheckpointError, InputError
from dprandp.inspection import OK, Check, attempt, exit_code
from dprandp.privacy.accounting import Event, GaussianEvent, compose
from dprandp.privacy.opinions import second_opinions
from dprandp.privacy.selection import SelectionPlan
from dprandp.privacy.tuning import TuningEvent
from dprandp.release import load_run_model
from dprandp.report.disclosure import epsilon_text
from dprandp.report.run import report_state
from dprandp.runs.directory import RunDir
from dprandp.runs.ledger import ledger_file, open_run_ledger
from dprandp.runs.results import PrivateResult

FIX = "do not rely on this run"

TUNED = 2e-3
"""By how much, of itself, a reported ε with private tuning may be below the one that dp-accounting finds with the same
theorem: the two turn Rényi DP into ε in different ways, and try different orders."""


@dataclass(frozen=True)
class Verdict:
    """Whether a run's claims hold."""

    run: str  # path
    passed: bool
    exit_code: int  # 0, or that of the first claim that does not hold: 1 for an ε that is too low, else 4
    checks: list[Check]


def verify(rundir: RunDir) -> Verdict:
    """Check a run's claims.

    Raises:
        InputError: no private stage of the run is finished, so it claims nothing.
        CheckpointError: that is what run.json says, and the ledger or the model says otherwise.
    """
    results = {stage: result for stage, result in rundir.results().items() if isinstance(result, PrivateResult)}
    if not results:
        open_run_ledger(rundir, warn=lambda text: None)  # refuses charges, or a model, that run.json does not know of
        raise InputError(
            f"{rundir.path} has no finished private stage, so there is no claim to check",
            fix=f"run: dprandp probe --run {shlex.quote(str(rundir.path))}",
        )
    checks = [
        *attempt("ledger", lambda: _chain(rundir)),
        *attempt("run and ledger", lambda: _run_and_ledger(rundir)),
        *attempt("plans", lambda: _plans(rundir)),
    ]
    for stage, result in results.items():
        checks += attempt(f"ε of {stage}", lambda result=result: _epsilon(rundir, result))
    checks += attempt("model", lambda: _model(rundir, results))
    checks += attempt("report", lambda: report_state(rundir))
    code = exit_code(checks)
    return Verdict(str(rundir.path), code == 0, code, checks)


def verify_lines(verdict: Verdict) -> str:
    """``verify`` for people."""
    rows = [f"{'holds' if each.state == OK else 'FAILS':<6} {each.name:<16} {each.found}" for each in verdict.checks]
    rows.append("all claims hold" if verdict.passed else "the run's claims DO NOT HOLD: do not rely on them")
    return "\n".join(rows)


def _lines(rundir: RunDir) -> list[dict[str, Any]]:
    """The ledger's lines. Raises CheckpointError where their hashes do not form a chain."""
    path = ledger_file(rundir)
    try:
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        previous = "0" * 64
        for number, line in enumerate(lines, 1):
            body = {key: value for key, value in line.items() if key != "hash"}
            digest = hashlib.sha256(json.dumps(body, separators=(",", ":")).encode()).hexdigest()
            if line["hash"] != digest or line["previous"] != previous:
                raise CheckpointError(f"line {number} of {path} breaks the chain", fix=FIX)
            previous = digest
            if line["kind"] == "charge":
                _ = [line[key] + 0 for key in ("attempt", "steps", "noise_multiplier", "sample_rate", "clip_norm")]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read as a ledger", fix=FIX) from error
    return lines


def _chain(rundir: RunDir) -> str:
    lines = _lines(rundir)
    steps = sum(line["steps"] for line in lines if line["kind"] == "charge")
    return f"{len(lines)} lines form a chain, {steps} steps were charged"


def _run_and_ledger(rundir: RunDir) -> str:
    open_run_ledger(rundir, warn=lambda text: None)
    budget = read_budget(rundir)
    if budget is not None and not budget.spent <= budget.epsilon * (1 + 1e-9):
        said = f"ε = {epsilon_text(budget.spent)} was spent of a budget of {epsilon_text(budget.epsilon)}"
        raise AuditError(said, fix=FIX)
    said = "the run's results, last line and budget agree with the ledger"
    reported = max(result.epsilon for result in rundir.results().values() if isinstance(result, PrivateResult))
    if budget is not None and budget.spent > reported * (1 + 1e-6):
        said += f"; ε = {epsilon_text(budget.spent)} was spent in all, some of it by a stage that is not finished"
    return said


def _plans(rundir: RunDir) -> str:
    planned, lines = read_plan_file(rundir), _lines(rundir)
    entries = {} if planned is None else planned.stages
    if unplanned := {line["stage"] for line in lines if line["kind"] in ("charge", "tuning")} - entries.keys():
        raise CheckpointError(f"{', '.join(sorted(map(str, unplanned)))} was charged, but never planned", fix=FIX)
    for name, entry in entries.items():
        plan = entry.plan
        if isinstance(plan, SelectionPlan):
            continue
        own = [line for line in lines if (line.get("stage"), line.get("attempt")) == (name, entry.attempt)]
        charged = [line for line in own if line["kind"] == "charge"]
        keys = ("noise_multiplier", "sample_rate", "clip_norm", "noise")
        other = [line for line in charged if any(line[key] != getattr(plan, key) for key in keys)]
        if other or sum(line["steps"] for line in charged) > plan.steps:
            raise CheckpointError(f"the charges of {name} differ from its plan", fix=FIX)
    return f"the charges agree with the plans ({', '.join(entries) or 'none'})"


def _epsilon(rundir: RunDir, result: PrivateResult) -> str:
    """A result's ε is not below that of the lines that it was computed from."""
    events: list[Event] = []
    seeded = False
    for line in _lines(rundir):
        seeded = seeded or line.get("random", "os-entropy") != "os-entropy"
        if line["kind"] == "charge":
            events.append(GaussianEvent(line["noise_multiplier"], line["sample_rate"], line["steps"]))
        if line["kind"] == "tuning":
            events.append(TuningEvent(line["mu"], line["eta"], line["gamma"]))
        if line["hash"] == result.ledger_head:
            break
    else:
        raise CheckpointError("the result names no line of the ledger", fix=FIX)
    if seeded:
        if result.private:
            raise AuditError("the result says that it is private, but some of its noise came from a seed", fix=FIX)
        return "NOT PRIVATE: some noise came from a seed, so that nothing is promised"
    opinions = second_opinions(events, result.delta)
    said = f"ε = {epsilon_text(result.epsilon)} at δ = {result.delta:g}; {'; '.join(map(str, opinions))}"
    lower = max(each.lower for each in opinions)
    steps = [event for event in events if isinstance(event, GaussianEvent)]
    if len(steps) < len(events):  # with private tuning
        lower = max(each.lower for each in second_opinions(steps, result.delta))
        if all(event.sample_rate == 1 for event in steps):
            lower = max(lower, opinions[-1].upper * (1 - TUNED))
    elif lower == 0:  # without a lower bound of the other library, the one that reported is used
        lower = compose(events, result.delta, lambda sentence: None).lower
        said += f"; by the same library again, from the ledger: ε ≥ {lower:.4g}"
    if not result.epsilon >= lower * (1 - 1e-6):
        raise AuditError(f"reported {said}", fix=FIX)
    return said


def _model(rundir: RunDir, results: Mapping[str, PrivateResult]) -> str:
    model = load_run_model(rundir)
    if model.result.stage not in results:  # its stage was begun again
        _epsilon(rundir, model.result)
    card = model.content["MODEL_CARD.md"].decode("utf-8").splitlines()
    due = card_of(rundir, model.result, model.shape).splitlines()
    if card != due:
        other = next((line for line in card if line not in due), "a line is missing")
        raise CheckpointError(f"the card is not the one of this result and this version: {other[:200]}", fix=FIX)
    return "hashes as described; the card is the one of the result"
