"""In which precision a network computes: float32, or bfloat16 products where the hardware multiplies them faster.

Decided once, when a stage begins, recorded in its configuration, and from then on an attribute of the network,
``network.precision``. So it is the same for every image, in every thread, on every rank, and after a resume on another
machine: hardware changes the speed of a run, not its numbers' kind. A network that nobody decided for computes in
float32. Parameters, statistics, heads, clipping and noise are float32 (or float64) always.

A patch network always computes in float32: its products are small and lie in the processor's cache, and its thresholds
would be compared with rounded numbers.
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
"""Environment variable: 1 or 0 stands in for what the processor says, so that either kind can be tested on any."""


def has_fast_bfloat16(device_type: str) -> bool:
    """Whether matrix products in bfloat16 are a hardware instruction on this device type.

    On a CPU that emulates them they run several times slower than float32. The processor's flags are read where the
    operating system lists them; elsewhere the answer is no.

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


def decide(asked: str, arch: str, device_type: str) -> str:
    """The precision of a network.

    Args:
        asked: 'auto', 'float32' or 'bfloat16'.
        arch: name of the architecture.
        device_type: 'cpu' or 'cuda'.

    Returns:
        'float32' or 'bfloat16'.

    Raises:
        UsageError: bfloat16 was asked of a patchnet.
    """
    if arch == "patchnet":
        if asked == BFLOAT16:
            raise UsageError(
                "a patchnet computes in float32, and --precision bfloat16 was given",
                fix="leave --precision out, or use --arch wrn-16-4 or another wrn",
            )
        return FLOAT32
    if asked == AUTO:
        return BFLOAT16 if has_fast_bfloat16(device_type) else FLOAT32
    return asked


def precision_of(network: nn.Module) -> str:
    """'float32' or 'bfloat16': what was decided for a network, float32 where nothing was."""
    return getattr(network, "precision", FLOAT32)


def autocast(network: nn.Module, device: torch.device) -> torch.autocast:
    """The context in which a network's products are computed: in its precision, whatever surrounds the call.

    Autocast belongs to a thread. Work that is handed to other threads enters this context there
    (``threads.in_parts`` carries it over).
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision_of(network) == BFLOAT16)


def full_precision(device: torch.device) -> torch.autocast:
    """The context of what is never computed in bfloat16: whitening, heads, clipping; whatever surrounds the call."""
    return torch.autocast(device.type, enabled=False)
