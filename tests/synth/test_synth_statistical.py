"""spectrum, wmm and color: each constraint holds afterwards, against slow definitions and with controls."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from dprandp.synth import statistical, steerable
from dprandp.synth.statistical import band_quantiles, impose_spectrum, match_ranks

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


def test_spectrum_gives_the_drawn_slopes_and_keeps_variance_mean_and_phase() -> None:
    draws = drawn(5, spectrum=True)
    channels = statistical.impose(draws).double().numpy()
    before = draws.noise.double().numpy()
    np.testing.assert_allclose(channels.mean(axis=(2, 3)), before.mean(axis=(2, 3)), rtol=1e-4)
    np.testing.assert_allclose(channels.std(axis=(2, 3)), before.std(axis=(2, 3)), rtol=1e-4)
    for image, noise, slope in zip(channels, before, draws.slope, strict=True):
        for channel, other in zip(image, noise, strict=True):
            np.testing.assert_allclose(axis_slopes(channel), slope, atol=0.02)
            assert np.abs(axis_slopes(other)).max() < 0.5  # control: noise has none
            turned = np.fft.fft2(channel)[1:8, 1:8] / np.fft.fft2(other)[1:8, 1:8]
            assert np.abs(np.angle(turned)).max() < 0.01


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


def bands_of(channels: torch.Tensor) -> list[torch.Tensor]:
    levels = steerable.levels_for(RESOLUTION)
    return steerable.analyse(torch.fft.rfft2(channels, norm="ortho"), steerable.filters(RESOLUTION, levels))


def band_errors(draws: statistical.Draws, channels: torch.Tensor) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per group of bands: RMS error of the sorted values over the deviation; kurtosis found and wanted."""
    first_band, results = 0, []
    for band in bands_of(channels):
        size, kinds = band.shape[-1], 1 if band.dim() == 4 else 4
        shapes = draws.shape[:, :, first_band : first_band + kinds].ravel()
        first_band += kinds
        wanted = band_quantiles(shapes, RESOLUTION // size, size * size)
        found = np.sort(band.reshape(wanted.shape))
        error = np.sqrt(((found - wanted) ** 2).mean(axis=1)) / wanted.std(axis=1)
        results.append((error, stats.kurtosis(found, axis=1), stats.kurtosis(wanted, axis=1)))
    assert first_band == draws.shape.shape[2]
    return results


def test_wmm_matches_the_quantiles_of_every_band(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = drawn(4, wmm=True)
    matched = band_errors(draws, statistical.impose(draws))
    raw = band_errors(draws, draws.noise - 128.0)
    monkeypatch.setattr(statistical, "ITERATIONS", 1)
    once = band_errors(draws, statistical.impose(draws))
    for (error, kurtosis, wanted), (raw_error, raw_kurtosis, _), (error_once, _, _) in zip(
        matched, raw, once, strict=True
    ):
        assert np.median(error) < 0.2
        assert np.median(error) < 0.4 * np.median(raw_error)  # controls: noise, and a single pass
        assert np.median(error) < 0.7 * np.median(error_once)
        assert abs(np.median(kurtosis) - np.median(wanted)) < 0.6 * abs(np.median(raw_kurtosis) - np.median(wanted))
    _, kurtosis, wanted = matched[0]  # the high-pass band has enough coefficients to tell shapes ρ apart
    assert np.corrcoef(kurtosis, wanted)[0, 1] > 0.7
    assert np.median(kurtosis) > 2.0  # 0 for a Gaussian


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
    levels = steerable.levels_for(size)
    masks = steerable.filters(size, levels)
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
                bands = steerable.analyse(spectrum, masks)
                bands[0] = torch.from_numpy(ranked(bands[0].numpy(), band_quantiles(shape[:1], 1, size**2)[0]))
                for level in range(levels):
                    for orientation in range(4):
                        rho = shape[1 + 4 * level + orientation]
                        wanted = band_quantiles(np.array([rho]), 2**level, (size >> level) ** 2)[0]
                        bands[1 + level][orientation] = torch.from_numpy(
                            ranked(bands[1 + level][orientation].numpy(), wanted)
                        )
                x = torch.fft.irfft2(steerable.synthesise(bands, spectrum, masks), norm="ortho").numpy()
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


def test_an_image_does_not_depend_on_those_it_is_worked_on_with() -> None:
    resolution, count = 64, statistical.CHUNK  # in render, two parts
    draws = statistical.draw(np.random.default_rng(7), count, resolution, **ALL)
    whole = statistical.to_bytes(draws.colours.to_rgb(statistical.impose(draws).numpy()))
    assert count * resolution**2 > statistical.CACHED
    assert np.array_equal(statistical.render(np.random.default_rng(7), count, resolution, **ALL), whole)


def test_imposing_a_spectrum_twice_is_imposing_it_once() -> None:
    draws = drawn(2, spectrum=True)
    wanted = statistical.amplitude(draws.slope, RESOLUTION)
    once = impose_spectrum(torch.fft.rfft2(draws.noise, norm="ortho"), wanted)
    torch.testing.assert_close(impose_spectrum(once, wanted), once, rtol=1e-3, atol=1e-3)


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


def test_images_use_the_whole_range_and_prefixes_hold() -> None:
    render = partial(statistical.render, **ALL)
    many = render(np.random.default_rng(0), statistical.CHUNK + 1, 16)
    assert many.shape == (statistical.CHUNK + 1, 16, 16, 3)
    assert (many.min(axis=(1, 2, 3)) == 0).all()
    assert (many.max(axis=(1, 2, 3)) == 255).all()
    np.testing.assert_array_equal(render(np.random.default_rng(0), 2, 16), many[:2])
