"""One exception class per exit code: what was wrong, with which value, what to do next.

Any other exception is a bug in dprandp, with exit code 1. Signals end with 130 (SIGINT) or 143 (SIGTERM), after a saved
checkpoint.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DprandpError(Exception):
    """Base of every error that a user can cause and correct.

    Args:
        problem: one sentence saying what was wrong, with the wrong value. It must contain nothing private:
            no pixel, label, index or file name of a private example.
        fix: one sentence saying what to do next.
        private_detail: details for the data's owner only (a file name, a position), printed only with ``--debug``.
    """

    exit_code = 1

    def __init__(self, problem: str, *, fix: str, private_detail: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.fix = fix
        self.private_detail = private_detail

    def __str__(self) -> str:
        return f"{self.problem}\n  fix: {self.fix}"


class UsageError(DprandpError):
    """A flag or a configuration value makes no sense."""

    exit_code = 2


class InputError(DprandpError):
    """An input is missing or invalid (data, shards, folders)."""

    exit_code = 3


class CheckpointError(DprandpError):
    """A checkpoint is corrupt, incomplete, or belongs to something else."""

    exit_code = 4


class BudgetError(DprandpError):
    """The privacy budget would be exceeded."""

    exit_code = 5


class StorageError(DprandpError):
    """A failure of the disk: full, read-only, locked by another process."""

    exit_code = 6


class AuditError(DprandpError):
    """The audit contradicts the privacy claim, or missed an injected fault: a bug."""


class BenchmarkError(DprandpError):
    """A ratio of speed regressed past its bound, or two ways to compute the same disagree: a bug."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Name the closest known spellings, as the tail of a sentence.

    Returns:
        ``"did you mean 'cifar10'?"`` or, when nothing is close, ``"known: a, b, c"``.
    """
    known = sorted(known)
    close = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(candidate) for candidate in close) + "?"
    return "known: " + ", ".join(known)
