"""``predict`` on a folder of image files, against loops of Pillow and torch over the same files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmark.cases import OURS, Case, Comparison, Side
from benchmark.pairs import agree
from benchmark.patchnet import pixels, random_net
from dprandp.config.declared import REFUSE, Decoding
from dprandp.config.presets import INPUT_SIZE
from dprandp.models import whitening
from dprandp.models.classifier import Classifier
from dprandp.release.predictions import BLOCK, predictions
from dprandp.vision.images import to_input

PLAIN = "a plain torch loop"
SAME = "a loop with the same network"

SIZES = {"full": (400, 1024, 10_000), "quick": (400, 256, 400), "tiny": (16, 8, 50)}  # filters, dimensions, images
FEW = 10
"""The plain loop, many times slower, takes one in so many images."""


@dataclass(frozen=True)
class Loaded:
    """What ``predictions`` needs of a released model, without the files of one."""

    network: Classifier
    classes: tuple[str, ...] = tuple(map(str, range(10)))
    shape: tuple[int, int, int] = (INPUT_SIZE, INPUT_SIZE, 3)
    decoding: Decoding = REFUSE
    multi_label: bool = False

    def probabilities(self, images: np.ndarray) -> Tensor:
        """As a released model's, with the mirror average."""
        return self.network.predict(to_input(images, INPUT_SIZE), mirror=True).softmax(dim=1)


def case(scale: str) -> Case:
    """Rows for every file, with checks that each is complete, against arrays of whatever Pillow gives."""
    filters, dims, count = SIZES[scale]
    net, generator = random_net(filters), torch.Generator().manual_seed(2)
    network = Classifier(net, whitening.fit(torch.rand(dims + 88, net.feature_dim, generator=generator), dims), 10)
    network.head.data.normal_(generator=generator)
    model = Loaded(network.eval())
    folder = tempfile.TemporaryDirectory(prefix="dprandp-bench-")
    files = [Path(folder.name) / f"{index:06d}.png" for index in range(count)]
    for path, image in zip(files, pixels(count, INPUT_SIZE, INPUT_SIZE, 3).numpy(), strict=True):
        Image.fromarray(image).save(path)

    def ours() -> Tensor:
        rows = [row for block in predictions(model, [Path(folder.name)]) for row in block]
        return torch.tensor([list(row["probabilities"].values()) for row in rows])

    @torch.no_grad()
    def plain(batch: Tensor) -> Tensor:
        prepared = net.normalise(batch)
        features = (net.features(prepared) + net.features(prepared.flip(-1))) / 2
        return (network.whitener(features) @ network.head).softmax(dim=1)

    def loop(classify: Callable[[Tensor], Tensor], size: int, chosen: list[Path]) -> Tensor:
        out = []
        for start in range(0, len(chosen), size):
            images = [np.asarray(Image.open(path).convert("RGB")) for path in chosen[start : start + size]]
            out.append(classify(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)))
        return torch.cat(out)

    def same(batch: Tensor) -> Tensor:
        return network.predict(batch, mirror=True).softmax(dim=1)

    few = files[: count // FEW]
    works = {PLAIN: lambda: loop(plain, 32, few), SAME: lambda: loop(same, BLOCK, files)}

    def check() -> Mapping[str, float]:
        found = ours()
        theirs = {name: work() for name, work in works.items()}
        return {name: agree(name, found[: len(rows)], rows, 1e-3) for name, rows in theirs.items()}

    return Case(
        ours=Side(OURS, lambda: ours, count),
        others=(Side(PLAIN, lambda: works[PLAIN], len(few)), Side(SAME, lambda: works[SAME], count)),
        comparisons=(Comparison(PLAIN), Comparison(SAME)),
        check=check,
        sizes=f"{count:,} PNG files, {filters:,} filters, {dims:,} dimensions",
        unit="image",
        warm_up=False,
    )
