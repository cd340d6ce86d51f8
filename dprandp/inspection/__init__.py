"""Commands about runs, budgets and this machine. Nothing here changes a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dprandp.errors import DprandpError

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Check:
    """One line of ``status --check`` or ``verify``: its name, ok | warn | fail, the finding, the exit code of a failure
    (else 0)."""

    name: str
    state: str
    found: str
    code: int = 0


def attempt(name: str, look: Callable[[], Check | str | None]) -> list[Check]:
    """The check that ``look`` makes (a text is the finding of one that is ok; None: there is nothing to check).

    An error is a failure with the error's own exit code.
    """
    try:
        found = look()
    except DprandpError as error:
        found = Check(name, FAIL, error.problem, error.exit_code)
    if found is None:
        return []
    return [Check(name, OK, found) if isinstance(found, str) else found]


def exit_code(checks: list[Check]) -> int:
    """0 without a failure, else that of the first one."""
    return next((check.code for check in checks if check.state == FAIL), 0)
