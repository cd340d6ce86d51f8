"""What clipping asks of the device that computes: where rows go, what may be waited for, with how many bits it adds.

Imports nothing of the package but ``errors``.
"""

from __future__ import annotations

import torch

from dprandp.errors import UsageError


def sent(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rows on the device that computes; to CUDA through memory that the processor need not wait for."""
    if rows.device == device:
        return rows
    return (rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True)


def surely_all(counted: torch.Tensor) -> bool:
    """Whether all are known to be true: False on an accelerator, which the processor would have to wait for."""
    return counted.device.type == "cpu" and bool(counted.all())


def require_full_precision(device: torch.device) -> None:
    """Refuse settings under which products of float32 matrices are made of fewer bits.

    With ten bits (TF32, bfloat16) a clip factor may be rounded up by 5e-4 of itself, and a record's part of a sum with
    it: beyond the clip norm, for which the noise is made.

    Raises:
        UsageError: torch was told so, in one way or another, or is inside an autocast.
    """
    try:
        whole = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch's older and newer settings contradict each other
        whole = False
    if not whole or torch.is_autocast_enabled(device.type):
        raise UsageError(
            "Clipped gradients would be added with less than float32's precision, so one record could weigh more than "
            "the clip norm.",
            fix='Call torch.set_float32_matmul_precision("highest"), outside of any autocast.',
        )
