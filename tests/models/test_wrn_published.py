"""The WideResNets of De et al. 2022, tensor by tensor, and the padding of their convolutions with stride 2."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dprandp.models.wrn import WideResNet, pad_same


def listed(depth: int, width: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape as the paper describes it: convolutions with gain and bias, norms with scale and offset."""
    found: dict[str, tuple[int, ...]] = {}

    def conv(name: str, wide_in: int, wide_out: int, size: int) -> None:
        found[f"{name}.weight"] = (wide_out, wide_in, size, size)
        found[f"{name}.bias"] = found[f"{name}.gain"] = (wide_out,)

    def norm(name: str, wide: int) -> None:
        found[f"{name}.weight"] = found[f"{name}.bias"] = (wide,)

    conv("stem", 3, 16, 3)
    wide, place = 16, 0
    for stage in (16 * width, 32 * width, 64 * width):
        for block in range((depth - 4) // 6):
            name = f"blocks.{place}"
            norm(f"{name}.norm1", wide)
            conv(f"{name}.conv1", wide, stage, 3)
            norm(f"{name}.norm2", stage)
            conv(f"{name}.conv2", stage, stage, 3)
            if block == 0:
                norm(f"{name}.skip_norm", wide)
                conv(f"{name}.skip_conv", wide, stage, 1)
            wide, place = stage, place + 1
    norm("final_norm", wide)
    return found


@pytest.mark.parametrize(
    ("depth", "width", "millions"),  # with the classifier of 10 classes; for CIFAR-10 the paper's text rounds them so
    [(16, 4, 2.75), (40, 4, 8.96), (28, 10, 36.5)],
)
def test_every_tensor_is_as_described(depth, width, millions):
    with torch.device("meta"):
        network = WideResNet(depth, width, pooling="1", padding="same")
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters()}
    assert shapes == listed(depth, width)
    assert list(network.state_dict()) == [name for name, _ in network.named_parameters()]  # no statistics
    count = sum(value.numel() for value in network.parameters()) + 64 * width * 10 + 10
    assert count / 1e6 == pytest.approx(millions, rel=2e-3)
    assert network.feature_dim == 64 * width


@pytest.mark.parametrize(("side", "size", "stride"), [(32, 3, 2), (31, 3, 2), (16, 7, 2), (8, 1, 2), (9, 3, 1)])
def test_same_padding_sees_the_places_that_it_says(side, size, stride):
    x = torch.randn(1, 1, side, side, generator=torch.Generator().manual_seed(0))
    kernel = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(1))
    found = F.conv2d(pad_same(x, size, stride), kernel, stride=stride)
    outputs = -(-side // stride)
    assert found.shape[-1] == outputs
    before = max((outputs - 1) * stride + size - side, 0) // 2
    for row, column in ((0, 0), (outputs - 1, outputs // 2), (outputs - 1, outputs - 1)):
        total = 0.0
        for down in range(size):
            for right in range(size):
                y, z = row * stride - before + down, column * stride - before + right
                if 0 <= y < side and 0 <= z < side:
                    total += float(x[0, 0, y, z] * kernel[0, 0, down, right])
        assert float(found[0, 0, row, column]) == pytest.approx(total, abs=1e-5)


def test_the_two_paddings_differ_in_strided_convolutions_alone():
    made = [WideResNet(10, 1, padding=padding, generator=torch.Generator().manual_seed(0)).requires_grad_(False)
            for padding in ("symmetric", "same")]  # fmt: skip
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    first = [network.blocks[0](network.stem(x)) for network in made]
    assert torch.equal(*first)
    later = [network.blocks[1](out) for network, out in zip(made, first, strict=True)]
    assert later[0].shape == later[1].shape == (1, 32, 16, 16)
    assert not torch.allclose(*later, atol=1e-2)
    # by hand: one row below and one column right, none above and left
    block, out = made[1].blocks[1], first[1]
    weight = block.conv1.standardised_weight()
    inner = F.conv2d(F.pad(block.norm1(out.relu()), (0, 1, 0, 1)), weight, block.conv1.bias, stride=2)
    skip = block.skip_conv(block.skip_norm(out.relu()))
    assert torch.allclose(later[1], skip + block.conv2(block.norm2(inner.relu())), atol=1e-5)
