"""The run directory: its layout, its lock, and the table of what was done with which configuration.

``run.json`` holds one record per stage: state, configuration, hashes of inputs and outputs, result. A finished stage is
not run again while nothing it depends on changed; a change is refused, naming what differs and the ways out. Nothing
here knows what a stage does.

Inputs that come from another stage are named ``STAGE/FILE`` (``generate/manifest.json``), by which staleness is found:
a stage is *stale* when the files it was made from are no longer those its predecessor has now.

Imports nothing of the package but ``errors``, ``environment``, ``files``, ``runfolder``, ``runtable`` and ``toml``.
"""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dprandp import environment, runtable, toml
from dprandp.errors import InputError, UsageError
from dprandp.files import atomic_path, atomic_write, file_sha256, storage_errors, to_json
from dprandp.runfolder import RunFolder, known_stage
from dprandp.runtable import OPTIONAL_STAGES, STAGES, Table

__all__ = ["OPTIONAL_STAGES", "STAGES", "Begin", "RunDir", "atomic_path", "atomic_write"]

IGNORED = ("device", "microbatch", "workers")
"""Settings that decide where and how fast a stage runs and never what comes out."""

DATA = "data"
"""The setting that names private data: its spelling is not compared where their content is."""


@dataclass(frozen=True)
class Begin:
    """What ``RunDir.begin`` decided.

    Attributes:
        action: "fresh" (the stage folder is empty), "resume" (go on from the last checkpoint) or "skip" (nothing to
            do).
        config: the configuration to run with; on "resume" and "skip" the recorded one, but for the ignored settings.
        directory: the stage's folder; it exists.
    """

    action: Literal["fresh", "resume", "skip"]
    config: dict[str, Any]
    directory: Path


class RunDir(RunFolder):
    """One run. Make it with ``RunDir.open``; hold ``lock()`` around everything that writes."""

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
        """Decide whether a stage starts, goes on or is skipped, and record that it is under way.

        * finished, same configuration and inputs: "skip";
        * begun, same configuration and inputs: "resume", whether or not ``resume`` is given;
        * the configuration differs: refused; ``resume`` keeps the recorded one, ``overwrite`` starts afresh;
        * the inputs differ: refused; only ``overwrite`` helps, as nothing half-made from other inputs can be continued.

        ``overwrite`` empties the stage's folder and makes the stages built on it stale. It touches neither ``privacy/``
        nor ``private/``: what was spent stays spent.

        Args:
            stage: a key of ``STAGES``.
            config: JSON values, flat; compared after a round trip through JSON. Public: it is written in clear.
            inputs: name -> hash of everything public the stage is made from; see ``inputs_from``.
            resume: ``--resume`` was given.
            overwrite: ``--overwrite`` was given.
            ignore: settings that are not compared.
            private_inputs: name -> hash of private inputs. A hash of private data is itself private (it lets anyone
                confirm a guess), so these are compared in the same way but kept in ``private/``. Where they are given,
                the name of the data is ignored: they may have moved.

        Raises:
            UsageError: configuration or inputs differ; both flags; files of unknown origin in the stage's folder.
            CheckpointError: run.json is corrupt or newer.
        """
        self._need_lock()
        directory = self.stage_dir(stage)
        if resume and overwrite:
            raise UsageError("--resume and --overwrite exclude each other", fix="give one of them, or neither")
        table = self._table()
        record = table.stages.get(stage)
        wanted = runtable.frozen(config)
        private_file = self.path / "private" / f"inputs-{stage}.json"
        if overwrite:
            self._empty(directory)
            record = None
        elif record is None and directory.exists() and any(directory.iterdir()):
            raise UsageError(
                f"{directory} holds files, but run.json knows nothing of stage {stage!r}",
                fix="choose another folder with --run, or give --overwrite to delete them",
            )
        if record is None:
            if private_inputs is not None:
                atomic_write(self.private_dir / private_file.name, to_json(dict(private_inputs), indent=1) + "\n")
            table.begin(stage, wanted, dict(inputs))
            self._write(table)
            if not (self.path / "env.json").exists():
                atomic_write(self.path / "env.json", to_json(environment.facts(), indent=1) + "\n")
            return self._prepared("fresh", wanted, directory)
        recorded, present = dict(record.inputs), dict(inputs)
        if private_inputs is not None:
            recorded |= runtable.read_hashes(private_file)
            present |= private_inputs
            ignore = (*ignore, DATA)
        changed = sorted(name for name in {*recorded, *present} if recorded.get(name) != present.get(name))
        if changed:
            raise UsageError(
                f"stage {stage!r} in {self.path} was made from other inputs: {', '.join(changed)} changed",
                fix="give --overwrite to start the stage afresh from the present inputs",
            )
        if not resume:
            self._refuse_other(stage, record.config, wanted, ignore)
        kept = _kept(record.config, wanted, ignore)
        if record.state == "partial":
            return self._prepared("resume", kept, directory)
        reasons = self._stale_because(table, stage)
        if reasons:
            raise UsageError(
                f"stage {stage!r} in {self.path} is stale: {reasons[0]}", fix="give --overwrite to make it afresh"
            )
        return Begin("skip", runtable.thawed(kept), directory)

    def foresee(
        self,
        stage: str,
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        ignore: Collection[str] = (*IGNORED, DATA),
    ) -> Begin:
        """What ``begin`` would decide, as far as the configuration tells: writes nothing, needs no lock.

        Inputs are not compared: for a private stage they would have to be read. So nothing is said of other data.

        Raises:
            UsageError: the configuration differs; both flags. CheckpointError: run.json is corrupt or newer.
        """
        directory = self.stage_dir(stage)
        if resume and overwrite:
            raise UsageError("--resume and --overwrite exclude each other", fix="give one of them, or neither")
        record, wanted = self._table().stages.get(stage), runtable.frozen(config)
        if overwrite or record is None:
            return Begin("fresh", runtable.thawed(wanted), directory)
        if not resume:
            self._refuse_other(stage, record.config, wanted, ignore)
        kept = _kept(record.config, wanted, ignore)
        return Begin("resume" if record.state == "partial" else "skip", runtable.thawed(kept), directory)

    def finish(
        self, stage: str, outputs: Mapping[str, str], result: Mapping[str, Any], *, ledger_head: str | None = None
    ) -> None:
        """Record a stage as done.

        Args:
            stage: the stage begun before.
            outputs: file below the stage's folder -> sha256; see ``hash_outputs``. What later stages depend on.
            result: the stage's public result, JSON values.
            ledger_head: of a private stage, the ledger's head after it (see ``keep_ledger_head``).
        """
        self._need_lock()
        absent = [name for name in outputs if not (self.stage_dir(stage) / name).is_file()]
        if absent:
            raise ValueError(f"stage {stage!r} did not write its output {absent[0]!r}")
        table = self._table()
        table.finish(stage, dict(outputs), dict(result))
        table.ledger_head = ledger_head or table.ledger_head
        self._write(table)

    @property
    def ledger_head(self) -> str | None:
        """Hash of the last line that the run's privacy ledger is known to have had; None before a private stage."""
        return self._table().ledger_head

    def keep_ledger_head(self, head: str) -> None:
        """Record the head of the privacy ledger: from now on a ledger without this line is known to be cut or lost."""
        self._need_lock()
        table = self._table()
        if table.ledger_head != head:
            table.ledger_head = head
            self._write(table)

    def hash_outputs(self, stage: str, names: Collection[str]) -> dict[str, str]:
        """sha256 of files below the stage's folder, for ``finish``."""
        return {name: file_sha256(self.stage_dir(stage) / name) for name in names}

    def inputs_from(self, *stages: str) -> dict[str, str]:
        """The present outputs of these stages, named for ``begin``: ``{"generate/manifest.json": sha256}``."""
        table = self._table()
        return {
            f"{stage}/{name}": digest
            for stage in stages
            for name, digest in (table.stages[stage].outputs if stage in table.stages else {}).items()
        }

    def status(self) -> list[dict[str, Any]]:
        """One row per stage, in order.

        Returns:
            dicts of stage, state (missing | partial | done | stale), reasons (why it is stale), started, finished,
            config, result; the last four are None where the stage is missing.
        """
        table = self._table()
        rows = []
        for stage in STAGES:
            record = table.stages.get(stage)
            reasons = self._stale_because(table, stage)
            state = record.state if record else "missing"
            if reasons and state == "done":
                state = "stale"
            row = {"stage": stage, "state": state, "reasons": reasons}
            for key in ("started", "finished", "config", "result"):
                row[key] = runtable.thawed(getattr(record, key)) if record else None
            rows.append(row)
        return rows

    def result(self, stage: str) -> dict[str, Any]:
        """The result given to ``finish``; empty if the stage is not finished."""
        record = self._table().stages.get(known_stage(stage))
        return runtable.thawed(record.result) if record else {}

    def require(self, stage: str, needed_by: str) -> None:
        """Refuse unless ``stage`` is done and fresh.

        Raises:
            InputError: it is missing, unfinished or stale; the fix is the command to run.
        """
        row = next(row for row in self.status() if row["stage"] == known_stage(stage))
        if row["state"] == "done":
            return
        why, flag = {
            "missing": (f"which {self.path} does not have", ""),
            "partial": (f"which was begun in {self.path} and not finished", " --resume"),
            "stale": (f"which is stale in {self.path}: {'; '.join(row['reasons'])}", " --overwrite"),
        }[row["state"]]
        raise InputError(
            f"stage {needed_by!r} needs stage {stage!r}, {why}",
            fix=f"run: dprandp {stage} --run {shlex.quote(str(self.path))}{flag}",
        )

    def _refuse_other(
        self, stage: str, recorded: Mapping[str, Any], wanted: Mapping[str, Any], ignore: Collection[str]
    ) -> None:
        differing = runtable.differences(recorded, wanted, ignore)
        if differing:
            raise UsageError(
                f"stage {stage!r} in {self.path} was begun with other settings: " + "; ".join(differing),
                fix="give --resume to go on with the recorded settings, or --overwrite to start the stage afresh",
            )

    def _empty(self, directory: Path) -> None:
        # Out of the way in one step first: killed half-way through the deletion, old checkpoints must not stay behind
        # to be resumed under the new configuration.
        if directory.exists():
            with storage_errors(directory, "empty"):
                os.replace(directory, self.path / f".trash-{secrets.token_hex(4)}")
        self._sweep()

    def _prepared(self, action: Literal["fresh", "resume"], config: dict[str, Any], directory: Path) -> Begin:
        thawed = runtable.thawed(config)
        with storage_errors(directory, "create"):
            directory.mkdir(exist_ok=True)
        if not (directory / "config.toml").exists():
            atomic_write(directory / "config.toml", toml.dumps(thawed))
        return Begin(action, thawed, directory)

    def _stale_because(self, table: Table, stage: str) -> list[str]:
        reasons = table.stale_because(stage)
        record = table.stages.get(stage)
        if record is not None and record.state != "partial":
            absent = [name for name in record.outputs if not (self.stage_dir(stage) / name).is_file()]
            reasons += [f"its file {name} is missing" for name in absent]
        return reasons

    def _table(self) -> Table:
        return runtable.read(self.path / "run.json")

    def _write(self, table: Table) -> None:
        atomic_write(self.path / "run.json", table.to_json())


def _kept(recorded: Mapping[str, Any], wanted: Mapping[str, Any], ignore: Collection[str]) -> dict[str, Any]:
    """The recorded configuration, but for what is not compared."""
    return {**recorded, **{key: value for key, value in wanted.items() if key in ignore}}
