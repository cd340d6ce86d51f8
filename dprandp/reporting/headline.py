"""The top of the report: what was reached, at which price in privacy, and what the numbers mean."""

from __future__ import annotations

import math
from typing import Any

from dprandp.config import public_data_name
from dprandp.reporting.disclosure import (
    epsilon_text,
    number,
    percent,
    privacy_sentence,
    why_not_private,
)
from dprandp.reporting.markup import Markup, tag
from dprandp.reporting.runfiles import PRIVATE_STAGES, Run


def headline(run: Run) -> Markup:
    """The headline block of a run, whatever stages it has."""
    result = run.final
    if result is None:
        return _without_classifier(run)
    reason = not_private_reason(run)
    data = public_data_name(result["data"])
    title = f"{result['title']}: {'differentially private ' if reason is None else ''}image classifier"
    return tag(
        "header",
        tag("h1", title),
        tag("p", f"Run {run.name}. Data set {data}, after stage {result['stage']}.", class_="soft"),
        badge(reason),
        _notes(run, result),
        _numbers(run, result, reason),
        tag("p", accuracy_sentence(result)),
        tag("p", _privacy_sentence(run, result)) if reason is None else None,
    )


def badge(reason: str | None) -> Markup:
    """PRIVATE, or a banner that cannot be missed."""
    if reason is None:
        return tag("p", tag("span", "PRIVATE", class_="badge"))
    explanation = f"{reason} Handle the model as you handle the training images."
    return tag("div", tag("strong", "NOT PRIVATE"), tag("p", explanation), class_="banner", role="alert")


def not_private_reason(run: Run) -> str | None:
    """Why the run's result is not private; None if it is."""
    if run.final is not None:
        reason = why_not_private(run.final)
        if reason is not None:
            return reason
    if math.isinf(run.spending.epsilon):
        return "The ledger holds steps without noise (ε = ∞): there is no guarantee at all."
    if run.spending.insecure:
        return "The ledger holds steps whose noise came from a seed (--insecure-seed), so the computed ε is void."
    return None


def accuracy_sentence(result: dict[str, Any]) -> str:
    """What the accuracy means, with the uncertainty of a finite test split."""
    low, high = wilson(result["accuracy"], result["test_examples"])
    return (
        f"The model was evaluated on the {result['test_examples']} test images once, when it was finished, and nothing "
        f"was chosen by them: {percent(result['accuracy'])} were assigned to the right one of "
        f"{len(result['classes'])} classes (95\u00a0% interval for new images of this kind: {percent(low)} to "
        f"{percent(high)}; one training, one random draw); always answering the most frequent class "
        f"would be right in {percent(result['majority_accuracy'])}."
    )


def wilson(share: float, count: int, deviations: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927).

    Args:
        share: observed, in [0, 1].
        count: of how many, at least 1.
        deviations: standard deviations to each side.
    """
    z2 = deviations**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = deviations * math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def _numbers(run: Run, result: dict[str, Any], reason: str | None) -> Markup:
    epsilon, delta = run.spending.epsilon, result["delta"]
    if reason is None:
        shown, below = epsilon_text(epsilon), f"of {number(run.spending.total)} allowed"
    elif math.isinf(epsilon):
        shown, below = "∞", "no noise"
    else:
        shown, below = "void", f"computed {epsilon_text(epsilon)}, which does not hold"
    cards = [
        ("Test accuracy", percent(result["accuracy"]), f"{result['test_examples']} images", True),
        ("ε, spent", shown, below, True),
        ("δ", _power(delta), f"chance that ε fails; unit: {result['unit']}", True),
        ("Majority baseline", percent(result["majority_accuracy"]), "most frequent class", False),
        ("Balanced accuracy", percent(result["balanced_accuracy"]), "mean over classes", False),
        ("AUC", "–" if result["auc"] is None else f"{result['auc']:.3f}", "one class against the rest", False),
    ]
    return tag(
        "dl",
        (
            tag("div", tag("dt", name), tag("dd", value, tag("small", below)), class_="big" if big else None)
            for name, value, below, big in cards
        ),
        class_="numbers",
    )


def _power(value: float) -> Markup:
    """``1e-05`` as 10⁻⁵."""
    if value >= 0.01:
        return tag("span", number(value))
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    factor = f"{float(mantissa):g}"
    return tag("span", "" if factor == "1" else f"{factor}·", "10", tag("sup", f"−{abs(int(exponent))}"))


def _privacy_sentence(run: Run, result: dict[str, Any]) -> str:
    exact = all(run.results[stage]["sample_rate"] == 1 for stage in run.private_stages)
    return privacy_sentence(result, run.spending.epsilon, exact=exact and not run.spending.unfinished)


def _notes(run: Run, result: dict[str, Any]) -> list[Markup]:
    notes = []
    row = run.row(result["stage"])
    if row["state"] == "stale":
        notes.append(
            f"Stage {result['stage']} is stale: {'; '.join(row['reasons'])}. The public stages shown below may not be "
            f"those it was made from."
        )
    open_stages = [r["stage"] for r in run.rows if r["stage"] in PRIVATE_STAGES and r["state"] == "partial"]
    if open_stages:
        notes.append(f"Stage {open_stages[-1]} was begun and is not finished.")
    if run.spending.unfinished:
        notes.append(
            f"ε counts the whole ledger, with steps that no finished stage reports: "
            f"{epsilon_text(run.spending.epsilon)} instead of {epsilon_text(result['epsilon'])}."
        )
    return [tag("p", note, class_="note") for note in notes]


def _without_classifier(run: Run) -> Markup:
    spent = run.spending
    if spent.epsilon == 0:
        privacy = "No private data was read, and no privacy was spent."
    else:
        privacy = (
            f"No private stage is finished; tuning or a begun one has spent ε = {epsilon_text(spent.epsilon)} at "
            f"δ = {number(spent.delta)} of {number(spent.total)}."
        )
    reason = not_private_reason(run)
    return tag(
        "header",
        tag("h1", "No classifier yet"),
        tag("p", f"Run {run.name}.", class_="soft"),
        badge(reason) if reason else None,
        tag("p", privacy),
    )
