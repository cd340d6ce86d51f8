"""The state of ``continue``, and its public work: tasks, gradients, evaluations.

Nothing in this file reads a private image; private images are only compared with a public set that declares as many
images of the same size, to refuse it if equal. The parameters after private steps are released anyway.

* *Labelled* public data (a declared part of the training split, or another data set): their own classes. Where these
  are the private classes, private and public steps share one head.
* *Synthetic* images: each of some hundred images is a class of its own, and random views of it have to be recognised
  (exemplar networks, Dosovitskiy et al. 2014, arXiv 1406.6909). The loss is of one view at a time, as the theory of the
  switch requires for the gradients' covariance and the Hessian.

All random choices are functions of (seed, step).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from dprandp.config.schema import (
    SYNTHETIC,
    ContinueConfig,
    PretrainConfig,
    data_options,
    fraction_of,
    public_data_options,
    same_data_name,
)
from dprandp.continual.switching import Look, LossTerms, loss_terms
from dprandp.data import DataSpec, open_dataset, public_part, without_public_part
from dprandp.dpsgd.masks import EXTRACTOR
from dprandp.dpsgd.stage import refuse_other_labels
from dprandp.dpsgd.training_data import declare_public, refuse_public, use_as_public
from dprandp.errors import UsageError
from dprandp.generate import load_images
from dprandp.models.classifier import Classifier
from dprandp.models.optimizers import Optimizer, OptimizerSettings, restore
from dprandp.models.precision import autocast
from dprandp.models.whitening import PooledOnly
from dprandp.pretrain import STAGE as PRETRAIN
from dprandp.pretrain import input_size, load_extractor
from dprandp.privacy.clipping import refuse_cross_example_layers
from dprandp.runs.context import Context
from dprandp.vision.images import as_declared, colour_of, to_input
from dprandp.vision.views import ContrastiveViews, private_views

HELD_OUT = 0.2
"""Fraction of labelled public images that are held out to decide the switch."""
MOST_HELD_OUT = 512


@dataclass(frozen=True)
class PublicTask:
    """Images, labels and how views are drawn."""

    title: str  # of the images, in words
    images: Tensor  # uint8 [n, 3, R, R]; R is ``size``, or larger for synthetic images
    labels: Tensor  # int64 [n]
    classes: int
    shared: bool  # whether the classes are the private ones, in the same order
    held_out: tuple[Tensor, Tensor]  # uint8 [v, 3, size, size], int64 [v]
    flip: bool  # whether a mirrored image keeps its label
    spec: DataSpec  # of the private data, as declared; synthetic images get the same channels and size
    size: int  # side of the extractor's input in pixels
    synthetic: bool  # whether the images are those of a random process
    seed: int

    @property
    def examples(self) -> int:
        """Number of public training images."""
        return len(self.images)

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Views of a random batch and their labels: uint8 [size, 3, S, S], int64 [size]; with replacement."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step * 7_919 + 31) % 2**63)
        chosen = torch.randint(len(self.images), (size,), generator=generator)
        if self.synthetic:
            views = _synthetic_views(self.images[chosen], self.size, self.spec, generator)
        else:
            views = private_views(self.images[chosen], 1, generator, flip=self.flip, augment_single=True)[:, 0]
        return views, self.labels[chosen]


def make_task(config: ContinueConfig, context: Context, spec: DataSpec) -> PublicTask:
    """The task that a configuration names, for private data of these declared facts.

    Raises:
        UsageError: unknown public data, or private data of which all are declared public.
        InputError: files are missing or unusable.
    """
    if config.public == SYNTHETIC:
        return _synthetic(config, context, spec)
    fraction = fraction_of(config.public)
    if fraction is None and same_data_name(config.public, config.data):
        raise _private_and_public(config)
    name, facts = config.public, public_data_options(config, config.public)
    if fraction is not None:
        name, facts = config.data, data_options(config) | {"unit_column": None}
    dataset, size = open_dataset(name, context.data_dir, download=context.download, **facts), input_size(context)
    dataset.for_input(size)
    refuse_other_labels("continue", dataset.spec)
    if fraction is None:
        own = open_dataset(config.data, context.data_dir, download=context.download, **data_options(config))
        own.for_input(size)
        if dataset.shares_images_with(own):
            raise _private_and_public(config)
        use_as_public(context.rundir, dataset)
        split, part = dataset.train(), f"images of {dataset.spec.name}"
    else:
        refuse_public(context.rundir, without_public_part(dataset, fraction, config.seed))  # was it another part?
        split, hashes = public_part(dataset, fraction, config.seed)
        declare_public(context.rundir, hashes)
        part = f"training images of {dataset.spec.name}, a random part by a public seed"
    title = f"{len(split.labels)} {part}, declared public by the user"
    order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(config.seed))
    held = min(MOST_HELD_OUT, max(1, int(HELD_OUT * len(order))))
    if held >= len(order):
        raise UsageError(f"{title}: too few to hold some out", fix="declare more images public")
    images, labels = to_input(split.images, size)[order], torch.from_numpy(split.labels)[order]
    return PublicTask(
        title=title,
        images=images[held:],
        labels=labels[held:],
        classes=len(dataset.spec.classes),
        shared=dataset.spec.classes == spec.classes,
        held_out=(images[:held], labels[:held]),
        flip=dataset.spec.flip_ok,
        spec=spec,
        size=size,
        synthetic=False,
        seed=config.seed,
    )


def _private_and_public(config: ContinueConfig) -> UsageError:
    other = "" if config.data == config.public else f": {config.public} holds some of its images"
    return UsageError(
        f"{config.data} is given both as private and as public data{other}",
        fix="declare a part of it public: --public fraction:0.1",
    )


def _synthetic(config: ContinueConfig, context: Context, spec: DataSpec) -> PublicTask:
    images = torch.from_numpy(load_images(context.rundir.stage_dir("generate"), config.instances))
    images, labels = images.permute(0, 3, 1, 2).contiguous(), torch.arange(len(images))
    if len(images) < 2:
        raise UsageError("the public task needs at least two images", fix="make more images, or give more instances")
    held = torch.arange(min(len(images), MOST_HELD_OUT))
    size, generator = input_size(context), torch.Generator().manual_seed(config.seed + 1)
    views = _synthetic_views(images[held], size, spec, generator)
    return PublicTask(
        title=f"{len(images)} synthetic images of this run, each a class",
        images=images,
        labels=labels,
        classes=len(images),
        shared=False,
        held_out=(views, labels[held]),
        flip=spec.flip_ok,
        spec=spec,
        size=size,
        synthetic=True,
        seed=config.seed,
    )


def _synthetic_views(images: Tensor, size: int, spec: DataSpec, generator: torch.Generator) -> Tensor:
    """One view each, with the declared channels and size of the private data: uint8 [b, 3, size, size]."""
    views = ContrastiveViews(size, flip=0.5 if spec.flip_ok else 0.0)
    pixels = (views.apply(images, views.draw(images, generator)) * 255).round_().to(torch.uint8)
    return as_declared(pixels, channels=spec.channels, height=spec.height, width=spec.width)


PUBLIC_HEAD = "public_head"
TERM_EXAMPLES = 32
"""Public examples that loss terms are estimated on."""
TERM_PROBES = 4
HELD_OUT_BATCH = 256


def make_training(
    config: ContinueConfig, context: Context, spec: DataSpec, task: PublicTask
) -> tuple[Training, PretrainConfig]:
    """A training at its start, from the run's pretrained extractor; and that one's configuration."""
    colour = colour_of(spec.channels)
    extractor, built_from = load_extractor(context, colour, PRETRAIN, precision=config.precision)
    model = Classifier(extractor, PooledOnly(extractor.feature_dim), len(spec.classes)).to(context.device)
    refuse_cross_example_layers(model)
    return Training(config, model, task), built_from


class Training:
    """Parameters, their moving average, and Adam; public and private steps change them in turn.

    Attributes:
        parameters: name -> float32: ``extractor.*``, ``head``, and ``public_head`` where the task has other classes.
        average: name -> float32, the moving average since the switch.
        optimizer: AdamW; its state is kept over the switch, except for the first moment.
        looks: evaluations of the public images, so far.
        public_names, private_names: the parameters with public, and with private gradients.
    """

    def __init__(self, config: ContinueConfig, model: Classifier, task: PublicTask) -> None:
        self.config, self.model, self.task = config, model, task
        self.device = model.head.device
        self.parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
        self.private_names = list(self.parameters)
        if not task.shared:
            self.parameters[PUBLIC_HEAD] = model.head.new_zeros(len(model.head), task.classes).detach()
        self.public_names = [name for name in self.parameters if name != "head" or task.shared]
        self.average = {name: value.clone() for name, value in self.parameters.items()}
        self.settings = OptimizerSettings("adam", weight_decay=config.weight_decay)
        self.optimizer = Optimizer(self.settings, self.parameters)
        self.looks: list[Look] = []

    def state(self) -> dict[str, Tensor]:
        """The tensors that steps change, by name; with ``looks``, all that the next step depends on."""
        tensors = {f"parameters.{name}": value for name, value in self.parameters.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        return tensors | self.optimizer.state

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the result of ``state``; the caller has checked the tensors."""
        restore(self.state(), tensors)

    def loss_of_each(self, parameters: Mapping[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """float32 [n], cross-entropy of public views (uint8 [n, 3, 32, 32]), one by one.

        Args:
            parameters: those of ``public_names``.
        """
        own = {name.removeprefix(EXTRACTOR): value for name, value in parameters.items() if name.startswith(EXTRACTOR)}
        extractor = self.model.extractor
        with autocast(extractor, self.device):
            features = functional_call(extractor, own, (extractor.normalise(images),))
        head = parameters["head" if self.task.shared else PUBLIC_HEAD]
        return functional.cross_entropy(self.model.whitener(features.float()) @ head, labels, reduction="none")

    def public_gradient(self, step: int) -> dict[str, Tensor]:
        """The mean gradient of a batch of public views, drawn by (seed, step)."""
        images, labels = self._on_device(*self.task.batch(step, self.config.public_batch_size))
        leaves = {name: self.parameters[name].detach().requires_grad_() for name in self.public_names}
        loss = self.loss_of_each(leaves, images, labels).mean()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def update(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        """One step of AdamW with gradients of public images, or with noisy ones."""
        self.optimizer.step(gradients, lr)

    def switch(self) -> None:
        """Begin private steps: reset the first moment, keep the second (Bu et al. 2024), and start to average."""
        self.optimizer.reset_first_moment()
        for name, value in self.average.items():
            value.copy_(self.parameters[name])

    def average_in(self, private_step: int) -> None:
        """Update the average with the parameters, after private step ``private_step`` (from 0)."""
        decay = min(self.config.ema, (1 + private_step) / (10 + private_step))
        for name, value in self.average.items():
            value.lerp_(self.parameters[name], 1 - decay)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss of the held-out public images."""
        images, labels = self.task.held_out
        own = {name: self.parameters[name] for name in self.public_names}
        total = 0.0
        for start in range(0, len(labels), HELD_OUT_BATCH):
            rows = slice(start, start + HELD_OUT_BATCH)
            total += float(self.loss_of_each(own, *self._on_device(images[rows], labels[rows])).double().sum())
        return total / len(labels)

    def terms(self, step: int, noise_multiplier: float, batch: float) -> LossTerms:
        """The loss terms of a private step from here, estimated on public views; see ``switching.py``."""
        images, labels = self._on_device(*self.task.batch(-1 - step, TERM_EXAMPLES))
        return loss_terms(
            self.loss_of_each,
            {name: self.parameters[name] for name in self.public_names},
            images,
            labels,
            noise_multiplier=noise_multiplier,
            batch=batch,
            probes=TERM_PROBES,
            generator=torch.Generator().manual_seed(self.config.seed * 1_000_003 + step),
        )

    def _on_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images.to(self.device), labels.to(self.device)
