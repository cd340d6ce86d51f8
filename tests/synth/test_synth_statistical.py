"""spectrum, wmm and color: each constraint holds afterwards, against slow definitions and with controls."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from dprandp.synth import statistical
from dprandp.synth.statistical import band_quantiles, match_ranks

RESOLUTION = 32
ALL = {"spectrum": True, "wmm": True, "colour": True}


def drawn(count: int, seed: int = 0, **constraints: bool) -> statistical.Draws:
    names = dict.fromkeys(("spectrum", "wmm", "colour"), False)
    return statistical.draw(np.random.default_rng(seed), count, RESOLUTION, **{**names, **constraints})


def axis_slopes(image: np.ndarray) -> np.ndarray:
    """Minus the slopes of log |F| against log f along the two axes, where the other frequency is 0: (x, y)."""
    amplitude = np.abs(np.fft.fft2(image))
    frequency = np.log(np.arange(1, image.shape[0] // 2))
    lines = (amplitude[0, 1 : len(frequency) + 1], amplitude[1 : len(frequency) + 1, 0])
    return np.array([-np.polyfit(frequency, np.log(line), 1)[0] for line in lines])


# ---------------------------------------------------------------------------------------------------------- constraints


def test_spectrum_of_the_written_images_follows_the_draws() -> None:
    render = partial(statistical.render, spectrum=True, wmm=False, colour=False)
    images = render(np.random.default_rng(3), statistical.CHUNK, 64)
    wanted = statistical.draw(np.random.default_rng(3), statistical.CHUNK, 64, spectrum=True, wmm=False, colour=False)
    fitted = np.array([axis_slopes(image.mean(axis=2)) for image in images])
    error = np.abs(fitted - wanted.slope)[wanted.slope < 2.2]  # above, rounding to bytes hides high frequencies
    assert len(error) >= 8
    assert np.median(error) < 0.15
    assert np.median(np.abs(fitted - wanted.slope[::-1])) > 0.4  # control: another image's


def test_laws_of_slope_and_shape() -> None:
    random = np.random.default_rng(0)
    draws = statistical.draw(random, 400, 8, **ALL)
    middle, difference = draws.slope.mean(axis=1), (draws.slope[:, 0] - draws.slope[:, 1]) / 2
    assert stats.kstest(middle, stats.uniform(0.5, 3.0).cdf).pvalue > 0.01
    assert stats.kstest(difference, stats.norm(0.0, 0.05).cdf).pvalue > 0.01
    assert stats.kstest(difference, stats.norm(0.0, 0.08).cdf).pvalue < 1e-3  # control
    assert stats.kstest(draws.shape.ravel(), stats.uniform(0.4, 0.4).cdf).pvalue > 0.01
    assert draws.shape.shape == (400, 3, 9)


def test_ranks_are_matched_like_an_argsort() -> None:
    for count in (256, 16384):  # packed into 32 and 64 bits
        values = torch.from_numpy(np.random.default_rng(0).standard_t(2, (3, count)).astype(np.float32))
        wanted = torch.from_numpy(np.sort(np.random.default_rng(1).random((3, count)).astype(np.float32)))
        matched = match_ranks(values, wanted).numpy()
        np.testing.assert_array_equal(np.sort(matched), wanted)
        for row, source, target in zip(matched, values.numpy(), wanted.numpy(), strict=True):
            oracle = np.empty(count, np.float32)
            oracle[np.argsort(source)] = target
            # Values closer than a step of the rounding may change places.
            assert np.abs(row - oracle).max() < 50 / count
            assert (row == oracle).mean() > 0.9
    flat = match_ranks(torch.zeros(1, 16), torch.arange(16.0)[None])
    np.testing.assert_array_equal(flat[0], np.arange(16))


@pytest.mark.parametrize(("shape", "scale"), [(0.4, 1), (0.8, 2), (0.6, 4)])
def test_quantiles_are_those_of_the_density(shape: float, scale: int) -> None:
    def cumulated(x: float, rho: float = shape) -> float:
        return integrate.quad(lambda t: np.exp(-((t / 4.0**scale) ** rho)), 0.0, x, limit=200)[0]

    quantiles = band_quantiles(np.array([shape, 0.7]), scale, 1024)
    assert quantiles.shape == (2, 1024)
    np.testing.assert_array_equal(quantiles[0], -quantiles[0, ::-1])
    assert (np.diff(quantiles[0]) > 0).all()
    places = [512, 600, 800, 1000, 1023]
    probability = np.array([cumulated(float(quantiles[0, k])) for k in places]) / cumulated(200.0)
    error = np.abs(probability - (np.array(places) - 511.5) / 512).max()
    assert error < 1e-3
    other = np.array([cumulated(float(quantiles[0, k]), 1.3 * shape) for k in places]) / cumulated(200.0, 1.3 * shape)
    assert np.abs(other - probability).max() > max(4.0 * error, 2e-3)  # control


@pytest.mark.parametrize("constraints", [{"spectrum": True, "colour": True}, ALL])
def test_colour_holds_exactly_at_the_end(constraints: dict[str, bool]) -> None:
    draws = drawn(3, **constraints)
    channels = statistical.impose(draws).numpy()
    np.testing.assert_array_equal(np.sort(channels.reshape(3, 3, -1)), draws.colours.histogram)
    rgb = draws.colours.to_rgb(channels)
    back = np.einsum("bkc,bcyx->bkyx", draws.colours.basis, rgb - draws.colours.mean[:, :, None, None])
    np.testing.assert_allclose(back, channels, atol=1e-3)
    noise = np.sort(draws.noise.numpy().reshape(3, 3, -1))
    assert np.abs(noise - draws.colours.histogram).mean() > 10  # control


def slow_images(draws: statistical.Draws) -> np.ndarray:
    """All three constraints ten times, on whole planes with argsort, one channel after the other."""
    size = draws.noise.shape[-1]
    levels = statistical.levels_for(size)
    masks = statistical.filters(size, levels)
    frequency = np.fft.fftfreq(size)
    result = draws.noise.double().numpy().copy()

    def ranked(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        out = np.empty(values.size)
        out[np.argsort(values, axis=None)] = wanted
        return out.reshape(values.shape)

    for image in range(len(result)):
        slope_x, slope_y = draws.slope[image]
        denominator = np.abs(frequency[None]) ** slope_x + np.abs(frequency[:, None]) ** slope_y
        denominator[0, 0] = np.inf
        for channel in range(3):
            x = result[image, channel]
            shape = draws.shape[image, channel]
            for _ in range(10):
                mean, deviation = x.mean(), x.std()
                y = np.fft.ifft2(np.exp(1j * np.angle(np.fft.fft2(x - mean))) / denominator).real
                x = y / y.std() * deviation + mean
                spectrum = torch.fft.rfft2(torch.from_numpy(x), norm="ortho")
                bands = statistical.analyse(spectrum, masks)
                bands[0] = torch.from_numpy(ranked(bands[0].numpy(), band_quantiles(shape[:1], 1, size**2)[0]))
                for level in range(levels):
                    for orientation in range(4):
                        rho = shape[1 + 4 * level + orientation]
                        wanted = band_quantiles(np.array([rho]), 2**level, (size >> level) ** 2)[0]
                        bands[1 + level][orientation] = torch.from_numpy(
                            ranked(bands[1 + level][orientation].numpy(), wanted)
                        )
                x = torch.fft.irfft2(statistical.synthesise(bands, spectrum, masks), norm="ortho").numpy()
                x = ranked(x, draws.colours.histogram[image, channel])
            result[image, channel] = x
    return result


def test_the_iteration_equals_a_slow_one() -> None:
    draws = drawn(1, seed=5, **ALL)
    fast, slow = statistical.impose(draws).numpy(), slow_images(draws)
    # Near-equal values may swap ranks in single precision, and ten iterations carry that on: nearly all pixels agree.
    correlation = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(fast[0], slow[0], strict=True)]
    assert min(correlation) > 0.99
    other = statistical.impose(drawn(1, seed=6, **ALL)).numpy()
    assert abs(np.corrcoef(other[0, 0].ravel(), slow[0, 0].ravel())[0, 1]) < 0.3  # control


def test_images_use_the_whole_range_and_depend_on_no_other() -> None:
    images = statistical.render(np.random.default_rng(7), statistical.CHUNK, 16, **ALL)
    assert (images.min(axis=(1, 2, 3)) == 0).all()
    assert (images.max(axis=(1, 2, 3)) == 255).all()
    draws = statistical.draw(np.random.default_rng(7), statistical.CHUNK, 16, **ALL)
    colours = replace(draws.colours, **{name: value[3:4] for name, value in vars(draws.colours).items()})
    own = replace(draws, noise=draws.noise[3:4], slope=draws.slope[3:4], shape=draws.shape[3:4], colours=colours)
    alone = statistical.to_bytes(colours.to_rgb(statistical.impose(own).numpy()))[0]
    np.testing.assert_array_equal(images[3], alone)


# -------------------------------------------------------------------------------------------------------------- colours


def test_colour_model_is_the_pca_of_its_reference() -> None:
    model = statistical.draw_colour_model(np.random.default_rng(0), 3, 16)
    random = np.random.default_rng(0)
    for index in range(3):
        pixels = statistical.draw_reference(random, 16).reshape(-1, 3)
        covariance = np.cov(pixels.T, bias=True)
        basis = model.basis[index].astype(float)
        np.testing.assert_allclose(basis @ basis.T, np.eye(3), atol=1e-6)
        turned = basis @ covariance @ basis.T
        np.testing.assert_allclose(turned - np.diag(np.diag(turned)), 0.0, atol=1e-2)
        along = (pixels - pixels.mean(axis=0)) @ basis.T
        np.testing.assert_allclose(np.sort(along, axis=0).T, model.histogram[index], atol=1e-2)
        assert pixels.min() == 0.0
        assert pixels.max() == pytest.approx(256.0)


def test_a_reference_has_few_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistical, "NOISE", 0.0)
    monkeypatch.setattr(statistical, "LARGEST_BLUR", 1)
    random = np.random.default_rng(0)
    references = [statistical.draw_reference(random, 32).reshape(-1, 3) for _ in range(100)]
    counts = np.array([1 + (np.abs(np.diff(reference, axis=0)) > 1e-9).any(axis=1).sum() for reference in references])
    assert counts.min() >= 2  # of 3 colours, one may have drawn a proportion near 0
    assert counts.max() <= 22
    assert stats.kstest(counts + random.random(100), stats.uniform(3, 20).cdf).pvalue > 1e-3
    assert stats.kstest(counts + random.random(100), stats.uniform(3, 14).cdf).pvalue < 1e-3  # control
