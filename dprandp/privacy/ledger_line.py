"""One line of the privacy ledger: what a charge holds, how a line is sealed, what can be read from a torn one."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dprandp.errors import StorageError
from dprandp.privacy.accounting import GaussianEvent

FORMAT = 1
FIRST_PREVIOUS = "0" * 64


@dataclass(frozen=True)
class Charge:
    """One paid block of ``steps`` steps; ``step`` counts the paid steps of this stage and attempt before it."""

    stage: str
    attempt: int
    step: int
    steps: int
    noise_multiplier: float
    sample_rate: float
    clip_norm: float
    random: str

    @property
    def event(self) -> GaussianEvent:
        return GaussianEvent(self.noise_multiplier, self.sample_rate, self.steps)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Charge:
        """Raises KeyError, TypeError, OverflowError or UsageError for a record that is no charge."""
        charge = cls(**{field.name: record[field.name] for field in fields(cls)})
        whole = (charge.attempt, charge.step, charge.steps)
        real = (charge.noise_multiplier, charge.sample_rate, charge.clip_norm)
        if not (
            isinstance(charge.stage, str)
            and isinstance(charge.random, str)
            and all(type(value) is int for value in whole)
            and all(type(value) in (int, float) for value in real)
            and charge.attempt >= 1
            and charge.steps >= 1
        ):
            raise TypeError("a value of a charge has another type or lies outside its range")
        _ = charge.event
        return charge

    @classmethod
    def from_torn(cls, line: bytes) -> Charge | None:
        """The charge at the start of a cut-off line, when all of it is there to the last comma."""
        match = _TORN.match(line.decode("utf-8", errors="replace"))
        if not match:
            return None
        return cls.from_record(dict(zip(_NAMES, (json.loads(value) for value in match.groups()), strict=True)))

    def record(self) -> dict[str, Any]:
        return {"kind": "charge", **asdict(self)}


_NAMES = [field.name for field in fields(Charge)]
_TORN = re.compile(r'\{"kind":"charge",' + ",".join(rf'"{name}":("[^"\\]*"|[^",]+)' for name in _NAMES) + ",")


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
