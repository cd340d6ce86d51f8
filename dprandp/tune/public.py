"""Settings chosen on public images, under the noise that the private data would get: no privacy cost.

**The noise.** The best settings depend on the ratio of noise to the signal of N examples. So with n < N public examples
the noise of a step's sum is multiplied by n/N. The held-out public images decide; the default is kept unless another
setting is right on more of them by a standard error of the difference.

**The synthetic task.** Classes are groups of synthetic images, drawn at random, ``INSTANCES`` in all; the examples of
an image are random crops of it, so the images of a class share only their label. (The networks that generated the
images cannot serve as classes: linear heads stay at chance level.)
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from dprandp.config.schema import ProbeConfig, data_options, public_data_options
from dprandp.data import DataSpec, open_dataset
from dprandp.dpsgd.budget import default_delta
from dprandp.dpsgd.features import placed
from dprandp.dpsgd.stage import refuse_other_labels
from dprandp.dpsgd.training_data import use_as_public
from dprandp.errors import InputError
from dprandp.generate import open_images
from dprandp.models.extractor import extract
from dprandp.models.whitening import Whitener
from dprandp.pretrain import input_size
from dprandp.privacy.clipping import clipped_softmax_sum
from dprandp.privacy.gaussian_dp import gaussian_dp_mu
from dprandp.probe import public_part
from dprandp.probe.head import HeadSettings, begin_head, default_lr, released_head, update_head
from dprandp.runs.context import Context
from dprandp.runs.tuning import SYNTHETIC, Chosen, PublicTuning, Simulated, Tried
from dprandp.tune.settings import TuneConfig, as_probe, private_data, probe_epsilon, settings_for
from dprandp.vision.images import ImageSet, as_declared, random_crops, to_input

INSTANCES = 40
"""Synthetic images of a task, in all classes together; at least two in each."""

FIT, HELD_OUT = 2000, 500
"""Most public examples to fit, and to decide by."""

SEED = 2
"""Added to the seed for the public task, so that its crops differ from the whitener's."""


def choose_publicly(
    config: ProbeConfig, tune: TuneConfig, context: Context, asked: dict[str, Any]
) -> PublicTuning:
    """Try settings on public images; of the private data only the declaration is used.

    The exception: a public set that declares as many images of the same size is compared with them, and refused if
    equal.
    """
    started = time.perf_counter()
    dataset = open_dataset(config.data, context.data_dir, **data_options(config) | {"unit_column": None})
    dataset.for_input(input_size(context))
    spec = dataset.spec
    refuse_other_labels("tune", spec)
    epsilon = probe_epsilon(config)
    delta = config.delta or default_delta(spec.train_examples, spec.published_delta)
    mu = gaussian_dp_mu(epsilon, delta) if math.isfinite(epsilon) else math.inf
    default = config.lr or default_lr(epsilon, delta, spec.train_examples, config.steps, config.clip_norm)
    features, labels, classes, cut, whitener = _public_task(config, tune, context, spec)
    settings = settings_for(config, whitener.components)
    generator = torch.Generator().manual_seed(config.seed + SEED)
    count = spec.train_examples
    order = [0, *(1 + torch.randperm(len(settings) - 1, generator=generator)).tolist()][: tune.trials]
    rights: dict[int, Tensor] = {}
    with context.console.progress(len(order), "settings") as progress:
        for index in order:
            setting = settings[index]
            seen = whitener.cut(features, setting.dims)
            rule = HeadSettings(default * setting.lr_factor, config.momentum, config.released)
            head = simulate(
                seen[:cut], labels[:cut], classes, setting.steps, config.clip_norm, mu, count, rule, generator
            )
            rights[index] = ((seen[cut:] @ head).argmax(dim=1) == labels[cut:]).cpu()
            progress.advance(1)
    best = better_than_default(rights)
    accuracy = {index: float(right.to(torch.float32).mean()) for index, right in rights.items()}
    tried = {
        index: Tried(**vars(settings[index]), lr=default * settings[index].lr_factor, accuracy=accuracy[index])
        for index in order
    }
    return PublicTuning(
        on=tune.on,
        trials=tune.trials,
        chosen=Chosen(tried[best].lr, tried[best].steps, tried[best].dims),
        accuracy=accuracy[best],
        default_accuracy=accuracy[0],
        charged_epsilon=0.0,
        simulated=Simulated(epsilon=epsilon, delta=delta, train_examples=count),
        fitted_examples=cut,
        held_out_examples=len(labels) - cut,
        tried=tuple(tried.values()),
        seconds=round(time.perf_counter() - started, 2),
        asked=asked,
    )


def better_than_default(rights: dict[int, Tensor]) -> int:
    """Index of the setting to take, from which held-out examples (bool [m]) each one got right; 0 is the default.

    The one with the most right answers, if it is right where the default is wrong in b cases, the other way round in c,
    and b − c ≥ √(b + c), the standard error of that difference (McNemar 1947); else 0.
    """
    best = max(rights, key=lambda index: (int(rights[index].sum()), -index))
    gained = int((rights[best] & ~rights[0]).sum())
    lost = int((rights[0] & ~rights[best]).sum())
    return best if gained - lost >= math.sqrt(gained + lost) and gained > lost else 0


def simulate(
    features: Tensor,
    labels: Tensor,
    classes: int,
    steps: int,
    clip_norm: float,
    mu: float,
    examples: int,
    settings: HeadSettings,
    generator: torch.Generator,
) -> Tensor:
    """The probe's arithmetic on public features, with the signal-to-noise ratio of a private data set.

    Args:
        features: float32 [n, d], unit norm, *public*, on the device that computes. labels: int64 [n], there too.
        mu: of the whole private fit, so that σ = √T/μ; inf for no noise.
        examples: N of the private data. The sum over n examples gets noise of std σ C n/N: μN is what matters.
        generator: seeded, of the CPU; this noise protects nothing.
    """
    count = len(features)
    noise_std = math.sqrt(steps) / mu * clip_norm * count / examples
    state = begin_head(torch.zeros(features.shape[1], classes, device=features.device))
    for number in range(steps):
        clipped = clipped_softmax_sum(features, labels, state["head"], clip_norm)
        noise = noise_std * torch.randn(clipped.shape, generator=generator).to(clipped.device)
        update_head(state, (clipped + noise) / count, settings, number, steps)
    return released_head(state, settings)


def _public_task(
    config: ProbeConfig, tune: TuneConfig, context: Context, spec: DataSpec
) -> tuple[Tensor, Tensor, int, int, Whitener]:
    """Whitened unit-norm features [n, dims], labels [n], number of classes, how many of n to fit, whitener."""
    size = input_size(context)
    generator = torch.Generator().manual_seed(config.seed + SEED)
    fitted = min(FIT, spec.train_examples)
    if tune.on == SYNTHETIC:
        images, labels, classes = synthetic_task(context, len(spec.classes), fitted + HELD_OUT, size, generator)
    else:
        public_dataset = open_dataset(tune.on, context.data_dir, **public_data_options(config, tune.on))
        own = open_dataset(config.data, context.data_dir, **data_options(config))
        for each in (public_dataset, own):
            each.for_input(size)
        refuse_other_labels("tune", public_dataset.spec)
        if public_dataset.shares_images_with(own):
            raise private_data(tune.on)
        use_as_public(context.rundir, public_dataset)
        split = public_dataset.train()
        chosen = torch.randperm(len(split.labels), generator=generator)[: fitted + HELD_OUT]
        images = to_input(split.images[chosen.numpy()], size)
        labels = torch.from_numpy(split.labels)[chosen]
        classes = len(public_dataset.spec.classes)
        fitted = min(fitted, len(labels) * 4 // 5)
    images = as_declared(images, channels=spec.channels, height=spec.height, width=spec.width)
    extractor, mirror, whitener = public_part(as_probe(config, context), context, spec)
    whitener = whitener.to(context.device)
    with context.console.progress(len(images), "public features") as progress:
        features = extract(extractor, images, mirror=mirror, after=whitener, on_batch=progress.advance)
    return *placed(features, labels, classes, context.device), classes, fitted, whitener


def synthetic_task(
    context: Context, classes: int, count: int, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, int]:
    """A classification task of synthetic images, of which a class is crops of some: uint8 [count, 3, size, size], int64
    [count] and the number of classes, in random order. Raises InputError for fewer images than classes."""
    wanted = max(2, INSTANCES // classes)
    images = ImageSet(open_images(context.rundir.stage_dir("generate"), classes * wanted))
    instances = min(wanted, len(images) // classes)
    if instances < 1:
        raise InputError(
            f"{len(images)} synthetic images are too few for {classes} classes",
            fix="generate more images, or tune with --on NAME",
        )
    drawn = torch.randperm(len(images), generator=generator)[: classes * instances]
    instance = torch.arange(count) % len(drawn)
    instance = instance[torch.randperm(count, generator=generator)]
    crops = random_crops(images, size, generator, drawn[instance])
    return crops, instance % classes, classes
