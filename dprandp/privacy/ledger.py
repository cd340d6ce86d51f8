"""The record of a run's charges: append-only, chained by hashes, on disk before anything charged is used.

One JSON object a line: the header, with the fixed budget, then charges (for a block of steps, or for a selection among
private trials) and seals of results (the SHA-256 of a finished stage's result). Each line carries the hash of the line
before (``previous``) and its own (``hash``), so that an edited, reordered or removed line is found when the file is
opened. The chain has no key: it finds accidents and careless edits. Missing lines at the end are found by references to
them: ``includes(head)`` for the head in run.json and every checkpoint, and the plan's check that no checkpoint holds
more updates than were charged. No line has a time: how long private tuning took would tell how many trials it made,
which is secret. Each has a random ``nonce``, so that two copies of a run that both go on have different ledgers.

Guarantee:
    ``charge`` returns only after the line is on disk (fsync), and nothing is used before it returns. So the file never
    shows less than was used, even after ``kill -9`` or a power cut. A charge whose use was lost stays charged.

A torn last line (power cut in the middle of ``charge``) belongs to a call that never returned. It is still counted as
one full charge if all of its costs can be read, and dropped otherwise; both with a warning. Other bytes after the last
line, or more of them than a line has, may replace charged lines, and are refused.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Self

from dprandp.errors import CheckpointError, StorageError, UsageError
from dprandp.privacy.accounting import EpsilonBound, Event, GaussianEvent, Warn, merge_events, warn_by_log
from dprandp.privacy.adaptive import compose_stages
from dprandp.privacy.tuning import TuningEvent

FORMAT = 3
"""Earlier formats, without the budget in the header, are refused by name."""

ADJACENCY = "zero-out"
"""The header's name for neighbours: in one of the data sets a record's slot is empty (see ``accounting``)."""

FIRST_PREVIOUS = "0" * 64

# --------------------------------------------------------------------------------------------------------------- lines


@dataclass(frozen=True)
class _Line:
    """What a line says of an attempt of a stage. Impossible values raise UsageError (or TypeError)."""

    KIND: ClassVar[str]
    stage: str
    attempt: int

    def __post_init__(self) -> None:
        if not (re.fullmatch(r"[a-z0-9._-]+", self.stage) and _whole(self.attempt) and self.possible()):
            raise UsageError(f"A ledger line is impossible: {self}.", fix="Give known names and values in their range.")

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """The inverse of ``record``; raises KeyError where a value is missing."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})

    def record(self) -> dict[str, Any]:
        return {"kind": self.KIND, **asdict(self)}


@dataclass(frozen=True)
class Charge(_Line):
    """One charged block of ``steps`` steps; ``step`` counts the charged steps of this stage and attempt before it, and
    ``planned`` is the number of steps that the attempt was planned to make in all."""

    KIND = "charge"
    step: int
    steps: int
    planned: int
    noise_multiplier: float
    sample_rate: float
    clip_norm: float
    noise: str
    random: str

    def possible(self) -> bool:
        _ = self.event  # refuses noise and rates out of their range
        reals = (self.noise_multiplier, self.sample_rate, self.clip_norm)
        whole = _whole(self.steps) and _whole(self.planned) and _whole(self.step, 0)
        known = self.noise in ("gaussian", "discrete") and _mode(self.random)
        fits = whole and self.step <= self.planned - self.steps
        return known and fits and all(type(value) in (int, float) for value in reals)

    @property
    def event(self) -> GaussianEvent:
        return GaussianEvent(self.noise_multiplier, self.sample_rate, self.steps, self.noise == "discrete")

    @classmethod
    def from_torn(cls, line: bytes) -> Charge | None:
        """The charge at the start of a torn line, if it is complete up to the last comma."""
        match = _TORN.match(line.decode("utf-8", errors="replace"))
        return match and cls.from_record({name: json.loads(value) for name, value in match.groupdict().items()})


@dataclass(frozen=True)
class TuningCharge(_Line):
    """One charged selection among private trials (``selection``), for any number of trials."""

    KIND = "tuning"
    mu: float
    eta: float
    gamma: float
    random: str

    def possible(self) -> bool:
        _ = self.event
        return _mode(self.random)

    @property
    def event(self) -> TuningEvent:
        return TuningEvent(self.mu, self.eta, self.gamma)


@dataclass(frozen=True)
class ResultSeal(_Line):
    """The result of a finished stage, by its SHA-256, for comparison with run.json."""

    KIND = "result"
    digest: str

    def possible(self) -> bool:
        return bool(re.fullmatch("[0-9a-f]{64}", self.digest))


def _whole(value: Any, least: int = 1) -> bool:
    return type(value) is int and value >= least


def _mode(random: str) -> bool:
    return random in ("os-entropy", "insecure-seed")


_LINES: dict[str, type[_Line]] = {line.KIND: line for line in (Charge, TuningCharge, ResultSeal)}
_TORN = re.compile(
    r'\{"kind":"charge",' + "".join(rf'"{field.name}":(?P<{field.name}>"[^"\\]*"|[^",]+),' for field in fields(Charge))
)
_START = b'{"kind":"'
_LONGEST_LINE = 600
"""Bytes: a charge has under 500 with every number written out to its last digit."""


def seal(body: dict[str, Any], previous: str) -> tuple[bytes, str]:
    """The line, with its end, of a record chained to the hash of the line before; and its own hash.

    The hash is the SHA-256 of the line as it would be without it. NaN and infinities raise ValueError.
    """
    record = {**body, "previous": previous}
    digest = hashlib.sha256(_compact(record)).hexdigest()
    return _compact({**record, "hash": digest}) + b"\n", digest


def unseal(line: bytes) -> tuple[dict[str, Any], str, str]:
    """(body, previous, hash) of a complete line without its end. Raises ValueError for one that was not sealed so."""
    try:
        record = json.loads(line)
        body = {name: value for name, value in record.items() if name not in ("previous", "hash")}
        sealed, digest = seal(body, record["previous"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("it is not a ledger line") from error
    if sealed != line + b"\n":
        raise ValueError("it was changed after it was written")
    return body, record["previous"], digest


def begins_a_line(torn: bytes) -> bool:
    """Whether a torn write can have left this: the first bytes of one line, then zeros.

    A file system that stored the new length of the file, but not yet its content, shows zeros after a power cut.
    """
    written = torn.rstrip(b"\0")
    start = written[: len(_START)]
    return len(torn) <= _LONGEST_LINE and _START.startswith(start) and all(32 <= byte < 127 for byte in written)


def _compact(record: dict[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode()


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _name_once(temporary: Path, path: Path) -> None:
    """Give a written file its real name, unless a file has that name: FileExistsError."""
    try:
        os.link(temporary, path)  # refuses an existing name, which a rename replaces
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, "it exists already, perhaps begun by another process just now") from None
    except OSError:  # a file system without links: a crash may leave an unfinished header, which is refused
        with open(path, "xb") as file:
            file.write(temporary.read_bytes())
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Raise StorageError for an ``OSError``."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"The privacy ledger {path} could not be read or written: {error.strerror or error}.",
            fix="Free space or correct permissions, use the run in one process at a time, then start again with "
            "--resume.",
        ) from error


# -------------------------------------------------------------------------------------------------------------- ledger


class Ledger:
    """The privacy ledger of one run, opened with ``Ledger.create`` or ``Ledger.open``.

    Attributes:
        header: ``format, data_unit, adjacency, examples, budget, created``, of which three are attributes too.
        seals: stage -> the seal of its latest result, in the order of the file.
        head: hash of the last line, for everything that depends on the ledger.
    """

    examples: int
    data_unit: str
    budget: dict[str, Any] | None

    def __init__(self, path: Path, read_only: bool, warn: Warn, fault_point: Callable[[str], None]) -> None:
        self.path = path
        self.header: dict[str, Any] = {}
        self.seals: dict[str, ResultSeal] = {}
        self.head = FIRST_PREVIOUS
        self._in_order: list[Charge | TuningCharge] = []
        self._hashes: set[str] = set()
        self._counts: Counter[tuple[str, int]] = Counter()
        self._size = 0  # bytes of the file that were verified; -1 after a failed write
        self._read_only, self._warn, self._fault_point = read_only, warn, fault_point

    @classmethod
    def create(
        cls,
        path: Path,
        examples: int,
        data_unit: str = "image",
        warn: Warn = warn_by_log,
        fault_point: Callable[[str], None] = lambda name: None,
        *,
        budget: Mapping[str, Any] | None = None,
    ) -> Ledger:
        """Start a ledger of N = ``examples`` records of a unit of privacy: write and fsync its header.

        ``budget``: the values that were fixed before the data were read, as finite JSON values; None in an audit.

        Guarantee:
            The file appears at once, whole, and never in the place of another, also where several processes begin a
            ledger at the same time or ``path`` is a link: the link stays, and its target is made.

        Raises:
            StorageError: the file exists, maybe begun by another process meanwhile, or cannot be written.
        """
        path = Path(os.path.realpath(path))  # of a link whose target is not there yet: the target
        body = {
            "kind": "header",
            "format": FORMAT,
            "data_unit": data_unit,
            "adjacency": ADJACENCY,
            "examples": int(examples),
            "budget": None if budget is None else dict(budget),
            "created": _today(),
            "nonce": secrets.token_hex(8),
        }
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
        with _disk(path):
            try:
                with open(temporary, "xb") as file:
                    file.write(seal(body, FIRST_PREVIOUS)[0])
                    file.flush()
                    os.fsync(file.fileno())
                _name_once(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            folder = os.open(path.parent, os.O_RDONLY)  # fsync of a file does not cover its name
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        return cls.open(path, warn=warn, fault_point=fault_point)

    @classmethod
    def open(
        cls,
        path: Path,
        read_only: bool = False,
        warn: Warn = warn_by_log,
        fault_point: Callable[[str], None] = lambda name: None,
    ) -> Ledger:
        """Read and verify a ledger; repair a torn last line unless ``read_only`` (which counts it all the same).

        ``warn`` is called with one sentence when a torn line is met, ``fault_point`` with "ledger.appended" and
        "ledger.fsynced" at these moments (crash tests).

        Raises:
            CheckpointError: the file is missing, empty, of another format, or a line was edited, moved or removed;
                the message names the line. StorageError: the disk refused.
        """
        ledger = cls(Path(path), read_only, warn, fault_point)
        with _disk(ledger.path):
            if not ledger.path.exists():
                raise CheckpointError(
                    f"The privacy ledger {path} is missing.",
                    fix="Restore it: without it the spent budget of this run is unknown.",
                )
            if not ledger.path.is_file():
                raise CheckpointError(f"{path} is not a regular file.", fix="Name a file for the privacy ledger.")
            data = ledger.path.read_bytes()
        lines = data.split(b"\n")
        torn = lines.pop()
        for number, line in enumerate(lines, start=1):
            ledger._read(line, number)
        ledger._size = len(data) - len(torn)
        if not ledger.header:
            raise ledger._damaged(1, "there is no complete header")
        if torn:
            ledger._repair(torn, len(lines) + 1)
        return ledger

    @property
    def charges(self) -> list[Charge]:
        """Every block of steps charged so far, in order."""
        return [charge for charge in self._in_order if isinstance(charge, Charge)]

    @property
    def tunings(self) -> list[TuningCharge]:
        """Every selection among private trials charged so far, in order."""
        return [charge for charge in self._in_order if isinstance(charge, TuningCharge)]

    @property
    def private(self) -> bool:
        """False if any step ran without noise or on repeatable randomness: then ε is void."""
        return self.random == "os-entropy" and all(charge.noise_multiplier > 0 for charge in self.charges)

    @property
    def random(self) -> str:
        """'insecure-seed' when anything charged used repeatable randomness, else 'os-entropy'."""
        modes = {charge.random for charge in self._in_order}
        return "os-entropy" if modes <= {"os-entropy"} else "insecure-seed"

    def includes(self, head: str) -> bool:
        """Whether a line with this hash is in the file: if not, the ledger is older than the reference."""
        return head in self._hashes

    def charge(
        self,
        *,
        stage: str,
        attempt: int,
        steps: int,
        planned: int,
        noise_multiplier: float,
        sample_rate: float,
        clip_norm: float,
        random: str,
        noise: str = "gaussian",
    ) -> Charge:
        """Charge a block of ``steps`` steps of the ``planned`` ones. Use none of them before this has returned.

        UsageError where a value is outside its range, the plan is exceeded, or the ledger was opened read-only;
        StorageError where the disk refused, or somebody else wrote to the file.

        Guarantee:
            On return the line is on disk. If this raises, the block must be taken as charged and must not be used.
        """
        values = (float(noise_multiplier), float(sample_rate), float(clip_norm))
        before = self.charged_steps(stage, attempt)
        charge = Charge(stage, int(attempt), before, int(steps), int(planned), *values, noise, random)
        self._append(charge)
        return charge

    def charge_tuning(self, *, stage: str, attempt: int, event: TuningEvent, random: str) -> TuningCharge:
        """Charge a selection among private trials; Guarantee and errors as for ``charge``."""
        charge = TuningCharge(stage, int(attempt), event.mu, event.eta, event.gamma, random)
        self._append(charge)
        return charge

    def seal_result(self, *, stage: str, attempt: int, digest: str) -> None:
        """Record the SHA-256 of a finished stage's result, at no cost. Errors as for ``charge``."""
        self._append(ResultSeal(stage, int(attempt), digest))

    def require_in_place(self) -> None:
        """Raise StorageError unless the file at the ledger's path still ends with the last line known here.

        To be called before anything charged is released: ``charge`` writes to the file that is there when it is called,
        and an older copy may take its place afterwards.
        """
        with _disk(self.path):
            if not self.path.read_bytes().endswith(f'"hash":"{self.head}"}}\n'.encode()):
                raise OSError("it was replaced by another file, or somebody else wrote to it")

    def events(self) -> list[Event]:
        """All charges in canonical form (equal q and σ added up), for the accountant."""
        return merge_events([charge.event for charge in self._in_order])

    def stages(self, besides: Collection[tuple[str, int]] = ()) -> list[list[Event]]:
        """The events of each attempt of each stage, as they began; but for the (stage, attempt) in ``besides``.

        Full batches count as far as they were charged; an attempt with sampled batches counts as its whole plan from
        its first charge on, since it may be stopped at any moment (``adaptive``).
        """
        found: dict[tuple[str, int], list[Event]] = {}
        for charge in self._in_order:
            key = (charge.stage, charge.attempt)
            if key in besides:
                continue
            if isinstance(charge, TuningCharge):
                found.setdefault(key, []).append(charge.event)
            elif charge.sample_rate == 1:
                found[key] = merge_events([*found.get(key, []), charge.event])
            else:
                found[key] = [replace(charge.event, steps=charge.planned)]
        return list(found.values())

    def charged_steps(self, stage: str, attempt: int) -> int:
        """Steps charged in one attempt of a stage, used or lost."""
        return self._counts[stage, attempt]

    def last_attempt(self, stage: str) -> int:
        """The highest attempt of a stage that has charged anything; 0 for none."""
        return max((charge.attempt for charge in self._in_order if charge.stage == stage), default=0)

    def spent(self, delta: float) -> EpsilonBound:
        """ε of everything charged, at ``delta``, by ``compose_stages``; infinite when a step ran without noise."""
        return compose_stages(self.stages(), delta, self._warn)

    def _read(self, line: bytes, number: int) -> None:
        """Verify one complete line and take it in."""
        try:
            body, previous, digest = unseal(line)
        except ValueError as error:
            raise self._damaged(number, str(error)) from error
        kind = body.pop("kind", None)
        if previous != self.head:
            raise self._damaged(number, "the line before it was changed, moved or removed")
        if kind == "header" and number == 1:
            self._read_header(body)
        elif isinstance(kind, str) and kind in _LINES and number > 1:
            self._take(self._checked(_LINES[kind].from_record, body, number))
        else:
            raise self._damaged(number, f"a line of kind {kind!r} does not belong here")
        self._note(digest)

    def _read_header(self, body: dict[str, Any]) -> None:
        if body.get("format") != FORMAT:
            raise CheckpointError(
                f"The privacy ledger {self.path} has format {body.get('format')}; this version reads {FORMAT}.",
                fix="Use the version of dprandp that wrote it.",
            )
        if not _whole(body.get("examples")) or type(body.get("data_unit")) is not str:
            raise self._damaged(1, "its number of examples, or the unit they are of, makes no sense")
        if body.get("adjacency") != ADJACENCY:
            raise self._damaged(1, "its relation of neighbours is not the one that is accounted here")
        if not isinstance(body.get("budget", ""), dict | None):
            raise self._damaged(1, "it does not say what the budget is")
        self.header = body
        self.examples, self.data_unit, self.budget = (body[name] for name in ("examples", "data_unit", "budget"))

    def _checked(self, read: Callable[[Any], Any], given: Any, number: int) -> Any:
        """What ``read`` makes of a line, if that makes sense here."""
        try:
            charge = read(given)
        except (KeyError, TypeError, ValueError, OverflowError, UsageError) as error:
            raise self._damaged(number, "its values make no sense") from error
        if isinstance(charge, Charge) and charge.step != self.charged_steps(charge.stage, charge.attempt):
            raise self._damaged(number, "its step does not follow the steps charged before")
        return charge

    def _take(self, line: _Line) -> None:
        if isinstance(line, ResultSeal):
            self.seals.pop(line.stage, None)
            self.seals[line.stage] = line  # the latest last
            return
        self._in_order.append(line)
        if isinstance(line, Charge):
            self._counts[line.stage, line.attempt] += line.steps

    def _note(self, digest: str) -> None:
        self.head = digest
        self._hashes.add(digest)

    def _repair(self, torn: bytes, number: int) -> None:
        """Deal with what follows the last newline (see the top of this file)."""
        restored: Charge | None = None
        whole = torn.endswith(b"}")  # but for its newline; if it does not verify, it was edited
        if whole:
            self._read(torn, number)
            outcome = "only its end of line was missing; it is kept"
        elif not begins_a_line(torn):
            raise self._damaged(number, "it is not the beginning of a line, so more may be lost than one")
        elif (restored := self._checked(Charge.from_torn, torn, number)) is not None:
            outcome = f"it is counted as charged in full ({restored.steps} steps of stage {restored.stage})"
        else:
            outcome = "nothing it would have charged was used; it is dropped"
        self._warn(f"Line {number} of the privacy ledger was cut off while it was written: {outcome}.")
        if self._read_only:
            if restored:
                self._take(restored)
            return
        kept = torn + b"\n" if whole else b""
        with _disk(self.path), open(self.path, "r+b") as file:
            file.truncate(self._size + max(0, len(kept) - 1))
            if kept:
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._size += len(kept)
        if restored:
            self._append(restored, repaired=True)

    def _append(self, new: _Line, **notes: Any) -> None:
        if self._read_only:
            raise UsageError("This ledger was opened for reading only.", fix="Open it for writing.")
        line, digest = seal({**new.record(), **notes, "nonce": secrets.token_hex(8)}, self.head)
        expected, self._size = self._size, -1  # until the write has succeeded, the state of the file is unknown
        with _disk(self.path):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if os.fstat(descriptor).st_size != expected:
                    raise OSError("somebody else wrote to it, or an earlier write failed")
                if os.write(descriptor, line) != len(line):
                    raise OSError("the line could not be written whole")
                self._fault_point("ledger.appended")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self._size = expected + len(line)
        self._note(digest)
        self._take(new)
        self._fault_point("ledger.fsynced")

    def _damaged(self, number: int, reason: str) -> CheckpointError:
        return CheckpointError(
            f"Line {number} of the privacy ledger {self.path} cannot be trusted: {reason}.",
            fix="Restore the file from a copy; without it nobody knows what this run has spent.",
        )
