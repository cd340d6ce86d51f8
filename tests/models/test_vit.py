"""The small Vision Transformer, against loops over patches and heads, and one example at a time."""

from __future__ import annotations

import math

import pytest
import torch

from dprandp.config.schema import PretrainConfig
from dprandp.errors import UsageError
from dprandp.models.extractor import build_extractor
from dprandp.models.vit import HEAD_WIDTH, VisionTransformer
from dprandp.privacy.clipping import refuse_cross_example_layers


def network() -> VisionTransformer:
    return build_extractor(PretrainConfig(arch="vit-2-32-8"), torch.Generator().manual_seed(0))


def norm(x: torch.Tensor, layer: torch.nn.LayerNorm) -> torch.Tensor:
    return (x - x.mean()) / (x.var(correction=0) + layer.eps).sqrt() * layer.weight + layer.bias


def slow_features(net: VisionTransformer, image: torch.Tensor) -> torch.Tensor:
    """Patch by patch, head by head, one image [3, 32, 32]."""
    patch = 32 // net.grid
    stream = []
    for row in range(net.grid):
        for column in range(net.grid):
            pixels = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            embedded = torch.stack([(pixels * weight).sum() for weight in net.embed.weight]) + net.embed.bias
            stream.append(embedded + net.position[row * net.grid + column])
    for block in net.blocks:
        width = len(stream[0])
        projected = [block.qkv.weight @ norm(x, block.norm1) + block.qkv.bias for x in stream]
        attended = []
        for mine in projected:
            heads = []
            for head in range(width // HEAD_WIDTH):
                own = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
                query = mine[:width][own]
                scores = torch.stack([query @ other[width : 2 * width][own] for other in projected])
                weights = torch.exp(scores / math.sqrt(HEAD_WIDTH))
                weights = weights / weights.sum()
                heads.append(sum(w * other[2 * width :][own] for w, other in zip(weights, projected, strict=True)))
            attended.append(torch.cat(heads))
        stream = [x + block.out.weight @ a + block.out.bias for x, a in zip(stream, attended, strict=True)]
        dense = []
        for x in stream:
            hidden = block.dense1.weight @ norm(x, block.norm2) + block.dense1.bias
            gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            dense.append(x + block.dense2.weight @ gelu + block.dense2.bias)
        stream = dense
    tokens = [norm(x, net.final_norm) for x in stream]
    half = net.grid // 2
    quarters = [
        [tokens[r * net.grid + c] for r in range(net.grid) for c in range(net.grid) if (r // half, c // half) == place]
        for place in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    return torch.cat([torch.stack(part).mean(dim=0) for part in (tokens, *quarters)])


def test_features_are_those_of_a_loop_over_patches_and_heads() -> None:
    net, images = network().double(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    expected = torch.stack([slow_features(net, image) for image in images])
    assert net.features(images).shape == (3, net.feature_dim) == (3, 160)
    torch.testing.assert_close(net.features(images), expected)
    assert (expected[0] - expected[1]).abs().max() > 0.1  # the images can be told apart


def test_one_image_moves_nobody_elses_features() -> None:
    net, images = network(), torch.randn(4, 3, 32, 32)
    before = net.features(images)
    images[2] = torch.randn(3, 32, 32) * 100
    after = net.features(images)
    kept = [0, 1, 3]
    assert torch.equal(before[kept], after[kept])
    assert not torch.allclose(before[2], after[2])
    refuse_cross_example_layers(net)


@pytest.mark.parametrize("name", ["vit-2-32", "vit-0-32-4", "vit-2-24-4", "vit-2-32-5", "vit-2-32-32", "vit-2-0-4"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        build_extractor(PretrainConfig(arch=name))
