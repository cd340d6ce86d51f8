"""``perlin``: sums of octaves of gradient noise, the usual cheap baseline.

Source: Perlin, "Improving Noise" (SIGGRAPH 2002): a random unit gradient at every point of a lattice, the linear
functions they define blended with the quintic 6t⁵ − 15t⁴ + 10t³. Noise is 0 at the lattice points and has continuous
second derivatives. Here the lattice is periodic; lattice, number of octaves and the factor from an octave to the next
are drawn per image, and three independent fields are mixed and coloured like the images of ``stylegan-oriented``.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from dprandp.synth.compose import in_chunks
from dprandp.synth.stylegan import colour, draw_colour, to_bytes

CHUNK = 20  # images drawn and rendered together; part of the random stream: changing it changes every image
PERSISTENCE = (0.3, 0.9)
COARSEST_CELLS = 8  # of the first octave, along a side


def fade(position: torch.Tensor) -> torch.Tensor:
    """6t⁵ − 15t⁴ + 10t³: from 0 to 1 on [0, 1], first and second derivative 0 at both ends."""
    return position**3 * (position * (6.0 * position - 15.0) + 10.0)


@lru_cache(maxsize=64)
def axis_weights(cells: int, positions: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Blending along one axis of a periodic lattice of ``cells`` points, at positions in [0, 1) of the period.

    Returns:
        the weight of every lattice point at every position, float32 [P, cells], and that weight times the distance
        from the lattice point to the position, in cells.
    """
    place = torch.tensor(positions, dtype=torch.float64) * cells
    first = place.floor().long()
    offset = place - first
    blend = fade(offset)
    rows = torch.arange(len(positions))
    weight, moment = torch.zeros(2, len(positions), cells, dtype=torch.float64)
    for corner, share, distance in ((first, 1.0 - blend, offset), (first + 1, blend, offset - 1.0)):
        weight.index_put_((rows, corner % cells), share, accumulate=True)
        moment.index_put_((rows, corner % cells), share * distance, accumulate=True)
    return weight.float(), moment.float()


def gradient_noise(gradients: torch.Tensor, positions: tuple[float, ...]) -> torch.Tensor:
    """Perlin noise at the grid `positions` × `positions` of the unit square: float32 [N, P, P].

    Its value is Σ over the lattice of w(y) w(x) (g_x δx + g_y δy) with separable weights w: two products of matrices
    per component of the gradients, float32 [N, cells, cells, 2].
    """
    weight, moment = axis_weights(gradients.shape[1], positions)
    return weight @ gradients[..., 0] @ moment.T + moment @ gradients[..., 1] @ weight.T


def draw_gradients(random: np.random.Generator, count: int, cells: int) -> torch.Tensor:
    """Unit vectors in uniform directions: float32 [count, cells, cells, 2]."""
    angle = torch.from_numpy(random.uniform(0.0, 2.0 * np.pi, (count, cells, cells)).astype(np.float32))
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def draw_fields(random: np.random.Generator, count: int, resolution: int) -> torch.Tensor:
    """Octave sums, three independent ones per image: float32 [count, 3, R, R]."""
    positions = tuple((np.arange(resolution) + 0.5) / resolution)
    finest = max(resolution // 2, 2)  # cells of two pixels
    first = 2 ** random.integers(1, np.log2(min(COARSEST_CELLS, finest)), size=count, endpoint=True)
    octaves = random.integers(1, np.log2(finest), size=count, endpoint=True)
    persistence = random.uniform(*PERSISTENCE, size=count)
    fields = torch.zeros(count, 3, resolution, resolution)
    cells = 2
    while cells <= finest:
        octave = np.log2(cells / first)
        gain = np.where((octave >= 0) & (octave < octaves), persistence**octave, 0.0).astype(np.float32)
        noise = gradient_noise(draw_gradients(random, 3 * count, cells), positions).view_as(fields)
        fields += torch.from_numpy(gain)[:, None, None, None] * noise
        cells *= 2
    return fields


def render(random: np.random.Generator, count: int, resolution: int) -> np.ndarray:
    """The ``Process``: independent images, of a power of two from 4 pixels on."""

    def chunk() -> np.ndarray:
        fields = draw_fields(random, CHUNK, resolution)
        mix = torch.from_numpy(random.standard_normal((CHUNK, 3, 3), dtype=np.float32))
        return to_bytes(colour((mix @ fields.flatten(2)).view_as(fields), *draw_colour(random, CHUNK)))

    return in_chunks(count, chunk)
