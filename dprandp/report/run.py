"""The report's inputs from a run directory: public files only, never ``private/``, never a checkpoint."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dprandp import __version__
from dprandp.config import schema
from dprandp.errors import CheckpointError, DprandpError, InputError
from dprandp.privacy.opinions import refuse_contradiction, second_opinions
from dprandp.report.disclosure import check
from dprandp.runs.directory import RunDir
from dprandp.runs.files import from_json, storage_errors
from dprandp.runs.ledger import open_run_ledger
from dprandp.runs.results import refuse_gaps

PRIVATE_STAGES = ("continue", "probe", "finetune")
"""Stages that may read private images; ``Run.private_stages`` are those that did, and are finished."""


@dataclass(frozen=True)
class Spending:
    """The ε that the run has spent, including unfinished stages.

    Attributes:
        epsilon: upper bound; 0 if nothing was charged.
        delta: None if nothing was planned.
        total: the run's budget; None if nothing was planned.
        insecure: some charge was made without noise or with noise from a seed.
        unfinished: charges exist that no finished stage reports.
    """

    epsilon: float
    delta: float | None
    total: float | None
    insecure: bool
    unfinished: bool
    opinions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """The public facts of a run.

    Attributes:
        name: the folder's name.
        rows: one per stage, see ``RunDir.status``.
        results: stage -> result, of the stages that have one.
        metrics: stage -> the lines of metrics.jsonl.
        preview: preview.png of the synthetic images, if it is there.
        spending: of the whole run.
        environment: env.json.
        audit: audit.json; None if there was no audit.
        audit_is_old: the run's plans have changed since the audit.
    """

    name: str
    rows: list[dict[str, Any]]
    results: dict[str, dict[str, Any]]
    metrics: dict[str, list[dict[str, Any]]]
    preview: Path | None
    spending: Spending
    environment: dict[str, Any]
    audit: dict[str, Any] | None = None
    audit_is_old: bool = False

    @property
    def private_stages(self) -> list[str]:
        """Finished stages that were charged for private images, in order."""
        return charged_stages(self.results)

    @property
    def final(self) -> dict[str, Any] | None:
        """The result of the last private stage that is done (of a stale one only where no other is), or None."""
        done = [row for row in self.rows if row["stage"] in self.private_stages]
        fresh = [row for row in done if row["state"] == "done"]
        return (fresh or done)[-1]["result"] if done else None

    def extractor_of(self, stage: str) -> dict[str, Any] | None:
        """The facts about a stage's initial extractor: pretrain's result, and ``continued`` if there is one."""
        pretrain, continued = self.results.get("pretrain"), self.results.get("continue")
        if pretrain is None or continued is None or stage == "continue":
            return pretrain
        return {**pretrain, "continued": continued}

    def row(self, stage: str) -> dict[str, Any]:
        """The row of one stage."""
        return next(row for row in self.rows if row["stage"] == stage)


def read_run(rundir: RunDir) -> Run:
    """Read a run.

    Raises:
        InputError: nothing is finished yet.
        CheckpointError: a file of the run is corrupt or incomplete.
        StorageError: a file cannot be read.
    """
    rows = rundir.status()
    results = {row["stage"]: row["result"] for row in rows if row["result"]}
    if not results:
        raise InputError(
            f"{rundir.path} has no finished stage, so there is nothing to report",
            fix=f"run: dprandp generate --run {shlex.quote(str(rundir.path))}",
        )
    for stage, result in results.items():
        refuse_gaps(stage, result)
        if stage in charged_stages(results):
            check(result)
    preview = rundir.stage_dir("generate") / "preview.png"
    audit, audit_is_old = _read_audit(rundir)
    return Run(
        name=rundir.path.resolve().name.encode("utf-8", "backslashreplace").decode(),
        rows=rows,
        results=results,
        metrics={stage: _read_lines(rundir.stage_dir(stage) / "metrics.jsonl") for stage in results},
        preview=preview if preview.is_file() and "generate" in results else None,
        spending=_spending(rundir, results),
        environment={"dprandp": __version__} | _read_object(rundir.path / "env.json"),
        audit=audit,
        audit_is_old=audit_is_old,
    )


def charged_stages(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Stages with results that were charged for private images; ``continue`` may have read public ones alone."""
    return [s for s in PRIVATE_STAGES if s in results and (s != "continue" or "epsilon" in results[s])]


def changed_settings(row: dict[str, Any]) -> list[str]:
    """Settings of a stage that differ from its size's defaults, as ``"steps = 300 (default 120)"``."""
    recorded = row["config"] or {}
    try:
        default = schema.as_dict(schema.resolve(row["stage"], recorded.get("size", "tiny"), None, {}))
    except DprandpError:  # unknown size: all settings are listed
        default = {}
    return [
        f"{key} = {_shown(key, value)} (default {default.get(key, 'automatic')})"
        for key, value in recorded.items()
        if key not in ("size", "tuned_on") and value != default.get(key)
    ]


def _shown(key: str, value: Any) -> Any:
    """A value, without the folder of a file."""
    return os.path.basename(value) if key == "init" else value


def _spending(rundir: RunDir, results: dict[str, dict[str, Any]]) -> Spending:
    """The largest ε that a finished stage reports, or that of the whole ledger where that is more.

    Raises:
        AuditError: two accountants contradict each other.
    """
    private = [results[stage] for stage in charged_stages(results)]
    plan = _read_object(rundir.path / "privacy" / "plan.json")
    delta = private[-1]["delta"] if private else plan.get("delta")
    total = private[-1]["epsilon_total"] if private else plan.get("epsilon")
    epsilon = max((result["epsilon"] for result in private), default=0.0)
    ledger = open_run_ledger(rundir)  # refuses a result without its ledger
    unfinished = False
    opinions: tuple[str, ...] = ()
    if ledger is not None and ledger.events() and delta is not None:
        bound = ledger.spent(float(delta))
        # about what counts: of a sampled stage that was stopped its whole plan, not the steps that it made
        others = second_opinions([event for stage in ledger.stages() for event in stage], float(delta))
        refuse_contradiction(bound, others)
        opinions, composed = tuple(map(str, others)), bound.upper
        unfinished = composed > epsilon * (1 + 1e-6)
        epsilon = max(epsilon, composed)
    return Spending(
        epsilon=epsilon,
        delta=None if delta is None else float(delta),
        total=None if total is None else float(total),
        insecure=ledger is not None and not ledger.private,
        unfinished=unfinished,
        opinions=opinions,
    )


def _read_audit(rundir: RunDir) -> tuple[dict[str, Any] | None, bool]:
    """The audit, and whether the run's plans have changed since."""
    path = rundir.path / "audit" / "audit.json"
    audit = _read_object(path)
    if not audit:
        return None, False
    try:
        audited = {found["name"]: (found["attempt"], found["plan"]) for found in audit["mechanisms"]}
        shown = [
            (found["epsilon_claimed"] + found["two_world"]["epsilon_lower"],
             found["one_run"] is None or found["one_run"]["epsilon_lower"],
             found["replay"]["flagged"], [control["flagged"] for control in found["controls"]])
            for found in audit["mechanisms"]
        ]  # fmt: skip
        complete = bool(shown) and audit["outcome"] and audit["data"] and audit["significance"] and "passed" in audit
    except (KeyError, TypeError) as error:
        raise _corrupt_audit(path) from error
    if not complete:
        raise _corrupt_audit(path)
    stages = _read_object(rundir.path / "privacy" / "plan.json").get("stages", {})
    return audit, audited != {name: (entry["attempt"], entry["plan"]) for name, entry in stages.items()}


def _corrupt_audit(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is corrupt: entries are missing", fix="run `dprandp audit` again, or remove it")


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing."""
    if not path.exists():
        return {}
    with storage_errors(path, "read"):
        content = path.read_bytes()
    try:
        value = from_json(content)
    except ValueError as error:
        raise _corrupt(path, "it is no valid JSON") from error
    if not isinstance(value, dict):
        raise _corrupt(path, "it is no JSON object")
    return value


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON objects, one a line; none if the file is missing.

    A crash may tear the last line of metrics.jsonl, which is then left out.
    """
    if not path.exists():
        return []
    with storage_errors(path, "read"):
        lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    values = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = from_json(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise _corrupt(path, f"line {number} is no valid JSON") from error
        if not isinstance(value, dict):
            raise _corrupt(path, f"line {number} is no JSON object")
        values.append(value)
    return values


def _corrupt(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is corrupt: {why}",
        fix="continue the interrupted stage (--resume), which repairs a torn file; else restore the file from a copy",
    )


def is_number(value: object) -> bool:
    """Whether a value is a finite number, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
