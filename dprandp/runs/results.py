"""The results of the stages, as ``run.json`` records them.

What is read is checked by ``directory.read``, as far as it is there; ``RunDir.result`` refuses a result that lacks a
field. Seconds are wall-clock. ε and δ are upper bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from dprandp.errors import CheckpointError
from dprandp.runs.files import Count, Fraction, Number, Text, ill_typed_entry, missing_entries, read_record
from dprandp.vision.intervals import wilson

ONE_IMAGE = "one image"
"""A result's name of the unit of privacy if each image is one."""

CONTRADICTION = "contradiction"
"""Outcome of an audit whose tests show more than was claimed."""

ALL_WEIGHTS = "all"
"""``trained_weights`` of a result where nothing is left out."""


@dataclass(frozen=True, kw_only=True)
class GenerateResult:
    """Of ``generate``."""

    process: Text
    count: Count  # images
    resolution: Count  # pixels, width and height
    images_per_second: Number | None  # None where all were there already
    seconds: Number


@dataclass(frozen=True, kw_only=True)
class Measures:
    """The evaluation of an extractor (``pretrain/contrastive.py``); None where too few images were held out."""

    knn_accuracy: Fraction | None
    linear_accuracy: Fraction | None
    alignment: Number | None  # in [0, 4]
    uniformity: Number | None  # in [-8, 0]
    effective_rank: Number | None


@dataclass(frozen=True, kw_only=True)
class Extractor(Measures):
    """What is known about an extractor; also on the card of a prior that ships."""

    arch: Text
    random_init: bool
    parameters: Count
    feature_dim: Count
    steps: Count
    loss: Number | None  # None where nothing was trained by gradients
    optimizer: Text | None = None  # of a training by gradients
    precision: Text | None = None  # in which it computes; older cards do not say
    replaced: Text | None = None  # layers of a network from elsewhere that were replaced, and by what


@dataclass(frozen=True, kw_only=True)
class PretrainResult(Extractor):
    """Of ``pretrain``; where there are two extractors, of the one for colour."""

    views_per_second: Number | None  # of a training by gradients
    seconds: Number
    prior: Text | None = None  # name of the shipped prior, if it was one
    prior_sha256: Text | None = None
    prior_images: Count | None = None  # that the prior was learned from
    grey: Measures | None = None  # of the second extractor
    init_file: Text | None = None  # name of a file of public weights, if the extractor has these
    init_sha256: Text | None = None
    init_source: Text | None = None  # where they are from, in the user's words
    init_origin: Text | None = None  # where they are from private steps, by the file's own description: that


Kappa = Annotated[float, lambda value: -1 <= value <= 1]
Interval = Annotated[tuple[Number, ...], lambda value: len(value) == 2 and -1 <= value[0] <= value[1] <= 1]
"""Low and high end, of 95 %."""


@dataclass(frozen=True, kw_only=True)
class ClassFigures:
    """Of one class or label on the test split; None where it has no image there, or is never predicted."""

    recall: Fraction | None
    recall_interval: Interval | None
    precision: Fraction | None
    precision_interval: Interval | None
    auc: Fraction | None = None  # of one of several labels of an image; None where it is on all images, or on none
    auc_interval: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Of a model on the test split, once. Figures with a default are missing in older results.

    Where images have several labels (multi-label), figures are means over the labels.
    """

    data: Text  # as given to --data
    title: Text  # of the data set
    classes: tuple[str, ...]
    multi_label: bool | None = None  # classes are labels, of which an image may have several
    class_shares: tuple[Fraction, ...] | None = None  # declared ones, by which the loss was weighted
    accuracy: Fraction
    balanced_accuracy: Fraction  # mean recall
    auc: Fraction | None  # one class against the rest; None where a single class occurs
    loss: Number  # mean cross-entropy, nats
    confusion: tuple[tuple[Count, ...], ...] | None  # images: true classes, predicted ones; None of several labels
    majority_accuracy: Fraction  # of always answering the most frequent class, or value of each label
    sensitivity: Fraction | None = None  # of two classes, the recall of the second; None for more classes
    specificity: Fraction | None = None  # and of the first
    kappa: Kappa | None = None  # of classes that are grades, with quadratic weights
    per_class: tuple[ClassFigures, ...] | None = None
    intervals: dict[str, Interval] | None = None  # of the fractions above, by name
    interval_method: Text | None = None  # in words
    shared_units_allowed: bool | None = None  # units may have images in both splits, as the user declared
    train_examples: Count  # images
    test_examples: Count
    input_size: Count | None = None  # side of the images that the model sees, in pixels
    split_rule: Text | None = None  # how the splits were made, where that was declared
    decoding: Text | None = None  # declared rules by which image files were read
    replaced: Text | None = None  # as in ``Extractor``

    def interval(self, figure: str) -> tuple[float, float] | None:
        """Low and high end of a figure; None where it has none. Of accuracy always: by Wilson where none is stored."""
        found = (self.intervals or {}).get(figure)
        if found is None and figure == "accuracy" and self.test_examples:
            return wilson(self.accuracy, self.test_examples)
        return found and (found[0], found[1])


@dataclass(frozen=True, kw_only=True)
class OtherCharge:
    """Charges of the run's ledger to another mechanism than the stage's own."""

    stage: Text
    attempt: Count
    sample_rate: Number
    noise_multiplier: Number
    clip_norm: Number
    charged_steps: Count


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """The privacy of a stage's release."""

    epsilon: Number  # of everything that the run has released by then
    delta: Number
    epsilon_target: Number  # of the stage
    epsilon_total: Number  # the run's budget
    accountant: Text
    noise_multiplier: Number  # σ, noise std over clip norm; 0 without privacy
    sample_rate: Number  # q
    steps: Count  # T, planned
    attempt: Count  # from 1: how often the stage was begun anew
    charged_steps: Count
    lost_steps: Count  # of these, not part of the model
    clip_norm: Number  # C, L2
    views: Count  # K
    expected_batch: Number  # qN
    adjacency: Text
    unit: Text  # of privacy, in words: ONE_IMAGE, or such as "one patient (column patient)"
    train_units: Count  # N
    public_part: Text | None = None  # of the training images, declared public; in words
    noise: Text  # gaussian or discrete
    also_charged: tuple[OtherCharge, ...]
    ledger_head: Text  # hash of the ledger's last line by then
    random: Text  # os-entropy or insecure-seed
    private: bool  # False where ε is void or infinite
    device: Text


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The tuning of a run's probe."""

    on: Text  # synthetic, private or a data set's name
    trials: Count  # expected ones where on is private
    charged_epsilon: Number  # of tuning alone; part of the run's ε
    settings: tuple[str, ...]  # names
    used: bool  # the stage ran with the chosen ones


@dataclass(frozen=True, kw_only=True)
class PrivateResult(Guarantee, Evaluation):
    """Of a stage that releases a model made from private images."""

    stage: Text
    lr: Number
    momentum: Number
    released: Text  # which iterate
    mirror: bool  # features are averaged over an image and its mirror image
    precision: Text
    tuned: Tuned | None
    tuned_on: Text | None  # as the user declares it
    seconds: Number
    model_sha256: Text | None = None  # of the released weights; None before they were written


@dataclass(frozen=True, kw_only=True)
class ProbeResult(PrivateResult):
    """Of ``probe``."""

    share: Fraction  # of the run's ε
    extractor_colour: Text  # of the images that the extractor was learned from: rgb, grey or both


@dataclass(frozen=True, kw_only=True)
class Refit:
    """The second mechanism of a fine-tune: the head alone, full batch."""

    noise_multiplier: Number
    sample_rate: Number
    steps: Count
    lost_steps: Count  # charged, not part of the model
    clip_norm: Number
    lr: Number
    momentum: Number


@dataclass(frozen=True, kw_only=True)
class FinetuneResult(PrivateResult):
    """Of ``finetune``."""

    refit: Refit | None
    source: Text  # the starting point: probe, pretrain, scratch or init
    arch: Text
    clipping: Text  # norm, automatic or rescaled
    trained_weights: Text  # in words
    optimizer: Text  # in words
    extractor_scale: Number
    recipe: Text | None = None  # a published one that was used, in words
    head_steps: Count | None = None  # the first steps, which trained the head and the last norm alone
    head_lr: Number | None = None  # learning rate of these
    init_file: Text | None = None  # as in ``PretrainResult``
    init_sha256: Text | None = None
    init_source: Text | None = None
    init_origin: Text | None = None


@dataclass(frozen=True, kw_only=True)
class PublicTraining:
    """The public part of ``continue``."""

    images: Text  # in words
    examples: Count
    steps: Count  # that were public alone
    mix: Text
    switch: Text  # in words
    head: Text  # whether the public classes are the private ones
    loss: Number | None  # on held-out public images at the last evaluation


@dataclass(frozen=True, kw_only=True)
class ContinueResult:
    """Of ``continue`` with public steps only."""

    stage: Text
    arch: Text
    precision: Text
    public_training: PublicTraining
    seconds: Number


@dataclass(frozen=True, kw_only=True)
class PrivateContinueResult(PrivateResult, ContinueResult):
    """Of ``continue`` with private steps."""

    share: Fraction  # of the run's remaining ε
    clipping: Text
    optimizer: Text  # in words


StageResult = GenerateResult | PretrainResult | ContinueResult | ProbeResult | FinetuneResult

RESULTS: dict[str, type[StageResult]] = {
    "generate": GenerateResult,
    "pretrain": PretrainResult,
    "continue": ContinueResult,
    "probe": ProbeResult,
    "finetune": FinetuneResult,
}


def kind_of(stage: str, record: Mapping[str, Any]) -> type[StageResult]:
    """The type of a recorded result."""
    return PrivateContinueResult if stage == "continue" and "epsilon" in record else RESULTS[stage]


def wrong_entry(stage: str, record: Mapping[str, Any]) -> str | None:
    """The name of an entry of a recorded result that is not of its type, or None; missing ones are not wrong."""
    wrong = ill_typed_entry(kind_of(stage, record), record)
    confusion = record.get("confusion")
    if wrong is not None or not issubclass(kind_of(stage, record), PrivateResult):
        return wrong
    if (confusion is None) != bool(record.get("multi_label")) and "confusion" in record:
        return "confusion"
    if confusion is not None and len({len(confusion), len(record.get("classes", confusion)), *map(len, confusion)}) > 1:
        return "confusion"
    classes = record.get("classes", confusion or ())
    for name in ("per_class", "class_shares"):
        if record.get(name) and len(record[name]) != len(classes):
            return name
    return None


def read_result(stage: str, record: Mapping[str, Any]) -> StageResult:
    """The result of a finished stage, from values that ``wrong_entry`` finds right.

    Raises:
        CheckpointError: it lacks something; the message names what.
    """
    kind = kind_of(stage, record)
    gaps = missing_entries(kind, record)
    if record.get("prior") is not None:
        gaps += sorted({"prior_sha256", "prior_images"} - record.keys())
    if gaps:
        raise CheckpointError(
            f"the recorded result of stage {stage!r} lacks {', '.join(gaps)}",
            fix="use the version of dprandp that wrote it, or run the stage again with --overwrite; what was spent "
            "stays spent",
        )
    return read_record(kind, dict(record))
