"""MODEL_CARD.md, which accompanies a released model and states its guarantee.

The head of the card has facts in YAML, as hubs of models read them. The YAML is written here rather than by a library:
mappings and lists in block style, numbers, and strings that are all in double quotes, as in JSON, so that nothing in
them can be taken for syntax.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dprandp import __version__
from dprandp.config.declared import Publication
from dprandp.report.disclosure import (
    class_figures,
    disclosure,
    epsilon_text,
    figures,
    from_scratch,
    model_warnings,
    number,
    privacy_sentence,
    public_steps,
    public_weights,
    several_images,
    shipped_prior,
    why_not_private,
)
from dprandp.runs.results import (
    ALL_WEIGHTS,
    ContinueResult,
    FinetuneResult,
    GenerateResult,
    PretrainResult,
    PrivateResult,
)

# ----------------------------------------------------------------------------------------------------------------- card

MOST_CLASSES = 50
"""Most class names that the card lists; model/config.json holds all of them."""

CARD = """\
# Model card: image classifier for {title}

Made by dprandp {version}.

{privacy}
{warnings}
## Intended use

{task}; research on differentially private training.

## Out-of-scope use

Decisions about people, diagnosis, or safety without a separate validation; images unlike the training data, for which \
predictions are meaningless; use of the scores as calibrated probabilities. Differential privacy protects the training \
images, not the images that the model classifies.

## Data

{title} (`{data}`): {train} training images{units}{public_part}, {test} test images. {kind}: {classes}.

Licence of the data: not known to this program. Check the terms of the data set before you publish the model.
{preprocessing}
## How it was trained

{start} {trained} trained on the data with {learner}: {steps} steps, expected batch {batch}, learning rate {lr}, \
momentum {momentum}, {views} view(s) of each image.

## Metrics on the {test} test images

| metric | value | 95 % interval |
|---|---|---|
{metrics}
{classes_table}

## Disclosure

|  |  |
|---|---|
{disclosure}
"""


def model_card(
    result: PrivateResult,
    pretrain: PretrainResult | None,
    generate: GenerateResult | None,
    continued: ContinueResult | None = None,
    shape: tuple[int, ...] | None = None,
) -> str:
    """Markdown for ``model/MODEL_CARD.md`` from the results of the private stage that made the model and of the stages
    before it (None for a model trained from scratch). ``shape``: height, width, channels of the data's images."""
    rows = disclosure(result, pretrain, generate, continued)
    classes, private = result.classes, why_not_private(result) is None
    names = ", ".join(_plain(name) for name in classes[:MOST_CLASSES])
    if len(classes) > MOST_CLASSES:
        names += f", and {len(classes) - MOST_CLASSES} more (see config.json)"
    units = public_part = ""
    if several_images(result):
        units = f" of {result.train_units} units of privacy, each {_plain(result.unit)}"
    if result.public_part is not None:
        public_part = f" (without those declared public: {_plain(result.public_part)})"
    card = CARD.format(
        title=_plain(result.title),
        version=__version__,
        privacy=_privacy(result),
        # as an alert, which is amber where a card is shown
        warnings="".join(f"\n> [!WARNING]\n> Warning: {_plain(text)}.\n" for text in model_warnings(result)),
        task=f"Saying which of {len(classes)} labels an image like those of {_plain(result.title)} has"
        if result.multi_label else
        f"Assigning an image like those of {_plain(result.title)} to one of {len(classes)} classes",
        kind="Labels, of which an image may have several" if result.multi_label else "Classes",
        # for a code span: backticks would end it
        data=" ".join(result.data.split()).replace("`", "'").replace("|", "/").replace("<", "&lt;"),
        train=result.train_examples,
        units=units,
        public_part=public_part,
        test=result.test_examples,
        classes=names,
        preprocessing=_preprocessing(shape, result.input_size, result.mirror),
        start=_start(result, pretrain, generate, continued),
        trained=_trained(result),
        learner="DP-SGD" if private else "the procedure of DP-SGD, without its guarantee",
        steps=result.steps,
        batch=number(result.expected_batch),
        lr=number(result.lr),
        momentum=number(result.momentum),
        views=result.views,
        metrics="\n".join(card_rows(figures(result))),
        classes_table=_classes(result),
        disclosure="\n".join(card_rows(rows)),
    )
    return head(result, Publication()) + card.replace("\u00a0", " ")


def published(card: str, result: PrivateResult, about: Publication) -> str:
    """A model's card with what its publisher says about it; the rest stays as it is."""
    body = without_head(card)
    said = [f"* {name}: {_plain(text)}" for name, text in (("Licence of this model", about.license),
                                                           ("Contact", about.contact)) if text]  # fmt: skip
    title, _, rest = body.partition("\n")
    if about.title:
        title = f"# {_plain(about.title)}\n\nI{_plain(default_title(result))[1:]}."
    if said:
        rest = "\n" + "\n".join(said) + "\n" + rest
    if about.intended_use:
        heading = "## Intended use\n\n"
        rest = rest.replace(heading, f"{heading}As the publisher says: {_plain(about.intended_use)}\n\n", 1)
    return f"{head(result, about)}{title}\n{rest}"


def _trained(result: PrivateResult) -> str:
    if isinstance(result, FinetuneResult) and result.trained_weights != ALL_WEIGHTS:
        return f"A part of the parameters ({_plain(result.trained_weights)}) was"
    return "A linear head was" if result.stage == "probe" else "All parameters were"


def _preprocessing(shape: tuple[int, ...] | None, size: int | None, mirror: bool) -> str:
    """What happens to an image before the network; nothing where it is not known."""
    if shape is None:
        return ""
    height, width, channels = shape
    colour, to = "grey" if channels == 1 else "RGB", "" if size is None else f" to {size} × {size} pixels"
    average = " The features of an image and of its mirror image are averaged." if mirror else ""
    return (
        f"\n## Preprocessing\n\nAn image is decoded to 8-bit {colour}, cut to its largest centred part of the "
        f"proportions {height} : {width} (height : width), and resized to {height} × {width} pixels (bicubic). "
        f"For the network it is then resized{to} (bilinear, antialiased) and scaled by constants that do not depend on "
        f"the data.{average} `dprandp predict` does all of this, an exported graph what follows the first resize.\n"
    )


def card_rows(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The lines of a card's table for rows of cells, such as (label, value) pairs."""
    return [f"| {' | '.join(map(_plain, row))} |".replace("\u00a0", " ") for row in rows]


def _classes(result: PrivateResult) -> str:
    """Recall and precision of each class, and how the intervals were found."""
    how = f"\nIntervals: {_plain(result.interval_method)}.\n" if result.interval_method else ""
    head, *rows = class_figures(result)[: 1 + MOST_CLASSES] or [()]
    if not rows:
        return how
    return "\n".join([how, *card_rows([head]), "|---" * len(head) + "|", *card_rows(rows), ""])


def _privacy(result: PrivateResult) -> str:
    sentence = privacy_sentence(result)
    if why_not_private(result) is not None:
        return f"## NOT PRIVATE\n\n**{sentence}**"
    return (
        f"## Privacy\n\n**(ε = {epsilon_text(result.epsilon)}, δ = {number(result.delta)})-differential "
        f"privacy** for {_plain(result.unit)}, adjacency \"{_plain(result.adjacency)}\". {sentence}\n\nThis "
        "holds for everything in this folder with respect to the training images, under the limits listed in the "
        "disclosure below."
    )


def _start(
    result: PrivateResult,
    pretrain: PretrainResult | None,
    generate: GenerateResult | None,
    continued: ContinueResult | None,
) -> str:
    """The network before the private training."""
    if weights := public_weights(result, pretrain):
        arch = getattr(result, "arch", None) or getattr(pretrain, "arch", None)
        return f"The network ({_plain(arch)}) started from {_plain(weights)}."
    if from_scratch(result) or pretrain is None:
        return "The network started from random weights."
    images = f"{generate.count} images of the random process {_plain(generate.process)}" if generate else ""
    kind = "left as initialised (a control experiment)" if pretrain.random_init else f"learned from {images}"
    said = f"The feature extractor ({_plain(pretrain.arch)}) was {kind}; no data was used for it."
    if pretrain.prior:
        said = f"The feature extractor is {_plain(shipped_prior(pretrain, generate))}."
    continued = result if isinstance(result, ContinueResult) else continued
    if continued is not None:
        further = _plain(public_steps(continued.public_training))
        said = f"{said.removesuffix('.')} before it was trained further: {further}."
    if continued is not result and isinstance(continued, PrivateResult):
        said += f" Private steps on {_plain(continued.title)} followed; ε includes their cost."
    return said


def _plain(text: object) -> str:
    """Text from outside, escaped for Markdown and the HTML made of it."""
    flat = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#~!])", r"\\\1", flat)


# ------------------------------------------------------------------------------------------------------------- its head

IDENTIFIER = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
"""A licence of which hubs know the name; any other text is called ``other`` there, with the text as its name."""

_HEAD = re.compile(r"\A---\n.*?\n---\n+", re.DOTALL)


def head(result: PrivateResult, about: Publication) -> str:
    """The head of a result's card, with the lines ``---`` around it."""
    return f"---\n{yaml(_facts(result, about))}---\n\n"


def without_head(card: str) -> str:
    """A card without its head, if it has one."""
    return _HEAD.sub("", card)


def default_title(result: PrivateResult) -> str:
    """The title of a card where the publisher gives none."""
    return f"image classifier for {result.title}"


def _facts(result: PrivateResult, about: Publication) -> dict[str, Any]:
    private = why_not_private(result) is None
    licence: dict[str, Any] = {}
    if about.license is not None:
        known = IDENTIFIER.fullmatch(about.license.lower()) is not None
        licence = {"license": about.license.lower()} if known else {"license": "other", "license_name": about.license}
    measured = {
        "accuracy": result.accuracy, "balanced_accuracy": result.balanced_accuracy, "roc_auc": result.auc,
        "loss": result.loss,
    }  # fmt: skip
    metrics = [{"type": name, "value": value} for name, value in measured.items() if _finite(value)]
    data = {"name": result.title, "type": result.data, "split": "test"}
    return {
        **licence,
        "library_name": "dprandp",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "differential-privacy" if private else "not-private", "dp-randp"],
        "metrics": [each["type"] for each in metrics],
        "model-index": [
            {
                "name": about.title or default_title(result),
                "results": [{"task": {"type": "image-classification"}, "dataset": data, "metrics": metrics}],
            }
        ],
        "differential_privacy": {
            "private": private,
            "epsilon": result.epsilon if math.isfinite(result.epsilon) else "inf",
            "delta": result.delta,
            "unit": result.unit,
            "adjacency": result.adjacency,
        },
    }


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def yaml(facts: Mapping[str, Any], indent: str = "") -> str:
    """A mapping in block style. Its values are mappings, lists of mappings or strings, strings, numbers, booleans."""
    lines = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{key}:\n{yaml(value, indent + '  ')}")
        elif isinstance(value, list):
            lines.append(f"{indent}{key}:\n")
            for each in value:
                item = yaml(each, indent + "  ") if isinstance(each, Mapping) else f"{indent}  {scalar(each)}\n"
                lines.append(f"{indent}- {item[len(indent) + 2 :]}")
        else:
            lines.append(f"{indent}{key}: {scalar(value)}\n")
    return "".join(lines)


def scalar(value: str | float | bool) -> str:
    """A string in double quotes, a number with a point where it has an exponent, true or false."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        flat = " ".join(value.split())
        text = json.dumps("".join(each if each.isprintable() else "\ufffd" for each in flat), ensure_ascii=False)
        return text.replace("<", "\\u003c").replace(">", "\\u003e")  # a viewer of Markdown may show the head as HTML
    text = repr(value)
    # YAML 1.1 takes 1e-05 for a string
    return text if "e" not in text or "." in text else text.replace("e", ".0e")
