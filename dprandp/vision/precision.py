"""bfloat16 where the hardware multiplies it faster than float32, and nowhere else."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import torch


@cache
def has_fast_bfloat16(device_type: str) -> bool:
    """Whether matrix products in bfloat16 are a hardware instruction on this device type.

    On a CPU that emulates them they run several times slower than float32. The processor's flags are read where the
    operating system lists them; elsewhere the answer is no.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = Path("/proc/cpuinfo")
    if device_type != "cpu" or not flags.is_file():
        return False
    words = flags.read_text(encoding="utf-8", errors="replace").split()
    return "amx_bf16" in words or "avx512_bf16" in words


def autocast(device: torch.device) -> AbstractContextManager:
    """bfloat16 autocast where ``has_fast_bfloat16``, otherwise no change."""
    if has_fast_bfloat16(device.type):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
