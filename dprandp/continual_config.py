"""Settings of ``continue``: public steps, then private ones (Bu et al. 2024); ``config.py`` has those of the others.

Imports nothing of the package but ``errors``.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UsageError, nearest

SYNTHETIC = "synth"
FRACTION = "fraction:"
MIXES = ("step", "cosine", "ratio", "public", "private")
SWITCHES = ("plateau", "decelerator")


@dataclass(frozen=True)
class ContinueConfig:
    """Between Phases I and II: the extractor goes on learning, from public images and then privately."""

    size: str = "tiny"
    public: str = SYNTHETIC
    """'synth' (the run's synthetic images), 'fraction:F' (a random part F of the training split, declared public), or
    the name of a data set that is declared public, such as folder:PATH."""
    data: str = "digits"
    epsilon: float = 1.0
    delta: float | None = None
    share: float = 0.7
    """Part of what is left of ε; 1 leaves nothing for a probe on the same data."""
    steps: int = 200
    """T, public and private together."""
    switch: str = "plateau"
    """Where public steps end: 'plateau' of the public validation loss, 'decelerator', or a step number."""
    mix: str = "step"
    """α of g = α g_public + (1 − α) g_private: 'step' at the switch; 'cosine', 'ratio'; 'public', 'private' alone."""
    check_every: int = 10
    """Public steps between two looks at the public validation loss, by which the switch is decided."""
    batch_size: int | None = None
    """Expected private batch. None: 0.08192 N."""
    public_batch_size: int = 64
    lr: float = 0.001
    """Of the private and the mixed steps."""
    public_lr: float = 0.002
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    """With automatic clipping the unit of sum and noise, and nothing else."""
    views: int = 1
    ema: float = 0.9999
    instances: int = 256
    """With public = 'synth': images that are to be told apart."""
    checkpoint_every: int = 20
    classes: int | None = None
    unit_column: str | None = None
    noise: str = "gaussian"
    precision: str = "auto"
    """As for ``pretrain``."""
    seed: int = 0


def validate(config: ContinueConfig) -> None:
    """Refuse what only this stage can have wrong; ``config.validate`` does the rest.

    Raises:
        UsageError: naming the value.
    """
    if config.mix not in MIXES:
        raise UsageError(f"[continue] mix = {config.mix!r} is unknown", fix=nearest(config.mix, MIXES))
    if switch_step(config) is None and config.switch not in SWITCHES:
        raise UsageError(
            f"[continue] switch = {config.switch!r} is no step and no rule",
            fix=f"give {' or '.join(SWITCHES)}, or a number of public steps",
        )
    step = switch_step(config)
    if step is not None and step >= config.steps and config.mix == "step":
        raise UsageError(
            f"switch = {step} leaves no private step of {config.steps}",
            fix=f"switch before step {config.steps}, or give mix = 'public' for public steps alone",
        )
    if config.share == 0 or not 0 < config.share <= 1:
        raise UsageError(f"share = {config.share!r} lies outside (0, 1]", fix="give a part of ε such as 0.7, or 1")
    if not 0 <= config.weight_decay < 1:
        raise UsageError(f"weight_decay = {config.weight_decay!r} lies outside [0, 1)", fix="give a small one, or 0")
    if config.public.startswith(FRACTION):
        fraction_of(config.public)
    elif not config.public.strip():
        raise UsageError("public names nothing", fix="give synth, fraction:0.1, or a data set such as folder:PATH")


def switch_step(config: ContinueConfig) -> int | None:
    """The step at which the switch was asked for; None where a rule decides."""
    text = config.switch
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 9 else None


def fraction_of(public: str) -> float | None:
    """F of ``fraction:F``; None for other public data.

    Raises:
        UsageError: F is no number in (0, 1).
    """
    if not public.startswith(FRACTION):
        return None
    text = public.removeprefix(FRACTION)
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise UsageError(
            f"public = {public!r}: {text!r} is no part of the training split", fix="give fraction:0.1, say"
        )
    return value
