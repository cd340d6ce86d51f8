"""The facts about the machine in env.json: enough to explain a difference, nothing that identifies anybody."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def facts() -> dict[str, Any]:
    """Versions, platform and device as plain values; no host name, user name or path."""
    import torch  # late: the commands that only read a run need no torch

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
    }


def free_on_device(device) -> int | None:
    """Bytes that are free on an accelerator (a ``torch.device``); None where nobody says."""
    import torch  # late, as above

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def available_memory() -> int | None:
    """Bytes that a process may still take without swapping, as Linux estimates it; None where nobody says."""
    listed = Path("/proc/meminfo")
    if not listed.is_file():
        return None
    for line in listed.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None
