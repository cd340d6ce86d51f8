"""The WideResNet: sizes, shapes, formulas against obvious versions, paddings."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dprandp.config.schema import PretrainConfig
from dprandp.errors import UsageError
from dprandp.models import wrn
from dprandp.models.extractor import build_extractor
from dprandp.models.wrn import WideResNet, pad_same
from dprandp.pretrain.contrastive import ProjectionHead


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_net(**settings: object) -> WideResNet:
    return WideResNet(10, 1, generator=seeded(), **settings)


def randomised(net: nn.Module) -> nn.Module:
    """Move every parameter off its special starting value (gains 1, biases 0), so that no term is invisible."""
    generator = seeded(9)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net


@pytest.mark.parametrize(
    "name",
    ["wrn-17-4", "wrn-4-4", "wrn-16-0", "wrn-16", "resnet-16-4", "WRN-16-4", "wrn-16-4 ", "wrn--2-4", "wrn-16-²"],
)
def test_bad_names_are_refused_with_a_way_out(name):
    assert wrn.parse_wrn("wrn-28-10") == (28, 10)
    with pytest.raises(UsageError) as caught:
        wrn.parse_wrn(name)
    assert caught.value.fix


@pytest.mark.parametrize("pooling", ["", "2", "1+1", "1+", "0", "81", "01", "four", "4 "])
def test_bad_pooling_is_refused(pooling):
    with pytest.raises(UsageError):
        small_net(pooling=pooling)


def listed(depth: int, width: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape as De et al. describe it: convolutions with gain and bias, norms with scale and offset."""
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
        plain = WideResNet(depth, width, weight_standardisation=False)
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters()}
    assert shapes == listed(depth, width)
    assert list(network.state_dict()) == [name for name, _ in network.named_parameters()]  # no statistics
    count = sum(value.numel() for value in network.parameters())
    assert (count + 64 * width * 10 + 10) / 1e6 == pytest.approx(millions, rel=2e-3)
    assert network.feature_dim == 64 * width
    without = sum(value.numel() for value in plain.parameters())
    assert count - without == sum(math.prod(shape) for name, shape in shapes.items() if name.endswith("gain"))
    if (depth, width) == (16, 4):
        assert f"({without:,}; weight standardisation adds {count - without:,} gains)" in WideResNet.__doc__


def test_initial_weights_have_the_stated_spread_and_are_the_generators():
    net, again, other = (WideResNet(16, 4, generator=seeded(seed)) for seed in (3, 3, 4))
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 30_000:
            std = 1 / math.sqrt(module.weight[0].numel())
            assert module.weight.std().item() == pytest.approx(std, rel=0.02)
            assert module.weight.abs().max() <= 2.28 * std  # cut off at two standard deviations before widening
            assert module.bias.abs().max() == 0
            assert (module.gain == 1).all()
    assert torch.equal(net.blocks[-1].conv2.weight, again.blocks[-1].conv2.weight)
    assert not torch.equal(net.stem.weight, other.stem.weight)


ORDERS = {  # TAN's numbers: (branch, skip, final), "r" = ReLU then norm, "n" = norm then ReLU
    "relu-norm-conv": "rrr",
    "norm-relu-conv": "nnn",
    "norm-relu-conv+relu-norm-skip": "nrr",
    "relu-norm-conv+norm-relu-skip": "rnr",
}


@pytest.mark.parametrize("layer_order", ORDERS)
@pytest.mark.parametrize(("standardised", "padding"), [(True, "symmetric"), (False, "symmetric"), (True, "same")])
def test_whole_network_against_a_plain_rewriting(layer_order, standardised, padding):
    net = small_net(layer_order=layer_order, weight_standardisation=standardised, padding=padding, pooling="64")
    net = randomised(net)  # pooling: every place of the map
    net.blocks[1].conv1.weight.data[3] = 0.7  # no variance: the floor must keep it finite
    tensors = dict(net.named_parameters())

    def conv(x, name, stride):
        weight = tensors[f"{name}.weight"]
        if standardised:
            fan_in = weight[0].numel()
            flat = weight.flatten(1)
            flat = flat - flat.mean(1, keepdim=True)
            flat = flat / (flat.square().mean(1, keepdim=True) * fan_in).clamp(min=1e-4).sqrt()
            weight = (flat * tensors[f"{name}.gain"][:, None]).view_as(weight)
        size = weight.shape[-1]
        sides = (0, 1, 0, 1) if padding == "same" and stride == 2 else (1, 1, 1, 1)  # left, right, above, below
        x = F.pad(x, sides) if size == 3 else x
        return F.conv2d(x, weight, tensors[f"{name}.bias"], stride=stride)

    def norm(x, name):
        grouped = x.reshape(len(x), 16, -1)
        deviation = (grouped.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
        plain = ((grouped - grouped.mean(2, keepdim=True)) / deviation).view_as(x)
        return plain * tensors[f"{name}.weight"].view(-1, 1, 1) + tensors[f"{name}.bias"].view(-1, 1, 1)

    def activate(x, name, order):
        return norm(x.clamp(min=0), name) if order == "r" else norm(x, name).clamp(min=0)

    def rewritten(x, orders):
        branch, skip, final = orders
        out = conv(x, "stem", 1)
        for index, stride in enumerate((1, 2, 2)):  # depth 10: one block per stage
            block = f"blocks.{index}"
            shortcut = out
            if f"{block}.skip_conv.weight" in tensors:
                shortcut = conv(activate(out, f"{block}.skip_norm", skip), f"{block}.skip_conv", stride)
            out = conv(activate(out, f"{block}.norm1", branch), f"{block}.conv1", stride)
            out = shortcut + conv(activate(out, f"{block}.norm2", branch), f"{block}.conv2", 1)
        return out, activate(out, "final_norm", final)

    x = torch.randn(2, 3, 32, 32, generator=seeded(4))
    for name, orders in ORDERS.items():
        trunk, feature_map = rewritten(x, orders)
        if name == layer_order:
            torch.testing.assert_close(net.trunk(x), trunk, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(net.features(x).view_as(feature_map), feature_map, atol=1e-4, rtol=1e-4)
        else:  # the comparison tells the orders apart
            assert (net.features(x).view_as(feature_map) - feature_map).abs().max() > 1e-3


def test_channels_last_and_bfloat16_agree_with_float32():
    net = WideResNet(16, 1, generator=seeded())
    x = torch.randn(4, 3, 32, 32, generator=seeded(8))
    expected = net.features(x)
    fast = copy.deepcopy(net).to(memory_format=torch.channels_last)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fast.features(last), expected, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = fast.features(last)
        half.float().square().mean().backward()
    assert F.cosine_similarity(half.float(), expected).min() > 0.999
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in fast.parameters())


def test_normalise():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    expected = (torch.arange(256).double() / 255 - 0.5) / 0.25
    torch.testing.assert_close(wrn.normalise(pixels).flatten().double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(wrn.normalise(pixels.float() / 255), wrn.normalise(pixels), atol=1e-6, rtol=0)
    assert wrn.normalise(pixels).dtype == torch.float32
    last = torch.zeros(2, 3, 4, 4, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    assert wrn.normalise(last).is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(UsageError):
        wrn.normalise(torch.zeros(1, 3, 4, 4, dtype=torch.int64))


def test_projection_head():
    head = ProjectionHead(16, hidden_dim=64, embedding_dim=6, generator=seeded())
    feature_map = torch.randn(3, 4, 2, 2, generator=seeded(1))

    def layer(x, linear):
        grouped = (x @ linear.weight.T).view(3, 16, 4)
        grouped = grouped - grouped.mean(2, keepdim=True)
        return (grouped / (grouped.var(2, correction=0, keepdim=True) + 1e-5).sqrt()).view(3, 64).clamp(min=0)

    plain = layer(layer(feature_map.reshape(3, 16), head.linear1), head.linear2) @ head.linear3.weight.T
    torch.testing.assert_close(head(feature_map), plain, atol=1e-5, rtol=1e-5)
    last = feature_map.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(head(last), head(feature_map))
    with pytest.raises(UsageError):
        ProjectionHead(16, hidden_dim=30)
    with torch.device("meta"):
        published = ProjectionHead(256 * 8 * 8)
    shapes = [tuple(layer.weight.shape) for layer in (published.linear1, published.linear2, published.linear3)]
    assert shapes == [(4096, 16384), (4096, 4096), (128, 4096)]


# ------------------------------------------------------------------------------------------------------------ padding


@pytest.mark.parametrize(("side", "size", "stride"), [(32, 3, 2), (31, 3, 2), (16, 7, 2), (8, 1, 2), (9, 3, 1)])
def test_same_padding_sees_the_places_that_it_says(side, size, stride):
    x = torch.randn(1, 1, side, side, generator=seeded(0))
    kernel = torch.randn(1, 1, size, size, generator=seeded(1))
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


# ------------------------------------------------------------------------------------------------------ earlier stages


def test_averages_of_earlier_stages_come_before_the_last_ones_and_are_parts_of_their_own():
    """Against hooks on the blocks: what the next block's first convolution sees, averaged by hand."""
    plain, wide = (WideResNet(16, 1, earlier=earlier, generator=seeded()) for earlier in ((), ("4+16", "1+9")))
    assert plain.state_dict().keys() == wide.state_dict().keys()
    x = torch.randn(3, 3, 32, 32, generator=seeded(1))
    seen = []
    for block in (wide.blocks[2], wide.blocks[4]):
        block.conv1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    features = wide.features(x)
    assert [part.width for part in wide.parts] == [20 * 16, 10 * 32, 5 * 64]
    assert sum(part.share for part in wide.parts) == pytest.approx(1)
    assert features.shape == (3, wide.feature_dim)
    torch.testing.assert_close(features[:, 640:], plain.features(x))
    first, second = seen
    for image in range(3):
        quarter = first[image, 5, 16:, :16].mean()  # channel 5, row 1, column 0 of the 2 x 2 grid
        torch.testing.assert_close(features[image, 5 * 4 + 2], quarter)
        cell = first[image, 7, 24:, 8:16].mean()  # row 3, column 1 of the 4 x 4 grid
        torch.testing.assert_close(features[image, 16 * 4 + 7 * 16 + 3 * 4 + 1], cell)
        torch.testing.assert_close(features[image, 320 + 9], second[image, 9].mean())
    network = build_extractor(PretrainConfig(arch="wrn-10-2", feature_stages="all"))
    assert [part.width for part in network.parts] == [640, 640, 640]
