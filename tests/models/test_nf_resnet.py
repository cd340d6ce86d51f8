"""NF-ResNet-50 tensor by tensor against the published description (Brock et al. 2021), and what it must not have."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dprandp.config.schema import PretrainConfig
from dprandp.models import nf_resnet
from dprandp.models.extractor import build_extractor
from dprandp.models.nf_resnet import NFBlock, NFResNet50, scaled_relu
from dprandp.models.wrn import initialise
from dprandp.privacy.clipping import refuse_cross_example_layers


@pytest.fixture(scope="module")
def network() -> NFResNet50:
    with pytest.MonkeyPatch.context() as patch:  # an eighth as wide as the published network
        patch.setattr(nf_resnet, "WIDTHS", tuple(width // 8 for width in nf_resnet.WIDTHS))
        patch.setattr(nf_resnet, "STEM_WIDTH", nf_resnet.STEM_WIDTH // 8)
        network = NFResNet50(generator=torch.Generator().manual_seed(0)).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for name, value in network.named_parameters():
        if not name.endswith("weight"):
            value.normal_(1.0 if name.endswith("gain") else 0.0, 0.3, generator=generator)
    return network


def same(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """A convolution with the padding of De et al.'s framework, place by place in one dimension at a time."""
    size = weight.shape[-1]
    total = max((math.ceil(x.shape[-1] / stride) - 1) * stride + size - x.shape[-1], 0)
    padded = torch.zeros(*x.shape[:2], x.shape[2] + total, x.shape[3] + total)
    low = total // 2
    padded[:, :, low : low + x.shape[2], low : low + x.shape[3]] = x
    return F.conv2d(padded, weight, bias, stride)


def described(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """The published network in plain operations."""

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight, gain = tensors[f"{name}.weight"], tensors[f"{name}.gain"]
        flat = weight.flatten(1)
        centred = flat - flat.mean(1, keepdim=True)
        energy = centred.square().sum(1, keepdim=True).clamp(min=1e-4)  # variance times fan-in
        return same(x, (centred * gain[:, None] / energy.sqrt()).view_as(weight), tensors[f"{name}.bias"], stride)

    def activation(x: Tensor) -> Tensor:
        return 1.7139588594436646 * x.clamp(min=0)

    out = conv("stem", x, 2)
    out = F.max_pool2d(F.pad(out, (0, 1, 0, 1), value=-math.inf), 3, 2)
    index, expected_std = 0, 1.0
    for depth, stride in ((3, 1), (4, 2), (6, 2), (3, 2)):
        for place in range(depth):
            name, step = f"blocks.{index}", stride if place == 0 else 1
            inner = activation(out) / expected_std
            shortcut = conv(f"{name}.shortcut", inner, step) if place == 0 else out
            inner = conv(f"{name}.conv1", inner)
            inner = conv(f"{name}.conv2", activation(inner), step)
            inner = conv(f"{name}.conv3", activation(inner))
            out = shortcut + 0.2 * tensors[f"{name}.skip_gain"] * inner
            expected_std = math.sqrt((1.0 if place == 0 else expected_std**2) + 0.2**2)
            index += 1
    return activation(out).mean((2, 3))


def test_it_computes_what_is_described(network: NFResNet50):
    x = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(2))
    expected = described(network.state_dict(), x)
    found = network.features(x)
    assert found.shape == (2, 256)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    # the order matters: without the last activation it is another network
    assert not torch.allclose(network.trunk(x).mean((2, 3)), expected, rtol=1e-1)


def test_its_parameters_are_counted_as_published():
    with torch.device("meta"):
        network = build_extractor(PretrainConfig(arch="nf-resnet-50"))
    counted = {name: value.numel() for name, value in network.named_parameters()}
    resnet_50, classifier, skip_gains = 25_557_032, 2_049_000, 16
    assert sum(counted.values()) == resnet_50 - classifier + skip_gains
    assert sum("skip_gain" in name for name in counted) == 16
    assert sum(name.endswith("conv2.weight") for name in counted) == 16
    assert sum("shortcut.weight" in name for name in counted) == 4
    assert dict(network.named_parameters())["stem.weight"].shape == (64, 3, 7, 7)


def test_it_has_no_norm_and_its_units_are_the_whole_trunk(network: NFResNet50):
    refuse_cross_example_layers(network)
    assert not any("Norm" in type(layer).__name__ or "Dropout" in type(layer).__name__ for layer in network.modules())
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(network.features(x)[1], network.features(x[1:2])[0], rtol=1e-3, atol=1e-4)
    out = x
    for _, unit in network.units():
        out = unit(out)
    assert len(network.units()) == 17
    assert torch.equal(out, network.trunk(x))


def test_its_activation_keeps_the_variance_and_its_branches_are_silent_at_the_start():
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    assert float(scaled_relu(x).var()) == pytest.approx(1, abs=0.01)
    block = NFBlock(8, 8, 1, 1.0)
    initialise(block, torch.Generator().manual_seed(0))
    x = x[:200].view(1, 8, 5, 5)
    assert torch.equal(block(x), x)
