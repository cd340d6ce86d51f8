"""The files of ``dprandp tune`` in a run, and their summary in a private stage's result.

    tune.json    the tried and the chosen settings, and the data; public (charged, where the data were private)
    tuned.toml   the chosen settings, for ``probe --config``
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dprandp.config import toml
from dprandp.errors import CheckpointError
from dprandp.privacy.accounting import compose
from dprandp.privacy.ledger import Ledger
from dprandp.runs.directory import RunDir, frozen
from dprandp.runs.files import Count, Fraction, Number, Text, atomic_write, read_object, read_record, to_json
from dprandp.runs.ledger import PRIVATE, TUNE, TUNING, ledger_file, open_run_ledger, plan_file, tuning_digest
from dprandp.runs.results import Tuned

RECORD, SETTINGS = TUNING, "tuned.toml"
SYNTHETIC = "synthetic"
FORMAT = 1


@dataclass(frozen=True)
class Setting:
    """One candidate."""

    lr_factor: Number  # on the default learning rate
    steps: Count
    dims: Count  # components of each part of the whitened features


@dataclass(frozen=True)
class Chosen:
    """The settings that were chosen."""

    lr: Number
    steps: Count
    dims: Count


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """tune.json: what was tuned, and what came out."""

    on: Text  # synthetic, private or a data set's name
    trials: Count  # settings to try; expected ones where on is private
    chosen: Chosen
    charged_epsilon: Number  # of tuning alone
    asked: dict[str, Any]  # the request, with the probe's settings and the hashes of the inputs


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A setting that was tried on public images."""

    lr_factor: Number
    steps: Count
    dims: Count
    lr: Number
    accuracy: Fraction  # on the held-out public images


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """The private training whose noise was simulated."""

    epsilon: Number
    delta: Number
    train_examples: Count


@dataclass(frozen=True, kw_only=True)
class PublicTuning(Tuning):
    """On public images."""

    accuracy: Fraction  # of the chosen setting
    default_accuracy: Fraction
    simulated: Simulated
    fitted_examples: Count
    held_out_examples: Count
    tried: tuple[Tried, ...]
    seconds: Number


@dataclass(frozen=True, kw_only=True)
class PrivateTuning(Tuning):
    """On the private data, charged. No duration: it would reveal the number of trials, which must stay secret."""

    noisy_right_answers: Number  # of the chosen setting, on its held-out records
    noise_std: Number
    held_out_examples_expected: Number
    epsilon: Number  # of the run by then
    delta: Number
    plan: dict[str, Any]  # as in the plan file
    settings: tuple[Setting, ...]
    private: bool


def elsewhere(on: str) -> str:
    """What ``tuned.toml`` declares of its settings as ``tuned_on``, for a run that they are given to."""
    where = "its private data, which that run's ε counts" if on == PRIVATE else on
    return f"{where}, by dprandp tune in another run"


def write_tuning(rundir: RunDir, record: Tuning, settings: Mapping[str, Any]) -> None:
    """Write both files; the record last: its presence means that tuning is done."""
    settings = {**settings, "tuned_on": elsewhere(record.on)}
    note = f"# Chosen by `dprandp tune` on {json.dumps(record.on, ensure_ascii=True)}; see {RECORD}.\n"
    atomic_write(rundir.path / SETTINGS, note + toml.dumps({"probe": settings}))
    atomic_write(rundir.path / RECORD, to_json({"format": FORMAT, **frozen(record)}, indent=1) + "\n")


def read_tuning(rundir: RunDir) -> Tuning | None:
    """The record of the run's tuning; None where nothing was tuned.

    Raises:
        CheckpointError: it is damaged, or of another format.
    """
    path = rundir.path / RECORD
    if not path.exists():
        return None
    record = read_object(path) or {}
    try:
        if record.get("format") != FORMAT:
            raise ValueError("another format")
        return read_record(PrivateTuning if record.get("on") == PRIVATE else PublicTuning, record)
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged",
            fix="restore it from a copy; if it was not made on private data, tune again with --overwrite",
        ) from error


def seal_tuning(rundir: RunDir, record: PrivateTuning) -> None:
    """Keep the hash of what private tuning is about to report in the ledger; the run's lock must be held."""
    ledger = open_run_ledger(rundir, write=True)
    ledger.seal_result(stage=TUNE, attempt=ledger.last_attempt(TUNE), digest=tuning_digest(record))
    rundir.keep_ledger_head(ledger.head)


def hide_duration(rundir: RunDir) -> None:
    """Give the files that private tuning wrote the times of the plan, written before its trials.

    The number of trials is secret, and the time between the files would tell it. Folders of checkpoints have no part in
    tuning; ``private/`` is not released. Files of stages before and after it keep their times (docs/stages.md).
    """
    begun = plan_file(rundir).stat()
    files = (rundir.path / SETTINGS, rundir.path / RECORD, ledger_file(rundir), rundir.path / "run.json")
    for path in (*files, *rundir.ledger_heads(), rundir.path, ledger_file(rundir).parent):
        os.utime(path, ns=(begun.st_mtime_ns, begun.st_mtime_ns))


def tuning_of(rundir: RunDir, ledger: Ledger, delta: float, settings: Mapping[str, float | None]) -> Tuned | None:
    """The summary of a run's tuning in a stage's result; None where nothing was tuned.

    Args:
        ledger: of the run; it overrides the files.
        delta: δ at which the cost is stated.
        settings: what the stage ran with, by the names of ``Chosen``.
    """
    record = read_tuning(rundir)
    charged = [charge.event for charge in ledger.tunings]
    if record is None and not charged:
        return None
    chosen = {} if record is None else vars(record.chosen)
    return Tuned(
        on=PRIVATE if record is None else record.on,
        trials=round(charged[-1].trials.mean) if record is None else record.trials,
        charged_epsilon=compose(charged, delta).upper,
        settings=tuple(sorted(chosen)),
        used=bool(chosen) and all(settings.get(name) == value for name, value in chosen.items()),
    )
