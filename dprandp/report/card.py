"""MODEL_CARD.md, which accompanies a released model and states its guarantee."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dprandp import __version__
from dprandp.report.disclosure import (
    disclosure,
    epsilon_text,
    number,
    percent,
    privacy_sentence,
    public_steps,
    public_weights,
    several_images,
    shipped_prior,
    why_not_private,
)

MOST_CLASSES = 50
"""Most class names that the card lists; model/config.json holds all of them."""


def model_card(
    result: Mapping[str, Any],
    pretrain: Mapping[str, Any],
    generate: Mapping[str, Any],
) -> str:
    """Markdown for ``model/MODEL_CARD.md``.

    Args:
        result: of the private stage that made the model.
        pretrain, generate: results of the public stages; empty for a model trained from scratch.

    Raises:
        CheckpointError: the result lacks a key that must be disclosed.
    """
    rows = disclosure(result, pretrain, generate)
    sections = [
        _title(result),
        _privacy(result),
        _use(result),
        _data(result),
        _training(result, pretrain, generate),
        _metrics(result),
        _table("Disclosure", ("", ""), rows),
    ]
    return "\n\n".join(sections).replace("\u00a0", " ") + "\n"


def _title(result: Mapping[str, Any]) -> str:
    return f"# Model card: image classifier for {_plain(result['title'])}\n\nMade by dprandp {__version__}."


def _privacy(result: Mapping[str, Any]) -> str:
    reason = why_not_private(result)
    sentence = privacy_sentence(result)
    if reason is not None:
        return f"## NOT PRIVATE\n\n**{sentence}**"
    return (
        f"## Privacy\n\n**(ε = {epsilon_text(result['epsilon'])}, δ = {number(result['delta'])})-differential "
        f"privacy** for {_plain(result['unit'])}, adjacency \"{_plain(result['adjacency'])}\". {sentence}\n\nThis "
        f"holds for everything in this folder with respect to the training images, under the limits listed in the "
        f"disclosure below."
    )


def _use(result: Mapping[str, Any]) -> str:
    return (
        f"## Intended use\n\nAssigning an image like those of {_plain(result['title'])} to one of "
        f"{len(result['classes'])} classes; research on differentially private training.\n\n"
        "## Out-of-scope use\n\nDecisions about people, diagnosis, or safety without a separate validation; images "
        "unlike the training data, for which predictions are meaningless; use of the scores as calibrated "
        "probabilities. Differential privacy protects the training images, not the images that the model classifies."
    )


def _data(result: Mapping[str, Any]) -> str:
    classes = result["classes"]
    names = ", ".join(_plain(name) for name in classes[:MOST_CLASSES])
    if len(classes) > MOST_CLASSES:
        names += f", and {len(classes) - MOST_CLASSES} more (see config.json)"
    return (
        f"## Data\n\n{_plain(result['title'])} (`{_code(result['data'])}`): {result['train_examples']} training "
        f"images{_units(result)}{_public_part(result)}, {result['test_examples']} test images. Classes: {names}.\n\n"
        "Licence of the data: not known to this program. Check the terms of the data set before you publish the model."
    )


def _units(result: Mapping[str, Any]) -> str:
    if not several_images(result):
        return ""
    return f" of {result['train_units']} units of privacy, each {_plain(result['unit'])}"


def _public_part(result: Mapping[str, Any]) -> str:
    if "public_part" not in result:
        return ""
    return f" (without those declared public: {_plain(result['public_part'])})"


def _training(result: Mapping[str, Any], pretrain: Mapping[str, Any], generate: Mapping[str, Any]) -> str:
    if weights := public_weights(result):
        prior = f"The network started from {_plain(weights)}."
    elif result.get("source") == "scratch" or not pretrain:
        prior = "The network started from random weights."
    else:
        images = f"{generate['count']} images of the random process {_plain(generate['process'])}" if generate else ""
        kind = "left as initialised (a control experiment)" if pretrain.get("random_init") else f"learned from {images}"
        prior = f"The feature extractor ({_plain(pretrain['arch'])}) was {kind}; no data was used for it."
        if pretrain.get("prior"):
            prior = f"The feature extractor is {_plain(shipped_prior(pretrain, generate))}."
        continued = result if "public_training" in result else pretrain.get("continued")
        if continued:
            further = _plain(public_steps(continued["public_training"]))
            prior = f"{prior.removesuffix('.')} before it was trained further: {further}."
        if continued and continued is not result and "epsilon" in continued:
            prior += f" Private steps on {_plain(continued['title'])} followed; ε includes their cost."
    stage = "A linear head" if result["stage"] == "probe" else "All parameters"
    learner = "DP-SGD" if why_not_private(result) is None else "the procedure of DP-SGD, without its guarantee"
    return (
        f"## How it was trained\n\n{prior} {stage} was trained on the data with {learner}: {result['steps']} steps, "
        f"expected batch {number(result['expected_batch'])}, learning rate {number(result['lr'])}, momentum "
        f"{number(result['momentum'])}, {result['views']} view(s) of each image."
    ).replace("All parameters was", "All parameters were")


def _metrics(result: Mapping[str, Any]) -> str:
    values = [
        ("accuracy", percent(result["accuracy"])),
        ("balanced accuracy", percent(result["balanced_accuracy"])),
        ("AUC, one class against the rest", "–" if result["auc"] is None else f"{result['auc']:.4f}"),
        ("loss, nats", number(result["loss"])),
        ("accuracy of always predicting the most frequent class", percent(result["majority_accuracy"])),
    ]
    return _table(f"Metrics on the {result['test_examples']} test images", ("metric", "value"), values)


def _table(title: str, head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *card_rows(rows)]
    return f"## {title}\n\n" + "\n".join(lines)


def card_rows(rows: Sequence[tuple[str, str]]) -> list[str]:
    """The lines of a card's table for (label, value) pairs."""
    return [f"| {_plain(name)} | {_plain(value)} |".replace("\u00a0", " ") for name, value in rows]


def _plain(text: object) -> str:
    """Text from outside, escaped for Markdown and the HTML made of it."""
    flat = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#~!])", r"\\\1", flat)


def _code(text: object) -> str:
    """Text for a code span: backticks would end it."""
    return " ".join(str(text).split()).replace("`", "'").replace("|", "/").replace("<", "&lt;")
