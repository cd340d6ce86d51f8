"""The head of the model card in YAML, what a publisher says on the card, and nothing in it that could be syntax."""

from __future__ import annotations

import math

import pytest
from block_yaml import head_of
from fake_run import EVIL, GENERATED, PRETRAINED, private_result

from dprandp.config.declared import Publication
from dprandp.report.card import model_card, published, scalar, without_head

HOSTILE = 'a: "b" \\ \'c\' # {d} [e] & *f ! | > % @ ` --- 😀 ' + EVIL


def test_a_card_begins_with_facts_in_yaml() -> None:
    card = model_card(private_result("probe"), PRETRAINED, GENERATED, shape=(8, 8, 1))
    facts = head_of(card)
    assert list(facts) == ["library_name", "pipeline_tag", "tags", "metrics", "model-index", "differential_privacy"]
    assert facts["pipeline_tag"] == "image-classification"
    assert facts["tags"] == ["image-classification", "differential-privacy", "dp-randp"]
    assert facts["metrics"] == ["accuracy", "balanced_accuracy", "roc_auc", "loss"]
    [model] = facts["model-index"]
    [measured] = model["results"]
    assert measured["dataset"] == {"name": "Handwritten digits", "type": "digits", "split": "test"}
    values = {each["type"]: each["value"] for each in measured["metrics"]}
    assert values == {"accuracy": 0.8611, "balanced_accuracy": 0.8573, "roc_auc": 0.9876, "loss": 0.5432}
    assert facts["differential_privacy"] == {
        "private": True, "epsilon": 0.2991, "delta": 1e-5, "unit": "one image", "adjacency": "zero-out of one record"
    }  # fmt: skip
    assert "8 × 8 pixels (bicubic)" in card
    assert "decoded to 8-bit grey" in card
    assert "mirror image are averaged" not in card


def test_the_head_does_not_promise_what_is_not_there() -> None:
    result = private_result("probe", epsilon=math.inf, noise_multiplier=0.0, private=False, auc=None)
    facts = head_of(model_card(result, PRETRAINED, GENERATED))
    assert facts["differential_privacy"]["private"] is False
    assert facts["differential_privacy"]["epsilon"] == "inf"
    assert "not-private" in facts["tags"]
    assert "differential-privacy" not in facts["tags"]
    assert "roc_auc" not in facts["metrics"]


def test_a_publisher_is_quoted_on_the_card() -> None:
    result = private_result("probe")
    card = model_card(result, PRETRAINED, GENERATED, shape=(8, 8, 1))
    about = Publication("Digits of the post", "CC-BY-4.0", "post@example.org", "Sorting letters_by hand.")
    shown = published(card, result, about)
    facts = head_of(shown)
    assert facts["license"] == "cc-by-4.0"
    assert facts["model-index"][0]["name"] == "Digits of the post"
    body = without_head(shown).replace("\\", "")
    assert body.startswith("# Digits of the post\n\nImage classifier for Handwritten digits.\n")
    for text in ("* Licence of this model: CC-BY-4.0\n", "* Contact: post@example.org\n",
                 "## Intended use\n\nAs the publisher says: Sorting letters_by hand.\n\nAssigning"):  # fmt: skip
        assert text in body
    kept = [line for line in without_head(card).splitlines() if line not in without_head(shown).splitlines()]
    assert kept == ["# Model card: image classifier for Handwritten digits"]  # all else stays
    older = published(without_head(card), result, about)  # a card of before there were heads
    assert older == shown
    assert published(card, result, Publication()) == card


def test_no_text_is_taken_for_syntax() -> None:
    result = private_result("probe", title=HOSTILE, classes=[HOSTILE, "b", "c"])
    card = published(model_card(result, PRETRAINED, GENERATED), result, Publication(*[HOSTILE] * 4))
    facts = head_of(card)
    assert facts["license"] == "other"
    read = [facts["license_name"], facts["model-index"][0]["name"],
            facts["model-index"][0]["results"][0]["dataset"]["name"]]  # fmt: skip
    assert read == [HOSTILE] * 3
    assert "<script" not in card


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-5, "1.0e-05"), (1.5e-7, "1.5e-07"), (1e22, "1.0e+22"), (0.1, "0.1"), (3, "3"), (True, "true"), ("y", '"y"'),
     (" a\n---\nb\u2028\x85\ufeff", '"a --- b \ufffd"')],
)
def test_numbers_are_numbers_in_every_version_of_yaml(value: object, text: str) -> None:
    assert scalar(value) == text
