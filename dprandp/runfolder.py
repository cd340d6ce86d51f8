"""The folder of one run: where things are, who may write, and nothing about what was done.

Imports nothing of the package but ``errors``, ``files``, ``locking`` and ``runtable``.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from dprandp import locking
from dprandp.errors import InputError, UsageError, nearest
from dprandp.files import remove_leftovers, storage_errors
from dprandp.runtable import STAGES

_FILES = {"run.json", "env.json", "report.html", "tune.json", "tuned.toml"}
_KNOWN = {*STAGES.values(), *_FILES, "privacy", "private", "model"}


class RunFolder:
    """Layout and lock of a run directory; ``RunDir`` adds the table of stages."""

    def __init__(self, path: Path | str, create: bool) -> None:
        self.path = Path(path)
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
                    f"{path} is no run directory: it has no run.json, and holds {strangers[0]!r}",
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
            self._descriptor = locking.acquire(self.path / ".lock", self.path)
        self._depth += 1
        try:
            if self._depth == 1:
                self._sweep()
            yield
        finally:
            self._depth -= 1
            if self._depth == 0 and self._descriptor is not None:
                locking.release(self._descriptor)
                self._descriptor = None

    def stage_dir(self, stage: str) -> Path:
        """The folder of a stage: ``stage_dir("generate")`` is ``runs/x/1-generate``. Made by ``begin``, not here."""
        return self.path / STAGES[known_stage(stage)]

    @property
    def privacy_dir(self) -> Path:
        """``privacy/``: plan and ledger. ``overwrite`` never touches it."""
        return self._folder("privacy", 0o777)

    @property
    def private_dir(self) -> Path:
        """``private/``, readable by its owner alone: what is computed from private data and must not be released."""
        return self._folder("private", 0o700)

    @property
    def model_dir(self) -> Path:
        """``model/``: what may be released, and nothing else."""
        return self._folder("model", 0o777)

    def _folder(self, name: str, mode: int) -> Path:
        path = self.path / name
        if self._create:
            with storage_errors(path, "create"):
                path.mkdir(mode=mode, exist_ok=True)
                if mode == 0o700:
                    path.chmod(mode)  # also for a folder that was there before, copied with other permissions
        return path

    def _need_lock(self) -> None:
        if self._depth == 0:
            raise RuntimeError("hold RunDir.lock() around begin and finish")

    def _sweep(self) -> None:
        remove_leftovers(self.path)
        for trash in self.path.glob(".trash-*"):
            with storage_errors(trash, "remove"):
                shutil.rmtree(trash)


def known_stage(stage: str) -> str:
    """The stage's name, or ``UsageError`` if there is no such stage."""
    if stage not in STAGES:
        raise UsageError(f"unknown stage {stage!r}", fix=nearest(stage, STAGES))
    return stage
