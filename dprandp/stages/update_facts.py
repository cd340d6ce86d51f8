"""What a fine-tune does with its noisy sums, in the words and numbers that its disclosure shows."""

from __future__ import annotations

from typing import Any

from dprandp.config import FinetuneConfig
from dprandp.published import note
from dprandp.stages.private_optimizers import OptimizerSettings
from dprandp.stages.scratch import init_hash


def settings_of(config: FinetuneConfig) -> OptimizerSettings:
    """The optimizer that a configuration asks for.

    Raises:
        UsageError: values out of range.
    """
    return OptimizerSettings(config.optimizer or "sgd", config.momentum)


def update_facts(config: FinetuneConfig, trained_weights: str) -> dict[str, Any]:
    """Part of the result.

    Args:
        config: the run's.
        trained_weights: which weights were trained, in words.

    Returns:
        momentum, clipping, trained_weights, optimizer; recipe, where one was used; for public weights init_sha256 and
        init_source.
    """
    settings = settings_of(config)
    facts = {
        "momentum": settings.beta,
        "clipping": config.clipping,
        "trained_weights": trained_weights,
        "optimizer": settings.in_words(),
    }
    if config.recipe is not None:
        facts["recipe"] = note(config.recipe, config.arch, config.source, config.epsilon)
    if config.init is not None:
        facts |= {"init_sha256": init_hash(config)["public weights"], "init_source": config.init_source}
    return facts
