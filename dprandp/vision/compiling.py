"""``torch.compile``, with an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dprandp.errors import UsageError


def compiled(work: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors as one kernel after another that is made for it, at its first call.

    Results differ from those of ``work`` by rounding alone. Compiling takes a minute or more; whether it is regained is
    measured by ``dprandp bench --only pretraining``.

    Raises:
        UsageError: at the first call, where this machine cannot compile.
    """
    made = torch.compile(work)

    def called(*args: Any) -> Any:
        try:
            return made(*args)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = str(error).strip().partition("\n")[0]
            raise UsageError(
                f"torch.compile failed: {reason}",
                fix="install a C++ compiler and Python's headers (Debian: g++ and python3-dev), or leave --compile out",
            ) from error

    return called
