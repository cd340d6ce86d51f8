"""``continue --plan``: what is known before the public images have said where private steps begin."""

from __future__ import annotations

from typing import Any

from dprandp.config import ContinueConfig
from dprandp.continual_config import switch_step
from dprandp.stages import continual, switching
from dprandp.stages.context import Context


def facts(config: ContinueConfig) -> dict[str, Any]:
    """What a plan says beside the mechanism.

    Returns:
        public (the images), public_steps (before the first private one, at the least), switch (the rule; None where
        the plan's steps and noise are those that will be, and not the most there may be).
    """
    ruled = config.mix == "step" and switch_step(config) is None
    least = config.steps - switching.most_private_steps(config)
    return {"public": config.public, "public_steps": least, "switch": config.switch if ruled else None}


def public_alone(config: ContinueConfig, context: Context, action: str) -> dict[str, Any]:
    """``mix = 'public'``: no private image is read, and nothing is paid.

    Returns:
        stage, action, data (that the images are shaped like), public, steps.
    """
    return {
        "stage": continual.STAGE,
        "action": action,
        "data": continual.open_stage(config, context, write=False).spec.name,
        "public": config.public,
        "steps": config.steps,
    }
