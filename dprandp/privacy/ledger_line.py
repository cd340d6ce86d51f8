"""One line of the privacy ledger: what a charge holds, how a line is sealed, what can be read from a torn one."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dprandp.errors import StorageError, UsageError
from dprandp.privacy.accounting import GaussianEvent
from dprandp.privacy.tuning import TuningEvent

FORMAT = 3
"""Earlier ones, in which the header did not hold the budget, are refused by name."""

FIRST_PREVIOUS = "0" * 64
KINDS = ("gaussian", "discrete")
"""Of noise; see ``noise`` and ``discrete_noise``."""


@dataclass(frozen=True)
class Charge:
    """One paid block of ``steps`` steps; ``step`` counts the paid steps of this stage and attempt before it, and
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
        """What the attempt counts as: of full batches these steps, of sampled ones the whole plan (``adaptive``)."""
        return self.event if self.sample_rate == 1 else replace(self.event, steps=self.planned)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Charge:
        """Raises KeyError, TypeError, ValueError, OverflowError or UsageError for a record that is no charge."""
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
        """The charge at the start of a cut-off line, when all of it is there to the last comma."""
        match = _TORN.match(line.decode("utf-8", errors="replace"))
        if not match:
            return None
        values = zip(_NAMES, match.groups(), strict=True)
        return cls.from_record({name: json.loads(value) for name, value in values})

    def record(self) -> dict[str, Any]:
        return {"kind": "charge", **asdict(self)}


@dataclass(frozen=True)
class TuningCharge:
    """One paid selection among private trials (``privacy/selection.py``), whatever number of trials it will take."""

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
        """Raises KeyError, TypeError or UsageError for a record that is no such charge."""
        charge = cls(**{field.name: record[field.name] for field in fields(cls)})
        _ = charge.event
        return charge

    def record(self) -> dict[str, Any]:
        return {"kind": "tuning", **asdict(self)}


@dataclass(frozen=True)
class ResultSeal:
    """The result of a finished stage, by its SHA-256: what run.json says of the stage is held against it."""

    stage: str
    attempt: int
    digest: str

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> ResultSeal:
        """Raises KeyError, TypeError or ValueError for a record that is no such seal."""
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
    """Whether a write cut short can have left this: the first bytes of one line, and zeros where the rest never came.

    A file system that had noted the new length of the file, but not yet its content, shows zeros after a power cut.
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
    """What an ``OSError`` on the ledger means to the user."""
    return StorageError(
        f"The privacy ledger {path} could not be read or written: {error.strerror or error}.",
        fix="Free space or mend permissions, let one process at a time use the run, then start again with --resume.",
    )


def _compact(record: dict[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode()


def refuse_senseless(stage: str, attempt: int, steps: int, random: str, noise: str) -> None:
    """Refuse a charge that no stage can have made.

    Raises:
        UsageError: names the values.
    """
    known = random in ("os-entropy", "insecure-seed") and noise in KINDS
    if not re.fullmatch(r"[a-z0-9._-]+", stage) or attempt < 1 or steps < 1 or not known:
        raise UsageError(
            f"A charge for stage {stage!r}, attempt {attempt}, {steps} steps, random {random!r}, {noise!r} noise "
            "makes no sense.",
            fix="Give a lower-case stage, attempt and steps of at least 1, known random mode and noise.",
        )
