"""The facts about the machine in env.json: enough to explain a difference, nothing that identifies anybody."""

from __future__ import annotations

import os
import platform
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
