"""The error of correlated noise, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from correlated_noise import best_bands, inverse_series, prefix_error


def toeplitz(column: torch.Tensor, size: int) -> torch.Tensor:
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for band, value in enumerate(column):
        matrix += value * torch.eye(size, dtype=torch.float64).roll(band, 0).tril()
    return matrix


@pytest.mark.parametrize("size", [1, 2, 7, 64, 65])
def test_the_error_is_that_of_dense_matrices(size: int) -> None:
    column = torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64)[:size]
    dense = toeplitz(column / column.norm(), size)
    assert torch.allclose(inverse_series(column / column.norm(), size), torch.linalg.inv(dense)[:, 0])
    sums = torch.ones(size, size, dtype=torch.float64).tril() @ torch.linalg.inv(dense)
    assert prefix_error(column, size) == pytest.approx(float(sums.square().sum() / size) ** 0.5)


def test_the_bands_are_the_best_ones() -> None:
    """Against a grid; and more bands are better where the noise costs the same."""
    steps, grid = 60, torch.linspace(0, 1, 201, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    least = min(prefix_error(torch.cat([one, value[None]]), steps) for value in grid)
    assert prefix_error(best_bands(steps, 2), steps) == pytest.approx(least, rel=1e-4)
    errors = [prefix_error(best_bands(steps, bands), steps) for bands in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(((steps + 1) / 2) ** 0.5)
