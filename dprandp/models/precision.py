"""The precision of a network: float32, or bfloat16 products where the hardware multiplies them faster.

It is decided once, when a stage begins, recorded in its configuration, and kept in ``network.precision``, so it is the
same for every image, thread and rank, and after a resume on another machine: hardware changes the speed of a run, not
its number format. The products are those of its layers and of the whitening. Parameters, heads,
clipping and noise are always float32 (or float64).
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch
from torch import nn

from dprandp.errors import UsageError

AUTO, FLOAT32, BFLOAT16 = "auto", "float32", "bfloat16"

PRETEND = "DPRANDP_PRETEND_BFLOAT16"
"""Environment variable: 1 or 0 overrides the processor's flag, to test either kind on any machine."""


def has_fast_bfloat16(device_type: str) -> bool:
    """Whether bfloat16 matrix products are a hardware instruction on this device type; emulated, they are slower.

    A CPU's flags are read where the operating system lists them; elsewhere the answer is no.

    Raises:
        UsageError: the environment variable ``PRETEND`` is neither 0 nor 1.
    """
    pretended = os.environ.get(PRETEND) if device_type == "cpu" else None
    if pretended is not None:
        if pretended not in ("0", "1"):
            raise UsageError(f"{PRETEND} = {pretended!r} is neither 0 nor 1", fix="unset it")
        return pretended == "1"
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type == "cpu" and _cpu_lists_bfloat16()


@cache
def _cpu_lists_bfloat16(flags: Path = Path("/proc/cpuinfo")) -> bool:
    if not flags.is_file():
        return False
    words = flags.read_text(encoding="utf-8", errors="replace").split()
    return "amx_bf16" in words or "avx512_bf16" in words


def decide(asked: str, device_type: str) -> str:
    """The precision of a network, 'float32' or 'bfloat16'.

    Args:
        asked: 'auto', 'float32' or 'bfloat16'. device_type: 'cpu' or 'cuda'.
    """
    if asked == AUTO:
        return BFLOAT16 if has_fast_bfloat16(device_type) else FLOAT32
    return asked


def precision_of(network: nn.Module) -> str:
    """The precision of a network, 'float32' by default."""
    return getattr(network, "precision", FLOAT32)


def dtype_of(network: nn.Module) -> torch.dtype:
    """The type of the factors of a network's products."""
    return torch.bfloat16 if precision_of(network) == BFLOAT16 else torch.float32


def autocast(network: nn.Module, device: torch.device) -> torch.autocast:
    """The context in which a network's products are computed in its precision, overriding any outer context.

    Autocast belongs to a thread; ``threads.in_parts`` carries it over to others.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision_of(network) == BFLOAT16)


def full_precision(device: torch.device) -> torch.autocast:
    """The same for heads and clipping, which are never in bfloat16, and for whitening, which names its own type."""
    return torch.autocast(device.type, enabled=False)
