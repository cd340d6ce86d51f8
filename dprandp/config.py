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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from . import pretrain_config, published
from .continual_config import ContinueConfig
from .continual_config import validate as validate_continue
from .errors import UsageError, nearest
from .finetune_options import LONGEST_TEXT, OPTION_CHOICES, WITHOUT_PHASE_ONE, FinetuneOptions, validate_options
from .pretrain_config import PRECISIONS, PretrainConfig
from .sizes import SIZE_DEFAULTS, SIZES
from .toml import read as read_toml

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
        values |= published.settings(values | given)
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
        return pretrain_config.unused(config)
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
        "colour": pretrain_config.COLOURS,
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
        pretrain_config.check(config)
    if isinstance(config, ContinueConfig):
        validate_continue(config)
