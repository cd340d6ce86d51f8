"""One frozen dataclass per stage, the size dial that fills it, and TOML in and out.

Everything here is public: configuration fields hold nothing that depends on private data, and are written into the run
directory and the report as they are.

A stage's configuration is resolved in this order, later wins: the size's defaults, what the run decided before (its
data and budget), a published recipe, a ``--config`` file's section of the stage's name, the flags given on the command
line. ``None`` means "decided by the stage from public facts" (the data set's declared size, ε), and the stage's
docstring says how.
"""

from __future__ import annotations

import dataclasses
import math
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from dprandp.config import presets
from dprandp.config.presets import SIZE_DEFAULTS, SIZES
from dprandp.config.toml import read as read_toml
from dprandp.errors import UsageError, nearest

# ---------------------------------------------------------------------------------------------------- continual config
#
# Settings of ``continue``: public steps, then private ones (Bu et al. 2024); this file has those of the others.
#
# Imports nothing of the package but ``errors``.

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


def validate_continue(config: ContinueConfig) -> None:
    """Refuse what only this stage can have wrong; ``validate`` does the rest.

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


# ---------------------------------------------------------------------------------------------------- finetune options
#
# Options of the fine-tune beyond the plain DP-SGD: published recipes, public weights, masks, ingredients.
#
# Everything is public and None by default: not used. ``FinetuneConfig`` inherits these fields.

LONGEST_TEXT = 500

OPTION_CHOICES = {
    "recipe": ("de2022",),
    "padding": ("symmetric", "same"),
    "pooling": ("1", "4", "1+4"),
    "layer_order": (
        "relu-norm-conv", "norm-relu-conv", "norm-relu-conv+relu-norm-skip", "relu-norm-conv+norm-relu-skip",
    ),
}  # fmt: skip

OPTIMIZERS = ("sgd", "adam")
"""See ``dpsgd/optimizers.py``. Not those of public training, which is asked for by the same name."""

WITHOUT_PHASE_ONE = ("scratch", "init")
"""Sources that need neither Phase I nor Phase II: random weights, or public ones from a file."""


@dataclass(frozen=True)
class FinetuneOptions:
    """Fields that ``FinetuneConfig`` has beside its own."""

    recipe: str | None = None
    """'de2022': the hyper-parameters of De et al. 2022 for this architecture and ε (see ``presets.py``)."""
    init: str | None = None
    """safetensors file with public weights of the network, for source = 'init'."""
    init_source: str | None = None
    """What they were learned from, in the user's words: she declares them public."""
    layer_order: str | None = None
    """Of a network that is not pretrained here; a key of ``vision.wrn.LAYER_ORDERS``. None: relu-norm-conv."""
    padding: str | None = None
    """'same': convolutions with stride 2 pad as De et al.'s do (below and right); None: 'symmetric'."""
    pooling: str | None = None
    """Grids that features are averaged over. None: '1+4'; '1' is the published global average."""
    optimizer: str | None = None
    """What is done with noisy gradients: 'sgd' (None: so) or 'adam'."""
    momentum: float | None = None
    """None: 0 for sgd, 0.9 for adam."""
    freeze: str | None = None
    """'random' or 'magnitude': train a part of the extractor's weights, chosen once (see ``dpsgd/masks.py``); with
    scope = 'block' also 'last'."""
    select: str | None = None
    """The same, chosen anew every ``every`` steps."""
    keep: float | None = None
    """The part that is trained."""
    prune: str | None = None
    """With freeze: 'hold' leaves the other weights as they are (None: so), 'zero' removes them."""
    every: int | None = None
    """With select. None: 10."""
    scope: str | None = None
    """The part is taken of all weights together ('global'; None: so), of each tensor ('layer'), or of whole blocks
    ('block'; see ``dpsgd/masks.py``)."""


def validate_options(values: Mapping[str, Any]) -> None:
    """Refuse values out of range, and combinations that make no sense, in words.

    Args:
        values: settings of a fine-tune that are not None.

    Raises:
        UsageError: naming the value.
    """
    optimizer = values.get("optimizer", "sgd")
    if optimizer not in OPTIMIZERS:
        raise UsageError(f"[finetune] optimizer = {optimizer!r} is unknown", fix=nearest(optimizer, OPTIMIZERS))
    _validate_start(values)


def _validate_start(values: Mapping[str, Any]) -> None:
    source = values.get("source", "probe")
    if source == "init" and "init" not in values:
        raise UsageError("--from init needs a file of public weights", fix="give --init FILE.safetensors")
    if "init" in values and source != "init":
        raise UsageError(f"--init brings public weights, and --from {source} does not use them", fix="drop one of them")
    if ("init" in values) != ("init_source" in values):
        problem = "--init-source without --init says nothing"
        if "init" in values:
            problem = "nobody said where the weights of --init come from: that they are public is yours to declare"
        raise UsageError(problem, fix='give --init FILE with --init-source TEXT, such as "ImageNet-1k, from ..."')
    text = values.get("init_source")
    if text is not None and not (text.isprintable() and 0 < len(text) <= LONGEST_TEXT):
        raise UsageError(
            f"init_source is not one line of 1 to {LONGEST_TEXT} printable characters", fix="say it in one short line"
        )
    if source not in WITHOUT_PHASE_ONE:
        for key in ("layer_order", "padding", "pooling", "recipe"):
            if key in values:
                raise UsageError(
                    f"--{key.replace('_', '-')} is for a network that is made here; --from {source} has one already",
                    fix="give --from scratch or --init FILE with it, or drop it",
                )


# ----------------------------------------------------------------------------------------------------- pretrain config
#
# Settings of Phase I's second half, and which of them belong to which way of learning.
#
# Imports nothing of the package but ``errors``.

PRECISIONS = ("auto", "float32", "bfloat16")
"""See ``models/precision.py``."""

PUBLIC_OPTIMIZERS = ("sgd", "adamw")
"""See ``models/optimizers.py``."""

COLOURS = ("rgb", "grey", "both")
"""Of the data that an extractor is for; see ``PretrainConfig.colour``."""


@dataclass(frozen=True)
class PretrainConfig:
    """Phase I, second half: a feature extractor from those images. Fields of the other architecture are unused."""

    size: str = "tiny"
    arch: str = "patchnet"
    seed: int = 0
    random_init: bool = False
    """Keep the extractor as initialised: the control experiment that says what Phase I was worth."""
    colour: str = "both"
    """Of the data that it is for: 'rgb', 'grey', or 'both' where they are not known yet. A patchnet for both is two
    dictionaries (``extractors_of``); a network that learns by gradients is one, and sees every second image in grey."""
    prior: str | None = None
    """A shipped prior (``priors/``) to be taken as it is; all other settings are then those of its card."""
    precision: str = "auto"
    """What the network's products are computed in; 'auto' is decided by architecture and device when the stage begins,
    and recorded. A patchnet has no choice: float32."""
    # patchnet
    filters: int = 400
    patch_size: int = 6
    patch_dims: int = 64
    stride: int = 1
    dictionary_patches: int = 100_000
    dictionary_iterations: int = 8
    layers: int = 1
    """2: beside the features of patches of pixels those of patches of their responses."""
    second_filters: int = 400
    # wrn-D-K
    steps: int = 100
    batch_size: int = 32
    optimizer: str = "sgd"
    lr: float | None = None
    """None: by optimizer and size, see ``lr_of``."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    grow: bool = False
    """Views of half the side in the first half of the steps: a quarter of the time each."""
    projection_hidden: int = 512
    projection_dim: int = 128
    layer_order: str = "relu-norm-conv"
    weight_standardisation: bool = True
    padding: str | None = None
    """Of convolutions with stride 2: 'symmetric' (None: so), or 'same' as De et al. 2022."""
    pooling: str | None = None
    """Grids that the last stage's map is averaged over; None: '1+4'."""
    feature_stages: str = "last"
    """Features: averages of the 'last' stage's map (published), or of those of 'all' three stages (tiny, small)."""
    checkpoint_every: int = 20


CHOICES = {"optimizer": PUBLIC_OPTIMIZERS, "feature_stages": ("last", "all")}

_SECOND_LAYER = {"layers", "second_filters"}
_PATCHNET = _SECOND_LAYER | {
    "filters", "patch_size", "patch_dims", "stride", "dictionary_patches", "dictionary_iterations",
}  # fmt: skip
_WRN = {
    "steps", "batch_size", "optimizer", "lr", "momentum", "weight_decay", "schedule", "grow", "projection_hidden",
    "projection_dim", "layer_order", "weight_standardisation", "padding", "pooling", "feature_stages",
    "checkpoint_every",
}  # fmt: skip


_LEARNING = {
    "dictionary_patches", "dictionary_iterations", "steps", "batch_size", "optimizer", "lr", "momentum", "weight_decay",
    "schedule", "grow", "projection_hidden", "projection_dim", "checkpoint_every",
}  # fmt: skip


def extractors_of(config: PretrainConfig) -> tuple[PretrainConfig, ...]:
    """The extractors that a configuration asks for: itself, or one for colour and then one for grey data.

    Learning a dictionary takes seconds, so where the data are not known there is one for each kind. Random weights
    have seen no image: one network serves both kinds.
    """
    if config.arch == "patchnet" and config.colour == "both" and not config.random_init:
        return tuple(dataclasses.replace(config, colour=colour) for colour in ("rgb", "grey"))
    return (config,)


def unused(config: PretrainConfig) -> set[str]:
    """Settings that have no say in what a configuration describes; they are not recorded."""
    return _of_another_network(config) | (_LEARNING if config.random_init else set())


def _of_another_network(config: PretrainConfig) -> set[str]:
    if config.arch == "patchnet":
        return {"precision"} | _WRN | (_SECOND_LAYER if config.layers == 1 else set())
    return (
        _PATCHNET
        | ({"momentum"} if config.optimizer == "adamw" else set())
    )


def check(config: PretrainConfig) -> None:
    """Refuse settings that do not go together.

    Raises:
        UsageError: a choice that is unknown, or two that exclude each other.
    """
    values: dict[str, Any] = dataclasses.asdict(config)
    for key, known in CHOICES.items():
        if values[key] not in known:
            raise UsageError(f"[pretrain] {key} = {values[key]!r} is unknown", fix=nearest(values[key], known))
    if config.arch == "patchnet" and config.precision == "bfloat16":
        raise UsageError(
            "[pretrain] precision = 'bfloat16', and a patchnet computes in float32",
            fix="leave --precision out, or use --arch wrn-16-4 or another wrn",
        )


def lr_of(config: PretrainConfig) -> float:
    """The learning rate: as given, else 0.03 (0.12 at size paper, as published) for sgd, 0.001 for adamw."""
    if config.lr is not None:
        return config.lr
    if config.optimizer == "adamw":
        return 1e-3
    return 0.12 if config.size == "paper" else 0.03


DEFAULT_DATA = "digits"

LARGEST = 2**63 - 1
"""Of any whole number, as in TOML: what the random generators take for a seed."""


@dataclass(frozen=True)
class GenerateConfig:
    """Phase I, first half: images of a random process."""

    size: str = "tiny"
    process: str = "stylegan-oriented"
    count: int = 4000
    resolution: int = 64
    seed: int = 0
    sample: int | None = None
    """Make only so many of the ``count`` images: those that a later stage takes of all as a sample. None: all."""


@dataclass(frozen=True)
class ProbeConfig:
    """Phase II: a head on frozen features, fitted with DP-SGD."""

    size: str = "tiny"
    data: str = DEFAULT_DATA
    epsilon: float = 1.0
    delta: float | None = None
    share: float | None = None
    steps: int = 120
    batch_size: int | None = None
    """Expected batch; None is full batch (sampling rate 1)."""
    lr: float | None = None
    momentum: float = 0.9
    clip_norm: float = 0.5
    """C. A gradient here is (p − y) xᵀ with x of unit norm, so about .95 long at first and shorter once an example is
    fitted. A bound that only the first ones reach pays noise for a length that they soon no longer have."""
    views: int = 1
    released: str = "average"
    """What is released: the 'average' of the second half of the iterates, the 'ema', or the 'last' one."""
    dims: int = 1024
    """Axes that each part of the features is whitened to (a layer of patches is one; so is each stage of a WRN)."""
    statistics_images: int = 1000
    """Synthetic images of which the whitener's statistics are taken."""
    statistics_views: int = 4
    """Of each; features are evened by how the views differ (``whitening.fit``). 1: crops, and no evening."""
    whitening_floor: float = 0.1
    mirror: bool | None = None
    """Average the features of an image and its mirror image; None follows the data set's declaration."""
    classes: int | None = None
    """Number of classes, for data that do not declare it."""
    unit_column: str | None = None
    """What says which images form one unit of privacy; 'image': each its own; None: as the data declare it."""
    noise: str = "gaussian"
    tuned_on: str | None = None
    """What these settings were tuned on elsewhere, in the user's words: stored and shown, nothing else."""
    precision: str = "auto"
    """As for ``pretrain``; of the features."""
    seed: int = 0


@dataclass(frozen=True)
class FinetuneConfig(FinetuneOptions):
    """Phase III: every parameter, with DP-SGD."""

    size: str = "tiny"
    source: str = "probe"
    """'probe' starts from Phases I and II, 'scratch' from random weights (De et al. 2022), 'init' from public ones."""
    data: str = DEFAULT_DATA
    epsilon: float = 1.0
    delta: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    extractor_scale: float | None = None
    """Factor on the extractor's gradient before the joint clip, and on its update: its share of clip and noise."""
    clip_norm: float = 1.0
    views: int = 1
    clipping: str = "norm"
    """'norm' shortens gradients longer than the clip norm; 'automatic' brings all of them to just below it; 'rescaled'
    is 'norm' with sum and noise divided by the clip norm (De et al. 2022), so that it does not scale the rate."""
    ema: float = 0.9999
    refit_steps: int | None = None
    """Full-batch steps of the head on the tuned features at the end; 0 for none. None: as the architecture's recipe."""
    refit_part: float = 0.85
    """Part of the remaining ε that the refit takes, where there is one."""
    arch: str = "wrn-16-4"
    """Used by the sources 'scratch' and 'init' alone."""
    checkpoint_every: int = 10
    classes: int | None = None
    unit_column: str | None = None
    noise: str = "gaussian"
    precision: str = "auto"
    """As for ``pretrain``."""
    seed: int = 0


StageConfig = GenerateConfig | PretrainConfig | ContinueConfig | ProbeConfig | FinetuneConfig

STAGE_CONFIGS: dict[str, type[StageConfig]] = {
    "generate": GenerateConfig,
    "pretrain": PretrainConfig,
    "continue": ContinueConfig,
    "probe": ProbeConfig,
    "finetune": FinetuneConfig,
}


def resolve(
    stage: str, size: str, file: Path | None, flags: dict[str, Any], inherited: dict[str, Any] | None = None
) -> StageConfig:
    """Build one stage's configuration, validated.

    Args:
        stage: a key of ``STAGE_CONFIGS``.
        size: 'tiny', 'small' or 'paper'.
        file: TOML with one table per stage, or None.
        flags: what the command line said; ``None`` values were not given.
        inherited: what the run decided before; file and flags win over it.

    Raises:
        UsageError: unknown size, key or value out of range.
        InputError: the file cannot be read as TOML.
    """
    if size not in SIZES:
        raise UsageError(f"unknown size {size!r}", fix=f"choose one of {', '.join(SIZES)}")
    values = {"size": size, **SIZE_DEFAULTS[size][stage], **(inherited or {})}
    given: dict[str, Any] = {}
    if file is not None:
        section = _section(read_toml(file), stage, file)
        if section.get("size", size) != size:  # its other defaults would not be those of the size it names
            raise UsageError(
                f"{file} says size = {section['size']!r} for {stage}, the command says {size!r}",
                fix="give that size with --size, or take the line out of the file",
            )
        given = section
    given = given | {key: value for key, value in flags.items() if value is not None}
    if stage == "finetune":
        _refuse_architecture_of_probe({**values, **given}, given)
        values |= presets.settings(values | given)
    return build(stage, values | given)


def _refuse_architecture_of_probe(values: dict[str, Any], given: dict[str, Any]) -> None:
    source = values.get("source", FinetuneConfig.source)
    if "arch" in given and source not in WITHOUT_PHASE_ONE:
        raise UsageError(
            f"--arch is for a network that is made here; --from {source} has one already",
            fix="give --from scratch or --init FILE with it, or drop it",
        )


def build(stage: str, values: dict[str, Any]) -> StageConfig:
    """Configuration from plain values, checked key by key.

    Raises:
        UsageError: unknown key, wrong type, or a value out of its range.
    """
    kind = STAGE_CONFIGS[stage]
    hints = get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            raise UsageError(f"[{stage}] has no setting {key!r}", fix=nearest(key, hints))
        if isinstance(value, int) and abs(value) > LARGEST:
            raise UsageError(f"[{stage}] {key} has more than 64 bits", fix=f"give a {key} of at most {LARGEST}")
        if isinstance(value, str) and any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value):
            raise UsageError(f"[{stage}] {key} = {value!r} holds what cannot be printed", fix=f"give a plain {key}")
        if not _fits(value, hints[key]):
            expected = str(getattr(hints[key], "__name__", hints[key])).replace(" | None", "")
            raise UsageError(f"[{stage}] {key} = {value!r} is not of type {expected}", fix=f"give {key} as {expected}")
    config = kind(**{key: float(v) if hints[key] in (float, float | None) and v is not None else v
                     for key, v in values.items()})
    validate(stage, config)
    return config


def as_dict(config: StageConfig) -> dict[str, Any]:
    """Plain values of a configuration; None, and settings that have no say in it, left out."""
    unused = _unused(config)
    return {k: v for k, v in dataclasses.asdict(config).items() if v is not None and k not in unused}


def _unused(config: StageConfig) -> set[str]:
    """Settings that have no say in what a configuration describes: they are neither recorded nor shown."""
    if isinstance(config, PretrainConfig):
        return unused(config)
    if not isinstance(config, FinetuneConfig):
        return set()
    made_here = config.source in WITHOUT_PHASE_ONE  # whose recipes have no refit
    no_refit = config.refit_steps == 0 or (made_here and config.refit_steps is None)
    return (set() if made_here else {"arch"}) | ({"refit_part"} if no_refit else set())


def public_data_name(name: str) -> str:
    """A data set's name as it may be published: of ``npz:`` and ``folder:`` the last part of the path alone.

    Where a file lies on somebody's disk (user names, project names) is nobody else's business.
    """
    kind, colon, path = name.partition(":")
    return f"{kind}:{os.path.basename(os.path.abspath(os.path.expanduser(path)))}" if colon and path else name


def same_data_name(one: str, other: str) -> bool:
    """Whether two names of data sets are spellings of one: paths of ``npz:`` and ``folder:`` are resolved from here."""
    return _resolved(one) == _resolved(other)


def _resolved(name: str) -> str:
    kind, colon, path = name.partition(":")
    return f"{kind}:{os.path.realpath(os.path.expanduser(path))}" if colon and path else name


def _section(document: dict[str, Any], stage: str, file: Path) -> dict[str, Any]:
    for key in document:
        if key not in STAGE_CONFIGS:
            raise UsageError(f"{file} has a table [{key}] that is no stage", fix=nearest(key, STAGE_CONFIGS))
    section = document.get(stage, {})
    if not isinstance(section, dict):
        raise UsageError(f"{file}: {stage} is not a table", fix=f"write [{stage}] and its settings below it")
    return section


def _fits(value: Any, hint: Any) -> bool:
    """Whether a TOML or command-line value may stand for a field of this type (an int may stand for a float)."""
    allowed = getattr(hint, "__args__", (hint,))
    if value is None:
        return type(None) in allowed
    if isinstance(value, bool):
        return bool in allowed
    if isinstance(value, int):
        return int in allowed or float in allowed
    return isinstance(value, tuple(kind for kind in allowed if kind is not type(None)))


_POSITIVE = (
    "count", "sample", "resolution", "filters", "patch_size", "patch_dims", "stride", "dictionary_patches",
    "dictionary_iterations", "second_filters", "steps", "batch_size", "projection_hidden", "projection_dim",
    "checkpoint_every", "views", "dims", "statistics_images", "statistics_views", "lr", "clip_norm",
    "whitening_floor", "instances", "check_every", "public_batch_size", "public_lr",
)  # fmt: skip


_AT_MOST = {
    "count": 10**8, "sample": 10**8, "filters": 10**5, "second_filters": 10**5, "dictionary_patches": 10**8,
    "dictionary_iterations": 10**6, "steps": 10**9, "refit_steps": 10**9,
    "batch_size": 10**9, "projection_hidden": 10**6, "projection_dim": 10**6, "views": 10**4, "dims": 10**6,
    "statistics_images": 10**8, "statistics_views": 10**3, "classes": 10**5, "checkpoint_every": 10**9,
    "instances": 10**7, "check_every": 10**9, "public_batch_size": 10**6,
}  # fmt: skip
"""Beyond these no machine's memory or patience reaches: a slip of the finger."""


def validate(stage: str, config: StageConfig) -> None:
    """Refuse values out of range (UsageError), naming the value."""
    values = {key: value for key, value in dataclasses.asdict(config).items() if value is not None}
    for key in _POSITIVE:
        value = values.get(key)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{key} = {value!r} is not a positive number", fix=f"give a {key} above 0")
    for key, most in _AT_MOST.items():
        if values.get(key, 0) > most:
            raise UsageError(f"{key} = {values[key]} is out of all bounds", fix=f"give a {key} of at most {most}")
    ranges = {"momentum": (0, 1), "ema": (0, 1), "extractor_scale": (0, math.inf), "refit_part": (0, 1)}
    ranges |= {"weight_decay": (0, math.inf), "classes": (2, math.inf), "layers": (1, 3)}
    for key, (low, high) in ranges.items():
        value = values.get(key)
        if value is not None and not low <= value < high:
            raise UsageError(f"{key} = {value!r} lies outside [{low}, {high})", fix=f"choose a {key} in that range")
    for key in ("seed", "refit_steps"):
        if values.get(key, 0) < 0:
            raise UsageError(f"{key} = {values[key]} is negative", fix=f"give a {key} of 0 or more")
    if "epsilon" in values and not values["epsilon"] > 0:
        raise UsageError(
            f"epsilon = {values['epsilon']!r} is no privacy budget",
            fix="give a number above 0, such as --eps 1, or --eps inf for a model without privacy",
        )
    if "delta" in values and not 0 < values["delta"] < 1:
        raise UsageError(f"delta = {values['delta']!r} lies outside (0, 1)", fix="use a delta below 1/N, such as 1e-5")
    if "share" in values and not 0 < values["share"] <= 1:
        raise UsageError(
            f"share = {values['share']!r} lies outside (0, 1]",
            fix="give the probe a part of epsilon such as 0.3, or 1 to fit nothing but the probe",
        )
    if "tuned_on" in values and not (values["tuned_on"].isprintable() and 0 < len(values["tuned_on"]) <= LONGEST_TEXT):
        raise UsageError(
            f"tuned_on is not one line of 1 to {LONGEST_TEXT} printable characters", fix="say it in one short line"
        )
    choices = {
        "schedule": ("cosine", "step"),
        "released": ("average", "ema", "last"),
        "source": ("probe", "scratch", "init"),
        "colour": COLOURS,
        "noise": ("gaussian", "discrete"),
        "clipping": ("norm", "automatic", "rescaled"),
        "size": SIZES,
        "precision": PRECISIONS,
        **OPTION_CHOICES,
    }
    for key, known in choices.items():
        if key in values and values[key] not in known:
            raise UsageError(f"[{stage}] {key} = {values[key]!r} is unknown", fix=nearest(str(values[key]), known))
    if stage == "finetune":
        validate_options(values)
    if isinstance(config, PretrainConfig):
        check(config)
    if isinstance(config, ContinueConfig):
        validate_continue(config)
