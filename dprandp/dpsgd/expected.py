"""What accuracy to expect of a private head, before anything is spent: from N, ε, δ and the number of classes alone.

A head starts at zero. What N records teach it about one of K classes is a sum over about N/K of them, each of a bounded
length. The noise of all steps together is that of one Gaussian mechanism: its standard deviation is 1/μ of that bound.
So signal over noise is μN/K, up to a constant. The dimension does not enter: a score is the product with one feature
vector of length 1, along which the noise is as large in a thousand dimensions as in ten.

The constant was measured: ``scripts/small_data.py`` simulates the probe on parts of Fashion-MNIST (training split; N =
100 to 3,000, ε = .5 to 8, K = 2, 4, 10), and compares the gain over guessing with that of the same head on the same
images without noise. The part that is kept is about s/(s + 7) for s = μN/K (docs/stages.md has the table).
"""

from __future__ import annotations

import math

from dprandp.privacy.gaussian_dp import gaussian_dp_mu

HALF = 7.0
"""The signal μN/K at which half of the gain over guessing is kept."""

LITTLE = 0.2
"""Of the gain: with less than this, accuracy is near guessing."""


def kept_gain(epsilon: float, delta: float, examples: int, classes: int) -> float:
    """The part of the gain over guessing that a head keeps under noise, in [0, 1]; 1 for an infinite ε."""
    if math.isinf(epsilon):
        return 1.0
    signal = gaussian_dp_mu(epsilon, delta) * examples / classes
    return signal / (signal + HALF)


def too_few(
    epsilon: float, delta: float, examples: int, classes: int, *, unit: str = "image", whole: float | None = None
) -> str | None:
    """What to say before a stage with too few records for its ε; None where half of the gain or more is kept.

    Args:
        epsilon: of the stage. examples: N.
        unit: the noun of a record.
        whole: the run's ε, where the stage gets only a part of it.
    """
    kept, guess = kept_gain(epsilon, delta, examples, classes), f"guessing, {100 / classes:.3g} %"
    if kept >= 0.5:
        return None
    what = f"about {100 * kept:.0f} % of the gain over {guess}, that the same head would have without noise"
    if kept < LITTLE:
        what = f"an accuracy near {guess}"
    said = f"N = {examples} is small for ε = {epsilon:.3g} and {classes} classes: expect {what}"
    if whole is not None:
        better = kept_gain(whole, delta, examples, classes)
        said += f"; with the run's whole ε = {whole:g} (--share 1) it would keep about {100 * better:.0f} % of the gain"
    return f"{said}. More {unit}s, fewer classes or a larger ε help"
