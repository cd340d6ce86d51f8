"""The run directory: its layout, its lock, and the table of stages with their configurations.

``run.json`` holds one record per stage: state, configuration, hashes of inputs and outputs, result. A finished stage is
not run again unless something changed that it depends on. A change is refused: the message names the difference and the
ways out.

Inputs that come from another stage are named ``STAGE/FILE`` (``generate/manifest.json``). A stage is *stale* when these
files have changed since.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import secrets
import shlex
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from dprandp import __version__
from dprandp.config import toml
from dprandp.config.schema import public_data_name
from dprandp.errors import CheckpointError, InputError, StorageError, UsageError, nearest
from dprandp.runs.files import atomic_write, file_sha256, from_json, remove_leftovers, storage_errors, to_json
from dprandp.runs.results import RESULTS, StageResult, read_result, wrong_entry

R = TypeVar("R", bound=StageResult)

# --------------------------------------------------------------------------------------------------------- environment


def facts() -> dict[str, Any]:
    """The content of env.json: versions, platform and device; no host name, user name or path."""
    import torch  # late: the commands that only read a run need no torch

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
    }


def free_on_device(device) -> int | None:
    """Free bytes of an accelerator (a ``torch.device``); None where unknown."""
    import torch  # late, as above

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def available_memory() -> int | None:
    """Bytes that a process may still allocate without swapping, as Linux estimates them; None where unknown."""
    listed = Path("/proc/meminfo")
    text = listed.read_text(encoding="ascii", errors="replace") if listed.is_file() else ""
    found = re.search(r"^MemAvailable:\s*(\d+)", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


# ------------------------------------------------------------------------------------------------------------- locking
#
# Of two processes that spend one privacy budget at the same time, neither would see the other's latest charges. So the
# lock is part of the privacy argument and cannot be switched off. It is an advisory ``flock`` on the file ``.lock``,
# which the kernel releases when the holder dies, so no stale lock needs removing.

_held: set[int] = set()


def _release_in_child() -> None:
    # A forked worker that outlives a killed parent would keep the lock through its inherited descriptor.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)


def acquire(path: Path, owner: Path) -> int:
    """Take the lock file ``path`` of the run directory ``owner`` without waiting; returns a descriptor for ``release``.

    It is created if missing, and never removed (removing it would let two holders in).

    Raises:
        StorageError: another process holds it (the message names its process id), or the file system has no locks.
    """
    with storage_errors(path, "open"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 32, 0).decode("ascii", errors="replace").strip() or "unknown"
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise StorageError(
                f"another dprandp process (pid {holder}) is working in {owner}",
                fix="wait until it has finished or stop it, or choose another folder with --run",
            ) from error
        raise StorageError(
            f"the file system of {owner} cannot lock files ({error.strerror}), so the privacy budget cannot be guarded",
            fix="choose a folder on a local disk with --run",
        ) from error
    with storage_errors(path):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    _held.add(descriptor)
    return descriptor


def release(descriptor: int) -> None:
    """Release the lock (in a forked child, which does not hold it: do nothing)."""
    if descriptor in _held:
        _held.discard(descriptor)
        os.close(descriptor)


# -------------------------------------------------------------------------------------------------- the table of stages
#
#     {"format": 1, "dprandp": "0.1.0", "ledger_head": "...", "stages": {"generate": {"state": "done", "config": {...},
#      "inputs": {...}, "outputs": {...}, "result": {...}, "started": "...", "finished": "..."}}}
#
# ``ledger_head`` is the hash of the last line of the privacy ledger that this run is known to have had; null before the
# first private stage. ``kept`` has hashes of files in private/ that say what the run must not forget. ``--overwrite``
# keeps both, and ``ledger.py`` compares the head with the ledger. A file ``.ledger-head`` beside run.json, and one
# ``ledger-head`` in the folder of each private stage, say the same, so that it is noticed when run.json and ledger are
# older than what a stage has left behind.

FORMAT = 1
STATES = ("partial", "done", "stale")
STAGES = {
    "generate": "1-generate",
    "pretrain": "2-pretrain",
    "continue": "2b-continue",
    "probe": "3-probe",
    "finetune": "4-finetune",
}
HEAD_FILE = "ledger-head"
PRIVATE_STAGES = ("continue", "probe", "finetune")
OPTIONAL_STAGES = ("continue",)
"""Stages that a run need not have; a missing one is not reported."""


@dataclass
class Record:
    """One stage in run.json.

    ``started`` and ``finished`` are days (UTC, ISO 8601): times would tell how long private tuning took, which tells
    the number of its trials. ``started`` is unique, by its microseconds; ``finished`` is None while it is partial.
    """

    state: str
    config: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]
    result: dict[str, Any]
    started: str
    finished: str | None


@dataclass
class Table:
    """The stages of a run, by name; the head of its privacy ledger (64 hexadecimal digits), if it has one; and of files
    in ``private/`` that must not be lost, the hash, or several of which a crash has left one ("" for no file)."""

    stages: dict[str, Record] = field(default_factory=dict)
    ledger_head: str | None = None
    kept: dict[str, list[str]] = field(default_factory=dict)

    def begin(self, stage: str, config: dict[str, Any], inputs: dict[str, str]) -> None:
        """Record that a stage has begun, without outputs; stages built on its former outputs become stale."""
        before = self.stages.get(stage)
        self.stages[stage] = Record("partial", config, inputs, {}, {}, _now(before.started if before else None), None)
        self._refresh()

    def finish(self, stage: str, outputs: dict[str, str], result: StageResult) -> None:
        """Record a stage as done; stages that were built on the same outputs are no longer stale."""
        record = self.stages[stage]
        record.state, record.outputs, record.result, record.finished = "done", outputs, frozen(result), _now()
        self._refresh()

    def stale_because(self, stage: str) -> list[str]:
        """Why a stage's recorded inputs differ from its predecessors' present outputs; empty if they are equal."""
        record = self.stages.get(stage)
        if record is None:
            return []
        reasons = set()
        for name, digest in record.inputs.items():
            source, _, file = name.partition("/")
            if source not in STAGES:
                continue  # an input from outside the run is compared where the stage begins
            predecessor = self.stages.get(source)
            if predecessor is None or predecessor.state == "partial":
                reasons.add(f"stage {source!r}, which it was made from, is unfinished")
            elif predecessor.outputs.get(file) != digest:
                reasons.add(f"it was made from another {name}")
            elif source != stage and self.stale_because(source):
                reasons.add(f"stage {source!r}, which it was made from, is stale")
        made_from = {name.partition("/")[0] for name in record.inputs}
        if "continue" in self.stages and "pretrain" in made_from and "continue" not in made_from | {stage}:
            reasons.add("the extractor was continued since")
        return sorted(reasons)

    def to_json(self) -> str:
        """The content of run.json."""
        stages = {stage: self.stages[stage] for stage in STAGES if stage in self.stages}
        document = {"format": FORMAT, "dprandp": __version__, "ledger_head": self.ledger_head}
        return to_json({**document, "kept": self.kept, "stages": stages}, indent=1) + "\n"

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
    stages, head = document.get("stages"), document.get("ledger_head")
    if not isinstance(stages, dict):
        raise _corrupt(path, "it has no table of stages")
    if not (head is None or (isinstance(head, str) and re.fullmatch("[0-9a-f]{64}", head))):
        raise _corrupt(path, "its head of the privacy ledger is no hash")
    kept = document.get("kept", {})
    if not isinstance(kept, dict) or not all(isinstance(each, list) and each for each in kept.values()):
        raise _corrupt(path, "its table of kept files is malformed")
    for stage, value in stages.items():
        problem = _problem(stage, value)
        if problem:
            raise _corrupt(path, problem)
    return Table({stage: Record(**value) for stage, value in stages.items()}, head, kept)


def _problem(stage: str, value: Any) -> str | None:
    """What is wrong with a record of run.json; None if nothing is."""
    fields, tables = {entry.name for entry in dataclasses.fields(Record)}, ("config", "inputs", "outputs", "result")
    if stage not in STAGES or not isinstance(value, dict) or set(value) != fields or value["state"] not in STATES:
        return f"its record of stage {stage!r} is malformed"
    if not all(isinstance(value[name], dict) for name in tables):
        return f"its record of stage {stage!r} is malformed"
    hashes = [*value["inputs"].values(), *value["outputs"].values()]
    if not all(isinstance(digest, str) for digest in hashes) or not all(map(_is_file_name, value["outputs"])):
        return f"the files in its record of stage {stage!r} are malformed"
    if not _is_moment(value["started"]) or not (value["finished"] is None or _is_moment(value["finished"])):
        return f"the times in its record of stage {stage!r} are malformed"
    wrong = wrong_entry(stage, value["result"])
    return None if wrong is None else f"{wrong!r} in its result of stage {stage!r} is of another kind"


def _is_file_name(name: str) -> bool:
    """Whether this names a file below a stage's folder, so that run.json cannot lead out of the run."""
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
    """The day, but at least a microsecond after ``after``, also if the clock stands still or goes back.

    ``started`` tells which beginning of a stage a plan belongs to, so it must be unique.
    """
    now = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if after is not None:
        now = max(now, datetime.fromisoformat(after) + timedelta(microseconds=1))
    return now.isoformat(timespec="microseconds")


def read_hashes(path: Path) -> dict[str, str]:
    """Read a JSON file of name -> hash.

    Raises:
        CheckpointError: it is missing or damaged, so the inputs cannot be compared.
    """
    try:
        hashes = from_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _corrupt(path, "the recorded hashes of the inputs cannot be read") from error
    if not isinstance(hashes, dict):
        raise _corrupt(path, "it holds no table of hashes")
    return hashes


def frozen(value: Any) -> dict[str, Any]:
    """A dict or dataclass after conversion to JSON: tuples become lists, infinities strings, NaN null."""
    return json.loads(to_json(value))


def thawed(value: Any) -> Any:
    """Undo ``frozen`` as far as possible: the strings "inf" and "-inf" become floats again."""
    if isinstance(value, dict):
        return {key: thawed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [thawed(item) for item in value]
    return float(value) if value in ("inf", "-inf") else value


def result_digest(result: Any) -> str:
    """SHA-256 (hexadecimal) of a result as JSON holds it; the same before and after a round trip.

    Of the data's name only the part that is released counts, so that a model's own result has the digest of its run's.
    """
    entries = frozen(result)
    if isinstance(entries.get("data"), str):
        entries["data"] = public_data_name(entries["data"])
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- the run

REPORT = "report.html"

_KNOWN = {
    *STAGES.values(), "run.json", "env.json", REPORT, "tune.json", "tuned.toml", "privacy", "private", "model",
    "whitening", "audit", "diagnose",
}  # fmt: skip

OWN_FOLDERS = (*STAGES.values(), "privacy", "private", "model", "whitening", "audit", "diagnose")
"""Folders of a run, in which no other run is."""

IGNORED = ("device", "microbatch", "workers")
"""Settings that decide where and how fast a stage runs, and never its result."""

DATA = "data"
"""The setting that names private data; not compared where the content of the data is compared."""


@dataclass(frozen=True)
class Begin:
    """The decision of ``RunDir.begin``.

    Attributes:
        action: "fresh" (the stage folder is empty), "resume" (from the last checkpoint) or "skip" (nothing to do).
        config: the configuration to run with; on "resume" and "skip" the recorded one, except for ignored settings.
        directory: the stage's folder; it exists.
    """

    action: Literal["fresh", "resume", "skip"]
    config: dict[str, Any]
    directory: Path


@dataclass(frozen=True)
class StageRow:
    """A stage as ``RunDir.status`` shows it; the last four are None where the stage is missing."""

    stage: str
    state: Literal["missing", "partial", "done", "stale"]
    reasons: list[str]  # why it is stale
    started: str | None
    finished: str | None
    config: dict[str, Any] | None  # see ``context.recorded``
    result: dict[str, Any] | None  # as recorded; empty where the stage is not finished


def looks_like_a_run(path: Path) -> bool:
    """Whether a folder is a run directory, or what is left of one: run.json may be lost, and must be missed."""
    parts = ("privacy", *STAGES.values())
    return (path / "run.json").is_file() or any((path / name).is_dir() for name in parts)


class RunDir:
    """One run. Make it with ``RunDir.open``; hold ``lock()`` around everything that writes."""

    def __init__(self, path: Path, create: bool) -> None:
        self.path = path
        self._create = create
        self._descriptor: int | None = None
        self._depth = 0

    @classmethod
    def open(cls, path: Path | str, create: bool) -> Self:
        """Open a run directory.

        Args:
            path: the folder.
            create: make it, and later its sub-folders, if missing. False for commands that only read.

        Raises:
            InputError: not there (``create=False``), or not a folder.
            UsageError: a folder with other things in it and no run.json.
            StorageError: it cannot be made.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file, not a run directory", fix="name a folder with --run")
        if not path.exists() and not create:
            raise InputError(
                f"there is no run at {path}", fix=f"start one: dprandp generate --run {shlex.quote(str(path))}"
            )
        with storage_errors(path, "create"):
            path.mkdir(parents=True, exist_ok=True)
        if not (path / "run.json").exists():
            strangers = sorted(e.name for e in path.iterdir() if e.name not in _KNOWN and not e.name.startswith("."))
            if strangers:
                raise UsageError(
                    f"{path} is not a run directory: it has no run.json, but holds {strangers[0]!r}",
                    fix="name a new or empty folder with --run",
                )
        return cls(path, create)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process. May be nested within one object.

        Raises:
            StorageError: another process holds it; the message names its process id.
        """
        if self._depth == 0:
            self._descriptor = acquire(self.path / ".lock", self.path)
        self._depth += 1
        try:
            if self._depth == 1:
                self._sweep()
            yield
        finally:
            self._depth -= 1
            if self._depth == 0 and self._descriptor is not None:
                release(self._descriptor)
                self._descriptor = None

    def stage_dir(self, stage: str) -> Path:
        """The folder of a stage: ``stage_dir("generate")`` is ``runs/x/1-generate``. Made by ``begin``, not here."""
        return self.path / STAGES[_known_stage(stage)]

    @property
    def privacy_dir(self) -> Path:
        """``privacy/``: plan and ledger. ``overwrite`` never touches it."""
        return self._folder("privacy", 0o777)

    @property
    def private_dir(self) -> Path:
        """``private/``, readable by its owner only: what was computed from private data and must not be released."""
        path = self._folder("private", 0o700)
        if self._create:
            with storage_errors(path, "create"):
                path.chmod(0o700)  # also for an existing folder with other permissions
        return path

    @property
    def model_dir(self) -> Path:
        """``model/``: only what may be released."""
        return self._folder("model", 0o777)

    def begin(
        self,
        stage: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        *,
        resume: bool = False,
        overwrite: bool = False,
        ignore: Collection[str] = IGNORED,
        private_inputs: Mapping[str, str] | None = None,
    ) -> Begin:
        """Decide whether a stage starts, continues or is skipped, and record that it has begun.

        * finished, same configuration and inputs: "skip";
        * begun, same configuration and inputs: "resume", whether or not ``resume`` is given;
        * the configuration differs: refused; ``resume`` keeps the recorded one, ``overwrite`` restarts the stage;
        * the inputs differ: refused; only ``overwrite`` helps.

        ``overwrite`` empties the stage's folder and makes the stages built on it stale. It touches neither ``privacy/``
        nor ``private/``: what was spent stays spent.

        Args:
            stage: a key of ``STAGES``.
            config: JSON values, flat; compared after conversion to JSON. Public: it is written in clear text.
            inputs: name -> hash of everything public the stage is made from; see ``inputs_from``.
            resume, overwrite: the flags.
            ignore: settings that are not compared.
            private_inputs: name -> hash of private inputs. A hash of private data is itself private (it can confirm a
                guess), so these are compared in the same way but kept in ``private/``. Where they are given, the name
                of the data is ignored, since the files may have moved.

        Raises:
            UsageError: configuration or inputs differ; both flags; files of unknown origin in the stage's folder.
            CheckpointError: run.json is corrupt or newer.
        """
        self._need_lock()
        _refuse_both(resume, overwrite)
        directory, table, wanted = self.stage_dir(stage), self._table(), frozen(config)
        record = table.stages.get(stage)
        private_file = self.path / "private" / f"inputs-{stage}.json"
        strange = record is None and directory.exists() and any(directory.iterdir())
        if strange and not (overwrite and stage not in PRIVATE_STAGES):
            raise UsageError(
                f"{directory} holds files, but run.json has no record of stage {stage!r}",
                fix="start a new --run" if stage in PRIVATE_STAGES else "choose another folder with --run, or give "
                "--overwrite to delete them",
            )
        if overwrite:
            self._empty(directory)
            record = None
        if record is None:
            if private_inputs is not None:
                atomic_write(self.private_dir / private_file.name, to_json(dict(private_inputs), indent=1) + "\n")
            table.begin(stage, wanted, dict(inputs))
            self._write(table)
            if not (self.path / "env.json").exists():
                atomic_write(self.path / "env.json", to_json(facts(), indent=1) + "\n")
            return self._prepared("fresh", wanted, directory)
        recorded, present = dict(record.inputs), dict(inputs)
        if private_inputs is not None:
            recorded |= read_hashes(private_file)
            present |= private_inputs
            ignore = (*ignore, DATA)
        changed = sorted(name for name in {*recorded, *present} if recorded.get(name) != present.get(name))
        if changed:
            raise UsageError(
                f"stage {stage!r} in {self.path} was made from other inputs: {', '.join(changed)} changed",
                fix="give --overwrite to restart the stage from the present inputs",
            )
        kept = self._kept(stage, record.config, wanted, ignore, resume)
        if record.state == "partial":
            return self._prepared("resume", kept, directory)
        reasons = self._stale_because(table, stage)
        if reasons:
            raise UsageError(
                f"stage {stage!r} in {self.path} is stale: {reasons[0]}", fix="give --overwrite to restart it"
            )
        return Begin("skip", thawed(kept), directory)

    def foresee(
        self,
        stage: str,
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        ignore: Collection[str] = (*IGNORED, DATA),
    ) -> Begin:
        """The decision of ``begin`` from the configuration alone: writes nothing, needs no lock.

        Inputs are not compared, since those of a private stage would have to be read.

        Raises:
            UsageError: the configuration differs; both flags. CheckpointError: run.json is corrupt or newer.
        """
        _refuse_both(resume, overwrite)
        directory, record, wanted = self.stage_dir(stage), self._table().stages.get(stage), frozen(config)
        if overwrite or record is None:
            return Begin("fresh", thawed(wanted), directory)
        kept = self._kept(stage, record.config, wanted, ignore, resume)
        return Begin("resume" if record.state == "partial" else "skip", thawed(kept), directory)

    def finish(
        self, stage: str, outputs: Mapping[str, str], result: StageResult, *, ledger_head: str | None = None
    ) -> None:
        """Record a stage as done.

        Args:
            stage: the stage begun before.
            outputs: file below the stage's folder -> sha256; see ``hash_outputs``. What later stages depend on.
            result: the stage's public result.
            ledger_head: of a private stage, the ledger's head after it (see ``keep_ledger_head``).
        """
        self._need_lock()
        table = self._table()
        table.finish(stage, dict(outputs), result)
        if ledger_head is not None:
            self._write_heads(ledger_head, stage)
            table.ledger_head = ledger_head
        self._write(table)

    @property
    def ledger_head(self) -> str | None:
        """Hash of the last line that the run's privacy ledger is known to have had; None before a private stage."""
        return self._table().ledger_head

    def keep_ledger_head(self, head: str, stage: str | None = None) -> None:
        """Record the head of the privacy ledger; from then on a ledger without this line is refused.

        It stands in run.json, in ``.ledger-head`` and in the folder of the stage, where it has one: an old copy of one
        of these does not hide what the others show.
        """
        self._need_lock()
        table = self._table()
        self._write_heads(head, stage)
        if table.ledger_head != head:
            table.ledger_head = head
            self._write(table)

    def write_kept(self, name: str, content: bytes) -> None:
        """Write a file in ``private/``, whose loss or change ``read_kept`` notices from now on."""
        self._need_lock()
        path, table, digest = self.private_dir / name, self._table(), hashlib.sha256(content).hexdigest()
        before = file_sha256(path) if path.exists() else ""
        table.kept[name] = [before, digest]  # a crash leaves one of them
        self._write(table)
        atomic_write(path, content)
        table.kept[name] = [digest]
        self._write(table)

    def read_kept(self, name: str) -> bytes | None:
        """The content of such a file; None where none was written.

        Raises:
            CheckpointError: it is lost, or not the one that was written.
        """
        path, allowed = self.path / "private" / name, self._table().kept.get(name)
        with storage_errors(path, "read"):
            content = path.read_bytes() if path.exists() else None
        if allowed is not None and ("" if content is None else hashlib.sha256(content).hexdigest()) not in allowed:
            raise CheckpointError(
                f"{path} is {'missing' if content is None else 'not the file that this run wrote'}, so it is unknown "
                "which images the run has used as public ones",
                fix="restore the run's private folder from a copy, or start a new run",
            )
        return content

    def _write_heads(self, head: str, stage: str | None) -> None:
        atomic_write(self.path / f".{HEAD_FILE}", f"{head}\n")
        if stage in STAGES and self.stage_dir(stage).is_dir():
            atomic_write(self.stage_dir(stage) / HEAD_FILE, f"{head}\n")

    def ledger_heads(self) -> dict[Path, str]:
        """What the run's files ``.ledger-head`` and ``ledger-head`` say, by path."""
        files = [self.path / f".{HEAD_FILE}", *(self.stage_dir(stage) / HEAD_FILE for stage in PRIVATE_STAGES)]
        return {
            file: file.read_text(encoding="ascii", errors="replace").strip() for file in files if file.is_file()
        }

    def unrecorded(self) -> list[Path]:
        """Folders of private stages with files, of which run.json knows nothing."""
        known = self._table().stages
        folders = [self.stage_dir(stage) for stage in PRIVATE_STAGES if stage not in known]
        return [folder for folder in folders if folder.is_dir() and any(folder.iterdir())]

    def hash_outputs(self, stage: str, names: Collection[str]) -> dict[str, str]:
        """sha256 of files below the stage's folder, for ``finish``."""
        return {name: file_sha256(self.stage_dir(stage) / name) for name in names}

    def inputs_from(self, *stages: str) -> dict[str, str]:
        """The present outputs of these stages, named for ``begin``: ``{"generate/manifest.json": sha256}``."""
        found = self._table().stages
        return {
            f"{stage}/{name}": digest
            for stage in stages if stage in found
            for name, digest in found[stage].outputs.items()
        }  # fmt: skip

    def status(self) -> list[StageRow]:
        """One row per stage, in order."""
        table = self._table()
        rows = []
        for stage in STAGES:
            record, reasons = table.stages.get(stage), self._stale_because(table, stage)
            if record is None:
                rows.append(StageRow(stage, "missing", reasons, None, None, None, None))
                continue
            state = "stale" if reasons and record.state == "done" else record.state
            config = thawed(record.config)
            rows.append(StageRow(stage, state, reasons, record.started, record.finished, config, record.result))
        return rows

    def row(self, stage: str) -> StageRow:
        """The row of one stage."""
        return next(row for row in self.status() if row.stage == _known_stage(stage))

    def results(self) -> dict[str, StageResult]:
        """The results of the finished stages, in order.

        Raises:
            CheckpointError: one lacks something.
        """
        return {row.stage: read_result(row.stage, row.result) for row in self.status() if row.result}

    def result(self, kind: type[R]) -> R | None:
        """The result of the stage with this kind of result, such as ``ProbeResult``; None if it is not finished.

        Raises:
            CheckpointError: it lacks something.
        """
        stage = next(stage for stage, each in RESULTS.items() if each is kind)
        record = self._table().stages.get(stage)
        return read_result(stage, record.result) if record and record.result else None

    def require(self, stage: str, needed_by: str) -> None:
        """Refuse unless ``stage`` is done and fresh.

        Raises:
            InputError: it is missing, unfinished or stale; the fix is the command to run.
        """
        row = self.row(stage)
        if row.state == "done":
            return
        why, flag = {
            "missing": (f"which {self.path} does not have", ""),
            "partial": (f"which was begun in {self.path} and not finished", " --resume"),
            "stale": (f"which is stale in {self.path}: {'; '.join(row.reasons)}", " --overwrite"),
        }[row.state]
        raise InputError(
            f"stage {needed_by!r} needs stage {stage!r}, {why}",
            fix=f"run: dprandp {stage} --run {shlex.quote(str(self.path))}{flag}",
        )

    def _folder(self, name: str, mode: int) -> Path:
        path = self.path / name
        if self._create:
            with storage_errors(path, "create"):
                path.mkdir(mode=mode, exist_ok=True)
        return path

    def _need_lock(self) -> None:
        if self._depth == 0:
            raise RuntimeError("hold RunDir.lock() around begin and finish")

    def _sweep(self) -> None:
        remove_leftovers(self.path)
        for trash in self.path.glob(".trash-*"):
            with storage_errors(trash, "remove"):
                shutil.rmtree(trash)

    def _empty(self, directory: Path) -> None:
        # Rename first, in one step: if the process is killed during the deletion, no old checkpoint may be resumed
        # under the new configuration.
        if directory.exists():
            with storage_errors(directory, "empty"):
                os.replace(directory, self.path / f".trash-{secrets.token_hex(4)}")
        self._sweep()

    def _kept(
        self, stage: str, recorded: dict[str, Any], wanted: dict[str, Any], ignore: Collection[str], resume: bool
    ) -> dict[str, Any]:
        """The recorded configuration, except for settings that are not compared; refuses another one.

        None is the same as missing.
        """
        said = [
            f"{key} was {_shown(recorded.get(key))}, is now {_shown(wanted.get(key))}"
            for key in sorted({*recorded, *wanted} - set(ignore))
            if recorded.get(key) != wanted.get(key)
        ]
        if said and not resume:
            raise UsageError(
                f"stage {stage!r} in {self.path} was begun with other settings: " + "; ".join(said),
                fix="give --resume to continue with the recorded settings, or --overwrite to restart the stage",
            )
        return recorded | {key: value for key, value in wanted.items() if key in ignore}

    def _prepared(self, action: Literal["fresh", "resume"], config: dict[str, Any], directory: Path) -> Begin:
        plain = thawed(config)
        with storage_errors(directory, "create"):
            directory.mkdir(exist_ok=True)
        if not (directory / "config.toml").exists():
            atomic_write(directory / "config.toml", toml.dumps(plain))
        return Begin(action, plain, directory)

    def _stale_because(self, table: Table, stage: str) -> list[str]:
        reasons = table.stale_because(stage)
        record = table.stages.get(stage)
        if record is not None and record.state != "partial":
            absent = [name for name in record.outputs if not (self.stage_dir(stage) / name).is_file()]
            reasons += [f"its file {name} is missing" for name in absent]
        return reasons

    def _table(self) -> Table:
        return read(self.path / "run.json")

    def _write(self, table: Table) -> None:
        atomic_write(self.path / "run.json", table.to_json())


def _known_stage(stage: str) -> str:
    if stage not in STAGES:
        raise UsageError(f"unknown stage {stage!r}", fix=nearest(stage, STAGES))
    return stage


def _refuse_both(resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other", fix="give one of them, or neither")


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)
