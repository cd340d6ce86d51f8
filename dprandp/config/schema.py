"""The settings of every stage: one frozen dataclass each, in which a setting is declared once (``settings.py``).

Everything here is public, and is written into the run directory and the report as it is.

A later source wins over an earlier one: the size's defaults, what the run decided before (its data and budget), a
published recipe, the stage's table in a ``--config`` file, the flags of the command line. ``None`` means "decided by
the stage from public facts" (the data set's declared size, ε); the setting's help says how.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dprandp.config import presets
from dprandp.config.declared import PARTS, RULES, Decoding, Layout, decoding_of, layout_of, without_size
from dprandp.config.presets import INPUT_SIZE, PRETRAINED, PROJECTION, SIZE_DEFAULTS, SIZES, RecipeName, by_recipe
from dprandp.config.settings import DATA, OUTPUT, PERFORMANCE, PRIVACY, checked, setting, settings_of, text
from dprandp.config.toml import read as read_toml
from dprandp.errors import UsageError, nearest

DEFAULT_DATA = "digits"
SYNTHETIC = "synth"
FRACTION = "fraction:"
WITHOUT_PHASE_ONE = ("scratch", "init")
"""Starting points of a fine-tune that need neither Phase I nor Phase II: random weights, or public ones from a file."""
DEFAULT_SHARE = 0.3
"""Fraction of ε for the probe. Tang et al. 2023, figure on the budget's split: 20 to 40 % of ε for Phase II is best."""
PATCHNET, SECOND_LAYER, NETWORK, BACKBONE = "patchnet", "second layer", "network", "backbone"
"""The kinds of extractor that a setting of ``pretrain`` may be for; a network learns by gradients, a backbone is one
from elsewhere."""
TORCHVISION, MODULE = "torchvision:", "module:"
"""Beginnings of the names of backbones."""

MANY, VERY_MANY = 10**6, 10**9
"""Upper limits of settings; a larger value is taken for a typing error."""

LayerOrder = Literal[
    "relu-norm-conv", "norm-relu-conv", "norm-relu-conv+relu-norm-skip", "relu-norm-conv+norm-relu-skip"
]
Padding = Literal["symmetric", "same"]
Pooling = Literal["1", "4", "1+4"]
Norm = Literal["group", "frozen"]


# ---------------------------------------------------------------------------------------------- settings of many stages


@dataclass(frozen=True)
class Common:
    """Settings of every stage."""

    size: Literal["tiny", "small", "paper"] = setting(
        "tiny", "Sets all other defaults: tiny (minutes on 2 cores), small (half an hour), paper."
    )
    seed: int = setting(0, "Seed of public randomness; never of the noise.", True, low=0, wrong="is negative",
                        fix="give a seed of 0 or more")  # fmt: skip


@dataclass(frozen=True)
class Network:
    """Settings of stages that compute with a network."""

    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Number format of the network's products: float32, bfloat16, or auto (bfloat16 where the device "
        "multiplies it faster, else float32), decided when the stage begins.",
        True, panel=PERFORMANCE,
    )  # fmt: skip


@dataclass(frozen=True)
class Private(Network, Decoding, Layout, Common):
    """Settings of the private stages: the data, the budget and the noise."""

    data: str = setting(
        DEFAULT_DATA, "Name of a data set (see `dprandp datasets`), npz:PATH, folder:PATH or csv:PATH.", True,
        panel=DATA, metavar="NAME", inherited=True,
    )  # fmt: skip
    classes: int | None = setting(
        None, "Number of classes, for npz: files that do not declare it, and csv: data with labels 0 to C-1.", True,
        panel=DATA, metavar="C", low=2, most=10**5,
    )  # fmt: skip
    unit_column: str | None = setting(
        None, "Unit of privacy: images with equal values in this array of npz: data (patient or patient_train), column "
        "of csv: data or of units.csv in folder: data, are one unit. folder: each sub-folder of a class of folder: "
        "data is one. image: each image is one.", True, panel=PRIVACY, metavar="NAME",
        otherwise="groups_train, group, or unit, where the data have it; else each image",
    )  # fmt: skip
    allow_shared_units: bool | None = setting(
        None, "Go on where units of the unit column (patients, say) have images in both the training and the test "
        "split; the figures of the test split are then too good. Stored and shown.", True, panel=DATA,
        otherwise="no, such data are refused",
    )  # fmt: skip
    epsilon: float = setting(
        1.0, "Total ε for everything this run releases about the data; inf = NOT PRIVATE.", "--eps", panel=PRIVACY,
        inherited=True, above=0, infinite=True, wrong="is no privacy budget",
        fix="give a number above 0, such as --eps 1, or --eps inf for a model without privacy",
    )  # fmt: skip
    delta: float | None = setting(
        None, "δ, the chance that ε fails.", True, panel=PRIVACY, above=0, below=1,
        otherwise="the run's, else 1e-5, or 0.1/N (one digit, rounded down) where that is smaller; 1e-5 for cifar10, "
        "cifar100, mnist and fashion-mnist, as in published results",
        fix="use a delta below 1/N, such as 1e-5",
    )  # fmt: skip
    noise: Literal["gaussian", "discrete"] = setting(
        "gaussian", "gaussian, or discrete: rounds sums to a grid and adds whole-number noise, without the known "
        "weaknesses of floating-point noise.", True, panel=PRIVACY,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- Phase I


@dataclass(frozen=True)
class GenerateConfig(Common):
    """Phase I, first half: images of a random process."""

    process: str = setting(
        "stylegan-oriented", "stylegan-oriented, stylegan-random, stylegan-highfreq, stylegan-sparse, dead-leaves (or "
        "dead-leaves-shapes), dead-leaves-squares, dead-leaves-oriented, dead-leaves-textures, spectrum, "
        "spectrum-color, wmm, spectrum-color-wmm, fractal, perlin; over any of them kml:NAME, kml-mixup:NAME, "
        "mixture:NAME,NAME,...", True, panel=DATA, metavar="NAME",
    )  # fmt: skip
    count: int = setting(4000, "Number of images to make.", True, panel=DATA, above=0, most=10**8)
    resolution: int = setting(64, "Their width and height in pixels.", True, panel=DATA, above=0)
    sample: int | None = setting(
        None, "Make only this many of the count images: the sample that a later stage would take of all.",
        above=0, most=10**8, otherwise="all",
    )  # fmt: skip


@dataclass(frozen=True)
class PretrainConfig(Network, Common):
    """Phase I, second half: a feature extractor from those images. Settings of other architectures are unused."""

    arch: str = setting(
        "patchnet", "patchnet, wrn-DEPTH-WIDTH such as wrn-16-4, or vit-DEPTH-WIDTH-PATCH such as vit-4-64-4; with "
        "--init also torchvision:NAME, or your own network, module:FILE.py:NAME (with --trust-code).", True,
    )  # fmt: skip
    random_init: bool = setting(False, "Keep the random weights: a control for the effect of Phase I.", True)
    colour: Literal["rgb", "grey", "both"] = setting(
        "both", "Colour of the data: rgb, grey or both. With both, a patchnet learns two dictionaries, of which later "
        "stages take the one that fits; a wrn or vit sees every second image in grey.", True,
        panel=DATA,
    )  # fmt: skip
    input_size: int | None = setting(
        None, "Side of the images that the extractor sees, in pixels. Images of any other size are resized to it.",
        True, panel=DATA, low=16, most=512, otherwise=f"{INPUT_SIZE}",
    )  # fmt: skip
    prior: str | None = setting(None, "A shipped prior, used unchanged; all other settings are those of its card.")
    init: str | None = setting(
        None, "safetensors file with public weights of --arch, which are taken unchanged. Declare their source with "
        "--init-source.", True, metavar="FILE", otherwise="none",
    )  # fmt: skip
    init_source: str | None = setting(
        None, "Data from which the weights of --init were learned; stored and shown.", True, metavar="TEXT", line=True,
        otherwise="none, needed with --init",
    )  # fmt: skip
    norm: Norm | None = setting(
        None, "What takes the place of BatchNorm in a torchvision: or module: network: group (GroupNorm), or frozen "
        "(the statistics of --init as constants).", True, of=BACKBONE, otherwise="group",
    )  # fmt: skip
    code: str | None = setting(
        None, "sha256 of the file of module:FILE.py:NAME; another file is refused.", of=BACKBONE,
        otherwise="that of the file when the stage begins",
    )  # fmt: skip
    filters: int = setting(600, "Filters of a patchnet.", above=0, most=10**5, of=PATCHNET)
    patch_size: int = setting(6, "Side of its patches in pixels.", above=0, of=PATCHNET)
    patch_dims: int = setting(64, "Components that patches are whitened to.", above=0, of=PATCHNET)
    stride: int = setting(1, "Pixels from one patch to the next, for each 32 pixels of the input's side.", above=0,
                          of=PATCHNET)  # fmt: skip
    dictionary_patches: int = setting(100_000, "Patches that the filters are learned from.", above=0, most=10**8,
                                      of=PATCHNET, learning=True)  # fmt: skip
    dictionary_iterations: int = setting(8, "Iterations of spherical k-means.", above=0, most=MANY, of=PATCHNET,
                                         learning=True)  # fmt: skip
    layers: int = setting(
        2, "Layers of a patchnet, 1 or 2: features of patches of pixels, and of patches of their responses.",
        True, low=1, below=3, of=PATCHNET,
    )  # fmt: skip
    second_filters: int = setting(800, "Filters of the second layer.", above=0, most=10**5, of=SECOND_LAYER)
    steps: int = setting(100, "Steps of a wrn or vit.", True, above=0, most=VERY_MANY, of=NETWORK, learning=True)
    batch_size: int = setting(32, "Images of a step of a wrn or vit, two views of each.", True, above=0, most=VERY_MANY,
                              of=NETWORK, learning=True)  # fmt: skip
    optimizer: Literal["sgd", "adamw"] = setting("sgd", "Optimizer of a wrn or vit.", True, of=NETWORK, learning=True)
    lr: float | None = setting(
        None, "Learning rate of a wrn or vit.", True, above=0, of=NETWORK, learning=True,
        otherwise="0.03, or 0.12 (paper); 0.001 for adamw",
    )  # fmt: skip
    momentum: float = setting(0.9, "Momentum of sgd.", low=0, below=1, of=NETWORK, learning=True)
    weight_decay: float = setting(1e-4, "Weight decay of the optimizer.", low=0, of=NETWORK, learning=True)
    schedule: Literal["cosine", "step"] = setting("cosine", "Schedule of the learning rate.", of=NETWORK, learning=True)
    projection_hidden: int = setting(512, "Width of the projection head's hidden layer.", above=0, most=MANY,
                                     of=NETWORK, learning=True)  # fmt: skip
    projection_dim: int = setting(128, "Dimensions in which views are compared.", above=0, most=MANY, of=NETWORK,
                                  learning=True)  # fmt: skip
    layer_order: LayerOrder = setting(
        "relu-norm-conv", "Order of operations around a convolution of a wrn.", of=NETWORK
    )
    weight_standardisation: bool = setting(True, "Standardise the filters of a wrn.", of=NETWORK)
    padding: Padding | None = setting(
        None, "Padding of convolutions with stride 2: symmetric, or same (De et al. 2022).", of=NETWORK,
        otherwise="symmetric",
    )
    pooling: Pooling | None = setting(
        None, "Grids over which the last stage's map is averaged.", of=NETWORK, otherwise="1+4"
    )
    feature_stages: Literal["last", "all", "projection"] = setting(
        "last", "Features of a wrn: averages of its last stage's map, or of all three stages'; or what the first layer "
        "of the projection head puts out (Tang et al. 2023, for a probe), which finetune --from pretrain leaves out.",
        True, of=NETWORK,
    )  # fmt: skip
    checkpoint_every: int = setting(20, "Steps between two checkpoints.", above=0, most=VERY_MANY, of=NETWORK,
                                    learning=True)  # fmt: skip


# -------------------------------------------------------------------------------------------- between Phases I and II


@dataclass(frozen=True)
class ContinueConfig(Private):
    """Between Phases I and II: train the extractor further, on public images and then privately."""

    public: str = setting(
        SYNTHETIC, "Public images: synth (the run's synthetic ones), fraction:F (a random part F of the training "
        "split, which you declare public), or a data set that you declare public, such as folder:PATH.", True,
        panel=DATA, metavar="WHAT",
    )  # fmt: skip
    instances: int = setting(256, "With --public synth: images, each a class.", True, panel=DATA, above=0, most=10**7)
    share: float = setting(
        0.7, "Fraction of the remaining ε for the private steps, in (0, 1]; 1 leaves nothing for a probe on the same "
        "data.", True, panel=PRIVACY, above=0, most=1, fix="give a fraction of ε such as 0.7, or 1",
    )  # fmt: skip
    switch: str = setting(
        "plateau", "Where private steps begin: plateau (of the loss on held-out public images), decelerator (when "
        "noise costs less than a tenth of a step, estimated on public images), or the number of the step.", True,
        metavar="plateau|decelerator|STEP",
    )  # fmt: skip
    mix: Literal["step", "cosine", "ratio", "public", "private"] = setting(
        "step", "Weight α of the public gradient: step (1, then 0 from the switch on), cosine or ratio (in every "
        "private step), public (1) or private (0).", True,
    )  # fmt: skip
    steps: int = setting(200, "Public and private steps in all.", True, above=0, most=VERY_MANY)
    check_every: int = setting(10, "Public steps between two evaluations of the public validation loss, by which the "
                               "switch is decided.", above=0, most=VERY_MANY)  # fmt: skip
    batch_size: int | None = setting(
        None, "Expected private batch B = qN of Poisson sampling.", True, above=0, most=VERY_MANY,
        otherwise=f"{by_recipe('batch_part', 'wrn', form='{:.2g} N', named=False)}, 4096 (paper)",
    )  # fmt: skip
    public_batch_size: int = setting(64, "Images of a public step.", True, above=0, most=MANY)
    lr: float = setting(0.001, "AdamW's learning rate of the private and the mixed steps.", True, above=0)
    public_lr: float = setting(0.002, "AdamW's learning rate of public steps.", True, above=0)
    weight_decay: float = setting(0.01, "AdamW's weight decay.", low=0, below=1, fix="give a small one, or 0")
    clip_norm: float = setting(1.0, "Scale of sum and noise; with automatic clipping it changes nothing else.", above=0)
    views: int = setting(1, "Augmented views K of each private example, averaged before the clip.", True, above=0,
                         most=10**4)  # fmt: skip
    ema: float = setting(0.9999, "Decay of the moving average of the parameters that is released.", low=0, below=1)
    checkpoint_every: int = setting(20, "Steps between two checkpoints.", above=0, most=VERY_MANY)


# ------------------------------------------------------------------------------------------------------------ Phase II


@dataclass(frozen=True)
class ProbeConfig(Private):
    """Phase II: a head on frozen features, fitted with DP-SGD."""

    share: float | None = setting(
        None, "Fraction of ε for the probe, in (0, 1]; 1: all of it, and nothing for finetune.", True, panel=PRIVACY,
        above=0, most=1, otherwise=f"{DEFAULT_SHARE:g}; in run 1, except for a network",
        fix="give the probe a fraction of epsilon such as 0.3, or 1 to fit nothing but the probe",
    )  # fmt: skip
    # A gradient here is (p − y) xᵀ with x of unit norm, so about .95 long at first and shorter once an example is
    # fitted. A larger bound would add noise for a length that gradients soon no longer have.
    clip_norm: float = setting(0.5, "Clip norm C: largest L2 norm of an example's gradient.", "--clip", panel=PRIVACY,
                               above=0)  # fmt: skip
    steps: int = setting(120, "Updates T.", True, above=0, most=VERY_MANY)
    batch_size: int | None = setting(
        None, "Expected batch B = qN of Poisson sampling.", True, above=0, most=VERY_MANY,
        otherwise="N (every example, q = 1)",
    )  # fmt: skip
    lr: float | None = setting(None, "Learning rate.", True, above=0, otherwise="set by the noise and the data's size")
    momentum: float = setting(0.9, "Momentum of the noisy gradients.", low=0, below=1)
    views: int = setting(1, "Augmented views K of each example, averaged before the clip.", True, above=0, most=10**4)
    released: Literal["average", "ema", "last"] = setting(
        "average", "What is released: the average of the second half of the iterates, the ema, or the last one."
    )
    dims: int = setting(2048, "Components to which each part of the features is whitened (one part for each layer of "
                        "patches, or each stage of a WRN).", above=0, most=MANY)  # fmt: skip
    statistics_images: int = setting(1000, "Synthetic images for the whitener's statistics.", above=0,
                                     most=10**8)  # fmt: skip
    statistics_views: int = setting(
        4, "Views of each image for the within-class covariance normalisation, where a class is the views of one "
        "image. 1: crops only, without that normalisation.", above=0, most=1000,
    )  # fmt: skip
    whitening_floor: float = setting(
        0.1, "Added to the eigenvalues of the features' covariance, relative to their mean.", above=0
    )
    mirror: bool | None = setting(None, "Average the features of an image and its mirror image.",
                                  otherwise="as the data set declares")  # fmt: skip
    tuned_on: str | None = setting(
        None, "Data on which you tuned these settings elsewhere; stored and shown.", True, panel=OUTPUT,
        metavar="TEXT", line=True, otherwise="nothing",
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- Phase III


@dataclass(frozen=True)
class FinetuneConfig(Private):
    """Phase III: every parameter, with DP-SGD."""

    source: Literal["probe", "pretrain", "scratch", "init"] = setting(
        "probe", "Starting point: the probe; pretrain, the extractor of Phase I and a new head, without a probe (Tang "
        "et al. 2023); scratch, a random network without Phase I or II (De et al. 2022); or init, the public weights "
        "of --init.", "--from", otherwise="that of the recipe; else probe, or init where --init is given",
    )  # fmt: skip
    arch: str = setting(
        "wrn-16-4", "With --from scratch or --init: wrn-DEPTH-WIDTH, nf-resnet-50, torchvision:NAME, or your own "
        "network, module:FILE.py:NAME (with --trust-code).", True,
    )  # fmt: skip
    recipe: RecipeName | None = setting(
        None, "dp-randp: Phases II and III as Tang et al. 2023 publish them, from the pretrained network, at --eps; "
        "de2022: batch, steps, learning rate, views and network as De et al. publish them for --arch and --eps; ours: "
        "neither. σ is always calibrated. Flags override the recipe, and the result names them.", True,
        otherwise="ours; dp-randp (paper) where the run has no probe",
    )  # fmt: skip
    init: str | None = setting(
        None, "safetensors file with public weights of --arch. Declare their source with --init-source.", True,
        metavar="FILE", otherwise="none",
    )  # fmt: skip
    init_source: str | None = setting(
        None, "Data from which the weights of --init were learned; stored and shown.", True, metavar="TEXT", line=True,
        otherwise="none, needed with --init",
    )  # fmt: skip
    input_size: int | None = setting(
        None, "Side of the images that a network made here sees, in pixels.", True, panel=DATA, low=16, most=512,
        otherwise=f"{INPUT_SIZE}",
    )  # fmt: skip
    layer_order: LayerOrder | None = setting(
        None, "Order of operations around a convolution of a wrn made here.", True, metavar="ORDER",
        otherwise="relu-norm-conv",
    )
    padding: Padding | None = setting(
        None, "Padding of its convolutions with stride 2: symmetric, or same (De et al.).", True, otherwise="symmetric"
    )
    pooling: Pooling | None = setting(
        None, "Average its last features over the image (1, published), over its four quarters (4), or both (1+4).",
        True, metavar="GRIDS",
        otherwise="1+4, or 1 (nf-resnet-50)",
    )  # fmt: skip
    norm: Norm | None = setting(
        None, "What takes the place of BatchNorm in a torchvision: or module: network made here: group (GroupNorm), or "
        "frozen (the statistics of --init as constants).", True, otherwise="group",
    )  # fmt: skip
    code: str | None = setting(
        None, "sha256 of the file of module:FILE.py:NAME; another file is refused.",
        otherwise="that of the file when the stage begins",
    )  # fmt: skip
    clip_norm: float = setting(1.0, "Clip norm C: largest L2 norm of an example's gradient.", "--clip", panel=PRIVACY,
                               above=0)  # fmt: skip
    clipping: Literal["norm", "automatic", "rescaled"] = setting(
        "norm", "norm: gradients longer than C are cut to C; automatic: all are scaled to just below C, so that C need "
        "not be tuned; rescaled: norm, then sum and noise are divided by C (De et al. 2022).", True, panel=PRIVACY,
    )  # fmt: skip
    steps: int | None = setting(
        None, "Updates T.", True, above=0, most=VERY_MANY,
        otherwise=f"{by_recipe('steps', 'patchnet', 'wrn', 'scratch')}, "
        f"{SIZE_DEFAULTS['paper']['finetune']['steps']} (paper)",
    )  # fmt: skip
    batch_size: int | None = setting(
        None, "Expected batch B = qN of Poisson sampling.", True, above=0, most=VERY_MANY,
        otherwise=f"{by_recipe('batch_part', 'patchnet', 'wrn', form='{:.2g} N')}, "
        f"{SIZE_DEFAULTS['paper']['finetune']['batch_size']} (paper)",
    )  # fmt: skip
    lr: float | None = setting(None, "Learning rate.", True, above=0,
                               otherwise=by_recipe("lr", "patchnet", "wrn", "scratch"))  # fmt: skip
    head_steps: int | None = setting(
        None, "The first steps, which train only the head and what follows the network's last block (its last norm).",
        low=0, most=VERY_MANY, otherwise="0, or 96 (dp-randp)",
    )  # fmt: skip
    head_lr: float | None = setting(
        None, "Learning rate of the first head_steps steps.", above=0, otherwise="lr, or 15 (dp-randp)"
    )
    extractor_scale: float | None = setting(
        None, "How strongly the extractor is trained relative to the head: a factor on its gradients before they are "
        "clipped, and on its updates. 0 trains only the head.", low=0,
        otherwise=by_recipe("extractor_scale", "patchnet", "wrn"),
    )  # fmt: skip
    views: int = setting(1, "Augmented views K of each example, averaged before the clip.", True, above=0, most=10**4)
    optimizer: Literal["sgd", "adam"] | None = setting(None, "Optimizer of the noisy gradients: sgd or adam.", True,
                                                       otherwise="sgd")  # fmt: skip
    momentum: float | None = setting(None, "Momentum of the optimizer, in [0, 1).", True, low=0, below=1,
                                     otherwise="0 (sgd), 0.9 (adam)")  # fmt: skip
    ema: float = setting(
        0.9999, "Decay in [0, 1) of the moving average of the parameters that is released; 0 releases the last "
        "ones.", True, low=0, below=1, otherwise="0.9999, less in the first steps",
    )  # fmt: skip
    train: str | None = setting(
        None, "What is trained: all, head, norm-bias (norms, biases and head), last:N (the last N blocks and what "
        "follows them), or lora:R (adapters of rank R on linear and convolution layers, and the head).", True,
        metavar="WHAT", otherwise="all",
    )  # fmt: skip
    freeze: str | None = setting(
        None, "Train a part of the extractor's weights, chosen once: random or magnitude; with --scope block also "
        "last. Needs --keep.", True, metavar="HOW", otherwise="all are trained",
    )  # fmt: skip
    select: str | None = setting(None, "Like --freeze, with a new choice every --every steps.", True, metavar="HOW",
                                 otherwise="all are trained")  # fmt: skip
    keep: float | None = setting(
        None, "Fraction of weights that --freeze or --select trains, such as 0.1; head, norms and biases are always "
        "trained.", True, otherwise="all are trained",
    )  # fmt: skip
    prune: str | None = setting(None, "What --freeze does to the other weights: hold or zero.", True, otherwise="hold")
    every: int | None = setting(None, "Steps between two choices of --select.", True, otherwise="10")
    scope: str | None = setting(
        None, "What --keep is a fraction of: all weights (global), each tensor (layer), or, with --freeze, whole "
        "blocks (block), which saves time and memory.", True, otherwise="global",
    )  # fmt: skip
    refit_steps: int | None = setting(
        None, "Full-batch steps of the head on the tuned features at the end; 0 for none.", low=0, most=VERY_MANY,
        wrong="is negative", fix="give refit_steps of 0 or more", otherwise=by_recipe("refit_steps", "patchnet", "wrn"),
    )  # fmt: skip
    refit_part: float = setting(0.85, "Fraction of the remaining ε for the refit, if there is one.", low=0,
                                below=1)  # fmt: skip
    checkpoint_every: int = setting(10, "Steps between two checkpoints.", above=0, most=VERY_MANY)


StageConfig = GenerateConfig | PretrainConfig | ContinueConfig | ProbeConfig | FinetuneConfig
PrivateConfig = ContinueConfig | ProbeConfig | FinetuneConfig

DATA_SETTINGS = ("data", "classes", "unit_column", "allow_shared_units", *PARTS, *RULES)
"""The settings of a private stage that say which data it reads, and how."""

STAGE_CONFIGS: dict[str, type[StageConfig]] = {
    "generate": GenerateConfig,
    "pretrain": PretrainConfig,
    "continue": ContinueConfig,
    "probe": ProbeConfig,
    "finetune": FinetuneConfig,
}


# --------------------------------------------------------------------------------------- from values to a configuration


def resolve(
    stage: str, size: str, file: Path | None, flags: dict[str, Any], inherited: dict[str, Any] | None = None
) -> StageConfig:
    """Build one stage's configuration, validated.

    Args:
        file: TOML with one table per stage, or None.
        flags: what the command line said; ``None`` values were not given.
        inherited: what the run decided before; file and flags override it.

    Raises:
        UsageError: unknown size, key or value out of range.
        InputError: the file cannot be read as TOML.
    """
    if size not in SIZES:
        raise UsageError(f"unknown size {size!r}", fix=f"choose one of {', '.join(SIZES)}")
    values = {"size": size, **SIZE_DEFAULTS[size][stage], **(inherited or {})}
    given = {} if file is None else _section(read_toml(file), stage, file)
    if given.get("size", size) != size:
        raise UsageError(
            f"{file} says size = {given['size']!r} for {stage}, the command says {size!r}",
            fix="give that size with --size, or take the line out of the file",
        )
    given = given | {key: value for key, value in flags.items() if value is not None}
    if stage == "pretrain" and "init" in given and "feature_stages" not in (inherited or {}) | given:
        values.pop("feature_stages", None)  # public weights have no projection
    if stage == "finetune":
        asked = (inherited or {}) | given
        if "recipe" not in asked and asked.get("source", PRETRAINED) != PRETRAINED:
            values.pop("recipe", None)  # that of the size is not about this starting point
        values |= presets.settings(values | given)
        source = (values | given).get("source", FinetuneConfig.source)
        if "arch" in given and source not in WITHOUT_PHASE_ONE:
            _refuse_network_setting("arch", source)
    values |= given
    if values.get("recipe") == "ours":  # as without one
        del values["recipe"]
    return build(stage, values)


def build(stage: str, values: dict[str, Any]) -> StageConfig:
    """Configuration from plain values, checked key by key.

    Raises:
        UsageError: unknown key, wrong type, a value out of its range, or settings that do not go together.
    """
    config = checked(stage, STAGE_CONFIGS[stage], values)
    if isinstance(config, FinetuneConfig):
        _check_finetune(config)
    if isinstance(config, FinetuneConfig | PretrainConfig):
        _check_weights(config)
    if isinstance(config, ContinueConfig):
        _check_switch(config)
    return config


def as_dict(config: StageConfig) -> dict[str, Any]:
    """Plain values of a configuration, without None and without settings that have no effect in it."""
    unused = _unused(config)
    return {k: v for k, v in dataclasses.asdict(config).items() if v is not None and k not in unused}


def _unused(config: StageConfig) -> set[str]:
    """Settings that have no effect in a configuration: they are neither recorded nor shown."""
    if isinstance(config, PretrainConfig):
        patchnet = config.arch == "patchnet"
        kind = PATCHNET if patchnet else BACKBONE if is_backbone(config.arch) else NETWORK
        used = {None, kind, SECOND_LAYER if patchnet and config.layers > 1 else None}
        declared, ready = settings_of(PretrainConfig).items(), config.random_init or config.init is not None
        idle = {name for name, made in declared if made.of not in used or (made.learning and ready)}
        if kind == NETWORK and config.feature_stages == PROJECTION:
            idle.discard("projection_hidden")  # of the features
        return idle | ({"momentum"} if config.optimizer == "adamw" else set())
    if not isinstance(config, FinetuneConfig):
        return set()
    made_here = config.source in WITHOUT_PHASE_ONE  # whose recipes have no refit
    no_refit = config.refit_steps == 0 or (made_here and config.refit_steps is None)
    return (set() if made_here else {"arch"}) | ({"refit_part"} if no_refit else set())


def default_text(stage: str, name: str) -> str | None:
    """A setting's default as help texts and documentation state it, for all sizes; None where there is none."""
    made = settings_of(STAGE_CONFIGS[stage])[name]
    if made.otherwise is not None:
        return made.otherwise
    values = {size: SIZE_DEFAULTS[size][stage].get(name, getattr(STAGE_CONFIGS[stage], name)) for size in SIZES}
    if all(value is None or value is False for value in values.values()):
        return None
    shown = {size: text(value) for size, value in values.items()}
    first = shown["tiny"]
    others = [size for size in SIZES if shown[size] != first]
    if not others:
        said = first
    elif len({shown[size] for size in others}) == 1:
        said = f"{first}, or {shown[others[0]]} ({', '.join(others)})"
    else:
        said = ", ".join(f"{value} ({size})" for size, value in shown.items())
    return f"the run's, else {said}" if made.inherited else said


# ------------------------------------------------------------------------------------------ what settings mean together


def extractors_of(config: PretrainConfig) -> tuple[PretrainConfig, ...]:
    """The extractors that a configuration asks for: itself, or one for colour and then one for grey data.

    Learning a dictionary takes seconds, so where the data are not known there is one for each kind. Random weights
    have seen no image: one network serves both kinds.
    """
    if config.arch == "patchnet" and config.colour == "both" and not config.random_init:
        return tuple(dataclasses.replace(config, colour=colour) for colour in ("rgb", "grey"))
    return (config,)


def probe_of_run(probe: ProbeConfig, arch: str, begun: Mapping[str, Any] | None) -> ProbeConfig:
    """The probe in ``run``: with a patchnet it has the whole budget, unless --share says otherwise.

    A fine-tune of a patchnet does not earn the part of ε that it takes (``docs/results.md``, "Probe and fine-tune").

    Args:
        arch: of the extractor. begun: the settings of the run's probe; None before it. One that left a part for a
            fine-tune is not changed.
    """
    whole = probe.share is None and arch == PATCHNET and (begun is None or begun.get("share") == 1)
    return dataclasses.replace(probe, share=1.0) if whole else probe


def is_backbone(arch: str) -> bool:
    """Whether an architecture is a network from elsewhere (``models/torchvision.py``)."""
    return arch.startswith((TORCHVISION, MODULE))


def module_of(arch: str) -> tuple[str, str]:
    """FILE.py and NAME of ``module:FILE.py:NAME``.

    Raises:
        UsageError: another spelling.
    """
    path, colon, name = arch.removeprefix(MODULE).rpartition(":")
    if not colon or not path.endswith(".py") or not name.isidentifier():
        raise UsageError(
            f"architecture {arch!r} is not of the form module:FILE.py:NAME", fix="write for example module:net.py:Net"
        )
    return path, name


def public_arch(arch: str) -> str:
    """An architecture as it may be published: without the folder of a user's file."""
    return MODULE + os.path.basename(arch.removeprefix(MODULE)) if arch.startswith(MODULE) else arch


def input_size_of(config: PretrainConfig | FinetuneConfig) -> int:
    """Side of the extractor's input in pixels."""
    return config.input_size or INPUT_SIZE


def resolution_for(size: int) -> int:
    """Width of synthetic images for an input of ``size`` pixels: a power of two, and at least twice that."""
    return 2 ** math.ceil(math.log2(2 * size))


def images_of_run(generate: GenerateConfig, pretrain: PretrainConfig) -> GenerateConfig:
    """The images in ``run``: large enough for the extractor's input, unless their resolution was chosen."""
    if generate.resolution != GenerateConfig.resolution:
        return generate
    wanted = resolution_for(input_size_of(pretrain))
    return dataclasses.replace(generate, resolution=max(generate.resolution, wanted))


def lr_of(config: PretrainConfig) -> float:
    """The learning rate: as given, else 0.03 (0.12 at size paper, as published) for sgd, 0.001 for adamw."""
    if config.lr is not None:
        return config.lr
    if config.optimizer == "adamw":
        return 1e-3
    return 0.12 if config.size == "paper" else 0.03


def switch_step(config: ContinueConfig) -> int | None:
    """The requested step of the switch; None where a rule decides."""
    asked = config.switch
    return int(asked) if asked.isascii() and asked.isdecimal() and len(asked) <= 9 else None


def fraction_of(public: str) -> float | None:
    """F of ``fraction:F``; None for other public data.

    Raises:
        UsageError: F is no number in (0, 1).
    """
    if not public.startswith(FRACTION):
        return None
    given = public.removeprefix(FRACTION)
    try:
        value = float(given)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise UsageError(
            f"public = {public!r}: {given!r} is not a number between 0 and 1",
            fix="give a fraction such as fraction:0.1",
        )
    return value


def _check_switch(config: ContinueConfig) -> None:
    step = switch_step(config)
    if step is None and config.switch not in ("plateau", "decelerator"):
        raise UsageError(
            f"[continue] switch = {config.switch!r} is neither a step nor a rule",
            fix="give plateau or decelerator, or a number of public steps",
        )
    if step is not None and step >= config.steps and config.mix == "step":
        raise UsageError(
            f"switch = {step} leaves no private step among {config.steps} steps",
            fix=f"give a switch below {config.steps}, or mix = 'public' for public steps only",
        )
    fraction_of(config.public)  # refuses one that is none
    if not config.public.strip():
        raise UsageError("public is empty", fix="give synth, fraction:0.1, or a data set such as folder:PATH")


def _check_finetune(config: FinetuneConfig) -> None:
    if config.source == "init" and config.init is None:
        raise UsageError("--from init needs a file of public weights", fix="give --init FILE.safetensors")
    if config.init is not None and config.source != "init":
        raise UsageError(
            f"--from {config.source} does not use the public weights of --init", fix="leave out one of the two flags"
        )
    if config.class_shares is not None and config.clipping == "automatic":
        raise UsageError(
            "--class-shares has no effect with --clipping automatic, which makes all gradients equally long",
            fix="leave out one of the two",
        )
    network = ("layer_order", "padding", "pooling", "norm", "input_size")
    set_here = [key for key in network if getattr(config, key) is not None]
    if config.recipe == "de2022":
        set_here.append("recipe")
    if set_here and config.source not in WITHOUT_PHASE_ONE:
        _refuse_network_setting(set_here[0], config.source)
    if config.recipe == "dp-randp" and config.source != PRETRAINED:
        raise UsageError(
            f"the recipe dp-randp starts from the pretrained extractor, not from {config.source}",
            fix="leave --from out, or give --recipe ours",
        )
    if config.head_lr is not None and not config.head_steps:
        raise UsageError("head_lr is set, but head_steps is not", fix="give head_steps too")
    if config.head_steps and any(getattr(config, name) is not None for name in ("train", "freeze", "select")):
        raise UsageError(
            "head_steps and --train, --freeze or --select exclude each other", fix="give one of them"
        )
    if config.head_steps and config.steps is not None and config.head_steps > config.steps:
        raise UsageError(
            f"head_steps = {config.head_steps} are more than the {config.steps} steps", fix="give more steps"
        )


def _check_weights(config: FinetuneConfig | PretrainConfig) -> None:
    """Public weights have a declared source, and settings that need them have them."""
    if (config.init is None) != (config.init_source is None):
        problem = "--init-source was given without --init"
        if config.init is not None:
            problem = "--init needs --init-source: you must declare the source of the weights, and that they are public"
        raise UsageError(problem, fix='give --init FILE with --init-source TEXT, such as "ImageNet-1k, from ..."')
    if config.norm == "frozen" and config.init is None:
        raise UsageError(
            "--norm frozen takes the statistics of public weights, and there are none",
            fix="give --init FILE with it, or --norm group",
        )
    if isinstance(config, PretrainConfig) and config.init and (config.random_init or config.arch == PATCHNET):
        other = "--random-init" if config.random_init else "a patchnet, which learns in a minute"
        raise UsageError(
            f"--init does not go with {other}",
            fix="leave --init out, or give --arch with it, such as --arch torchvision:resnet18",
        )


def _refuse_network_setting(key: str, source: str) -> None:
    raise UsageError(
        f"--{key.replace('_', '-')} sets a new network, but --from {source} continues an existing one",
        fix="give --from scratch or --init FILE with it, or leave it out",
    )


def data_options(config: PrivateConfig) -> dict[str, Any]:
    """The options of ``data.open_dataset`` for a stage's own data."""
    facts = {"num_classes": config.classes, "unit_column": config.unit_column}
    return facts | {"decoding": decoding_of(config), "layout": layout_of(config)}


def public_data_options(config: PrivateConfig, name: str) -> dict[str, Any]:
    """Those for a set of that name which its owner declares public: a folder is read by the same rules."""
    return {"decoding": decoding_of(config)} if name.startswith("folder:") else {}


def public_data_name(name: str) -> str:
    """A data set's name as it may be published: only the last part of a path, which may name users or projects."""
    kind, colon, path = name.partition(":")
    return f"{kind}:{os.path.basename(os.path.abspath(os.path.expanduser(path)))}" if colon and path else name


def same_data_name(one: str, other: str) -> bool:
    """Whether two names mean the same images: paths are resolved, and a MedMNIST set in another size has the same."""

    def resolved(name: str) -> str:
        kind, colon, path = name.partition(":")
        if colon and path:
            return f"{kind}:{os.path.realpath(os.path.expanduser(path))}"
        return without_size(name)

    return resolved(one) == resolved(other)


def _section(document: dict[str, Any], stage: str, file: Path) -> dict[str, Any]:
    for key in document:
        if key not in STAGE_CONFIGS:
            raise UsageError(f"{file} has a table [{key}], which is not a stage", fix=nearest(key, STAGE_CONFIGS))
    section = document.get(stage, {})
    if not isinstance(section, dict):
        raise UsageError(f"{file}: {stage} is not a table", fix=f"write [{stage}] and its settings below it")
    return section
