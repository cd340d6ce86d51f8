"""The report's inputs from a run directory: public files only, never ``private/``, never a checkpoint.

Also the command lines that repeat a run with the settings that it recorded, and its metrics as event files for
TensorBoard: what ``metrics.jsonl`` holds, all of which may be released.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dprandp import __version__
from dprandp.config import schema, toml
from dprandp.config.schema import (
    DATA_SETTINGS,
    MODULE,
    STAGE_CONFIGS,
    WITHOUT_PHASE_ONE,
    public_arch,
    public_data_name,
    same_data_name,
)
from dprandp.config.settings import settings_of, text
from dprandp.errors import CheckpointError, DprandpError, InputError, UsageError
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.opinions import refuse_contradiction, second_opinions
from dprandp.runs.directory import REPORT, RunDir, StageRow, looks_like_a_run
from dprandp.runs.files import Count, Fraction, Number, Text, from_json, read_object, read_record, storage_errors
from dprandp.runs.ledger import Combined, combined_ledgers, open_run_ledger, useful_parts
from dprandp.runs.results import CONTRADICTION, PrivateResult, StageResult

NO_LEDGER = "none"


@dataclass(frozen=True)
class Spending:
    """The ε that the run has spent, including unfinished stages.

    Attributes:
        epsilon: upper bound; 0 if nothing was charged.
        delta: None if nothing was planned.
        total: the run's budget; None if nothing was planned.
        insecure: some charge was made without noise or with noise from a seed.
        unfinished: charges exist that no finished stage reports.
        opinions: ε by other libraries.
        parts: mechanisms of finished stages in order, each with the ε after it, without steps that were lost.
    """

    epsilon: float
    delta: float | None
    total: float | None
    insecure: bool
    unfinished: bool
    opinions: tuple[str, ...]
    parts: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Measured:
    """Test accuracy at an ε."""

    name: str  # of the stage, or of another run
    epsilon: float
    accuracy: float
    interval: tuple[float, float] | None  # 95 %


@dataclass(frozen=True)
class Others:
    """Other runs in the same folder that declare the same data.

    Attributes:
        names: of their folders.
        together: what they and this run cost; None where their units of privacy differ.
        unreadable: names of runs whose files are damaged: they are not counted.
        measured: their accuracy.
    """

    names: tuple[str, ...]
    together: Combined | None
    unreadable: tuple[str, ...]
    measured: tuple[Measured, ...]


@dataclass(frozen=True)
class Power:
    """Where noise is too small by ``factor``, the chance that the game sees it."""

    factor: Number
    flagged: Fraction


@dataclass(frozen=True, kw_only=True)
class Game:
    """What the distinguishing game showed."""

    epsilon_lower: Number
    trials: Count  # with the record, and as many without
    power: tuple[Power, ...] | None = None


@dataclass(frozen=True)
class OneRun:
    """What one run with many canaries showed."""

    epsilon_lower: Number
    canaries: Count


@dataclass(frozen=True)
class Flagged:
    """Whether a replay contradicts the claim, or a control was seen."""

    flagged: bool


@dataclass(frozen=True)
class Audited:
    """One mechanism in audit.json."""

    name: Text
    attempt: Count
    plan: dict[str, Any]  # as in plan.json
    epsilon_claimed: Number
    two_world: Game
    one_run: OneRun | None  # None for private tuning
    replay: Flagged
    controls: tuple[Flagged, ...]

    @property
    def contradicted(self) -> bool:
        """Whether a test showed more than was claimed."""
        shown = [self.two_world.epsilon_lower, self.one_run.epsilon_lower if self.one_run else 0.0]
        return self.replay.flagged or max(shown) > self.epsilon_claimed


@dataclass(frozen=True)
class Audit:
    """What the report shows of audit.json."""

    outcome: Text
    passed: bool
    significance: Number
    data: Text  # on which it was made, in words
    mechanisms: tuple[Audited, ...]
    ledger_head: Text | None = None  # of the run when it was audited

    @property
    def contradicted(self) -> bool:
        """Whether the file says so, or its own figures do."""
        return self.outcome == CONTRADICTION or any(found.contradicted for found in self.mechanisms)

    @property
    def blind(self) -> bool:
        """Whether a fault that the audit put in was missed, by its verdict or its figures."""
        return not self.passed or not all(control.flagged for found in self.mechanisms for control in found.controls)


@dataclass(frozen=True)
class Run:
    """The public facts of a run.

    Attributes:
        name: the folder's name.
        rows: one per stage.
        results: of the finished stages.
        metrics: stage -> the lines of metrics.jsonl.
        preview: preview.png of the synthetic images, if it is there.
        filters: filters.png of the extractor that the data took, if it is there.
        spending: of the whole run.
        others: runs beside it; None where it has charged nothing.
        environment: env.json.
        audit: None if there was no audit.
        audit_is_old: the run's plans or its ledger have changed since the audit.
        ledger_head: hash of the ledger's last line; "none" where nothing private was begun.
    """

    name: str
    rows: list[StageRow]
    results: dict[str, StageResult]
    metrics: dict[str, list[dict[str, Any]]]
    preview: Path | None
    filters: Path | None
    spending: Spending
    others: Others | None
    environment: dict[str, Any]
    audit: Audit | None
    audit_is_old: bool
    ledger_head: str

    @property
    def private_stages(self) -> list[str]:
        """Finished stages that were charged for private images, in order."""
        return [stage for stage, result in self.results.items() if isinstance(result, PrivateResult)]

    @property
    def final(self) -> PrivateResult | None:
        """The result of the last private stage that is done (of a stale one only where no other is), or None."""
        done = [row for row in self.rows if row.stage in self.private_stages]
        fresh = [row for row in done if row.state == "done"]
        return self.results[(fresh or done)[-1].stage] if done else None

    def row(self, stage: str) -> StageRow:
        """The row of one stage."""
        return next(row for row in self.rows if row.stage == stage)


def read_run(rundir: RunDir) -> Run:
    """Read a run.

    Raises:
        InputError: nothing is finished yet.
        CheckpointError: a file of the run is corrupt or incomplete.
        StorageError: a file cannot be read.
        AuditError: two accountants contradict each other.
    """
    results = rundir.results()
    if not results:
        raise InputError(
            f"{rundir.path} has no finished stage, so there is nothing to report",
            fix=f"run: dprandp generate --run {shlex.quote(str(rundir.path))}",
        )
    preview = rundir.stage_dir("generate") / "preview.png"
    plan = _read_object(rundir.path / "privacy" / "plan.json")
    filters = rundir.stage_dir("pretrain") / "filters.png"
    if any(getattr(result, "extractor_colour", None) == "grey" for result in results.values()):
        filters = next((path for path in (filters.parent / "grey" / filters.name, filters) if path.is_file()), filters)
    private = [each for each in results.values() if isinstance(each, PrivateResult)]
    ledger = open_run_ledger(rundir)  # refuses a result without its ledger
    audit, audit_is_old = _read_audit(rundir.path / "audit" / "audit.json", plan, ledger)
    return Run(
        name=rundir.path.resolve().name.encode("utf-8", "backslashreplace").decode(),
        rows=rundir.status(),
        results=results,
        metrics={stage: _read_lines(rundir.stage_dir(stage) / "metrics.jsonl") for stage in results},
        preview=preview if preview.is_file() and "generate" in results else None,
        filters=filters if filters.is_file() and "pretrain" in results else None,
        spending=_spending(ledger, private, plan),
        others=_others(rundir.path.resolve(), ledger, plan) if ledger is not None and ledger.events() else None,
        environment={"dprandp": __version__} | _read_object(rundir.path / "env.json"),
        audit=audit,
        audit_is_old=audit_is_old,
        ledger_head=NO_LEDGER if ledger is None else ledger.head,
    )


def changed_settings(row: StageRow) -> list[str]:
    """Settings of a stage that differ from its size's defaults, as ``"steps = 300 (default 120)"``."""
    default = defaults_of(row)
    return [
        f"{key} = {published(key, value)} (default {default.get(key, 'automatic')})"
        for key, value in differing_settings(row).items()
        if key != "tuned_on"
    ]


def _spending(ledger: Ledger | None, private: list[PrivateResult], plan: dict[str, Any]) -> Spending:
    """The largest ε that a finished private stage reports, or that of the whole ledger where that is more."""
    delta = private[-1].delta if private else plan.get("delta")
    total = private[-1].epsilon_total if private else plan.get("epsilon")
    epsilon = max((result.epsilon for result in private), default=0.0)
    unfinished, opinions, parts = False, (), []
    if ledger is not None and ledger.events() and delta is not None:
        bound = ledger.spent(float(delta))
        # about what counts: of a sampled stage that was stopped its whole plan, not the steps that it made
        others = second_opinions([event for stage in ledger.stages() for event in stage], float(delta))
        refuse_contradiction(bound, others)
        opinions = tuple(map(str, others))
        unfinished = bound.upper > epsilon * (1 + 1e-6)
        epsilon = max(epsilon, bound.upper)
        if math.isfinite(epsilon):
            lost = {(result.stage, result.attempt): result.lost_steps for result in private}
            lost |= {(each.stage, each.attempt): 0 for each in ledger.tunings}
            refits = {f"{each.stage}.head": each.refit for each in private if getattr(each, "refit", None)}
            lost |= {(name, ledger.last_attempt(name)): refit.lost_steps for name, refit in refits.items()}
            parts = useful_parts(ledger, float(delta), lost)
    return Spending(
        epsilon=epsilon,
        delta=None if delta is None else float(delta),
        total=None if total is None else float(total),
        insecure=ledger is not None and not ledger.private,
        unfinished=unfinished,
        opinions=opinions,
        parts=tuple(parts),
    )


def _others(path: Path, ledger: Ledger, plan: dict[str, Any]) -> Others:
    """The runs beside the one at ``path`` that have charged something, and declare data of the same name.

    Whether data are the same is not decided by their content here: the answer would be a function of private data, and
    the report may be published. ``dprandp compare`` does so, for the data's owner.
    """
    names, unreadable, measured, spent = [], [], [], [(ledger, float(plan.get("delta", 1)))]
    same_unit = True
    for other in sorted(each for each in path.parent.iterdir() if each != path and looks_like_a_run(each)):
        try:
            theirs = _read_object(other / "privacy" / "plan.json")
            if "data" not in theirs or not same_data_name(str(theirs["data"]), str(plan.get("data"))):
                continue
            rundir = RunDir.open(other, create=False)
            charged, results = open_run_ledger(rundir), rundir.results().values()
            if charged is None or not charged.events():
                continue
            delta = float(theirs["delta"])
        except (DprandpError, KeyError, TypeError, ValueError):
            unreadable.append(other.name)
            continue
        names.append(other.name)
        spent.append((charged, delta))
        same_unit = same_unit and theirs.get("unit") == plan.get("unit")
        if found := [each for each in results if isinstance(each, PrivateResult) and each.private]:
            last = found[-1]
            measured.append(Measured(other.name, last.epsilon, last.accuracy, last.interval("accuracy")))
    together = combined_ledgers(spent) if names and same_unit else None
    return Others(tuple(names), together, tuple(unreadable), tuple(measured))


def report_state(rundir: RunDir) -> str | None:
    """Whether the run's report.html, if there is one, was made from its ledger as it is now.

    Raises:
        CheckpointError: it was made before the last charge, by another version, or of another run.
    """
    path = rundir.path / REPORT
    if not path.exists():
        return None
    with storage_errors(path, "read"):
        page = path.read_text(encoding="utf-8", errors="replace")
    ledger = open_run_ledger(rundir)
    if _head_in_page(NO_LEDGER if ledger is None else ledger.head) not in page:
        raise CheckpointError(
            f"{path} was not made from the ledger as it is now, so its ε may be too low",
            fix=f"make it anew: dprandp report --run {shlex.quote(str(rundir.path))}",
        )
    return "report.html was made from the ledger as it is now"


def _head_in_page(head: str) -> str:
    """The element of the page that names the ledger's last line."""
    return f'<meta name="ledger-head" content="{head}">'


def _read_audit(path: Path, plan: dict[str, Any], ledger: Ledger | None) -> tuple[Audit | None, bool]:
    """The audit, and whether the run's plans or its ledger have changed since."""
    found = _read_object(path)
    if not found:
        return None, False
    try:
        audit = read_record(Audit, found)
        if not audit.mechanisms:
            raise ValueError("no mechanism")
    except ValueError as error:
        fix = "run `dprandp audit` again, or remove it"
        raise CheckpointError(f"{path} is corrupt: {error}", fix=fix) from error
    audited = {found.name: (found.attempt, found.plan) for found in audit.mechanisms}
    planned = {name: (entry["attempt"], entry["plan"]) for name, entry in plan.get("stages", {}).items()}
    return audit, audited != planned or ledger is None or audit.ledger_head != ledger.head


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing."""
    return _whole(read_object(path), path, "it") if path.exists() else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON objects, one a line; none if the file is missing. A last line that a crash has torn is left out."""
    if not path.exists():
        return []
    with storage_errors(path, "read"):
        lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    values = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            value = from_json(line or "{}")
        except ValueError:
            value = None
        values.append(_whole(value, path, f"line {number}"))
    return values


def _whole(value: Any, path: Path, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} is corrupt: {what} is no JSON object",
            fix="continue the interrupted stage (--resume), which repairs a torn file; else restore it from a copy",
        )
    return value


# ------------------------------------------------------------------------------------------ the commands that repeat it

SETTINGS_FILE = "settings.toml"
INHERITED = (*DATA_SETTINGS, "epsilon", "delta", "noise")
"""What a fine-tune takes from the run's probe."""


def differing_settings(row: StageRow) -> dict[str, Any]:
    """Settings of a stage that differ from its size's defaults, by name."""
    recorded, default = row.config or {}, defaults_of(row)
    return {name: value for name, value in recorded.items() if name != "size" and value != default.get(name)}


DECIDING = ("arch", "layers", "init", "init_source", "source", "recipe", "epsilon")
"""Settings on which other settings' defaults depend."""


def defaults_of(row: StageRow) -> dict[str, Any]:
    """The defaults of a stage at the run's size, with its network and recipe; none for an unknown size."""
    recorded = row.config or {}
    size, chosen = recorded.get("size", "tiny"), {name: recorded[name] for name in DECIDING if name in recorded}
    if recorded.get("source") not in (None, *WITHOUT_PHASE_ONE) and row.stage == "finetune":
        chosen.pop("arch", None)
    try:
        plain, fitting = (schema.as_dict(schema.resolve(row.stage, size, None, given)) for given in ({}, chosen))
    except DprandpError:
        return {}
    return fitting | {name: plain.get(name) for name in chosen}


def commands(name: str, rows: Sequence[StageRow]) -> str:
    """Lines for a shell: a settings file, where one is needed, and a command for each stage that the run has begun.

    Folders of data and of weights are left out, as in all that may be published.

    Args:
        name: of the run's folder.
    """
    begun = {row.stage: row for row in rows if row.config is not None}
    prior = begun["pretrain"].config.get("prior") if "pretrain" in begun else None
    if prior:  # its stages are made by the first one after them
        begun = {stage: row for stage, row in begun.items() if stage not in ("generate", "pretrain")} or {
            "pretrain": begun["pretrain"]
        }
    code = any(str(row.config.get("arch")).startswith(MODULE) for row in begun.values())
    lines, tables = [], {}
    for index, (stage, row) in enumerate(begun.items()):
        changed = {} if prior and stage == "pretrain" else _own_settings(row, begun)
        declared = settings_of(STAGE_CONFIGS[stage])
        flags = {k: v for k, v in changed.items() if k in declared and declared[k].flag and v is not False}
        tables[stage] = {key: value for key, value in changed.items() if key not in flags and key != "prior"}
        words = ["dprandp", stage, "--run", f"runs/{name}", *(["--prior", prior] if prior and index == 0 else [])]
        if (size := row.config.get("size", "tiny")) != "tiny":
            words += ["--size", size]
        words += ["--config", SETTINGS_FILE] if tables[stage] else []
        words += ["--trust-code"] if code and stage != "generate" else []
        for key, value in flags.items():
            words += [declared[key].flag, *([] if value is True else [text(published(key, value))])]
        lines.append(shlex.join(words))
    written = {stage: table for stage, table in tables.items() if table}
    if written:
        lines = [f"cat > {SETTINGS_FILE} <<'END'", toml.dumps(written).rstrip("\n"), "END", *lines]
    return "\n".join(lines)


def _own_settings(row: StageRow, begun: Mapping[str, StageRow]) -> dict[str, Any]:
    """What a stage's command has to say: what the run has not said before it."""
    changed = differing_settings(row)
    if row.stage == "finetune" and "probe" in begun and row.config.get("source") not in WITHOUT_PHASE_ONE:
        said = begun["probe"].config
        changed = {key: value for key, value in changed.items() if key not in INHERITED or said.get(key) != value}
    return changed


def published(key: str, value: Any) -> Any:
    """A setting's value, as recorded, without the folder of a user's file."""
    if not isinstance(value, str):
        return value
    if key in ("data", "public"):
        return public_data_name(value)
    if key == "arch":
        return public_arch(value)
    return os.path.basename(value) if key == "init" else value


# ---------------------------------------------------------------------------------------------------------- TensorBoard


def write_events(rundir: RunDir, folder: Path) -> None:
    """Write a folder for each stage: its scalars by step, and test accuracy and ε at its last.

    Raises:
        UsageError: the folder exists, or TensorBoard is not installed. StorageError: the disk refuses.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "--tensorboard needs TensorBoard, which is not installed", fix="pip install 'dprandp[tensorboard]'"
        ) from error
    if folder.exists():
        raise UsageError(f"{folder} exists", fix="give another folder")
    run = read_run(rundir)
    for stage, lines in run.metrics.items():
        with SummaryWriter(str(folder / stage)) as writer:
            last = 0
            for line in lines:
                last = line.get("step", last)
                for name, value in line.items():
                    if name != "step" and type(value) in (int, float):
                        writer.add_scalar(name, value, last)
            for name in ("accuracy", "epsilon"):
                value = getattr(run.results[stage], name, None)
                if value is not None:
                    writer.add_scalar(name, value, last)
