"""The report and the model card: complete, true, self-contained, and made of public files alone."""

from __future__ import annotations

import json
import math
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dprandp import config, faults, report
from dprandp.console import MetricsLog
from dprandp.errors import CheckpointError, InputError
from dprandp.files import atomic_write
from dprandp.model_card import model_card
from dprandp.privacy.ledger import Ledger
from dprandp.reporting import disclosure as disclosing
from dprandp.reporting import figures, headline, markup, style
from dprandp.reporting.disclosure import disclosure
from dprandp.rundir import RunDir

EVIL = "<script>alert(1)</script>"
CANARY = "canary-of-the-private-folder"

# ------------------------------------------------------------------------------------------------ a realistic run

GENERATED = {
    "process": "stylegan-oriented",
    "count": 4000,
    "resolution": 64,
    "images_per_second": 212.4,
    "seconds": 18.8,
}
PRETRAINED = {
    "arch": "patchnet",
    "random_init": False,
    "parameters": 43_600,
    "feature_dim": 3200,
    "steps": 8,
    "views_per_second": None,
    "loss": None,
    "knn_accuracy": 0.615,
    "seconds": 41.2,
}


def private_result(stage: str, **changes: Any) -> dict[str, Any]:
    """The result of a private stage on the digits, every number of it different from every other."""
    classes = changes.pop("classes", [str(digit) for digit in range(10)])
    count = len(classes)
    matrix = (np.eye(count, dtype=int) * 31).tolist()
    for true in range(count):
        matrix[true][(3 * true + 1) % count] += 5
    full = stage == "probe"
    result = {
        "stage": stage,
        "data": "digits",
        "title": "Handwritten digits",
        "classes": classes,
        "accuracy": 0.8611 if full else 0.8917,
        "balanced_accuracy": 0.8573,
        "auc": 0.9876,
        "loss": 0.5432,
        "majority_accuracy": 0.1028,
        "confusion": matrix,
        "train_examples": 1437,
        "test_examples": 360,
        "epsilon": 0.2991 if full else 0.9987,
        "delta": 1e-5,
        "epsilon_target": 0.3 if full else 1.0,
        "epsilon_total": 1.0,
        "accountant": "Gaussian DP, closed form" if full else "PRV (prv-accountant 0.2.0)",
        "noise_multiplier": 133.7 if full else 2.345,
        "sample_rate": 1.0 if full else 0.0207,
        "steps": 120 if full else 20,
        "charged_steps": 123 if full else 22,
        "lost_steps": 3 if full else 2,
        "clip_norm": 1.25,
        "views": 4,
        "expected_batch": 1437 if full else 29.7459,
        "lr": 0.777,
        "momentum": 0.9,
        "seconds": 9.5 if full else 75.0,
        "device": "cpu",
        "private": True,
        "random": "os-entropy",
        "released": "average" if full else "EMA, decay 0.9999",
        "adjacency": "add/remove one record",
        "unit": "one image",
        "mirror": False,
    }
    result |= {"share": 0.3} if full else {"source": "probe", "arch": "patchnet", "extractor_scale": 0.1}
    return result | changes


def charge(ledger: Ledger, stage: str, steps: int, noise_multiplier: float, random: str = "os-entropy") -> None:
    ledger.charge(
        stage=stage, attempt=1, steps=steps, noise_multiplier=noise_multiplier, sample_rate=1.0, clip_norm=1.25,
        random=random,
    )  # fmt: skip


def complete(run: RunDir, stage: str, result: dict[str, Any], lines: int, **settings: Any) -> None:
    """Run a stage as the real ones do, but for its work; ``lines`` of metrics at most."""
    begun = run.begin(stage, config.as_dict(config.build(stage, settings)), {})
    log = MetricsLog(begun.directory / "metrics.jsonl")
    rng = np.random.default_rng(5)
    if stage == "generate":
        sheet = rng.integers(0, 256, (24, 16, 3), dtype=np.uint8)
        Image.fromarray(sheet).resize((1024, 384)).save(begun.directory / "preview.png")
    elif stage == "pretrain":
        for step in range(min(lines, 8)):
            log.write(step=step + 1, similarity=0.6 - 0.2 / (step + 1))
    else:
        for step in range(min(lines, result["steps"])):
            norms = {"update_norm": float(rng.normal(3, 0.1)), "weight_norm": 0.4 * math.sqrt(step)}
            log.write(step=step, **norms, secret=12321.5)
    run.finish(stage, {}, result)


def make_run(path: Path, stages: int = 4, lines: int = 1, **changes: Any) -> RunDir:
    """A run whose first ``stages`` stages are done; ``changes`` go into the results of the private ones.

    A single line of metrics makes no curve, which saves the time of drawing it.
    """
    run = RunDir.open(path, create=True)
    with run.lock():
        if stages > 0:
            complete(run, "generate", GENERATED, lines)
        if stages > 1:
            complete(run, "pretrain", PRETRAINED, lines)
        if stages > 2:
            plan = {"format": 1, "epsilon": 1.0, "delta": 1e-5, "examples": 1437}
            atomic_write(run.privacy_dir / "plan.json", json.dumps(plan))
            atomic_write(run.private_dir / "notes.json", json.dumps({"training_loss": CANARY}))
            ledger = Ledger.create(run.privacy_dir / "ledger.jsonl", examples=1437)
            charge(ledger, "probe", 123, 133.7, changes.get("random", "os-entropy"))
            complete(run, "probe", private_result("probe", **changes), lines, views=4, clip_norm=1.25)
        if stages > 3:
            charge(ledger, "finetune", 22, 30.0)
            complete(run, "finetune", private_result("finetune", **changes), lines, views=4, clip_norm=1.25)
    return run


def written(run: RunDir) -> str:
    return report.write(run).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------ reading a page


class Page(HTMLParser):
    """Elements with attributes and text, and whether every element was closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.headings: list[tuple[int, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in markup.VOID:
            self._open.append(tag)
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("style", "title"):
            return
        self.texts.append(data)
        if self._open and re.fullmatch(r"h[1-6]", self._open[-1]):
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def outside_references(text: str) -> list[str]:
    """Everything in a page that would make a browser fetch or run something."""
    found = []
    for tag, attributes in Page(text).elements:
        if tag in ("script", "link", "iframe", "object", "embed", "base", "form"):
            found.append(tag)
        for name, value in attributes.items():
            if name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster", "background") and not (
                value.startswith("#") or re.match(r"data:image/(jpeg|png);base64,", value)
            ):
                found.append(f"{tag} {name}={value[:40]}")
            if name.startswith("on") or value.lower().startswith("javascript:"):
                found.append(f"{tag} {name}")
    found += [match for match in re.findall(r"url\(\s*['\"]?([^)'\"]*)", text) if not match.startswith("#")]
    found += re.findall(r"@import|https?://|//[a-z0-9-]+\.[a-z]{2,}", text)
    return found


# ------------------------------------------------------------------------------------------------ the whole page


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(make_run(tmp_path_factory.mktemp("full") / "digits-run", lines=500))


def test_sections_in_order_with_their_content(full: str) -> None:
    page = Page(full)
    assert [text for level, text in page.headings if level == 1] == [
        "Handwritten digits: differentially private image classifier"
    ]
    assert [text for level, text in page.headings if level == 2] == [
        "Stages",
        "Synthetic images",
        "Learning curves",
        "Budget",
        "Confusion matrix",
        "Disclosure",
        "Configuration",
        "Environment",
    ]
    for content in (
        "89.2 %",  # the fine-tune's accuracy, not the probe's
        "0.999 of 1 allowed",
        "10.3 %",
        "85.7 %",
        "0.988",
        "1 min 15 s",
        "k-NN 61.5 % on synthetic classes",
        "Some of the 4000 images that the random process stylegan-oriented made at 64 px",
        "ε = 0.3 spent after probe",
        "ε = 0.999 spent after finetune",
        "ε = 1 is the budget of the run, at δ = 1e-05",
        "probe (2 not default)",
        "views = 4 (default 1)",
        "torch",
    ):
        assert content in page.text, content
    assert "PRIVATE" in page.texts
    assert "NOT PRIVATE" not in full


def test_configuration_is_exact(full: str) -> None:
    page = Page(full)
    shown = [tomllib.loads(text) for text in page.texts if text.startswith('size = "')]
    assert shown[2] == config.as_dict(config.build("probe", {"views": 4, "clip_norm": 1.25}))
    assert len(shown) == 4


def test_curves_are_text_and_public(full: str) -> None:
    page = Page(full)
    drawings = [attributes for attributes in page.all("svg") if attributes.get("role") == "img"]
    # pretrain's similarity, and two norms of each private stage; a quantity not known to be public is not drawn
    titles = {attributes["aria-labelledby"] for attributes in drawings}
    assert titles == {
        "pretrain-similarity-title",
        "probe-update_norm-title",
        "probe-weight_norm-title",
        "finetune-update_norm-title",
        "finetune-weight_norm-title",
    }
    assert "step" in page.texts
    assert "12321" not in full


def test_self_contained(full: str) -> None:
    assert outside_references(full) == []
    policies = [a["content"] for a in Page(full).all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert len(Page(full).all("img")) == 1


@pytest.mark.parametrize(
    "planted",
    [
        '<img src="https://example.org/a.png">',
        '<img src="a.png">',
        "<script>1</script>",
        '<p onclick="x()">a</p>',
        "<style>@import 'a.css'</style>",
        "<style>p { background: url(a.png) }</style>",
        '<a href="javascript:x()">a</a>',
        "<svg><use href='b.svg#x'></use></svg>",
    ],
)
def test_self_containment_check_can_fail(full: str, planted: str) -> None:
    assert outside_references(full.replace("<main>", f"<main>{planted}")) != []


def test_accessible(full: str) -> None:
    page = Page(full)
    assert page.all("html") == [{"lang": "en"}]
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(attributes.get("alt") for attributes in page.all("img"))
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert all(attributes["aria-labelledby"] in identifiers for attributes in page.all("svg") if "role" in attributes)
    assert len(page.all("caption")) == len(page.all("table")) >= 3
    assert all(attributes.get("scope") in ("row", "col") for attributes in page.all("th"))
    boxes = [attributes for attributes in page.all("div") if attributes.get("class") == "scroll"]
    assert len(boxes) == len(page.all("table"))
    assert all(box["tabindex"] == "0" for box in boxes)
    assert any("width=device-width" in attributes.get("content", "") for attributes in page.all("meta"))


def luminance(colour: tuple[float, ...]) -> float:
    """Relative luminance, WCAG 2.2."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_in_light_and_dark() -> None:
    """Text reaches 4.5 : 1 on what it stands on (WCAG 2.2, 1.4.3), the darkest cells of the matrix included."""
    blocks = re.findall(r":root \{(.*?)\}", style.CSS, flags=re.DOTALL)
    schemes = [dict(re.findall(r"--([a-z-]+): ([^;]+);", block)) for block in blocks]
    assert len(schemes) == 3  # light, dark, paper
    for scheme in (schemes[0], schemes[1], schemes[0] | schemes[2]):
        rgb = {
            name: tuple(int((v * 2 if len(v) == 3 else v)[i : i + 2], 16) for i in (0, 2, 4))
            if len(v := value.strip("# ")) == 6
            else tuple(int(c * 2, 16) for c in v)
            if value.startswith("#")
            else tuple(map(int, value.split()))
            for name, value in scheme.items()
        }
        pairs = [(rgb[a], rgb[b]) for a in ("ink", "soft") for b in ("paper", "panel")]
        pairs += [(rgb["good"], rgb["good-panel"]), (rgb["bad"], rgb["bad-panel"])]
        for name in ("hit", "miss"):
            mixed = tuple(0.62 * a + 0.38 * b for a, b in zip(rgb[name], rgb["paper"], strict=True))
            pairs.append((rgb["ink"], mixed))
        for front, back in pairs:
            light, dark = sorted((luminance(front), luminance(back)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)


def test_same_files_same_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", stages=2, lines=500)
    assert written(run) == written(run)


def test_written_atomically_and_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "x", stages=1)
    points: list[str] = []
    monkeypatch.setattr(faults, "point", points.append)
    path = report.write(run)
    assert path == run.path / "report.html"
    assert points == ["temp-written", "renamed", "report-written"]


# ------------------------------------------------------------------------------------------------ partial runs


def test_nothing_done_names_the_command(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "x", create=True)
    with pytest.raises(InputError) as error:
        report.write(run)
    assert error.value.fix == f"run: dprandp generate --run {run.path}"
    assert not (run.path / "report.html").exists()


@pytest.mark.parametrize(
    ("stages", "sections"),
    [
        (1, ["Stages", "Synthetic images", "Configuration", "Environment"]),
        (2, ["Stages", "Synthetic images", "Learning curves", "Configuration", "Environment"]),
    ],
)
def test_public_stages_alone(tmp_path: Path, stages: int, sections: list[str]) -> None:
    page = Page(written(make_run(tmp_path / "x", stages, lines=5)))
    assert [text for level, text in page.headings if level == 2] == sections
    assert "No classifier yet" in page.text
    assert "no privacy was spent" in page.text


def test_probe_alone(tmp_path: Path) -> None:
    page = Page(written(make_run(tmp_path / "x", stages=3)))
    assert "86.1 %" in page.text
    assert "0.3 of 1 allowed" in page.text
    assert "after stage probe" in page.text


def test_unfinished_stage_is_counted(tmp_path: Path) -> None:
    """Charges that no finished stage reports are part of the ε that is shown."""
    run = make_run(tmp_path / "x", stages=3)
    ledger = Ledger.open(run.privacy_dir / "ledger.jsonl")
    with run.lock():
        run.begin("finetune", config.as_dict(config.build("finetune", {})), {})
    before = Page(written(run)).text
    assert "0.3 of 1 allowed" in before
    charge(ledger, "finetune", 4, 10.0)
    page = Page(written(run))
    truth = ledger.spent(1e-5).upper
    shown = float(re.search(r"ε, spent ([\d.]+)", page.text).group(1))
    assert truth <= shown <= truth + 1e-3
    assert shown > 0.6
    assert "Stage finetune was begun and is not finished" in page.text
    assert "spent after steps of unfinished stages" in page.text


def test_unfinished_probe_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", stages=2)
    with run.lock():
        run.begin("probe", config.as_dict(config.build("probe", {})), {})
        atomic_write(run.privacy_dir / "plan.json", json.dumps({"format": 1, "epsilon": 1.0, "delta": 1e-5}))
        ledger = Ledger.create(run.privacy_dir / "ledger.jsonl", examples=1437)
        assert "no privacy was spent" in Page(written(run)).text
        charge(ledger, "probe", 4, 10.0)
        page = Page(written(run))
    shown = float(re.search(r"has spent ε = ([\d.]+)", page.text).group(1))
    assert shown >= ledger.spent(1e-5).upper
    assert "no privacy was spent" not in page.text


def test_stale_stage_is_named(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "x", create=True)
    with run.lock():
        for stage, result, seed in (
            ("generate", GENERATED, 0),
            ("pretrain", PRETRAINED, 0),
            ("generate", GENERATED, 1),
        ):
            inputs = run.inputs_from("generate") if stage == "pretrain" else {}
            begun = run.begin(stage, {"seed": seed}, inputs, overwrite=True)
            (begun.directory / "made").write_text(f"{stage} {seed}")
            run.finish(stage, run.hash_outputs(stage, ["made"]), result)
        Ledger.create(run.privacy_dir / "ledger.jsonl", examples=1437)
        run.begin("probe", {}, {"generate/made": "0" * 64})
        run.finish("probe", {}, private_result("probe"))
    text = Page(written(run)).text
    assert "Stage probe is stale: it was made from another generate/made" in text


# ------------------------------------------------------------------------------------------------ not private


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epsilon": math.inf, "epsilon_total": math.inf, "noise_multiplier": 0.0, "private": False}, "without noise"),
        ({"random": "insecure-seed", "private": False}, "came from a seed"),
        ({"private": False}, "An earlier step of this run"),
    ],
)
def test_not_private_is_unmissable(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    text = written(make_run(tmp_path / "x", **changes))
    page = Page(text)
    assert "NOT PRIVATE" in page.texts
    assert "PRIVATE" not in page.texts  # the badge
    assert any(attributes.get("class") == "banner" for attributes in page.all("div"))
    assert reason in page.text
    assert "differentially private image classifier" not in page.text
    assert re.search(r"ε, spent (∞|void)", page.text)
    card = model_card(private_result("finetune", **changes), PRETRAINED, GENERATED)
    assert "## NOT PRIVATE" in card
    assert reason in card
    assert "differential privacy** for" not in card


def test_seeded_charge_in_the_ledger_is_enough(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x")
    charge(Ledger.open(run.privacy_dir / "ledger.jsonl"), "probe", 1, 133.7, "insecure-seed")
    page = Page(written(run))
    assert "NOT PRIVATE" in page.texts
    assert "PRIVATE" not in page.texts


# ------------------------------------------------------------------------------------------------ disclosure

FIELDS = {
    "mechanism": (r"^Mechanism$", r"Poisson-subsampled Gaussian mechanism"),
    "epsilon": (r"^ε ", r"0\.999\b.*upper bound.*stage 1, of the run 1\b"),
    "delta": (r"^δ$", r"^1e-05$"),
    "adjacency": (r"^Adjacency$", r"add/remove one record"),
    "unit": (r"^Unit of privacy$", r"one image"),
    "N": (r"^N ", r"1437\b.*public"),
    "q": (r"^q ", r"0\.0207\b.*qN = 29\.7459"),
    "T": (r"^T ", r"\b20 planned, 22 charged.*\b2 of these were lost"),
    "sigma": (r"^σ ", r"2\.345\b"),
    "C": (r"^C ", r"1\.25\b"),
    "K": (r"^K ", r"^4\b"),
    "accountant and version": (r"^Accountant$", r"PRV \(prv-accountant 0\.2\.0\)"),
    "RNG mode": (r"^Random numbers$", r"^os-entropy"),
    "tuned, and on what": (r"^Tuned", r"public benchmark.*Set by whoever ran it: lr = 3"),
    "public": (r"^Public inputs$", r"4000 synthetic images.*stylegan-oriented.*patchnet.*Handwritten digits"),
    "released": (r"^Released$", r"EMA, decay 0\.9999.*test metrics"),
    "floating point": (r"^Limit: floating-point noise \(severity low\)$", r"Mironov.*float64"),
    "N public": (r"^Limit: N", r"public|not cover"),
    "test split": (r"^Limit: test split$", r"Read once, at the end.*without noise"),
    "other copies": (r"^Limit: other", r"add to it.*same person"),
}
"""Every field that must be disclosed beside an ε: how it is labelled, and what its value says for the run above."""


def undisclosed(rows: list[tuple[str, str]]) -> list[str]:
    """The fields that a disclosure lacks."""
    return [
        field
        for field, (label, value) in FIELDS.items()
        if not any(re.search(label, name) and re.search(value, said) for name, said in rows)
    ]


def test_disclosure_is_complete_field_by_field() -> None:
    rows = disclosure(private_result("finetune"), PRETRAINED, GENERATED, changed=["lr = 3 (default automatic)"])
    assert undisclosed(rows) == []
    # the positive control: without a row, exactly its field is missed
    lost = [undisclosed(rows[:index] + rows[index + 1 :]) for index in range(len(rows))]
    assert sorted(field for fields in lost for field in fields) == sorted(FIELDS)


@pytest.mark.parametrize(
    ("key", "value", "label"),
    [
        ("epsilon", 0.7, "ε (privacy loss)"),
        ("epsilon_target", 0.7, "ε (privacy loss)"),
        ("delta", 1e-6, "δ"),
        ("adjacency", "replace one record", "Adjacency"),
        ("unit", "one patient", "Unit of privacy"),
        ("train_examples", 999, "N (training examples)"),
        ("sample_rate", 0.5, "q (sampling rate)"),
        ("expected_batch", 33, "q (sampling rate)"),
        ("steps", 21, "T (noisy steps)"),
        ("charged_steps", 33, "T (noisy steps)"),
        ("lost_steps", 0, "T (noisy steps)"),
        ("noise_multiplier", 3.5, "σ (noise multiplier)"),
        ("noise_multiplier", 0.0, "Mechanism"),
        ("sample_rate", 1.0, "Mechanism"),
        ("clip_norm", 2.5, "C (clip norm)"),
        ("views", 16, "K (views per example)"),
        ("accountant", "RDP (opacus 1.5)", "Accountant"),
        ("random", "insecure-seed", "Random numbers"),
        ("released", "last", "Released"),
        ("source", "scratch", "Public inputs"),
    ],
)
def test_disclosure_follows_the_result(key: str, value: Any, label: str) -> None:
    before = dict(disclosure(private_result("finetune"), PRETRAINED, GENERATED))
    after = dict(disclosure(private_result("finetune", **{key: value}), PRETRAINED, GENERATED))
    assert before.keys() == after.keys()
    assert before[label] != after[label]


def test_report_and_card_show_the_whole_disclosure(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x")
    text = Page(written(run)).text
    card = model_card(private_result("finetune"), PRETRAINED, GENERATED, earlier=[private_result("probe")])
    plain = card.replace("\\", "")
    for stage in ("probe", "finetune"):
        for label, value in disclosure(private_result(stage), PRETRAINED, GENERATED):
            assert label in text
            assert value in text, label
            if stage == "finetune":
                assert f"| {label} | {value} |" in plain
    assert "Also counted in ε | probe: q = 1, T = 123, σ = 133.7, C = 1.25, K = 4 |" in plain


@pytest.mark.parametrize("key", disclosing.NEEDED)
def test_incomplete_result_is_refused(key: str) -> None:
    result = private_result("finetune")
    del result[key]
    with pytest.raises(CheckpointError, match=rf"lacks {key}\b"):
        disclosure(result)


# ------------------------------------------------------------------------------------------------ the model card


def test_model_card_sections() -> None:
    card = model_card(private_result("probe"), PRETRAINED, GENERATED)
    assert re.findall(r"^## (.*)$", card, flags=re.MULTILINE) == [
        "Privacy",
        "Intended use",
        "Out-of-scope use",
        "Data",
        "How it was trained",
        "Metrics on the 360 test images",
        "Disclosure",
    ]
    for content in (
        "(ε = 0.3, δ = 1e-05)-differential privacy",
        "Licence of the data: not known",
        "86.1 %",
        "learned from 4000 images of the random process stylegan-oriented",
        "A linear head was trained",
    ):
        assert content in card, content
    assert "NOT PRIVATE" not in card


def test_model_card_from_scratch() -> None:
    card = model_card(private_result("finetune", source="scratch"), {}, {})
    assert "started from random weights" in card
    assert "synthetic images" not in card.replace("constants or synthetic images", "")
    assert "All parameters were trained" in card


def test_model_card_escapes_and_shortens() -> None:
    classes = [EVIL, "a|b", "*c*\nd", *map(str, range(60))]
    card = model_card(private_result("probe", classes=classes, title="T|<b>"), PRETRAINED, GENERATED)
    assert "<script" not in card
    assert "<b>" not in card
    assert "a\\|b" in card
    assert "and 13 more" in card
    for line in card.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 3


# ------------------------------------------------------------------------------------------------ what must not get in


def test_names_from_files_stay_text(tmp_path: Path) -> None:
    classes = [EVIL, '"><img src=x onerror=alert(1)>', "c&amp;", *map(str, range(7))]
    changes = {"classes": classes, "title": f"{EVIL}T", "data": "folder:<b>", "device": EVIL, "accountant": "'\"<i>"}
    text = written(make_run(tmp_path / "x", **changes))
    page = Page(text)
    assert outside_references(text) == []
    assert EVIL in page.texts
    assert "c&amp;" in page.texts
    assert not page.all("b")
    assert not page.all("i")[3:]  # the three of the budget's legend


def test_many_classes_escape_as_well(tmp_path: Path) -> None:
    classes = [f"{EVIL} {number}" for number in range(25)]
    text = written(make_run(tmp_path / "x", classes=classes))
    page = Page(text)
    assert outside_references(text) == []
    assert any(a.get("aria-labelledby") == "confusion-title" for a in page.all("svg"))
    assert "Most frequent confusions" in page.text
    assert any(row.startswith(EVIL) for row in page.texts)


@pytest.fixture
def opened() -> Iterator[Callable[[], list[str]]]:
    """Paths opened since; audit hooks cannot be removed, so this one is switched off at the end."""
    paths: list[str] = []
    active = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if active and event in ("open", "os.listdir", "os.scandir"):
            paths.append(str(arguments[0]))

    sys.addaudithook(hook)
    yield lambda: paths
    active = False


def test_private_folder_is_never_read(tmp_path: Path, opened: Callable[[], list[str]]) -> None:
    run = make_run(tmp_path / "x")
    opened().clear()
    text = written(run)
    touched = [path for path in opened() if str(run.path) in path]
    assert any("ledger.jsonl" in path for path in touched)  # the hook sees
    assert not [path for path in touched if "/private" in path]
    assert CANARY not in text


# ------------------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("env.json", b"{", "env.json"),
        ("env.json", b"[]", "env.json"),
        ("privacy/plan.json", b"\xff", "plan.json"),
        ("3-probe/metrics.jsonl", b'{"step": 1}\nrubbish\n{"step": 2}\n', "line 2"),
        ("1-generate/preview.png", b"no picture", "preview.png"),
        ("privacy/ledger.jsonl", b"{}\n", "ledger"),
        ("privacy/ledger.jsonl", None, "ledger"),
    ],
)
def test_damage_is_named(tmp_path: Path, file: str, content: bytes | None, named: str) -> None:
    run = make_run(tmp_path / "x")
    if content is None:
        (run.path / file).unlink()
    else:
        (run.path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=named):
        report.write(run)
    assert not (run.path / "report.html").exists()


def test_torn_metrics_and_missing_preview_are_harmless(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", stages=3, lines=5)
    with open(run.path / "3-probe" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "upda')
    (run.path / "1-generate" / "preview.png").unlink()
    page = Page(written(run))
    assert "Synthetic images" not in [text for _, text in page.headings]
    assert "Learning curves" in [text for _, text in page.headings]


# ------------------------------------------------------------------------------------------------ numbers


def test_detection_rate_is_that_of_the_best_test() -> None:
    # μ = 0.268 at (1, 1e-5) and 1.666 at (8, 1e-5); the best test between N(0,1) and N(μ,1) is a threshold
    for epsilon, mu in ((1.0, 0.268), (8.0, 1.666)):
        threshold = NormalDist().inv_cdf(0.99)
        expected = 1 - NormalDist(mu).cdf(threshold)
        assert disclosing.detection_rate(epsilon, 1e-5) == pytest.approx(expected, rel=5e-3)
    assert disclosing.detection_rate(math.inf, 1e-5) == 1
    assert disclosing.detection_rate(0.0, 1e-5) == pytest.approx(0.01, abs=1e-4)


def test_privacy_sentence_is_exact_only_for_full_batches() -> None:
    assert "at most 1." in disclosing.privacy_sentence(private_result("probe"))
    assert "at most about 2" in disclosing.privacy_sentence(private_result("finetune"))
    assert "at most about" in disclosing.privacy_sentence(private_result("probe"), 0.9, exact=False)


def test_printed_epsilon_is_never_below_the_truth() -> None:
    for epsilon in [0.0, 1e-9, 0.3, 0.29901, 0.9999, 1.0, 1.0000004, 7.9996, 3.1415926]:
        shown = float(disclosing.epsilon_text(epsilon))
        assert epsilon - 1e-12 <= shown + 1e-12
        assert shown - epsilon <= 1e-3
    assert disclosing.epsilon_text(math.inf) == "∞"
    assert disclosing.epsilon_text(0.3) == "0.3"


@pytest.mark.parametrize(("share", "count"), [(0.8917, 360), (0.0, 20), (1.0, 20), (0.5, 10_000)])
def test_wilson_interval_against_its_definition(share: float, count: int) -> None:
    """The shares p whose normal approximation does not reject what was seen, found by trying them."""
    tried = np.linspace(0, 1, 200_001)
    accepted = tried[(share - tried) ** 2 <= 1.96**2 * tried * (1 - tried) / count + 1e-15]
    low, high = headline.wilson(share, count)
    assert low == pytest.approx(accepted.min(), abs=2e-5)
    assert high == pytest.approx(accepted.max(), abs=2e-5)


def test_long_and_broken_curves() -> None:
    steps = list(range(100_000))
    values = [None if step % 1000 == 0 else float(step) for step in steps]
    drawn = figures.curve("c", steps, values, title="a < b", label="loss")
    assert len(drawn) < 60_000
    assert "a &lt; b" in drawn


def test_preview_is_decoded_and_made_smaller(tmp_path: Path) -> None:
    path = tmp_path / "preview.png"
    Image.new("RGB", (4096, 1536), "red").save(path)
    tag = figures.preview_image(path, 'x"y')
    assert 'width="1280" height="480"' in tag
    assert "x&quot;y" in tag
    Image.new("RGB", (8, 8)).save(path, format="JPEG")
    with pytest.raises(CheckpointError, match=r"preview\.png"):
        figures.preview_image(path, "x")
