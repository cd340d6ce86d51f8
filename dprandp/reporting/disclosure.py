"""What must be said beside every privacy claim: one list, shared by the report and the model card.

A number ε without its mechanism, its neighbours, its unit and its limits says nothing. ``disclosure`` is that list;
nothing in it is computed from private data. All of it comes from the result that a private stage recorded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.special import ndtr, ndtri

from dprandp.errors import CheckpointError
from dprandp.privacy.accounting import ADVISED_SHARE
from dprandp.privacy.gaussian_dp import equivalent_mu
from dprandp.reporting.wording import (
    clip_in_words,
    clipped_gradient,
    groups,
    limits,
    noise_in_words,
    noun,
    public_inputs,
    several_images,
    units_and_images,
    update_in_words,
)
from dprandp.runresults import ONE_IMAGE

Facts = Mapping[str, Any]

NEEDED = (
    "stage", "data", "title", "classes", "accuracy", "balanced_accuracy", "auc", "loss", "majority_accuracy",
    "confusion", "epsilon", "delta", "epsilon_target", "epsilon_total", "accountant", "noise_multiplier", "sample_rate",
    "steps", "clip_norm", "views", "expected_batch", "train_examples", "test_examples", "lr", "momentum", "seconds",
    "device", "private", "random", "released", "adjacency", "unit", "mirror", "charged_steps", "lost_steps",
    "also_charged", "ledger_head", "noise", "precision",
)  # fmt: skip
"""Keys that the result of a private stage must have. A disclosure with a gap is worse than none."""

RELEASED = {
    "average": "the mean of the second half of the iterates",
    "ema": "the exponential moving average of the iterates",
    "last": "the last iterate",
}

# What nobody can read out of a run's files, said as it is. Whoever changes a default keeps this true.
DEFAULTS_CHOSEN_ON = (
    "Default learning rates, steps and sizes were chosen on public benchmark data sets; on such a set the accuracy is "
    "therefore slightly optimistic. Trying several settings on the private data and keeping the best spends privacy "
    "that ε does not count, unless all were tried in this run directory."
)

LIMITS = (
    (
        "Limit: floating-point noise (severity low)",
        "Gaussian noise in floating point has gaps that can betray the value below it (Mironov 2012). It is computed "
        "and added in float64 and rounded to float32, which hides the 29 lowest bits: a mitigation, not a proof. Low, "
        "because what is published is a trained model and not single noisy sums.",
    ),
    (
        "Limit: tails and timing",
        "Noise values never exceed 8.6 standard deviations; what is cut off has probability 1e-17 per coordinate and "
        "step, to be added to δ in thought. Nothing runs in constant time: who can time the training may learn from "
        "that.",
    ),
    (
        "Limit: N is treated as public",
        "The number of training images sets the sampling rate, the divisor and δ, and is printed here. Where the size "
        "of the data set is itself a secret, this guarantee does not cover it.",
    ),
    (
        "Limit: test split",
        "Each private stage (continue, probe, fine-tune) evaluates the model that it releases on the test split once, "
        "at the stage's own end; nothing is chosen by the result. Its metrics are published without noise: ε covers "
        "the training images, not the test images.",
    ),
    (
        "Limit: other copies",
        "ε counts what this run directory released. Other runs on the same images add to it. Images of the same "
        "person, or duplicates, are protected one by one and not as a group.",
    ),
)


def check(result: Facts) -> None:
    """Refuse a result that cannot be disclosed in full.

    Raises:
        CheckpointError: a key is missing; the message names it.
    """
    needed = [*NEEDED, "train_units"] if result.get("unit", ONE_IMAGE) != ONE_IMAGE else NEEDED
    missing = [key for key in needed if key not in result]
    if missing:
        raise CheckpointError(
            f"the recorded result of stage {result.get('stage', 'unknown')!r} lacks {', '.join(missing)}",
            fix="make the stage again with --overwrite; what it has spent stays spent",
        )


def disclosure(
    result: Facts,
    pretrain: Facts | None = None,
    generate: Facts | None = None,
    *,
    changed: Sequence[str] | None = None,
) -> list[tuple[str, str]]:
    """Everything a reader needs to judge the guarantee of one private stage.

    Args:
        result: the stage's result, with the keys ``NEEDED``.
        pretrain, generate: results of the public stages, None or empty where there are none.
        changed: settings other than the defaults, as ``"steps = 300 (default 120)"``; None if not known.

    Returns:
        (label, value) pairs of plain text, always the same labels in the same order.

    Raises:
        CheckpointError: the result lacks a key.
    """
    check(result)
    rows = [
        ("Mechanism", _mechanism(result)),
        ("ε (privacy loss)", _epsilon(result)),
        ("Also counted in ε", _also_charged(result)),
        ("δ", _delta(result)),
        ("Adjacency", f"{result['adjacency']} (the change that must not be noticed){_slot(result)}"),
        ("Unit of privacy", f"{result['unit']}"),
        ("Several records together", groups(result)),
        ("N (training examples)", units_and_images(result)),
        (
            "q (sampling rate)",
            f"{number(result['sample_rate'])} per step, expected batch qN = {number(result['expected_batch'])}",
        ),
        ("T (noisy steps)", _steps(result)),
        ("σ (noise multiplier)", f"{number(result['noise_multiplier'])} (noise std over clip norm)"),
        ("C (clip norm)", f"{number(result['clip_norm'])} (L2 norm of one {_record(result)}'s gradient)"),
        ("K (views per example)", f"{result['views']}, their gradients averaged before the clip"),
        ("Update", update_in_words(result)),
        ("Trained weights", result.get("trained_weights", "the head alone" if result["stage"] == "probe" else "all")),
        ("Second mechanism (refit)", _refit(result.get("refit"))),
        ("Accountant", f"{result['accountant']}, upper bound"),
        ("Random numbers", _random(result)),
        ("Arithmetic", f"network computed in {result['precision']}; sums and noise in float64"),
        ("Released", f"{RELEASED.get(result['released'], result['released'])}, and the test metrics"),
        ("Tuned, and on what", _tuned(result, changed)),
        ("Public inputs", public_inputs(result, pretrain or {}, generate or {})),
        *limits(result, LIMITS),
    ]
    return rows


def why_not_private(result: Facts) -> str | None:
    """The reason for the stamp NOT PRIVATE, or None for a private result."""
    if math.isinf(result["epsilon"]) or result["noise_multiplier"] == 0:
        return "It was trained without noise (ε = ∞): there is no guarantee at all."
    if result["random"] != "os-entropy":
        return (
            "Its noise came from a seed (--insecure-seed): whoever knows or guesses the seed can take the noise away "
            "again, so the computed ε is void."
        )
    if not result["private"]:
        return "An earlier step of this run had no noise, or noise from a seed (see privacy/ledger.jsonl): ε is void."
    return None


def detection_rate(epsilon: float, delta: float, false_positive_rate: float = 0.01) -> float:
    """Best true-positive rate of a membership test at a false-positive rate, for the equivalent Gaussian mechanism.

    Φ(Φ⁻¹(FPR) + μ), Dong, Roth & Su 2022, "Gaussian Differential Privacy", equation (6). Exact for full-batch Gaussian
    steps; for sampled ones the equivalent Gaussian stands in for the true trade-off curve.

    Args:
        epsilon: ε ≥ 0; infinite gives 1.
        delta: δ in (0, 1).
        false_positive_rate: in (0, 1).
    """
    if math.isinf(epsilon):
        return 1.0
    return float(ndtr(ndtri(false_positive_rate) + equivalent_mu(epsilon, delta)))


def privacy_sentence(result: Facts, epsilon: float | None = None, *, exact: bool | None = None) -> str:
    """What the guarantee means, in one or two plain sentences.

    Args:
        result: of a private stage.
        epsilon: the ε to explain, if more was spent than the result says.
        exact: all steps were full batches, so that the equivalent Gaussian is the mechanism itself; by default judged
            by the result's own sampling rate.
    """
    reason = why_not_private(result)
    if reason is not None:
        return f"NOT PRIVATE. {reason} Handle the model as you handle the training images."
    epsilon = result["epsilon"] if epsilon is None else epsilon
    rate = detection_rate(epsilon, result["delta"])
    exact = (result["sample_rate"] == 1 if exact is None else exact) and not tuning_was_paid(result)
    bound = "at most" if exact else "at most about"
    known, hidden = "every training image but one", "that image"
    if several_images(result):
        known, hidden = f"every training image but those of one {noun(result)}", f"that {noun(result)}"
    return (
        f"Suppose an attacker knows {known}, sees all that this run released, and accepts "
        f"1\u00a0% false alarms: the presence of {hidden} is then detected {bound} {percent(rate, up=True)} of the "
        f"time, where guessing gives 1\u00a0%."
    )


def epsilon_text(epsilon: float) -> str:
    """ε to three decimals, rounded up: what is printed is never below the truth."""
    if math.isinf(epsilon):
        return "∞"
    return f"{math.ceil(epsilon * 1000 - 1e-9) / 1000:.3f}".rstrip("0").rstrip(".")


def number(value: float | None) -> str:
    """A number for people: at most six significant digits, ∞ for infinity, – for none."""
    if value is None:
        return "–"
    if isinstance(value, float) and math.isinf(value):
        return "∞"
    if isinstance(value, int):
        return str(value)
    return re.sub(r"e([+-])0+", r"e\1", f"{value:.6g}").replace("e+", "e")


def percent(value: float, up: bool = False) -> str:
    """``0.4312`` as ``43.1 %`` with a space that does not break; ``up`` rounds up."""
    tenths = math.ceil(value * 1000 - 1e-9) if up else round(value * 1000)
    return f"{tenths / 10:g}\u00a0%"


def _mechanism(result: Facts) -> str:
    if result["noise_multiplier"] == 0:
        return "None: clipped gradient sums without noise. This is no private mechanism."
    full = result["sample_rate"] == 1
    name = "Gaussian mechanism on full batches" if full else "Poisson-subsampled Gaussian mechanism"
    one = _record(result)
    batch = f"all {one}s take part in every step" if full else f"each {one} joins a step's batch independently with q"
    return (
        f"{name} (DP-SGD): {batch}; {clipped_gradient(result)} {clip_in_words(result)}; {noise_in_words(result)}, "
        f"once per step, and is divided by the public qN, not by the size of the batch that was drawn."
    )


def _delta(result: Facts) -> str:
    """δ, and how far it is from 1/N, where it would promise nothing to somebody."""
    share = result["delta"] * result.get("train_units", result["train_examples"])
    said = f"{number(result['delta'])}, which is {share:.2g}/N"
    if share <= ADVISED_SHARE * (1 + 1e-9):
        return said
    return (
        f"{said}. At 1/N, publishing one whole record at random would count as private; at most {ADVISED_SHARE:g}/N is "
        "advised, unless results are to be compared with others that are published at this δ"
    )


def _slot(result: Facts) -> str:
    """What zero-out means, for readers who know add/remove."""
    if not str(result["adjacency"]).startswith("zero-out"):
        return ""
    return (
        f": the slot of one {_record(result)} is left empty, so that it contributes nothing to any sum; N, q, the "
        "divisor and all other positions stay the same. The accountant's theorems for adding or removing a record "
        "bound the same sums, with the record and without it"
    )


def _record(result: Facts) -> str:
    return noun(result) if several_images(result) else "example"


def _epsilon(result: Facts) -> str:
    if math.isinf(result["epsilon"]):
        return "∞: NOT PRIVATE, no noise was added"
    void = "" if why_not_private(result) is None else " VOID, NOT PRIVATE (see random numbers)."
    return (
        f"{epsilon_text(result['epsilon'])}, upper bound on what everything this run released up to the end of this "
        f"stage has spent. Target of the stage {number(result['epsilon_target'])}, of the run "
        f"{number(result['epsilon_total'])}.{void}"
    )


def _refit(refit: Facts | None) -> str:
    if not refit:
        return "none"
    lost = f", {refit['lost_steps']} of them lost in interruptions" if refit["lost_steps"] else ""
    return (
        f"then the head alone, on the features of the tuned extractor, with all that was left of ε: "
        f"q = {number(refit['sample_rate'])}, T = {refit['steps']}{lost}, σ = {number(refit['noise_multiplier'])}, "
        f"C = {number(refit['clip_norm'])}, K = 1"
    )


def _steps(result: Facts) -> str:
    text = f"{result['steps']} planned, {result['charged_steps']} charged to the ledger"
    if result["lost_steps"]:
        text += f"; {result['lost_steps']} of these were lost in interruptions: paid for, not part of the model"
    return text


def _random(result: Facts) -> str:
    if result["random"] == "os-entropy":
        return "os-entropy: noise and batches from the operating system, never seeded, stored or repeated"
    return f"{result['random']}: noise and batches from a seed that can be repeated. NOT PRIVATE."


def _tuned(result: Facts, changed: Sequence[str] | None) -> str:
    parts = [_tuned_here(result.get("tuned")) + "."]
    if result.get("tuned_on"):
        parts.append(f"Declared by whoever ran it, of settings tuned elsewhere: tuned on “{result['tuned_on']}”.")
    parts.append(DEFAULTS_CHOSEN_ON)
    if changed is not None:
        own = f"Set by whoever ran it: {', '.join(changed)}."
        parts.append(own if changed else "All settings of this stage are defaults.")
    return " ".join(parts)


def _tuned_here(tuned: Facts | None) -> str:
    """What `dprandp tune` did in this run: on what, how many trials, at which cost."""
    if not tuned:
        return "Nothing in this run, where the program selected nothing by results: no choice among epochs or settings"
    names = ", ".join(tuned["settings"]) or "nothing that was finished"
    cost = f"ε = {epsilon_text(tuned['charged_epsilon'])} by itself, part of the ε above"
    if tuned["on"] == "private":
        said = (
            f"{names} of the probe, on the private data, paid for: the best of a random number of private trials "
            f"({tuned['trials']} expected), {cost}"
        )
    else:
        what = "synthetic images of this run" if tuned["on"] == "synthetic" else (
            f"the training split of {tuned['on']}, declared public by whoever ran it"
        )
        said = f"{names} of the probe, on {what}: {tuned['trials']} settings tried under simulated noise, no cost in ε"
        if tuned["charged_epsilon"] > 0:
            said += f"; before that on the private data, {cost}"
    return said if tuned["used"] else said + "; the stage ran with other settings"


def tuning_was_paid(result: Facts) -> bool:
    """Whether ε holds the cost of tuning on the private data."""
    return bool(result.get("tuned")) and result["tuned"]["charged_epsilon"] > 0


def _also_charged(result: Facts) -> str:
    """What the ledger holds beside this stage's own mechanism: stages before it, and abandoned attempts."""
    parts = [
        f"{charged['stage']}" + (f", attempt {charged['attempt']}" if charged["attempt"] > 1 else "") + ": "
        f"q = {number(charged['sample_rate'])}, T = {charged['charged_steps']}, "
        f"σ = {number(charged['noise_multiplier'])}, C = {number(charged['clip_norm'])}"
        for charged in result["also_charged"]
    ]
    return "; ".join(parts) or "nothing: this is all that the run's ledger holds, but for what is named below"
