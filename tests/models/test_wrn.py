"""The WideResNet: size, shapes, formulas against obvious versions, isolation of examples, per-example gradients."""

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
from dprandp.pretrain.contrastive import ProjectionHead


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_net(**settings: object) -> wrn.WideResNet:
    return wrn.WideResNet(10, 1, generator=seeded(), **settings)


def randomised(net: nn.Module) -> nn.Module:
    """Move every parameter off its special starting value (gains 1, biases 0), so that no term is invisible."""
    generator = seeded(9)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net


@pytest.mark.parametrize(("name", "shape"), [("wrn-16-4", (16, 4)), ("wrn-40-4", (40, 4)), ("wrn-28-10", (28, 10))])
def test_name_is_read(name, shape):
    assert wrn.parse_wrn(name) == shape


@pytest.mark.parametrize(
    "name",
    ["wrn-17-4", "wrn-4-4", "wrn-16-0", "wrn-16", "resnet-16-4", "WRN-16-4", "wrn-16-4 ", "wrn--2-4", "wrn-16-²"],
)
def test_bad_names_are_refused_with_a_way_out(name):
    with pytest.raises(UsageError) as caught:
        wrn.parse_wrn(name)
    assert caught.value.fix


def test_parameter_count_of_wrn_16_4():
    def conv(wide_in, wide_out, size):
        return wide_in * wide_out * size * size + wide_out

    def norm(wide):
        return 2 * wide

    by_hand = conv(3, 16, 3) + norm(256)
    for wide_in, wide_out in ((16, 64), (64, 128), (128, 256)):
        first = norm(wide_in) + conv(wide_in, wide_out, 3) + norm(wide_out) + conv(wide_out, wide_out, 3)
        shortcut = norm(wide_in) + conv(wide_in, wide_out, 1)
        second = 2 * (norm(wide_out) + conv(wide_out, wide_out, 3))
        by_hand += first + shortcut + second
    plain = sum(p.numel() for p in wrn.WideResNet(16, 4, weight_standardisation=False).parameters())
    assert plain == by_hand
    assert round(plain / 1e6, 2) == 2.75  # the published figure
    standardised = wrn.WideResNet(16, 4)
    gains = sum(m.gain.numel() for m in standardised.modules() if isinstance(m, wrn.StandardisedConv2d))
    assert sum(p.numel() for p in standardised.parameters()) == by_hand + gains
    assert f"{plain:,}" in wrn.WideResNet.__doc__
    assert f"{gains:,}" in wrn.WideResNet.__doc__


def test_shapes_and_feature_dim():
    net = wrn.WideResNet(16, 4)
    x = torch.randn(2, 3, 32, 32)
    assert net.feature_map(x).shape == (2, 256, 8, 8)
    assert net.trunk(x).shape == (2, 256, 8, 8)
    assert net.features(x).shape == (2, net.feature_dim) == (2, 1280)
    assert small_net(pooling="1").feature_dim == 64
    assert small_net(pooling="16").features(x).shape == (2, 64 * 16)
    assert small_net(channels=1).features(torch.randn(3, 1, 28, 28)).shape == (3, 320)


def test_features_are_the_averages_they_say():
    net = randomised(small_net())
    x = torch.randn(2, 3, 32, 32, generator=seeded(1))
    feature_map = net.feature_map(x)
    expected = []
    for image in feature_map:
        row = [channel.mean() for channel in image]
        for channel in image:
            row += [channel[:4, :4].mean(), channel[:4, 4:].mean(), channel[4:, :4].mean(), channel[4:, 4:].mean()]
        expected.append(torch.stack(row))
    torch.testing.assert_close(net.features(x), torch.stack(expected))


@pytest.mark.parametrize("pooling", ["", "2", "1+1", "1+", "0", "81", "-1", "01", "four", "4 "])
def test_bad_pooling_is_refused(pooling):
    with pytest.raises(UsageError):
        small_net(pooling=pooling)


@pytest.mark.parametrize(
    "settings",
    [{"norm_groups": 3}, {"norm_groups": 0}, {"norm_groups": 32}, {"layer_order": "norm"}, {"channels": 4}],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(UsageError):
        small_net(**settings)


def test_no_layer_mixes_examples():
    for module in wrn.WideResNet(16, 4).modules():
        assert not isinstance(module, nn.modules.batchnorm._NormBase)
    net = randomised(small_net())
    x = torch.randn(4, 3, 32, 32, generator=seeded(1))
    moved = x.clone()
    moved[1:] = torch.randn(3, 3, 32, 32, generator=seeded(2))
    torch.testing.assert_close(net.features(x)[0], net.features(moved)[0], atol=1e-6, rtol=1e-5)
    assert (net.features(x)[1] - net.features(moved)[1]).abs().max() > 1e-2


def test_weight_standardisation_formula():
    conv = wrn.StandardisedConv2d(4, 5, 3, padding=1)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(5, 4, 3, 3, generator=seeded()) * 3 + 1)
        conv.weight[4] = 0.7  # no variance: the floor must keep it finite
        conv.gain.copy_(torch.tensor([1.0, 2.0, -0.5, 1.0, 1.0]))
    for index in range(5):
        values = conv.weight[index].flatten().tolist()
        mean = sum(values) / 36
        variance = sum((value - mean) ** 2 for value in values) / 36
        scale = conv.gain[index].item() / math.sqrt(max(variance * 36, 1e-4))
        expected = torch.tensor([(value - mean) * scale for value in values]).view(4, 3, 3)
        torch.testing.assert_close(conv.standardised_weight()[index], expected, atol=1e-5, rtol=1e-5)
    x = torch.randn(2, 4, 8, 8, generator=seeded(1))
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.standardised_weight(), conv.bias, padding=1))


def test_initial_weights_have_the_stated_spread():
    net = wrn.WideResNet(16, 4, generator=seeded(3))
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 30_000:
            std = 1 / math.sqrt(module.weight[0].numel())
            assert module.weight.std().item() == pytest.approx(std, rel=0.02)
            assert module.weight.abs().max() <= 2.28 * std  # cut off at two standard deviations before widening
            assert module.bias.abs().max() == 0
            assert (module.gain == 1).all()


def test_initial_weights_follow_the_generator():
    first, second, third = (wrn.WideResNet(10, 1, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.stem.weight, second.stem.weight)
    assert torch.equal(first.blocks[-1].conv2.weight, second.blocks[-1].conv2.weight)
    assert not torch.equal(first.stem.weight, third.stem.weight)


ORDERS = {  # TAN's numbers: (branch, skip, final), "r" = ReLU then norm, "n" = norm then ReLU
    "relu-norm-conv": "rrr",
    "norm-relu-conv": "nnn",
    "norm-relu-conv+relu-norm-skip": "nrr",
    "relu-norm-conv+norm-relu-skip": "rnr",
}


@pytest.mark.parametrize("layer_order", ORDERS)
@pytest.mark.parametrize("weight_standardisation", [True, False])
def test_whole_network_against_a_plain_rewriting(layer_order, weight_standardisation):
    net = randomised(small_net(layer_order=layer_order, weight_standardisation=weight_standardisation, norm_groups=4))
    tensors = dict(net.named_parameters())

    def conv(x, name, stride, padding):
        weight = tensors[f"{name}.weight"]
        if weight_standardisation:
            fan_in = weight[0].numel()
            flat = weight.flatten(1)
            flat = flat - flat.mean(1, keepdim=True)
            flat = flat / (flat.square().mean(1, keepdim=True) * fan_in).sqrt()
            weight = (flat * tensors[f"{name}.gain"][:, None]).view_as(weight)
        return F.conv2d(x, weight, tensors[f"{name}.bias"], stride=stride, padding=padding)

    def norm(x, name):
        grouped = x.reshape(len(x), 4, -1)
        deviation = (grouped.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
        plain = ((grouped - grouped.mean(2, keepdim=True)) / deviation).view_as(x)
        return plain * tensors[f"{name}.weight"].view(-1, 1, 1) + tensors[f"{name}.bias"].view(-1, 1, 1)

    def activate(x, name, order):
        return norm(x.clamp(min=0), name) if order == "r" else norm(x, name).clamp(min=0)

    branch, skip, final = ORDERS[layer_order]
    x = torch.randn(2, 3, 32, 32, generator=seeded(4))
    out = conv(x, "stem", 1, 1)
    for index, stride in enumerate((1, 2, 2)):  # depth 10: one block per stage
        block = f"blocks.{index}"
        shortcut = out
        if f"{block}.skip_conv.weight" in tensors:
            shortcut = conv(activate(out, f"{block}.skip_norm", skip), f"{block}.skip_conv", stride, 0)
        out = conv(activate(out, f"{block}.norm1", branch), f"{block}.conv1", stride, 1)
        out = shortcut + conv(activate(out, f"{block}.norm2", branch), f"{block}.conv2", 1, 1)
    torch.testing.assert_close(net.trunk(x), out, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(net.feature_map(x), activate(out, "final_norm", final), atol=1e-4, rtol=1e-4)


def test_layer_orders_differ():
    x = torch.randn(1, 3, 32, 32, generator=seeded(5))
    nets = [wrn.WideResNet(10, 2, layer_order=name, generator=seeded()) for name in wrn.LAYER_ORDERS]
    outputs = [net.trunk(x) for net in nets]
    for i in range(4):
        for j in range(i):
            assert (outputs[i] - outputs[j]).abs().max() > 1e-3


@pytest.mark.parametrize("layer_order", ["relu-norm-conv", "relu-norm-conv+norm-relu-skip"])
def test_vmap_of_grad_equals_a_loop(layer_order):
    # In float64: in float32 one of 100,000 ReLU inputs is now and then so near 0 that the two paths round it to
    # different sides, and the gradients then truly differ.
    net = randomised(wrn.WideResNet(10, 2, layer_order=layer_order, generator=seeded())).double()
    params = {name: value.detach() for name, value in net.named_parameters()}
    images = torch.randn(3, 2, 3, 32, 32, generator=seeded(6)).double()  # three examples of two views each
    target = torch.randn(net.feature_dim, generator=seeded(7)).double()

    def loss(values, views):
        return (torch.func.functional_call(net, values, (views,)) @ target).square().mean()

    batched = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, images)
    for index in range(3):
        net.zero_grad()
        (net(images[index]) @ target).square().mean().backward()
        for name, parameter in net.named_parameters():
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(batched[name][index], parameter.grad, atol=1e-9 * scale + 1e-9, rtol=1e-8)
            assert scale > 0 or name.endswith("stem.bias"), name


def test_channels_last_and_bfloat16_agree_with_float32():
    net = wrn.WideResNet(16, 1, generator=seeded())
    x = torch.randn(4, 3, 32, 32, generator=seeded(8))
    expected = net.features(x)
    fast = copy.deepcopy(net).to(memory_format=torch.channels_last)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fast.features(last), expected, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = fast.features(last)
        half.float().square().mean().backward()
    cosine = F.cosine_similarity(half.float(), expected)
    assert cosine.min() > 0.999
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in fast.parameters()
    )


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
    head = ProjectionHead(4 * 2 * 2, hidden_dim=32, embedding_dim=6, norm_groups=8, generator=seeded())
    feature_map = torch.randn(3, 4, 2, 2, generator=seeded(1))
    hidden = head.first_layer(feature_map)
    assert hidden.shape == (3, 32)
    assert head(feature_map).shape == (3, 6)
    plain = feature_map.reshape(3, 16) @ head.linear1.weight.T
    grouped = plain.view(3, 8, 4)
    grouped = (grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(hidden, grouped.view(3, 32).clamp(min=0), atol=1e-5, rtol=1e-5)
    last = feature_map.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(head(last), head(feature_map))
    with pytest.raises(UsageError):
        ProjectionHead(16, hidden_dim=30, norm_groups=16)


def test_published_projection_head_shape():
    with torch.device("meta"):
        head = ProjectionHead(256 * 8 * 8)
    shapes = [tuple(layer.weight.shape) for layer in (head.linear1, head.linear2, head.linear3)]
    assert shapes == [(4096, 16384), (4096, 4096), (128, 4096)]


# ------------------------------------------------------------------------------------------------------ earlier stages


def test_averages_of_earlier_stages_come_before_the_last_ones_and_are_parts_of_their_own():
    """Against hooks on the blocks: what the next block's first convolution sees, averaged by hand."""
    plain, wide = (wrn.WideResNet(16, 1, earlier=earlier, generator=torch.Generator().manual_seed(0))
                   for earlier in ((), ("4+16", "1+9")))  # fmt: skip
    assert plain.state_dict().keys() == wide.state_dict().keys()
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
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
    with pytest.raises(UsageError, match="1 pooling grids for two"):
        wrn.WideResNet(16, 1, earlier=("1",))


def test_pooling_all_stages_gives_parts_of_one_width():
    network = build_extractor(PretrainConfig(arch="wrn-10-2", feature_stages="all"))
    assert [part.width for part in network.parts] == [640, 640, 640]
    assert build_extractor(PretrainConfig(arch="wrn-10-2")).feature_dim == 640
