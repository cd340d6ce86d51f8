"""What leaves the run: the test result, read once, and ``model/``, which holds nothing but what may be released."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors

from dprandp.files import atomic_write, to_json
from dprandp.model_card import model_card
from dprandp.rundir import RunDir
from dprandp.stages.private import PrivateStage
from dprandp.vision.classifier import Classifier
from dprandp.vision.images import INPUT_SIZE, to_input
from dprandp.vision.metrics import classification_metrics

MODEL_FILES = ("model.safetensors", "config.json", "MODEL_CARD.md")
"""The allow-list of ``model/``; a test holds it."""


def evaluate(model: Classifier, stage: PrivateStage, mirror: bool) -> dict[str, Any]:
    """Measure the final model on the test split, which nothing else reads.

    Returns:
        data, title, classes, accuracy, balanced_accuracy, auc, loss, confusion, majority_accuracy (of always answering
        the test split's most frequent class), train_examples, test_examples.
    """
    spec = stage.spec
    test = stage.dataset.test()
    with stage.context.console.progress(len(test.labels), "test images") as progress:
        scores = model.eval().predict(to_input(test.images), mirror=mirror, on_batch=progress.advance)
    metrics = classification_metrics(scores, torch.from_numpy(test.labels))
    return {
        "data": spec.name,
        "title": spec.title,
        "classes": list(spec.classes),
        **metrics,
        "majority_accuracy": max(Counter(test.labels.tolist()).values()) / len(test.labels),
        "train_examples": spec.train_examples,
        "test_examples": spec.test_examples,
    }


def write_model(rundir: RunDir, model: Classifier, result: dict[str, Any]) -> None:
    """Write ``model/``: weights, how to use them, and the card.

    The training split reaches these files only through the noisy updates that made ``model`` and ``result``.
    """
    folder: Path = rundir.model_dir
    recorded = {row["stage"]: row for row in rundir.status()}
    if result.get("source") == "scratch":  # whatever else the run holds, this model was not made from it
        pretrain, generate, arch = {}, {}, result["arch"]
        extractor = recorded[result["stage"]]["config"]
    else:
        pretrain, generate = (recorded[stage]["result"] or {} for stage in ("pretrain", "generate"))
        arch, extractor = pretrain["arch"], recorded["pretrain"]["config"]
    # their cost is part of this result's epsilon, also where the model was not made from them
    others = [recorded[stage]["result"] for stage in ("probe", "finetune") if stage != result["stage"]]
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    config = {
        "format": 1,
        "arch": arch,
        "extractor": extractor,
        "classes": result["classes"],
        "input": {"size": INPUT_SIZE, "mirror": result["mirror"]},
        "result": result,
    }
    atomic_write(folder / "model.safetensors", to_safetensors(tensors))
    atomic_write(folder / "config.json", to_json(config, indent=1) + "\n")
    card = model_card(result, pretrain, generate, earlier=[other for other in others if other])
    atomic_write(folder / "MODEL_CARD.md", card)
