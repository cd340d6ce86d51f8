"""What records of an audit are made of: public things that a run holds."""

from __future__ import annotations

import torch
from torch import Tensor

from dprandp import probe
from dprandp.config.schema import FinetuneConfig
from dprandp.continual.loop import HEADS, STAGE
from dprandp.finetune.start import network_config
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import build_extractor, extract
from dprandp.models.whitening import PooledOnly
from dprandp.pretrain import load_extractor, synthetic_crops
from dprandp.runs.checkpoint import load_finished
from dprandp.runs.context import Context

IMAGES = 256
"""Synthetic images that records are made of."""


class Facts:
    """Public things of a run that records are made of.

    Attributes:
        classes: number of classes.
        mirror: whether views may be mirrored.
        images: uint8 [n, 3, 32, 32], synthetic (noise where the run has none).
        features: float32 [n, d] of these images, from the run's extractor and whitener.
        model: the classifier as the fine-tune finds it.
    """

    def __init__(self, context: Context) -> None:
        rows = {row["stage"]: row for row in context.rundir.status()}
        last = next(rows[name]["result"] for name in ("finetune", "probe", "continue") if rows[name]["result"])
        self.classes, self.mirror = len(last["classes"]), last["mirror"]
        precision = last["precision"]
        generator = torch.Generator().manual_seed(0)
        if rows["probe"]["result"]:
            colour = rows["probe"]["result"]["extractor_colour"]
            extractor, _ = load_extractor(context, colour, precision=precision)
            whitener = probe.load_whitener(context, extractor).to(context.device)
            self.images = synthetic_crops(context, IMAGES, seed=0)
            head = probe.load_head(context, torch.empty(whitener.dims, self.classes))
        elif not rows["finetune"]["result"]:
            extractor, _ = load_extractor(context, "rgb", precision=precision)  # a continued one is for either kind
            whitener = PooledOnly(extractor.feature_dim)
            self.images = synthetic_crops(context, IMAGES, seed=0)
            head = load_finished(context.rundir.stage_dir(STAGE) / HEADS, HEADS, STAGE).tensors["head"]
        else:  # no Phase I, no Phase II; public weights are not looked for: random ones have gradients as well
            config = FinetuneConfig(**rows["finetune"]["config"])
            extractor, head = build_extractor(network_config(config), generator), None
            whitener = PooledOnly(extractor.feature_dim)
            self.images = torch.randint(256, (IMAGES, 3, 32, 32), generator=generator).to(torch.uint8)
        self.model = Classifier(extractor, whitener, self.classes).to(context.device)
        if head is not None:
            self.model.head.data.copy_(head)
        self.features: Tensor = extract(
            self.model.extractor, self.images, mirror=self.mirror, after=self.model.whitener
        )
