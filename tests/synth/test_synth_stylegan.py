"""The StyleGANs: renderers against dense networks with the same draws; laws of the draws, wavelets and pink noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats
from torch.nn import functional

from dprandp.synth import stylegan, stylegan_random
from dprandp.synth.stylegan import (
    HIGHFREQ,
    ORIENTED,
    SPARSE,
    ConvDraws,
    ImageDraws,
    Network,
    Variant,
    area_resize,
    base_wavelets,
    draw_pink_noise,
    enveloped_pink_noise,
    lanczos_matrix,
    pink_spectrum_noise,
    sign_wavelets,
    wavelets,
)
from dprandp.synth.stylegan_random import RandomNetwork

FIR = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 4.0
FIR_2D = FIR[:, None] * FIR[None, :]


def filter_padded(x: torch.Tensor, left: int, right: int) -> torch.Tensor:
    channels = x.shape[1]
    padded = functional.pad(x, (left, right, left, right))
    return functional.conv2d(padded, FIR_2D.expand(channels, 1, 4, 4), groups=channels)


def dense_synthesise(network: Network, draws: ImageDraws, image_index: int, epsilon: float) -> torch.Tensor:
    """One image, the obvious way: full [O, I, 3, 3] weights W = s_o · wavelet, modulated, demodulated, convolved.

    The magnitude |s_o|, which the draws leave out, is made up here: the result must not depend on it.
    """
    magnitudes = np.random.default_rng(99)
    x = network.constant.double()[None]
    image = None
    rgb_layers = iter(draws.rgb)
    for shape, conv in zip(network.shapes, draws.convs, strict=True):
        sign = 1.0 - 2.0 * conv.negative[image_index].double()
        s = sign * torch.from_numpy(np.abs(magnitudes.standard_normal(shape.out_channels)))
        filters = torch.from_numpy(network.variant.bank)[conv.wavelet[image_index]]
        weight = s[:, None, None, None] * filters[None]
        weight = weight * conv.style[image_index].double()[None, :, None, None]
        weight = weight * torch.rsqrt(weight.square().sum(dim=(1, 2, 3), keepdim=True) + epsilon)
        if shape.upsamples:
            y = functional.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
            y = filter_padded(y, 1, 1)
        else:
            y = functional.conv2d(x, weight, padding=1)
        size = (shape.resolution, shape.resolution)
        if draws.noise is None:
            noise = conv.noise[image_index].double()[None, None]
        else:
            noise = functional.interpolate(draws.noise[image_index].double()[None, None], size, mode="area")
        y = y + noise * conv.noise_scale[image_index].double()
        y = y + conv.bias[image_index].double()[None, :, None, None]
        x = 2.0**0.5 * functional.relu(y)
        if shape.feeds_rgb:
            rgb = functional.conv2d(x, next(rgb_layers)[image_index].double().T[:, :, None, None])
            if image is not None:
                zeros = torch.zeros(1, 3, *size, dtype=torch.float64)
                zeros[:, :, ::2, ::2] = image
                image = filter_padded(zeros, 2, 1) + rgb
            else:
                image = rgb
    assert image is not None
    return image[0]


def in_float64(network: Network, draws: ImageDraws) -> tuple[Network, ImageDraws]:
    def widen(value: object) -> object:
        if isinstance(value, list):
            return [widen(entry) for entry in value]
        if isinstance(value, ConvDraws | Network | ImageDraws):
            return replace(value, **{name: widen(entry) for name, entry in vars(value).items()})
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return widen(network), widen(draws)  # type: ignore[return-value]


def drawn(
    seed: int, resolution: int, count: int, variant: Variant = ORIENTED
) -> tuple[Network, ImageDraws]:
    random = np.random.default_rng(seed)
    network = stylegan.draw_network(random, resolution, variant)
    return network, stylegan.draw_images(random, network, count)


def error_in_deviations(image: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((image - wanted).abs().max() / wanted.std())


@pytest.fixture
def few_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {4: 40, 8: 32, 16: 24, 32: 20, 64: 12}
    monkeypatch.setattr(stylegan, "channels_at", counts.__getitem__)


def check_against_dense(seed: int, resolution: int, count: int, variant: Variant = ORIENTED) -> None:
    network, draws = drawn(seed, resolution, count, variant)
    images = stylegan.synthesise(network, draws)
    exact_images = stylegan.synthesise(*in_float64(network, draws))
    assert images.dtype == torch.float32
    for index in range(count):
        assert error_in_deviations(exact_images[index], dense_synthesise(network, draws, index, epsilon=0.0)) < 1e-9
        # StyleGAN2 guards its demodulation with 1e-8: no difference that single precision would show.
        assert error_in_deviations(images[index], dense_synthesise(network, draws, index, epsilon=1e-8)) < 1e-4


def test_equals_dense_network_at_full_width() -> None:
    check_against_dense(seed=0, resolution=8, count=1)


@pytest.mark.usefixtures("few_channels")
@pytest.mark.parametrize("variant", [ORIENTED, HIGHFREQ, SPARSE], ids=["oriented", "highfreq", "sparse"])
def test_equals_dense_network_at_full_depth_with_unequal_widths(variant: Variant) -> None:
    for seed in range(2):
        check_against_dense(seed, resolution=64, count=2, variant=variant)


@pytest.mark.slow
def test_equals_dense_network_at_full_size() -> None:
    check_against_dense(seed=1, resolution=128, count=2)


@pytest.mark.usefixtures("few_channels")
@pytest.mark.parametrize("variant", [ORIENTED, SPARSE], ids=["oriented", "sparse"])
def test_every_draw_matters(variant: Variant) -> None:
    """Control of the comparison: draws of another image in any one field of any one layer are noticed."""
    network, draws = drawn(0, 64, 2, variant)
    wanted = stylegan.synthesise(network, draws)[0]
    own_noise = variant is SPARSE  # a map of its own for every layer
    assert (draws.noise is None) == own_noise
    for layer, (shape, conv) in enumerate(zip(network.shapes, draws.convs, strict=True)):
        if own_noise:
            assert conv.noise.shape == (2, shape.resolution, shape.resolution)
            np.testing.assert_allclose(conv.noise.std(dim=(1, 2), correction=0), 1.0, atol=1e-3)
        for field in ("style", "wavelet", "negative", "bias", "noise_scale", *(["noise"] if own_noise else [])):
            convs = list(draws.convs)
            convs[layer] = replace(conv, **{field: getattr(conv, field).flip(0)})
            changed = stylegan.synthesise(network, replace(draws, convs=convs))[0]
            assert error_in_deviations(changed, wanted) > 1e-3, (field, layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ascending_sorts_each_row_and_keeps_equal_values_in_order(dtype: torch.dtype) -> None:
    values = torch.randn(5, 40, generator=torch.Generator().manual_seed(3)).to(dtype)
    values[1] = 0.0
    values[2, ::2], values[2, 1::4] = 0.0, -0.0
    values[3, 5:20] = values[3, 4]
    found, order = stylegan.ascending(values)
    for row, places, original in zip(found.tolist(), order.tolist(), values.tolist(), strict=True):
        assert places == sorted(range(40), key=lambda place: original[place])  # Python's sort is stable
        assert row == [original[place] for place in places]


def test_layer_shapes_at_256() -> None:
    shapes = stylegan.layer_shapes(256)
    assert [shape.resolution for shape in shapes] == [4, 8, 8, 16, 16, 32, 32, 64, 64, 128, 128, 256, 256]
    assert [shape.out_channels for shape in shapes][-6:] == [512, 512, 256, 256, 128, 128]
    assert [shape.in_channels for shape in shapes][-6:] == [512, 512, 512, 256, 256, 128]
    assert [shape.upsamples for shape in shapes] == [False, *[True, False] * 6]
    assert [shape.feeds_rgb for shape in shapes] == [True, *[False, True] * 6]


@pytest.mark.parametrize(
    ("variant", "bias_law"),
    [(ORIENTED, stats.uniform(-0.2, 0.4)), (SPARSE, stats.uniform(0.0, 0.2)), (HIGHFREQ, None)],
    ids=["oriented", "sparse", "highfreq"],
)
def test_laws_of_the_draws(variant: Variant, bias_law) -> None:
    network, draws = drawn(5, 8, 200, variant)
    for conv in draws.convs:
        bias, scale = conv.bias.numpy().ravel(), conv.noise_scale.numpy()
        if bias_law is None:
            assert (bias == 0.0).all()
        else:
            assert stats.kstest(bias, bias_law.cdf).pvalue > 1e-3
            assert stats.kstest(bias, stats.uniform(-0.21, 0.42).cdf).pvalue < 1e-3  # control
        if variant is not ORIENTED:  # whose images choose some of them first
            counts = np.bincount(conv.wavelet.numpy().ravel(), minlength=40)
            assert stats.chisquare(counts).pvalue > 1e-3  # every channel draws from all forty
        assert stats.kstest(scale, stats.uniform(0.0, 0.3).cdf).pvalue > 1e-3
        assert abs(conv.negative.float().mean() - 0.5) < 0.01
        # style = A w + 1 with E w² = (1 + .2²)/2 per coordinate of w
        assert abs(conv.style.mean() - 1.0) < 0.05
        assert conv.style.std().item() == pytest.approx(0.52**0.5, rel=0.1)
    # RGB weights: N(0, 1) · style / √512
    assert draws.rgb[0].std().item() == pytest.approx((1.52 / 512) ** 0.5, rel=0.1)
    assert network.constant.shape == (512, 4, 4)


def test_number_of_wavelets_is_uniform_from_5_to_40() -> None:
    choice = stylegan.draw_wavelet_choice(np.random.default_rng(0), 3000, 1000)
    counts = np.array([len(np.unique(row)) for row in choice])
    assert counts.min() == 5
    assert counts.max() == 40
    assert stats.chisquare(np.bincount(counts)[5:]).pvalue > 0.01
    assert stats.chisquare(np.bincount(np.minimum(counts + 1, 40))[5:]).pvalue < 1e-3  # control
    # Every wavelet is drawn equally often.
    frequency = np.bincount(np.concatenate([np.unique(row) for row in choice]), minlength=40) / counts.sum()
    np.testing.assert_allclose(frequency, 1 / 40, rtol=0.06)


def test_colour_sets_mean_and_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    image = 1e6 * torch.rand(2, 3, 16, 16, generator=generator) - 5.0
    mean = torch.tensor([[0.5, 0.45, 0.4], [0.5, 0.5, 0.9]])
    std = torch.tensor([[0.1, 0.15, 0.2], [0.1, 0.1, 0.3]])
    result = stylegan.colour(image, mean, std)
    torch.testing.assert_close(result.mean(dim=(2, 3))[0], mean[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(result.std(dim=(2, 3), correction=0)[0], std[0], atol=1e-4, rtol=0)
    assert result[1, 2].max() == 1.0  # clipped
    flat = stylegan.colour(torch.full((1, 3, 4, 4), 7.0), mean[:1], std[:1])
    torch.testing.assert_close(flat, mean[:1, :, None, None].expand(1, 3, 4, 4))


def test_colour_law() -> None:
    _, draws = drawn(2, 8, 1000)
    laws = [(0.483, 0.145), (0.455, 0.142), (0.401, 0.161), (0.219, 0.063), (0.213, 0.062), (0.213, 0.069)]  # published
    values = torch.cat([draws.colour_mean, draws.colour_std], dim=1).numpy()
    for column, (centre, spread) in zip(values.T, laws, strict=True):
        assert stats.kstest(column, stats.norm(centre, spread).cdf).pvalue > 1e-3
        assert stats.kstest(column, stats.norm(centre + 0.3 * spread, spread).cdf).pvalue < 1e-3  # control


def neighbour_correlation(images: np.ndarray) -> np.ndarray:
    grey = images.astype(np.float64).mean(axis=3)
    return np.array([np.corrcoef(image[:, 1:].ravel(), image[:, :-1].ravel())[0, 1] for image in grey])


def test_images_are_structured_and_varied() -> None:
    images = stylegan.render(np.random.default_rng(0), 20, 64)
    correlation = neighbour_correlation(images)
    noise = np.random.default_rng(0).integers(256, size=images.shape, dtype=np.uint8)
    assert np.median(correlation) > 0.6
    assert np.median(neighbour_correlation(noise)) < 0.1  # control
    assert np.median(images.std(axis=(1, 2))) > 25.0  # not flat
    assert np.median(np.abs(images[..., 0].astype(float) - images[..., 1]).mean(axis=(1, 2))) > 15.0  # not grey
    flat = images.reshape(20, -1).astype(float)
    assert np.abs(np.corrcoef(flat) - np.eye(20)).max() < 0.95  # no image twice


# ------------------------------------------------------------------------------------------------------------- wavelets


def rotated_centre(image: np.ndarray, degrees: float) -> np.ndarray:
    rotated = ndimage.rotate(image, degrees, reshape=False, order=1, mode="nearest")
    centre = rotated[4:7, 4:7]
    return centre - centre.mean()


def literal_step() -> np.ndarray:
    step = np.ones((11, 11))
    step[:, 5] = 0.0
    step[:, 6:] = -1.0
    return step


def literal_line() -> np.ndarray:
    line = np.ones((11, 11))
    line[:, 5] = -1.0
    return line


def test_edges_and_lines_equal_rotated_images() -> None:
    """The sense of rotation does not matter for the set of forty, but it must be one of the two."""
    base, everything = base_wavelets(), wavelets()
    for orientation in range(8):
        for offset, image in ((0, literal_step()), (8, literal_line())):
            own = base[offset + orientation]
            both = [rotated_centre(image, sign * 22.5 * orientation) for sign in (1, -1)]
            assert min(np.abs(own - candidate).max() for candidate in both) < 1e-9
            assert max(np.abs(everything - candidate).max(axis=(1, 2)).min() for candidate in both) < 1e-9
            half_way = [rotated_centre(image, sign * 22.5 * orientation + 11.25) for sign in (1, -1)]  # control
            assert min(np.abs(own - wrong).max() for wrong in half_way) > 0.05


def test_forty_different_wavelets_in_negated_pairs() -> None:
    everything = wavelets()
    assert everything.shape == (40, 3, 3)
    np.testing.assert_array_equal(everything[20:], -everything[:20])
    distance = np.abs(everything[:, None] - everything[None]).max(axis=(2, 3)) + np.eye(40)
    assert distance.min() > 0.05


def test_the_four_unoriented_ones() -> None:
    delta, centre_against_rest, plus, signed_plus = base_wavelets()[16:]
    np.testing.assert_array_equal(delta, [[0, 0, 0], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(centre_against_rest, [[-1, -1, -1], [-1, 1, -1], [-1, -1, -1]])
    np.testing.assert_array_equal(plus, [[0, 1, 0], [1, 1, 1], [0, 1, 0]])
    np.testing.assert_array_equal(signed_plus, [[-1, 1, -1], [1, 1, 1], [-1, 1, -1]])


def test_sign_wavelets_equal_the_signs_of_rotated_images() -> None:
    """Sixteen edges round the circle, eight lines with both signs, four others with both signs: forty."""
    everything = sign_wavelets()
    assert everything.shape == (40, 3, 3)
    assert set(np.unique(everything)) == {-1.0, 0.0, 1.0}
    found = set()
    for orientation in range(16):
        edge = np.sign(np.round(rotated_centre(literal_step(), 22.5 * orientation), 6))
        line = ndimage.rotate(literal_line(), 22.5 * orientation, reshape=False, order=1, mode="nearest")
        line = np.sign(np.round(line[4:7, 4:7], 6))
        for wanted in (edge, line, -line):
            matches = np.flatnonzero((everything == wanted).all(axis=(1, 2)))
            assert len(matches) >= 1
            found |= set(matches)
    assert found | {16, 17, 18, 19, 36, 37, 38, 39} == set(range(40))
    np.testing.assert_array_equal(everything[20:], -everything[:20])
    np.testing.assert_array_equal(everything[16:20], np.concatenate([base_wavelets()[16:]]))
    assert not (everything == wavelets()).all()


# ----------------------------------------------------------------------------------------------------------- pink noise

RESOLUTION = 32


def white_noise(count: int) -> torch.Tensor:
    random = np.random.default_rng(3)
    return torch.from_numpy(random.standard_normal((count, RESOLUTION, RESOLUTION)))


def amplitude_slope(image: np.ndarray) -> float:
    """Least-squares slope of log |F| against log r over every frequency but 0."""
    frequency = np.fft.fftfreq(RESOLUTION) * RESOLUTION
    radius = np.hypot(frequency[:, None], frequency[None, :]).ravel()[1:]
    amplitude = np.abs(np.fft.fft2(image)).ravel()[1:]
    return np.polyfit(np.log(radius), np.log(amplitude), 1)[0]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_slope_is_minus_the_exponent(exponent: float) -> None:
    white = white_noise(3)
    pink = pink_spectrum_noise(white, torch.full((3,), exponent, dtype=torch.float64)).numpy()
    for before, after in zip(white.numpy(), pink, strict=True):
        assert amplitude_slope(after) == pytest.approx(-exponent, abs=1e-6)
        assert abs(amplitude_slope(before)) < 0.2  # control: the measure finds no slope in white noise
        assert after.mean() == pytest.approx(0.0, abs=1e-12)


def test_envelope_equals_pillow_lanczos() -> None:
    grid = np.random.default_rng(0).laplace(size=(4, 4)).astype(np.float32)
    matrix = lanczos_matrix(RESOLUTION, 4).numpy()
    wanted = np.asarray(Image.fromarray(grid).resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS))
    np.testing.assert_allclose(matrix @ grid @ matrix.T, wanted, atol=1e-4)
    other = np.asarray(Image.fromarray(grid).resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC))
    assert np.abs(wanted - other).max() > 0.02  # control


def test_envelope_multiplies_the_noise_of_drawn_maps_of_unit_deviation() -> None:
    white, exponent = white_noise(1), torch.ones(1, dtype=torch.float64)
    envelope = torch.zeros(1, 4, 4, dtype=torch.float64)
    envelope[0, 0, 0] = 1.0
    noise = enveloped_pink_noise(white, exponent, envelope)[0].numpy()
    assert np.std(noise[:8, :8]) > 20 * np.std(noise[-8:, -8:])
    unevenness = []
    for enveloped in (True, False):
        maps = draw_pink_noise(np.random.default_rng(0), 200, RESOLUTION, enveloped).numpy()
        assert maps.dtype == np.float32
        np.testing.assert_allclose(maps.std(axis=(1, 2)), 1.0, atol=1e-4)
        assert np.abs(np.corrcoef(maps.reshape(200, -1)) - np.eye(200)).max() < 0.95
        energy = (maps**2).reshape(200, 2, 16, 2, 16).mean(axis=(2, 4)).reshape(200, 4)
        unevenness.append(float(np.median(energy.std(axis=1) / energy.mean(axis=1))))
    assert unevenness[0] > 1.5 * unevenness[1]


def test_area_resize_averages_squares() -> None:
    maps = white_noise(2)
    small = area_resize(maps, 8).numpy()
    wanted = maps.numpy().reshape(2, 8, 4, 8, 4).mean(axis=(2, 4))
    np.testing.assert_allclose(small, wanted, atol=1e-12)
    assert area_resize(maps, RESOLUTION) is maps


# ------------------------------------------------------------------------------------------------------ stylegan-random


def dense_random(network: RandomNetwork, latents: torch.Tensor, index: int) -> torch.Tensor:
    """One image with its own modulated and demodulated filters, in double precision."""
    latents = latents[:, index].double()
    x = network.constant.double()[None]
    image, rgb_layer = None, 0
    for layer, filters in enumerate(network.filters):
        style = network.affines[layer].double() @ latents[layer] + 1.0
        weight = filters.double() * style[None, :, None, None]
        weight = weight / torch.sqrt(weight.square().sum(dim=(1, 2, 3), keepdim=True))
        if network.upsamples[layer]:
            x = filter_padded(functional.conv_transpose2d(x, weight.transpose(0, 1), stride=2), 1, 1)
        else:
            x = functional.conv2d(x, weight, padding=1)
        x = 2.0**0.5 * functional.relu(x)
        if not network.upsamples[layer]:
            style = network.rgb_affines[rgb_layer].double() @ latents[layer + 1] + 1.0
            weights = network.rgb_weights[rgb_layer].double() * style / len(style) ** 0.5
            rgb = functional.conv2d(x, weights[:, :, None, None])
            if image is not None:
                zeros = torch.zeros_like(rgb)
                zeros[:, :, ::2, ::2] = image
                rgb = rgb + filter_padded(zeros, 2, 1)
            image, rgb_layer = rgb, rgb_layer + 1
    return image[0]


def test_equals_filters_formed_for_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stylegan_random, "MAX_CHANNELS", 12)
    random = np.random.default_rng(0)
    network = stylegan_random.draw_network(random, 32)
    latents = torch.from_numpy(random.standard_normal((len(network.filters) + 1, 3, 512), dtype=np.float32))
    images = stylegan_random.synthesise(network, latents)
    assert images.shape == (3, 3, 32, 32)
    for index in range(3):
        wanted = dense_random(network, latents, index)
        assert (images[index] - wanted).abs().max() < 1e-4 * wanted.std()
    assert (images[0] - wanted).abs().max() > 0.1 * wanted.std()  # control: another image


def test_networks_have_the_published_shape_but_for_their_width() -> None:
    network = stylegan_random.draw_network(np.random.default_rng(0), 64)
    assert network.upsamples == [False, *[True, False] * 4]
    assert {filters.shape for filters in network.filters} == {(64, 64, 3, 3)}
    values = torch.cat([filters.flatten() for filters in network.filters])
    assert abs(float(values.std()) - 1.0) < 0.01
    assert [weights.shape for weights in network.rgb_weights] == [(3, 64)] * 5


def test_images_are_smooth_blobs() -> None:
    grey = stylegan_random.render(np.random.default_rng(1), 20, 16).mean(axis=3)
    neighbours = [np.corrcoef(image[:, 1:].ravel(), image[:, :-1].ravel())[0, 1] for image in grey]
    assert np.median(neighbours) > 0.7
    assert np.abs(np.corrcoef(grey.reshape(len(grey), -1)) - np.eye(len(grey))).max() < 0.98
