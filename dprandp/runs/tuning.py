"""The files of ``dprandp tune`` in a run, and their summary in a private stage's result.

    tune.json    the tried and the chosen settings, and the data; public (charged, where the data were private)
    tuned.toml   the chosen settings, for ``probe --config``
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dprandp.config import toml
from dprandp.errors import CheckpointError
from dprandp.privacy.accounting import compose
from dprandp.privacy.ledger import Ledger
from dprandp.runs.directory import RunDir, frozen, result_digest, thawed
from dprandp.runs.files import atomic_write, read_object, to_json
from dprandp.runs.ledger import open_run_ledger

RECORD, SETTINGS = "tune.json", "tuned.toml"
SYNTHETIC, PRIVATE = "synthetic", "private"
TUNE = "tune"
"""As the ledger calls private tuning."""
FORMAT = 1
_NEEDED = {"on": str, "trials": int, "chosen": dict, "asked": dict}


def write_tuning(rundir: RunDir, record: dict[str, Any], settings: dict[str, Any]) -> None:
    """Write both files; the record (on, trials, chosen, asked, ...) last: its presence means that tuning is done."""
    note = f"# Chosen by `dprandp tune` on {json.dumps(record['on'], ensure_ascii=True)}; see {RECORD}.\n"
    atomic_write(rundir.path / SETTINGS, note + toml.dumps({"probe": settings}))
    atomic_write(rundir.path / RECORD, to_json({"format": FORMAT, **record}, indent=1) + "\n")


def read_tuning(rundir: RunDir) -> dict[str, Any] | None:
    """The record of the run's tuning; None where nothing was tuned.

    Raises:
        CheckpointError: it is damaged, or of another format.
    """
    path = rundir.path / RECORD
    if not path.exists():
        return None
    record = thawed(read_object(path) or {})
    if record.pop("format", None) == FORMAT and all(isinstance(record.get(key), kind) for key, kind in _NEEDED.items()):
        return record
    raise CheckpointError(
        f"{path} is damaged", fix="restore it from a copy, or tune again with --overwrite; what was spent stays spent"
    )


def seal_tuning(rundir: RunDir, record: Mapping[str, Any]) -> None:
    """Keep the hash of what private tuning is about to report in the ledger; the run's lock must be held."""
    ledger = open_run_ledger(rundir, write=True)
    ledger.seal_result(stage=TUNE, attempt=ledger.last_attempt(TUNE), digest=_digest(record))
    rundir.keep_ledger_head(ledger.head)


def refuse_other_tuning(rundir: RunDir, record: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless this is what the run's last private tuning reported: its ε is shown again."""
    ledger = open_run_ledger(rundir)
    seal = None if ledger is None else ledger.seals.get(TUNE)
    if seal is None or seal.digest != _digest(record):
        raise CheckpointError(
            f"{rundir.path / RECORD} is not what the tuning reported: its hash differs from that in the privacy ledger",
            fix="restore it and the privacy folder together from a copy, or take the settings of tuned.toml",
        )


def _digest(record: Mapping[str, Any]) -> str:
    """Of a record as it was made or as it was read; where the data lie is not compared (see ``asked``)."""
    return result_digest({key: value for key, value in record.items() if key != "asked"})


def tuning_of(rundir: RunDir, ledger: Ledger, delta: float, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of a run's tuning in a stage's result.

    Args:
        ledger: of the run; it overrides the files.
        delta: δ at which the cost is stated.
        settings: what the stage ran with, by the names of the record's ``chosen``.

    Returns:
        on, trials (expected ones where on is 'private'), charged_epsilon (upper bound, alone; part of the run's ε),
        settings (names of the tuned ones), used (the stage ran with the chosen ones). None where nothing was tuned.
    """
    record = read_tuning(rundir)
    charged = [charge.event for charge in ledger.tunings]
    if record is None and not charged:
        return None
    if record is None:
        record = {"on": PRIVATE, "trials": round(charged[-1].trials.mean), "chosen": {}}
    chosen = record["chosen"]
    return {
        "on": record["on"],
        "trials": record["trials"],
        "charged_epsilon": compose(charged, delta).upper,
        "settings": sorted(chosen),
        "used": bool(chosen) and all(settings.get(name) == value for name, value in frozen(chosen).items()),
    }
