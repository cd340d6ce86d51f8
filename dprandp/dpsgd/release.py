"""The releases of a run: the result on the test split, and ``model/``, which holds only what may be released."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from dprandp.config.schema import WITHOUT_PHASE_ONE, PretrainConfig, as_dict, public_arch, public_data_name
from dprandp.dpsgd.features import features_of_test
from dprandp.dpsgd.stage import PrivateStage
from dprandp.errors import UsageError
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import replaced_in
from dprandp.models.precision import precision_of
from dprandp.report.card import model_card
from dprandp.runs.checkpoint import tensors_to_bytes
from dprandp.runs.directory import RunDir
from dprandp.runs.files import atomic_write, to_json
from dprandp.runs.results import (
    ClassFigures,
    ContinueResult,
    Evaluation,
    FinetuneResult,
    GenerateResult,
    PretrainResult,
    PrivateResult,
)
from dprandp.vision.metrics import classification_metrics, multi_label_metrics

MODEL_FILES = ("model.safetensors", "config.json", "MODEL_CARD.md")
"""The allow-list of ``model/``."""

MODEL_FORMAT = 5
"""Format 1 had no precision; format 2 had a patchnet whose roots were taken after pooling. Since format 5
the whitening has the network's precision. Earlier formats are refused by name."""


def evaluate(model: Classifier, stage: PrivateStage, mirror: bool, *, keep: bool) -> Evaluation | None:
    """Evaluate the stage's final model on the test split, once; the result chooses nothing.

    Args:
        keep: keep the features in ``private/``; for an extractor that a further probe will have too.

    Returns:
        None on ranks other than rank 0.
    """
    spec = stage.spec
    test = stage.dataset.test()
    features = features_of_test(stage, model.eval().extractor, model.whitener, test.images, mirror=mirror, keep=keep)
    if not stage.context.ranks.is_first:
        return None
    scores = features @ model.head.detach().cpu()
    units = stage.dataset.test_units()
    if spec.multi_label:
        metrics = multi_label_metrics(scores, torch.from_numpy(test.labels), units)
    else:
        metrics = classification_metrics(scores, torch.from_numpy(test.labels), units, ordinal=spec.ordinal)
    if spec.unit_column is not None and units is None:
        metrics["interval_method"] += "; the test split names no units, so each of its images counts as independent"
    metrics["per_class"] = tuple(ClassFigures(**each) for each in metrics["per_class"])
    return Evaluation(
        data=stage.budget.data,
        title=spec.title,
        classes=spec.classes,
        multi_label=spec.multi_label or None,
        class_shares=spec.class_shares,
        **metrics,
        shared_units_allowed=stage.shared_units or None,
        train_examples=spec.train_examples,
        test_examples=spec.test_examples,
        input_size=model.extractor.input_size,
        split_rule=spec.split_rule or None,
        decoding=str(spec.decoding) or None,
        replaced=replaced_in(model.extractor),
    )


def tensors_of(model: Classifier) -> dict[str, Tensor]:
    """Copies of a model's parameters and buffers, for ``refuse_changed``."""
    return {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}


def refuse_changed(before: Mapping[str, Tensor], model: Classifier, trained: Collection[str]) -> None:
    """Refuse (UsageError) a model of which other tensors than the trained ones changed since: these would be released,
    and have no noise.

    No network of this package does so, and a trial on noise finds most networks from elsewhere that do.
    """
    after = dict((*model.named_parameters(), *model.named_buffers()))
    changed = [name for name in before if name not in trained and not torch.equal(before[name], after[name])]
    if changed:
        raise UsageError(
            f"the network has changed its state while it computed on the data ({', '.join(changed[:3])}): what they "
            "hold now is not noisy, and would be part of the model; nothing is released",
            fix="take what keeps state out of the network's code, and start a new --run: what was spent stays spent",
        )


AnyResult = TypeVar("AnyResult", bound=PrivateResult)


def _alone(result: PrivateResult) -> bool:
    """Whether the model is of no other stage of the run."""
    return isinstance(result, FinetuneResult) and result.source in WITHOUT_PHASE_ONE


def card_of(rundir: RunDir, result: PrivateResult, shape: tuple[int, int, int]) -> str:
    """The card of the model that a stage of a run has made; ``shape``: height, width, channels of the data's images."""
    if _alone(result):
        return model_card(result, None, None, shape=shape)
    continued = None if isinstance(result, ContinueResult) else rundir.result(ContinueResult)
    before = rundir.result(PretrainResult), rundir.result(GenerateResult), continued
    return model_card(result, *before, shape=shape)


def _published(config: PretrainConfig) -> dict[str, Any]:
    """An extractor's configuration without the folders of a user's files."""
    init = config.init and os.path.basename(config.init)
    return as_dict(replace(config, arch=public_arch(config.arch), init=init))


def coarse_seconds(started: float) -> float:
    """Seconds since ``started``, a value of ``time.perf_counter``, to one significant digit; 1 at least.

    A private stage takes as long as the sizes of the private image files, and the batches that were drawn, make it.
    Results are published, so they say no more of that than its order of magnitude.
    """
    return float(f"{max(1.0, time.perf_counter() - started):.0e}")


def write_model(stage: PrivateStage, model: Classifier, result: AnyResult) -> AnyResult:
    """Write ``model/``: weights, the card, and how to use them (``config.json``, last: it holds the others' hashes).

    No file has the path of the data.

    Returns:
        The result with the hash of the weights: the ledger seals it, and so the weights that it is about.
    """
    rundir = stage.context.rundir
    folder = rundir.model_dir
    arch = result.arch if _alone(result) else rundir.result(PretrainResult).arch
    weights = tensors_to_bytes(model.state_dict())
    sealed = replace(result, model_sha256=hashlib.sha256(weights).hexdigest())
    result = replace(sealed, data=public_data_name(result.data))
    card = card_of(rundir, result, stage.spec.image_shape)
    content = {"model.safetensors": weights, "MODEL_CARD.md": card.encode("utf-8")}
    config = {
        "format": MODEL_FORMAT,
        "arch": arch,
        "extractor": _published(model.extractor.built_from),  # of two, the one that the model holds
        "precision": precision_of(model.extractor),
        "classes": result.classes,
        "input": {
            "size": model.extractor.input_size,
            "mirror": result.mirror,
            "shape": list(stage.spec.image_shape),
            "decoding": stage.spec.decoding.as_dict(),
        },
        "result": result,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in content.items()},
    }
    for name, data in content.items():
        atomic_write(folder / name, data)
    atomic_write(folder / "config.json", to_json(config, indent=1) + "\n")
    return sealed
