"""The privacy ledger of a run, compared with the run's own records.

A ledger alone does not show that it was deleted, or that lines were cut off its end. So the run keeps the hash of the
last written line, renewed at each checkpoint: ``ledger_head`` in run.json, and a file beside it and in the folder of
each private stage. The first two are kept by ``--overwrite``. The ledger keeps the hash of each finished stage's result
and, in its first line, the fixed budget and a hash of the record of the data. Every command that spends, reports or
releases opens the ledger here, so none continues with too low an ε or too large a budget after a lost folder, an old
backup of some files, or an edited run.json or plan.json.

Limit: a run that was restored to an earlier state as a whole, or copied, is not noticed. ε counts what one run
directory has released; add up the ε of copies.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dprandp.errors import BudgetError, CheckpointError
from dprandp.privacy.accounting import GaussianEvent, Warn, warn_by_log
from dprandp.privacy.adaptive import Stage, compose_stages
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.tuning import TuningEvent
from dprandp.runs.directory import RunDir, frozen, result_digest
from dprandp.runs.files import read_object, storage_errors

TUNING, PRIVATE, TUNE = "tune.json", "private", "tune"
"""The record of a run's tuning, how it names the private data, and how the ledger names private tuning."""

ALWAYS_PRIVATE = ("probe", "finetune")
"""Stages that always read private data; ``continue`` may read only public data."""


RESTORE = "restore the run as a whole from a copy; if there is none, start a new --run and add up the ε of both"

SEALED = ("epsilon", "delta", "examples", "unit", "public_part", "data_record")
"""Entries of plan.json that were fixed before the data were first read; the last two are optional."""


def ledger_file(rundir: RunDir) -> Path:
    """The ledger's path."""
    return rundir.path / "privacy" / "ledger.jsonl"


def plan_file(rundir: RunDir) -> Path:
    """The path of budget and plans."""
    return rundir.path / "privacy" / "plan.json"


def remove_uncharged(path: Path) -> None:
    """Remove a ledger without charges, if there is one: a stage that was stopped before its first charge has left it.

    Raises:
        CheckpointError: it holds charges by now, so another process has begun since this one read the run.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with storage_errors(path, "replace"):
        if not path.exists():
            return
        os.replace(path, aside)  # whoever charges to it from now on fails before anything is used
        try:
            if not Ledger.open(aside, read_only=True).events():
                return aside.unlink()
        except BaseException:
            os.replace(aside, path)
            raise
        os.replace(aside, path)
    raise CheckpointError(
        f"another process has begun to charge to {path} since this one opened the run",
        fix="use a run in one process at a time; where the folder is shared between machines, on one machine",
    )


def open_run_ledger(
    rundir: RunDir,
    *,
    write: bool = False,
    warn: Warn = warn_by_log,
    fault_point: Callable[[str], None] = lambda name: None,
) -> Ledger | None:
    """The run's ledger; None where no private stage was ever begun.

    Args:
        write: open it for charges; the run's lock must be held.
        warn, fault_point: as for ``Ledger.open``.

    Guarantee:
        The ledger that is returned holds every line that it held when a stage of this run last wrote a checkpoint,
        finished or began its charges, and when anything was made that is in ``model/`` or in the folder of a private
        stage; each private result in
        run.json is the one that was computed from it, and the budget in plan.json is the one that the ledger was begun
        with.

    Raises:
        CheckpointError: the ledger is lost, damaged, older than the run or of another run; the recorded result of a
            private stage, or of private tuning, is not the one that was reported; or the budget was changed.
            StorageError: the disk refuses.
    """
    path, head = ledger_file(rundir), rundir.ledger_head
    rows = {row.stage: row.result for row in rundir.status() if row.result}
    results = {stage: result for stage, result in rows.items() if stage in ALWAYS_PRIVATE or "epsilon" in result}
    if head is None and results:
        raise CheckpointError(
            f"{rundir.path / 'run.json'} reports stage {next(iter(results))!r} but does not name the privacy ledger "
            "that it was charged to",
            fix="restore run.json from a copy, or start a new --run and add up the ε of both",
        )
    for folder in rundir.unrecorded():
        raise CheckpointError(
            f"{folder} holds what a private stage made, and {rundir.path / 'run.json'} does not know of it: run.json "
            "is lost or older, and perhaps the ledger too",
            fix=RESTORE,
        )
    planned, model, kept = plan_file(rundir).exists(), _model_head(rundir), rundir.ledger_heads()
    tuned = _private_tuning(rundir)
    if head is None and model is None and not kept and not path.exists() and not planned:
        if tuned is not None:
            raise CheckpointError(
                f"{rundir.path / TUNING} reports tuning on private data, and this run has no privacy ledger that it "
                "was charged to",
                fix=f"{RESTORE}; of another run's tuning take tuned.toml alone",
            )
        return None
    ledger = Ledger.open(path, read_only=not write, warn=warn, fault_point=fault_point)
    if head is None and ledger.events():  # the run notes its ledger before the first charge
        raise CheckpointError(
            f"{path} holds charges, and {rundir.path / 'run.json'} does not know of it: run.json is lost or older, so "
            "nothing tells whether the ledger is whole",
            fix="restore run.json from a copy, or start a new --run and add up what both release",
        )
    if head is not None and not ledger.includes(head):
        raise CheckpointError(
            f"{path} lacks lines that this run has written to it: it was cut, restored from an old copy, or is of "
            "another run",
            fix="restore the run's privacy folder as it was after the last stage; if that is lost, the run's budget "
            "counts as spent: start a new --run and add up the ε of both",
        )
    for file, line in kept.items():
        if not ledger.includes(line):
            raise CheckpointError(
                f"{file} names a line that is not in this run's ledger: run.json and the ledger are older than what "
                f"{file.parent} holds, or it is of another run",
                fix=RESTORE,
            )
    if model is not None and not ledger.includes(model):
        raise CheckpointError(
            f"{rundir.path / 'model'} holds a model whose privacy cost is not in this run's ledger: run.json and the "
            "ledger are older than the model, or it is of another run",
            fix="restore the run as a whole from a copy; a model from elsewhere is named with --model",
        )
    if ledger.events() and not planned:
        raise CheckpointError(
            f"{plan_file(rundir)} is missing, but the ledger beside it holds charges",
            fix="restore it from a copy: without it this run's budget is unknown",
        )
    if planned:
        _refuse_changed_budget(ledger, plan_file(rundir))
    seal = ledger.seals.get(TUNE)
    if tuned is not None and (seal is None or seal.digest != tuning_digest(tuned)):
        raise CheckpointError(
            f"{rundir.path / TUNING} is not what the tuning of this run reported: its hash differs from that in the "
            "privacy ledger",
            fix="restore it and the privacy folder together from a copy; of another run's tuning take tuned.toml alone",
        )
    for stage, result in results.items():
        seal = ledger.seals.get(stage)
        if seal is None or seal.digest != result_digest(result):
            raise CheckpointError(
                f"the result of stage {stage!r} in {rundir.path / 'run.json'} is not the one that the stage reported: "
                "its hash differs from that in the privacy ledger",
                fix="restore run.json and the privacy folder together from a copy",
            )
    return ledger


def _private_tuning(rundir: RunDir) -> dict[str, Any] | None:
    """What tune.json holds, where it says that the tuning was on private data."""
    path = rundir.path / TUNING
    record = read_object(path) if path.is_file() else None
    return record if record is not None and record.get("on") == PRIVATE else None


def tuning_digest(record: Any) -> str:
    """Of tune.json, as it was made or as it was read; where the data lie (``asked``) is not compared."""
    return result_digest({key: value for key, value in frozen(record).items() if key not in ("asked", "format")})


def _model_head(rundir: RunDir) -> str | None:
    """The line of the ledger that the released model says it was charged by; None where there is no such model."""
    path = rundir.path / "model" / "config.json"
    result = (read_object(path) or {}).get("result") if path.is_file() else None
    head = result.get("ledger_head") if isinstance(result, dict) else None
    return head if isinstance(head, str) else None  # whoever loads the model says what is wrong with it


def sealed_budget(document: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of plan.json that the ledger's header keeps, as finite JSON values."""
    found = {key: document[key] for key in SEALED if key in document}
    return {key: str(value) if value == math.inf else value for key, value in found.items()}


def _refuse_changed_budget(ledger: Ledger, path: Path) -> None:
    fixed, present = ledger.budget or {}, sealed_budget(read_object(path) or {})
    if fixed.keys() - present.keys() or not present:
        raise CheckpointError(
            f"{path} is damaged", fix="restore it from a copy: without it this run's budget is unknown"
        )
    changed = [key for key in SEALED if present.get(key) != fixed.get(key)]
    if changed:
        said = "; ".join(f"{key} is {present.get(key)!r} there and {fixed.get(key)!r} in the ledger" for key in changed)
        raise CheckpointError(
            f"{path} was changed since this run's budget was fixed: {said}",
            fix="restore it from a copy, or with the ledger's values; for another budget start a new --run and add "
            "up the ε of both",
        )


# ------------------------------------------------------------------------------------------------------ parts and sums


def useful_parts(ledger: Ledger, delta: float, lost: Mapping[tuple[str, int], int]) -> list[tuple[str, float]]:
    """Mechanisms in the order of their first charge, each with the ε that it and those before it cost; lost steps of
    full batches are left out (those of sampled ones cost nothing that their plan had not).

    Args:
        delta: of the run.
        lost: steps by (stage, attempt): of the mechanisms to count, those that a crash took.
    """
    keys = {(each.stage, each.attempt): None for each in (*ledger.tunings, *ledger.charges)}
    parts, stages = [], []
    for key in (key for key in keys if key in lost):
        (events,) = ledger.stages(besides=[other for other in keys if other != key])
        stages.append([_shortened(event, lost[key]) for event in events])
        parts.append((key[0], compose_stages(stages, delta).upper))
    return parts


def _shortened(event: GaussianEvent | TuningEvent, steps: int) -> GaussianEvent | TuningEvent:
    full = isinstance(event, GaussianEvent) and event.sample_rate == 1
    return replace(event, steps=event.steps - steps) if full else event


@dataclass(frozen=True)
class Combined:
    """What several runs about the same data cost together."""

    epsilon: float  # upper bound, or inf
    delta: float
    method: str  # in words


VOID = "void: a step of one of them had no noise, or noise from a seed"


def combined(runs: Sequence[tuple[Sequence[Stage], float]]) -> Combined:
    """ε of all stages of several runs, given with the δ of each run.

    With private tuning, whose place before all other uses of the data the ledgers of several runs cannot show, and
    where discrete noise is too coarse for so much at once, ε and δ of the runs are added up.
    """
    delta, stages = min(each for _, each in runs), [stage for mechanisms, _ in runs for stage in mechanisms]
    if not any(isinstance(event, TuningEvent) for stage in stages for event in stage):
        try:
            bound = compose_stages(stages, delta)
            return Combined(bound.upper, delta, bound.accountant)
        except BudgetError:
            pass  # the lattice of discrete noise is too coarse for so much at once
    added = math.fsum(compose_stages(mechanisms, own).upper for mechanisms, own in runs)
    return Combined(added, math.fsum(own for _, own in runs), "basic composition: ε and δ of the runs added up")


def combined_ledgers(runs: Sequence[tuple[Ledger, float]]) -> Combined:
    """``combined`` of what ledgers hold, each with the δ of its run."""
    if not all(ledger.private for ledger, _ in runs):
        return Combined(math.inf, min(delta for _, delta in runs), VOID)
    return combined([(ledger.stages(), delta) for ledger, delta in runs])
