"""The record of a run's charges: append-only, chained by hashes, on disk before anything charged is used.

One JSON object a line. The first is the header, with the fixed budget; the others are charges (for a block of steps, or
for a selection among private trials) and seals of results (the SHA-256 of a finished stage's result).
Each line carries the hash of the line before (``previous``) and its own (``hash``), so that an edited, reordered or
removed line is found when the file is opened. The chain has no key: it finds accidents and careless edits. Missing
lines
at the end are found by references to them: ``includes(head)`` for the head in run.json and every checkpoint, and the
plan's check that no checkpoint holds more updates than were charged.

Guarantee:
    ``charge`` returns only after the line is on disk (fsync), and nothing is used before it returns. So the file never
    shows less than was used, even after ``kill -9`` or a power cut. A charge whose use was lost stays charged.

A torn last line (power cut in the middle of ``charge``) belongs to a call that never returned, so its charge was never
used. It is still counted as one full charge if all of its costs can be read, and dropped otherwise; both with a
warning.
Other bytes after the last line, or more of them than a line has, do not come from a power cut: they may replace charged
lines, and are refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dprandp.errors import CheckpointError, StorageError, UsageError
from dprandp.privacy.accounting import EpsilonBound, Event, GaussianEvent, Warn, merge_events, warn_by_log
from dprandp.privacy.adaptive import compose_stages
from dprandp.privacy.tuning import TuningEvent

# --------------------------------------------------------------------------------------------------------- ledger line
#
# One line of the privacy ledger: the content of a charge, the seal of a line, the reading of a torn one.

FORMAT = 3
"""Earlier formats, without the budget in the header, are refused by name."""

FIRST_PREVIOUS = "0" * 64
KINDS = ("gaussian", "discrete")
"""Of noise; see ``noise`` and ``discrete_noise``."""


@dataclass(frozen=True)
class Charge:
    """One charged block of ``steps`` steps; ``step`` counts the charged steps of this stage and attempt before it, and
    ``planned`` is the number of steps that the attempt was planned to make in all."""

    stage: str
    attempt: int
    step: int
    steps: int
    planned: int
    noise_multiplier: float
    sample_rate: float
    clip_norm: float
    noise: str
    random: str

    @property
    def event(self) -> GaussianEvent:
        return GaussianEvent(self.noise_multiplier, self.sample_rate, self.steps, self.noise == "discrete")

    @property
    def counted(self) -> GaussianEvent:
        """The event of the attempt: for full batches these steps, for sampled ones the whole plan (``adaptive``)."""
        return self.event if self.sample_rate == 1 else replace(self.event, steps=self.planned)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Charge:
        """Raises KeyError, TypeError, ValueError, OverflowError or UsageError for a record that is not a charge."""
        charge = cls(**{name: record[name] for name in _NAMES})
        whole = (charge.attempt, charge.step, charge.steps, charge.planned)
        real = (charge.noise_multiplier, charge.sample_rate, charge.clip_norm)
        if not (
            isinstance(charge.stage, str)
            and isinstance(charge.random, str)
            and all(type(value) is int for value in whole)
            and all(type(value) in (int, float) for value in real)
            and charge.attempt >= 1
            and charge.steps >= 1
            and 0 <= charge.step <= charge.planned - charge.steps
        ):
            raise TypeError("a value of a charge has another type or lies outside its range")
        _ = charge.event
        if charge.noise not in KINDS:
            raise ValueError("an unknown kind of noise")
        return charge

    @classmethod
    def from_torn(cls, line: bytes) -> Charge | None:
        """The charge at the start of a torn line, if it is complete up to the last comma."""
        match = _TORN.match(line.decode("utf-8", errors="replace"))
        if not match:
            return None
        values = zip(_NAMES, match.groups(), strict=True)
        return cls.from_record({name: json.loads(value) for name, value in values})

    def record(self) -> dict[str, Any]:
        return {"kind": "charge", **asdict(self)}


@dataclass(frozen=True)
class TuningCharge:
    """One charged selection among private trials (``privacy/selection.py``), for any number of trials."""

    stage: str
    attempt: int
    mu: float
    eta: float
    gamma: float
    random: str

    @property
    def event(self) -> TuningEvent:
        return TuningEvent(self.mu, self.eta, self.gamma)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> TuningCharge:
        """Raises KeyError, TypeError or UsageError for a record that is not such a charge."""
        charge = cls(**{field.name: record[field.name] for field in fields(cls)})
        _ = charge.event
        return charge

    def record(self) -> dict[str, Any]:
        return {"kind": "tuning", **asdict(self)}


@dataclass(frozen=True)
class ResultSeal:
    """The result of a finished stage, by its SHA-256, for comparison with run.json."""

    stage: str
    attempt: int
    digest: str

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> ResultSeal:
        """Raises KeyError, TypeError or ValueError for a record that is not such a seal."""
        seal = cls(**{field.name: record[field.name] for field in fields(cls)})
        if not (isinstance(seal.stage, str) and type(seal.attempt) is int and seal.attempt >= 1):
            raise TypeError("a value of a result's seal has another type or lies outside its range")
        if not (isinstance(seal.digest, str) and re.fullmatch("[0-9a-f]{64}", seal.digest)):
            raise ValueError("the digest of a result is no SHA-256")
        return seal

    def record(self) -> dict[str, Any]:
        return {"kind": "result", **asdict(self)}


_NAMES = [field.name for field in fields(Charge)]
_TORN = re.compile(r'\{"kind":"charge",' + "".join(rf'"{name}":("[^"\\]*"|[^",]+),' for name in _NAMES))
_START = b'{"kind":"'
_LONGEST_LINE = 700
"""Bytes: a charge has under 500 with every number written out to its last digit."""


def seal(body: dict[str, Any], previous: str) -> tuple[bytes, str]:
    """The line, with its end, of a record chained to the hash of the line before; and its own hash.

    The hash is the SHA-256 of the line as it would be without it. NaN and infinities raise ValueError.
    """
    record = {**body, "previous": previous}
    digest = hashlib.sha256(_compact(record)).hexdigest()
    return _compact({**record, "hash": digest}) + b"\n", digest


def unseal(line: bytes) -> tuple[dict[str, Any], str, str]:
    """(body, previous, hash) of a complete line without its end.

    Raises:
        ValueError: it is no sealed line, or was changed after it was sealed.
    """
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


def sync_folder(folder: Path) -> None:
    """fsync of a folder: that of a file does not cover its name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(path: Path, error: OSError) -> StorageError:
    """The error for an ``OSError`` on the ledger."""
    return StorageError(
        f"The privacy ledger {path} could not be read or written: {error.strerror or error}.",
        fix="Free space or correct permissions, use the run in one process at a time, then start again with --resume.",
    )


def _compact(record: dict[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode()


def refuse_senseless(stage: str, attempt: int, steps: int, random: str, noise: str) -> None:
    """Refuse an impossible charge.

    Raises:
        UsageError: names the values.
    """
    known = random in ("os-entropy", "insecure-seed") and noise in KINDS
    if not re.fullmatch(r"[a-z0-9._-]+", stage) or attempt < 1 or steps < 1 or not known:
        raise UsageError(
            f"A charge for stage {stage!r}, attempt {attempt}, {steps} steps, random {random!r}, {noise!r} noise "
            "is impossible.",
            fix="Give a lower-case stage, attempt and steps of at least 1, known random mode and noise.",
        )


ADJACENCY = "zero-out"
"""The header's name for neighbours: in one of the data sets a record's slot is empty (see ``accounting``)."""


class Ledger:
    """The privacy ledger of one run, opened with ``Ledger.create`` or ``Ledger.open``.

    Attributes:
        path: the file.
        header: ``format, data_unit, adjacency, examples, budget, created``.
        charges: every block of steps charged so far, in order.
        tunings: every selection among private trials charged so far, in order.
        seals: stage -> the seal of its latest result.
        head: hash of the last line, for everything that depends on the ledger.
    """

    def __init__(self, path: Path, read_only: bool, warn: Warn, fault_point: Callable[[str], None]) -> None:
        self.path = path
        self.header: dict[str, Any] = {}
        self.charges: list[Charge] = []
        self.tunings: list[TuningCharge] = []
        self._in_order: list[Charge | TuningCharge] = []
        self.seals: dict[str, ResultSeal] = {}
        self.head = FIRST_PREVIOUS
        self._hashes: set[str] = set()
        self._counts: Counter[tuple[str, int]] = Counter()
        self._size = 0  # bytes of the file that were verified; -1 after a failed write
        self._read_only = read_only
        self._warn = warn
        self._fault_point = fault_point

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
        """Start a ledger: write and fsync its header.

        Args:
            path: the file.
            examples: N ≥ 1, the public number of records.
            data_unit: the unit of privacy.
            warn, fault_point: as for ``open``.
            budget: the values that were fixed before the data were read, by name, as finite JSON values. They are
            sealed
                with the header, for comparison with copies. None for a ledger without a budget, as that of an audit.

        Raises:
            StorageError: the file exists or cannot be written.
        """
        path = Path(path)
        body = {
            "kind": "header",
            "format": FORMAT,
            "data_unit": data_unit,
            "adjacency": ADJACENCY,
            "examples": int(examples),
            "budget": None if budget is None else dict(budget),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        temporary = path.with_name(path.name + ".new")
        try:
            if path.exists():
                raise FileExistsError(f"{path.name} exists already")
            with open(temporary, "wb") as file:
                file.write(seal(body, FIRST_PREVIOUS)[0])
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        except OSError as error:
            raise storage_error(path, error) from error
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

        Args:
            path: the file.
            read_only: never write; ``charge`` is refused. For reports while a run goes on.
            warn: called with one sentence when a torn line is met.
            fault_point: called with "ledger.appended" and "ledger.fsynced" at these moments (crash tests).

        Raises:
            CheckpointError: the file is missing, empty, of a newer format, or a line was edited, moved or removed;
                the message names the line.
            StorageError: the disk refused.
        """
        ledger = cls(Path(path), read_only, warn, fault_point)
        try:
            data = ledger.path.read_bytes()
        except FileNotFoundError as error:
            raise CheckpointError(
                f"The privacy ledger {path} is missing.",
                fix="Restore it: without it the spent budget of this run is unknown.",
            ) from error
        except OSError as error:
            raise storage_error(ledger.path, error) from error
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
    def examples(self) -> int:
        return self.header["examples"]

    @property
    def data_unit(self) -> str:
        return self.header["data_unit"]

    @property
    def budget(self) -> dict[str, Any] | None:
        """The budget in the header; see ``create``."""
        return self.header["budget"]

    @property
    def private(self) -> bool:
        """False if any step ran without noise or on repeatable randomness: then ε is void."""
        return self.random == "os-entropy" and all(charge.noise_multiplier > 0 for charge in self.charges)

    @property
    def random(self) -> str:
        """'insecure-seed' when anything charged used repeatable randomness, else 'os-entropy'."""
        modes = {charge.random for charge in [*self.charges, *self.tunings]}
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
        """Charge a block of steps. Use none of them before this has returned.

        Args:
            stage, attempt: whose steps they are. steps: T of the block. planned: T of the attempt's whole plan.
            noise_multiplier, sample_rate, clip_norm, noise: σ, q, C and kind of noise of each step.
            random: 'os-entropy' or 'insecure-seed'.

        Guarantee:
            On return the line is on disk. If this raises, the block must be taken as charged and must not be used.

        Raises:
            UsageError: a value is outside its range, or the ledger was opened read-only.
            StorageError: the disk refused, or somebody else wrote to the file.
        """
        self._refuse_reader()
        refuse_senseless(stage, attempt, steps, random, noise)
        values = (float(noise_multiplier), float(sample_rate), float(clip_norm))
        before = self.charged_steps(stage, attempt)
        if before + steps > planned:
            raise UsageError(
                f"A charge would bring stage {stage!r}, attempt {attempt}, to {before + steps} steps of {planned}.",
                fix="Plan the stage again with --overwrite.",
            )
        charge = Charge(stage, int(attempt), before, int(steps), int(planned), *values, noise, random)
        _ = charge.event  # refuses impossible values before they are written
        self._append(charge, {})
        return charge

    def charge_tuning(self, *, stage: str, attempt: int, event: TuningEvent, random: str) -> TuningCharge:
        """Charge a selection among private trials; Guarantee and errors as for ``charge``."""
        self._refuse_reader()
        refuse_senseless(stage, attempt, 1, random, KINDS[0])
        charge = TuningCharge(stage, int(attempt), event.mu, event.eta, event.gamma, random)
        self._append(charge, {})
        return charge

    def seal_result(self, *, stage: str, attempt: int, digest: str) -> None:
        """Record the SHA-256 of a finished stage's result, at no cost. Errors as for ``charge``."""
        self._refuse_reader()
        refuse_senseless(stage, attempt, 1, "os-entropy", KINDS[0])
        self._append(ResultSeal(stage, int(attempt), digest), {})

    def events(self) -> list[Event]:
        """All charges in canonical form (equal q and σ added up), for the accountant."""
        return merge_events([charge.event for charge in [*self.charges, *self.tunings]])

    def stages(self, besides: Collection[tuple[str, int]] = ()) -> list[list[Event]]:
        """The events of each attempt of each stage, in the order in which they began; see ``adaptive``.

        Full batches count as far as they were charged; an attempt with sampled batches counts as its whole plan from
        its first charge on, since it may be stopped at any moment.

        Args:
            besides: (stage, attempt) pairs to leave out.
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
                found[key] = [charge.counted]
        return list(found.values())

    def charged_steps(self, stage: str, attempt: int) -> int:
        """Steps charged in one attempt of a stage, used or lost."""
        return self._counts[stage, attempt]

    def last_attempt(self, stage: str) -> int:
        """The highest attempt of a stage that has charged anything; 0 for none."""
        return max((c.attempt for c in [*self.charges, *self.tunings] if c.stage == stage), default=0)

    def spent(self, delta: float) -> EpsilonBound:
        """ε of everything charged, at ``delta``; infinite when a step ran without noise. See ``private`` as well.

        Guarantee:
            Holds also where a stage was planned after the results of earlier ones were seen (``adaptive``).
        """
        return compose_stages(self.stages(), delta, self._warn)

    def _refuse_reader(self) -> None:
        if self._read_only:
            raise UsageError("This ledger was opened for reading only.", fix="Open it for writing.")

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
            if body.get("format") != FORMAT:
                raise CheckpointError(
                    f"The privacy ledger {self.path} has format {body.get('format')}; this version reads {FORMAT}.",
                    fix="Use the version of dprandp that wrote it.",
                )
            if type(body.get("examples")) is not int or body["examples"] < 1 or type(body.get("data_unit")) is not str:
                raise self._damaged(number, "its number of examples, or the unit they are of, makes no sense")
            if body.get("adjacency") != ADJACENCY:
                raise self._damaged(number, "its relation of neighbours is not the one that is accounted here")
            if not isinstance(body.get("budget", ""), dict | None):
                raise self._damaged(number, "it does not say what the budget is")
            self.header = body
        elif kind == "charge" and number > 1:
            self._take(self._checked(body, number))
        elif kind == "tuning" and number > 1:
            try:
                self._take(TuningCharge.from_record(body))
            except (KeyError, TypeError, ValueError, UsageError) as error:
                raise self._damaged(number, "its values make no sense") from error
        elif kind == "result" and number > 1:
            try:
                self._take(ResultSeal.from_record(body))
            except (KeyError, TypeError, ValueError) as error:
                raise self._damaged(number, "its values make no sense") from error
        else:
            raise self._damaged(number, f"a line of kind {kind!r} does not belong here")
        self._note(digest)

    def _checked(self, body: dict[str, Any], number: int) -> Charge:
        try:
            charge = Charge.from_record(body)
        except (KeyError, TypeError, ValueError, OverflowError, UsageError) as error:
            raise self._damaged(number, "its values make no sense") from error
        if charge.step != self.charged_steps(charge.stage, charge.attempt):
            raise self._damaged(number, "its step does not follow the steps charged before")
        return charge

    def _torn_charge(self, torn: bytes, number: int) -> Charge | None:
        if not begins_a_line(torn):
            raise self._damaged(number, "it is not the beginning of a line, so more may be lost than one")
        try:
            charge = Charge.from_torn(torn)
        except (ValueError, TypeError, OverflowError, UsageError) as error:
            raise self._damaged(number, "its values make no sense") from error
        return self._checked(charge.record(), number) if charge else None

    def _take(self, charge: Charge | TuningCharge | ResultSeal) -> None:
        if isinstance(charge, ResultSeal):
            self.seals[charge.stage] = charge
            return
        self._in_order.append(charge)
        if isinstance(charge, TuningCharge):
            self.tunings.append(charge)
            return
        self.charges.append(charge)
        self._counts[charge.stage, charge.attempt] += charge.steps

    def _note(self, digest: str) -> None:
        self.head = digest
        self._hashes.add(digest)

    def _repair(self, torn: bytes, number: int) -> None:
        """Deal with what follows the last newline (see the top of this file)."""
        restored: Charge | None = None
        keep = 0
        if torn.endswith(b"}"):  # whole but for its newline; if it does not verify, it was edited
            self._read(torn, number)
            outcome, keep = "only its end of line was missing; it is kept", len(torn)
        elif (restored := self._torn_charge(torn, number)) is not None:
            outcome = f"it is counted as charged in full ({restored.steps} steps of stage {restored.stage})"
        else:
            outcome = "nothing it would have charged was used; it is dropped"
        self._warn(f"Line {number} of the privacy ledger was cut off while it was written: {outcome}.")
        if self._read_only:
            if restored:
                self._take(restored)
            return
        try:
            with open(self.path, "r+b") as file:
                file.truncate(self._size + keep)
                if keep:
                    file.seek(0, os.SEEK_END)
                    file.write(b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_error(self.path, error) from error
        self._size += keep + 1 if keep else 0
        if restored:
            self._append(restored, {"repaired": True})

    def _append(self, charge: Charge | TuningCharge | ResultSeal, notes: dict[str, Any]) -> None:
        body = {**charge.record(), "time": datetime.now(UTC).isoformat(timespec="seconds"), **notes}
        line, digest = seal(body, self.head)
        expected, self._size = self._size, -1  # until the write has succeeded, the state of the file is unknown
        try:
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
        except OSError as error:
            raise storage_error(self.path, error) from error
        self._size = expected + len(line)
        self._note(digest)
        self._take(charge)
        self._fault_point("ledger.fsynced")

    def _damaged(self, number: int, reason: str) -> CheckpointError:
        return CheckpointError(
            f"Line {number} of the privacy ledger {self.path} cannot be trusted: {reason}.",
            fix="Restore the file from a copy; without it nobody knows what this run has spent.",
        )
