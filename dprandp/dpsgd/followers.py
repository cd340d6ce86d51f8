"""What the ranks beside rank 0 do: the tasks that the stages ask of them, and nothing else.

They hold no run directory, read no data set and no ledger, draw nothing, and print nothing but why they had to stop.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from dprandp import generate
from dprandp.dpsgd import clipped_sums
from dprandp.dpsgd import features as extraction
from dprandp.errors import InputError
from dprandp.models.classifier import Classifier
from dprandp.pretrain import wrn
from dprandp.runs.console import Console
from dprandp.runs.context import prepare_device
from dprandp.runs.parallel import Follower

Facts = dict[str, Any]
Tensors = dict[str, Tensor]


def serve(follower: Follower, console: Console) -> int:
    """Serve the leader until it ends; returns the exit code it has.

    Args:
        follower: this rank.
        console: with --debug it prints the tracebacks of tasks that fail.

    Raises:
        RankLostError: the leader is gone.
    """
    prepare_device("cpu")
    work = _Work(follower)
    training = work.training
    tasks = {
        generate.RENDER: work.render,
        extraction.MODEL: work.take_model,
        extraction.FEATURES: work.features,
        clipped_sums.SETTINGS: work.begin_sums,
        clipped_sums.PARAMETERS: work.take_parameters,
        clipped_sums.SHARE: work.share_of_sum,
        wrn.IMAGES: lambda facts, tensors: training.images(facts, tensors, device_of(facts["device"])),
        wrn.BEGIN: training.begin,
        wrn.STEP: training.step,
    }
    return follower.serve(tasks, console.described)


def device_of(kind: str) -> torch.device:
    """This rank's device of the leader's kind: the CPU, or the accelerator whose number is its own on its machine.

    Raises:
        InputError: this machine has none.
    """
    if kind == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count()
    if not found:
        raise InputError("its machine has no CUDA device, rank 0 has", fix="give --device cpu, or use other machines")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % found)


class _Work:
    """The tasks, and what one task leaves for the next."""

    def __init__(self, follower: Follower) -> None:
        self.training = wrn.SharedTraining(follower)
        self._model: Classifier
        self._sums: clipped_sums.ClippedSums
        self._parameters: Tensors
        self._masks: Tensors
        self._step: int

    def render(self, facts: Facts, tensors: Tensors) -> Tensors:
        return generate.rendered_for(facts["job"])

    def take_model(self, facts: Facts, tensors: Tensors) -> None:
        self._model = extraction.told_model(facts, tensors, device_of(facts["device"]))

    def features(self, facts: Facts, tensors: Tensors) -> Tensors:
        whitener = self._model.whitener if facts["whiten"] else None
        made = extraction.share_of_features(self._model.extractor, tensors["images"], whitener, facts["mirror"])
        return {"features": made}

    def begin_sums(self, facts: Facts, tensors: Tensors) -> None:
        self._sums = clipped_sums.ClippedSums(self._model, clipped_sums.SumSettings(**facts))

    def take_parameters(self, facts: Facts, tensors: Tensors) -> None:
        device = self._model.head.device
        given = {name: value.to(device) for name, value in tensors.items()}
        masks = [name for name in given if name.startswith(clipped_sums.MASK)]
        self._masks = {name.removeprefix(clipped_sums.MASK): given.pop(name) for name in masks}
        self._parameters = given
        self._step = facts["step"]

    def share_of_sum(self, facts: Facts, tensors: Tensors) -> Tensors:
        batch = clipped_sums.Batch(**tensors)
        return self._sums.of(self._parameters, self._step, batch, self._masks)
