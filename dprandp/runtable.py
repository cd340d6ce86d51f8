"""``run.json``: reading, checking and writing the table of stages.

::

    {"format": 1, "dprandp": "0.1.0", "ledger_head": "...", "stages": {"generate": {"state": "done", "config": {...},
     "inputs": {...}, "outputs": {...}, "result": {...}, "started": "...", "finished": "..."}}}

``ledger_head`` is the hash of the last line of the privacy ledger that this run is known to have had; null before the
first private stage. It outlives ``--overwrite``: whoever opens the ledger compares (``runledger.py``).

Imports nothing of the package but ``errors``, ``files``, ``runresults`` and the version.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from dprandp import __version__
from dprandp.errors import CheckpointError
from dprandp.files import from_json, storage_errors, to_json
from dprandp.runresults import wrong_entry

FORMAT = 1
STATES = ("partial", "done", "stale")
STAGES = {
    "generate": "1-generate",
    "pretrain": "2-pretrain",
    "continue": "2b-continue",
    "probe": "3-probe",
    "finetune": "4-finetune",
}
OPTIONAL_STAGES = ("continue",)
"""Of which a run need not have one, and nobody is told that it is missing."""


@dataclass
class Record:
    """One stage in run.json. Times are UTC, ISO 8601; ``finished`` is None while the stage is partial."""

    state: str
    config: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]
    result: dict[str, Any]
    started: str
    finished: str | None


@dataclass
class Table:
    """The stages of a run, by name, and the head of its privacy ledger (64 hexadecimal digits), if it has one."""

    stages: dict[str, Record] = field(default_factory=dict)
    ledger_head: str | None = None

    def begin(self, stage: str, config: dict[str, Any], inputs: dict[str, str]) -> None:
        """Put a stage under way with nothing made yet; what was built on its former outputs becomes stale."""
        before = self.stages.get(stage)
        self.stages[stage] = Record("partial", config, inputs, {}, {}, _now(before.started if before else None), None)
        self._refresh()

    def finish(self, stage: str, outputs: dict[str, str], result: dict[str, Any]) -> None:
        """Record a stage as done; what was built on these very outputs is no longer stale."""
        record = self.stages[stage]
        record.state, record.outputs, record.result, record.finished = "done", outputs, frozen(result), _now()
        self._refresh()

    def stale_because(self, stage: str) -> list[str]:
        """Why a stage's recorded inputs are not its predecessors' present outputs; empty if they are."""
        record = self.stages.get(stage)
        if record is None:
            return []
        reasons = []
        for name, digest in record.inputs.items():
            source, _, file = name.partition("/")
            if source not in STAGES:
                continue  # comes from outside the run: whoever begins the stage compares it
            predecessor = self.stages.get(source)
            if predecessor is None or predecessor.state == "partial":
                reasons.append(f"stage {source!r}, which it was made from, is unfinished")
            elif predecessor.outputs.get(file) != digest:
                reasons.append(f"it was made from another {name}")
            elif source != stage and self.stale_because(source):
                reasons.append(f"stage {source!r}, which it was made from, is stale")
        made_from = {name.partition("/")[0] for name in record.inputs}
        if "continue" in self.stages and "pretrain" in made_from and "continue" not in made_from | {stage}:
            reasons.append("the extractor was continued since")
        return sorted(set(reasons))

    def to_json(self) -> str:
        stages = {stage: dataclasses.asdict(self.stages[stage]) for stage in STAGES if stage in self.stages}
        document = {"format": FORMAT, "dprandp": __version__, "ledger_head": self.ledger_head, "stages": stages}
        return to_json(document, indent=1) + "\n"

    def _refresh(self) -> None:
        for stage, record in self.stages.items():
            if record.state != "partial":
                record.state = "stale" if self.stale_because(stage) else "done"


def read(path: Path) -> Table:
    """Read run.json; a missing file is an empty table.

    Raises:
        CheckpointError: not valid, or written by a newer version (which it names).
        StorageError: it cannot be read.
    """
    if not path.exists():
        return Table()
    with storage_errors(path, "read"):
        content = path.read_bytes()
    try:
        document = from_json(content)
    except ValueError as error:
        raise _corrupt(path, "it is no valid JSON") from error
    if not isinstance(document, dict) or type(document.get("format")) is not int or document["format"] < 1:
        raise _corrupt(path, "it has no format number")
    if document["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {document['format']}, written by dprandp {document.get('dprandp')}; "
            f"this is dprandp {__version__}, which reads up to format {FORMAT}",
            fix="upgrade dprandp, or choose another run with --run",
        )
    stages = document.get("stages")
    if not isinstance(stages, dict):
        raise _corrupt(path, "it has no table of stages")
    head = document.get("ledger_head")
    if not (head is None or (isinstance(head, str) and re.fullmatch("[0-9a-f]{64}", head))):
        raise _corrupt(path, "its head of the privacy ledger is no hash")
    return Table({stage: _record(path, stage, value) for stage, value in stages.items()}, head)


def read_hashes(path: Path) -> dict[str, str]:
    """Read a JSON file of name -> hash.

    Raises:
        CheckpointError: it is missing or no such file, so nothing tells whether the inputs are still the same.
    """
    try:
        hashes = from_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _corrupt(path, "the recorded hashes of the inputs cannot be read") from error
    if not isinstance(hashes, dict):
        raise _corrupt(path, "it holds no table of hashes")
    return hashes


def frozen(value: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON makes of a dict: tuples become lists, infinities strings, NaN null."""
    return json.loads(to_json(dict(value)))


def result_digest(result: Mapping[str, Any]) -> str:
    """SHA-256 (hexadecimal) of a stage's result as run.json holds it; the same before and after a round trip."""
    return hashlib.sha256(json.dumps(frozen(result), sort_keys=True).encode()).hexdigest()


def thawed(value: Any) -> Any:
    """Undo ``frozen`` as far as it can be undone: the strings "inf" and "-inf" become floats again."""
    if isinstance(value, dict):
        return {key: thawed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [thawed(item) for item in value]
    return float(value) if value in ("inf", "-inf") else value


def differences(old: Mapping[str, Any], new: Mapping[str, Any], ignore: Collection[str]) -> list[str]:
    """``"steps was 10, is now 20"`` for each setting that differs; a setting that is None is the same as none."""
    return [
        f"{key} was {_shown(old.get(key))}, is now {_shown(new.get(key))}"
        for key in sorted({*old, *new} - set(ignore))
        if old.get(key) != new.get(key)
    ]


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)


def _record(path: Path, stage: str, value: Any) -> Record:
    fields = {entry.name for entry in dataclasses.fields(Record)}
    if stage not in STAGES or not isinstance(value, dict) or set(value) != fields or value["state"] not in STATES:
        raise _corrupt(path, f"its record of stage {stage!r} is malformed")
    if not all(isinstance(value[name], dict) for name in ("config", "inputs", "outputs", "result")):
        raise _corrupt(path, f"its record of stage {stage!r} is malformed")
    hashes = [digest for name in ("inputs", "outputs") for digest in value[name].values()]
    if not all(isinstance(digest, str) for digest in hashes) or not all(map(_is_file_name, value["outputs"])):
        raise _corrupt(path, f"the files in its record of stage {stage!r} are malformed")
    if not _is_moment(value["started"]) or not (value["finished"] is None or _is_moment(value["finished"])):
        raise _corrupt(path, f"the times in its record of stage {stage!r} are malformed")
    wrong = wrong_entry(value["result"])
    if wrong is not None:
        raise _corrupt(path, f"{wrong!r} in its result of stage {stage!r} is of another kind")
    return Record(**value)


def _is_file_name(name: str) -> bool:
    """Whether this names a file below a stage's folder: nothing read from run.json may lead out of the run."""
    parts = name.split("/")
    return len(name) < 200 and name.isprintable() and all(part not in ("", ".", "..") for part in parts)


def _is_moment(value: Any) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def _corrupt(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is corrupt: {why}",
        fix="restore it from a copy, or start a new run with --run; the ledger in privacy/ is a separate file",
    )


def _now(after: str | None = None) -> str:
    """The time; where the clock stands still or went back, a microsecond after ``after``.

    By ``started`` a plan is known to be of this beginning of a stage and not of an earlier one, so no two beginnings
    may share it, whatever the clock says.
    """
    now = datetime.now(UTC)
    if after is not None:
        now = max(now, datetime.fromisoformat(after) + timedelta(microseconds=1))
    return now.isoformat(timespec="microseconds")
