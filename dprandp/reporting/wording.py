"""Words that depend on what one record is (an image, or all images of a patient, say), on the kind of noise, and on
whether the extractor was learned in the run or shipped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dprandp.privacy.discrete_cost import DELTA_SHARE, LATTICE_BITS
from dprandp.privacy.gaussian_dp import gaussian_dp_epsilon, gaussian_dp_mu
from dprandp.privacy.group import group_privacy
from dprandp.runresults import ONE_IMAGE

Facts = Mapping[str, Any]

GROUP_SIZES = (2, 5, 10)
"""Of which the disclosure of an image-level guarantee says what is left of it."""

DISCRETE_LIMIT = (
    "None in the noise: sums and noise are whole multiples of a public granularity, a power of two with 2^"
    f"{LATTICE_BITS} to 2^{LATTICE_BITS + 1} steps to the noise's standard deviation, added as whole numbers. What is "
    "left is the rounding of what is summed: a head's sums are made in float64, below the slack of the clip; features "
    "and gradients of a whole network are float32, and where they are computed in batches their last bits may depend "
    "on the images beside them."
)
DISCRETE_TAILS = (
    "Discrete noise is drawn to within 2^-110 of its exact distribution per coordinate; its distance from Gaussian "
    f"noise is paid for with a part of {DELTA_SHARE:g} of δ. Nothing runs in constant time: who can time the training "
    "may learn from that."
)


def several_images(result: Facts) -> bool:
    """Whether a unit of privacy may have several images."""
    return result["unit"] != ONE_IMAGE


def noun(result: Facts) -> str:
    """What one record is: ``image``, or ``patient``, as the column is called."""
    return str(result["unit"]).removeprefix("one ").split(" (column ")[0]


def units_and_images(result: Facts) -> str:
    """N in words."""
    if not several_images(result):
        return f"{result['train_examples']}, treated as public{_declared(result)}"
    return (
        f"{result['train_units']} units, which are this guarantee's N, with {result['train_examples']} images in all; "
        "both numbers are treated as public"
    )


def _declared(result: Facts) -> str:
    """Of training images that nobody promises to hide."""
    if "public_part" not in result:
        return ""
    return (
        f"; a random part of the training images ({result['public_part']}) was declared public by whoever ran it: it "
        "is not among them, and not protected"
    )


def clipped_gradient(result: Facts) -> str:
    """Whose gradient is clipped."""
    if not several_images(result):
        return "each example's gradient"
    return f"each {noun(result)}'s gradient, the mean over all its images,"


def clip_in_words(result: Facts) -> str:
    """What is done to it."""
    if result.get("clipping", "norm") == "automatic":
        return "is scaled to just below L2 norm C, whatever its length (automatic clipping, Bu et al. 2023)"
    if result.get("clipping", "norm") == "rescaled":
        return "is clipped to L2 norm C (sum and noise are then divided by C: De et al. 2022)"
    return "is clipped to L2 norm C"


def update_in_words(result: Facts) -> str:
    """What becomes of a noisy sum: none of it costs privacy."""
    done = result.get("optimizer") or f"SGD on the noisy gradients, momentum {result['momentum']:g}"
    recipe = f"; hyper-parameters of the recipe {result['recipe']}" if result.get("recipe") else ""
    return f"{done}{recipe}"


def public_weights(result: Facts) -> str | None:
    """Where a network's first weights came from, if from a file; that they are public was declared, not checked."""
    if not result.get("init_sha256"):
        return None
    return (
        f"weights from a file (sha256 {result['init_sha256']}), declared public by whoever ran this, in these words: "
        f"“{result['init_source']}”. This program cannot check that: where the file was made from the private images, "
        "or from anything else that must stay hidden, ε does not cover it"
    )


def noise_in_words(result: Facts) -> str:
    """What is added to a step's sum."""
    if result["noise"] == "discrete":
        return (
            "the sum is rounded to a lattice and gets discrete Gaussian noise (Canonne, Kamath & Steinke 2020) of std "
            "σC per coordinate"
        )
    return "the sum gets noise N(0, (σC)²) per coordinate"


def limits(result: Facts, general: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The general limits, with what the kind of noise and the unit change about them; the labels stay the same."""
    texts = dict(general)
    if result["noise"] == "discrete":
        texts["Limit: floating-point noise (severity low)"] = DISCRETE_LIMIT
        texts["Limit: tails and timing"] = DISCRETE_TAILS
    if several_images(result):
        one = noun(result)
        texts["Limit: N is treated as public"] = (
            f"The number of units ({one}) sets the sampling rate, the divisor and δ; it is printed here, as is the "
            "number of images. Where these are themselves a secret, this guarantee does not cover them."
        )
        texts["Limit: other copies"] = (
            f"ε counts what this run directory released. Other runs on the same images add to it. All images of one "
            f"{one} are protected together where the column gives them the same value; those of the same person under "
            "two values, or duplicates in two units, are not."
        )
    return list(texts.items())


def groups(result: Facts) -> str:
    """What the guarantee is worth for several records together."""
    epsilon, delta = result["epsilon"], result["delta"]
    one = noun(result)
    if math.isinf(epsilon) or not result["private"]:
        return f"no guarantee, as for one {one}"
    exact = result["accountant"].startswith("exact Gaussian DP") and result["noise"] == "gaussian"
    parts = []
    for size in GROUP_SIZES:
        if exact:
            bound = gaussian_dp_epsilon(size * gaussian_dp_mu(epsilon, delta) * (1 + 1e-9), delta)
            parts.append(f"{size}: ε = {_up(bound)}")
        else:
            bound, group_delta = group_privacy(epsilon, delta, size)
            parts.append(f"{size}: ε = {_up(bound)} with δ = {min(1.0, group_delta):.2g}")
    how = f"exact, at δ = {delta:g}" if exact else "a bound that holds for any mechanism, not tight"
    return f"together, by their number: {'; '.join(parts)} ({how}). dprandp account --group-size k finds better ones."


def _up(epsilon: float) -> str:
    return f"{math.ceil(epsilon * 100 - 1e-9) / 100:g}"


def public_steps(training: Facts) -> str:
    """What ``continue`` did with public images, from ``public_training`` of its result."""
    mixed = {
        "cosine": "; a public gradient was mixed into every private step, with a weight that rose from 0 towards 1",
        "ratio": "; a public gradient was mixed into every private step, by the ratio of the numbers of examples",
    }.get(training["mix"], "")
    began = "" if training["mix"] == "public" else f"; private steps began {training['switch']}"
    if training["mix"] in ("cosine", "ratio", "private"):
        began = f"; {training['switch']}"
    return f"{training['steps']} steps on public images alone ({training['images']}){began}{mixed}"


def continued(result: Facts) -> str:
    """How an extractor was continued before a later stage took it, from the result of ``continue``."""
    private = "without private images"
    if "epsilon" in result:
        private = f"then {result['charged_steps']} private steps on {result['title']}, which are counted in ε"
    return f"continued: {public_steps(result['public_training'])}; {private}"


def shipped_prior(pretrain: Facts, generate: Facts) -> str:
    """Which prior a run took instead of learning an extractor; that it saw no data; what to compare it with."""
    process = f" of the random process {generate['process']}" if generate else ""
    return (
        f"the prior {pretrain['prior']} that dprandp ships (sha256 {pretrain['prior_sha256']}), an extractor "
        f"({pretrain['arch']}) learned from {pretrain['prior_images']} synthetic images{process}, made without any data"
    )


def public_inputs(result: Facts, pretrain: Facts, generate: Facts) -> str:
    """Everything that went into a stage beside the private images."""
    declared = (
        f"declared facts of the data set ({result['title']}: {len(result['classes'])} class names, N, image size); the "
        f"configuration; the code. Normalisation and whitening use constants or synthetic images, never private ones."
    )
    if weights := public_weights(result):
        return f"{weights[0].upper()}{weights[1:]}; {declared}"
    if result.get("source") == "scratch" or not pretrain:
        return f"A randomly initialised network; {declared}"
    if "public_training" in result:
        declared = f"{public_steps(result['public_training'])}; {declared}"
    if pretrain.get("continued"):
        declared = f"{continued(pretrain['continued'])}; {declared}"
    images = "synthetic images"
    if generate:
        images = f"{generate['count']} synthetic images of the random process {generate['process']}"
    if pretrain.get("prior"):
        return f"{shipped_prior(pretrain, generate)}; for its statistics {images}, made without any data; {declared}"
    learned = "a randomly initialised extractor" if pretrain.get("random_init") else "an extractor learned from them"
    return f"{images}, made without any data; {learned} ({pretrain['arch']}); {declared}"
