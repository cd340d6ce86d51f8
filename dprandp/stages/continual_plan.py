"""``continue --plan``: what is known before the public images have said where private steps begin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dprandp.config import ContinueConfig, PretrainConfig
from dprandp.continual_config import switch_step
from dprandp.stages import continual, estimates, switching
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


def cost(
    config: ContinueConfig, extractor: estimates.Extractor, expected_batch: float, shared: dict[str, Any]
) -> estimates.Cost:
    """Private steps, and public ones before or beside them; ``shared`` as for ``estimates.finetune_cost``."""
    private = estimates.finetune_cost(
        extractor, **shared, dims=extractor.feature_dim, expected_batch=expected_batch, refit_steps=0, mirror=False
    )
    return private.plus(_public_seconds(config, extractor) if shared["cpu"] else None)


def public_alone(
    config: ContinueConfig, context: Context, extractor: PretrainConfig, action: str, cpu: bool
) -> dict[str, Any]:
    """``mix = 'public'``: no private image is read, and nothing is paid.

    Returns:
        stage, action, data (that the images are shaped like), public, steps, and the cost; or take, and nothing to do.
    """
    known = estimates.extractor_facts(extractor)
    need = 8 * known.state_bytes
    made = estimates.Cost(need, int(estimates.PROGRAM_BYTES + need), _public_seconds(config, known) if cpu else None)
    if config.take is not None:
        nothing = replace(made, seconds_estimate=1.0)
        return {"stage": continual.STAGE, "action": action, "take": config.take, "steps": 0, **nothing.rounded()}
    return {
        "stage": continual.STAGE,
        "action": action,
        "data": continual.open_stage(config, context, write=False).spec.name,
        "public": config.public,
        "steps": config.steps,
        **made.rounded(),
    }


def _public_seconds(config: ContinueConfig, extractor: estimates.Extractor) -> float:
    steps = config.steps if config.mix in ("public", "cosine", "ratio") else switching.latest_switch(config)
    steps = 0 if config.mix == "private" else steps
    return steps * config.public_batch_size * extractor.training_seconds / torch.get_num_threads()
