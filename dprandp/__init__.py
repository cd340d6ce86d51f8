"""dprandp: train an image classifier under differential privacy, with a prior learned from random processes.

The names of ``dprandp.api`` are those of the package: ``dprandp.random_images``, ``dprandp.fit_private_head``, ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dprandp.api import (
        PrivateHead,
        RandomImages,
        ReleasedModel,
        epsilon,
        fit_private_head,
        load_model,
        noise_multiplier,
        random_images,
        run,
    )

__version__ = "0.1.0"

__all__ = [
    "PrivateHead", "RandomImages", "ReleasedModel", "epsilon", "fit_private_head", "load_model", "noise_multiplier",
    "random_images", "run",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load the API when it is first used: the command line's ``--help`` needs no torch."""
    if name in __all__:
        from dprandp import api

        return getattr(api, name)
    raise AttributeError(f"module 'dprandp' has no attribute {name!r}")
