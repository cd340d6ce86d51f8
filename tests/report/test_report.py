"""The page of a finished run: its content, that it stands alone, and that everybody can read it."""

from __future__ import annotations

import json
import math
import re
import tomllib
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import EVIL, charge, make_run, written
from html_page import Page, outside_references
from PIL import Image

from dprandp.config import schema
from dprandp.errors import AuditError, CheckpointError
from dprandp.privacy.gaussian_dp import gaussian_dp_epsilon
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.opinions import Opinion
from dprandp.report import figures
from dprandp.report import page as report
from dprandp.report import run as run_module
from dprandp.runs import faults
from dprandp.runs.directory import RunDir
from dprandp.runs.ledger import ledger_file
from dprandp.vision.images import filter_sheet


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(make_run(tmp_path_factory.mktemp("full") / "digits-run", lines=500))


def test_sections_in_order_with_their_content(full: str) -> None:
    page = Page(full)
    assert page.headings[0] == (1, "Handwritten digits: differentially private image classifier")
    assert page.sections == [
        "Stages", "Synthetic images", "Accuracy against ε", "Learning curves", "Budget", "Figures of the test split",
        "Confusion matrix", "Disclosure", "Repeat", "Configuration", "Environment",
    ]  # fmt: skip
    for content in (
        "Test accuracy 89.2 %",  # the fine-tune's, not the probe's
        "after stage finetune", "0.999 of 1 allowed", "10.3 %", "85.7 %", "0.988", "1 min 15 s",
        "k-NN 61.5 % on synthetic classes",
        "Some of the 4000 images that the random process stylegan-oriented made at 64 px",
        "The bar is the run's budget, ε = 1 at δ = 1e-5", "It counts this run alone.", "left: ε from 0.999 to 1",
        "probe (2 not default)", "views = 4 (default 1)", "torch", "Other accountants", "prv-accountant", "opacus",
    ):  # fmt: skip
        assert content in page.text, content
    assert "PRIVATE" in page.texts
    assert "NOT PRIVATE" not in full
    # the configuration is exact
    shown = [tomllib.loads(text) for text in page.texts if text.startswith('size = "')]
    assert shown[2] == schema.as_dict(schema.build("probe", {"views": 4, "clip_norm": 1.25}))
    assert len(shown) == 4
    # of metrics.jsonl, only quantities that are known to be public
    assert page.drawings == {"pretrain-similarity-title", "accuracy-title"}
    assert "step" in page.texts
    assert "12321" not in full


def test_a_contradiction_of_accountants_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.setattr(run_module, "second_opinions", lambda events, delta: [Opinion("another (PRV)", 50.0, 60.0)])
    with pytest.raises(AuditError, match="contradict each other"):
        written(run)


def test_a_training_by_gradients_shows_what_was_seen_of_its_features(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", stages=2)
    lines = [{"step": 10, "loss": -1.0}, {"step": 20, "knn_accuracy": 0.1, "effective_rank": 5.0},
             {"step": 40, "knn_accuracy": 0.4, "effective_rank": 9.0}]  # fmt: skip
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (run.stage_dir("pretrain") / "metrics.jsonl").write_text(text, encoding="utf-8")
    # one loss makes no curve
    assert Page(written(run)).drawings == {"pretrain-knn_accuracy-title", "pretrain-effective_rank-title"}
    assert written(run) == written(run)


def test_self_contained(full: str) -> None:
    assert outside_references(full) == []
    policies = [a["content"] for a in Page(full).all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert len(Page(full).all("img")) == 1
    for planted in (
        '<img src="https://example.org/a.png">', '<img src="a.png">', "<script>1</script>",
        '<p onclick="x()">a</p>', "<style>@import 'a.css'</style>", "<style>p { background: url(a.png) }</style>",
        '<a href="javascript:x()">a</a>', "<svg><use href='b.svg#x'></use></svg>",
    ):  # fmt: skip
        assert outside_references(full.replace("<main>", f"<main>{planted}")) != [], planted


def test_accessible(full: str) -> None:
    page = Page(full)
    assert page.all("html") == [{"lang": "en"}]
    levels = [level for level, _ in page.headings]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(attributes.get("alt") for attributes in page.all("img"))
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert page.drawings <= set(identifiers)
    boxes = [attributes for attributes in page.all("div") if attributes.get("class") == "scroll"]
    assert len(page.all("caption")) == len(page.all("table")) == len(boxes) >= 3
    assert all(attributes.get("scope") in ("row", "col") for attributes in page.all("th"))
    assert all(box["tabindex"] == "0" for box in boxes)
    assert any("width=device-width" in attributes.get("content", "") for attributes in page.all("meta"))


def luminance(colour: tuple[float, ...]) -> float:
    """Relative luminance, WCAG 2.2."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_in_light_and_dark() -> None:
    """Text reaches 4.5 : 1 on what it stands on (WCAG 2.2, 1.4.3), the darkest cells of the matrix included."""

    def rgb(value: str) -> tuple[int, ...]:
        if not value.startswith("#"):
            return tuple(map(int, value.split()))
        digits = value[1:] if len(value) == 7 else "".join(2 * digit for digit in value[1:])
        return tuple(bytes.fromhex(digits))

    blocks = re.findall(r":root \{(.*?)\}", (resources.files(report.__package__) / "page.css").read_text(), re.DOTALL)
    light, dark, paper = [{k: rgb(v) for k, v in re.findall(r"--([a-z-]+): ([^;]+);", block)} for block in blocks]
    for scheme in (light, dark, light | paper):
        pairs = [(scheme[a], scheme[b]) for a in ("ink", "soft") for b in ("paper", "panel")]
        pairs += [(scheme["good"], scheme["good-panel"]), (scheme["bad"], scheme["bad-panel"])]
        for name in ("hit", "miss"):
            mixed = tuple(0.62 * a + 0.38 * b for a, b in zip(scheme[name], scheme["paper"], strict=True))
            pairs.append((scheme["ink"], mixed))
        for front, back in pairs:
            low, high = sorted((luminance(front), luminance(back)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (front, back)


def test_written_atomically_and_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "x", stages=1)
    points: list[str] = []
    monkeypatch.setattr(faults, "point", points.append)
    assert report.write(run) == run.path / "report.html"
    assert points == ["temp-written", "renamed", "report-written"]


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
    assert "x&#34;y" in tag
    Image.new("RGB", (8, 8)).save(path, format="JPEG")
    with pytest.raises(CheckpointError, match=r"preview\.png"):
        figures.preview_image(path, "x")


def test_the_first_filters_are_shown_as_pixels_of_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2)
    assert "First-layer filters" not in Page(written(run)).sections
    tiles = np.random.default_rng(0).normal(size=(50, 3, 6, 6))
    Image.fromarray(filter_sheet(tiles)).save(run.path / "2-pretrain/filters.png")
    html = written(run)
    assert "First-layer filters" in Page(html).sections
    assert html.count("data:image/png;base64,") == 1
    assert outside_references(html) == []
    (run.path / "2-pretrain/filters.png").write_bytes(b"<svg>")
    with pytest.raises(CheckpointError, match=r"filters\.png is not a whole PNG file"):
        written(run)


# ------------------------------------------------------------------------------------------------- budget, other runs


def test_the_budget_is_divided_into_what_stages_used_what_was_lost_and_what_is_left(tmp_path: Path) -> None:
    """The oracle: full batches are Gaussian, and their μ² add up. The probe lost 3 of 123 steps, the fine-tune 2 of
    22."""
    run = make_run(tmp_path / "x", epsilon=0.1)
    charge(Ledger.open(run.privacy_dir / "ledger.jsonl"), "probe", 100, 100.0, attempt=2)  # begun again, not finished
    text = Page(written(run)).text
    mu2 = np.array([120 / 133.7**2, 20 / 30**2, 3 / 133.7**2 + 2 / 30**2 + 100 / 100**2]).cumsum()
    probe, finetune, lost = (gaussian_dp_epsilon(math.sqrt(each), 1e-5) for each in mu2)
    for name, before, after in (
        ("probe", 0, probe), ("fine-tune", probe, finetune),
        ("lost to crashes, restarts and unfinished stages", finetune, lost), ("left", lost, 1),
    ):  # fmt: skip
        low, high = map(float, re.search(rf"{name}: ε from ([\d.]+) to ([\d.]+)", text).groups())
        assert (low, high) == pytest.approx((before, after), abs=0.01)


def on_data(run: RunDir, data: str, **facts: Any) -> RunDir:
    plan = run.privacy_dir / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"data": data} | facts))
    return run


def test_a_report_names_the_runs_beside_it_that_declare_the_same_data_and_their_epsilon_together(
    tmp_path: Path,
) -> None:
    """By declared name, not by content: whether contents are equal is a private fact."""
    run = on_data(make_run(tmp_path / "runs/first"), "digits")
    for content in (run.private_dir, tmp_path / "runs"):
        (content / "training-data.json").write_text('{"train": "t", "images": "i"}')
    other = on_data(make_run(tmp_path / "runs/second", stages=3), "digits")
    on_data(make_run(tmp_path / "runs/third", stages=3), "mnist")
    on_data(make_run(tmp_path / "elsewhere/fourth", stages=3), "digits")
    make_run(tmp_path / "runs/public", stages=2)
    text = Page(written(run)).text
    assert "1 other run in the same folder declares the same data (second)" in text
    mu2 = 2 * 123 / 133.7**2 + 22 / 30**2
    shown = float(re.search(r"has seen ε = ([\d.]+) at δ = 1e-5, not", text)[1])
    assert shown == pytest.approx(gaussian_dp_epsilon(math.sqrt(mu2), 1e-5), rel=0.02)
    assert "It counts this run alone" not in text
    plan = json.loads((other.privacy_dir / "plan.json").read_text())
    (other.privacy_dir / "ledger.jsonl").write_text("damaged")
    text = Page(written(run)).text
    assert "Not counted, since their files cannot be read: second" in text
    assert "other run in the same folder" not in text
    assert plan["data"] == "digits"


def test_other_units_of_privacy_are_said_not_to_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dprandp.runs.ledger.SEALED", ("epsilon", "delta", "examples"))  # these ledgers name no unit
    run = on_data(make_run(tmp_path / "runs/first", stages=3), "scans", unit="one image")
    on_data(make_run(tmp_path / "runs/second", stages=3), "scans", unit="one patient")
    assert "Their units of privacy differ, so that their ε cannot be added up." in Page(written(run)).text


# ----------------------------------------------------------------------------------------------------------- the audit

FOUND: dict[str, Any] = {
    "name": "probe",
    "attempt": 1,
    "plan": {"steps": 120},
    "epsilon_claimed": 0.29912,
    "two_world": {
        "trials": 4321, "epsilon_lower": 0.1357,
        "power": [{"factor": 1.0, "flagged": 0.001}, {"factor": 1.5, "flagged": 0.876}],
    },
    "one_run": {"canaries": 987, "epsilon_lower": 0.0246},
    "replay": {"flagged": False},
    "controls": [{"flagged": True}, {"flagged": True}],
}  # fmt: skip
AUDIT: dict[str, Any] = {
    "format": 1, "outcome": "nothing contradicts", "passed": True, "significance": 0.001, "data": f"synthetic {EVIL}",
    "mechanisms": [FOUND],
}  # fmt: skip
OLD = "The audit is of another state of this run"


@pytest.fixture
def audited(tmp_path: Path) -> RunDir:
    """A run whose plan is that of AUDIT."""
    run = make_run(tmp_path / "run", stages=3)
    plan = run.path / "privacy/plan.json"
    stages = {"probe": {"attempt": 1, "started": "x", "plan": {"steps": 120}}}
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"stages": stages}))
    (run.path / "audit").mkdir()
    return run


def with_audit(run: RunDir, audit: object) -> str:
    if isinstance(audit, dict) and "ledger_head" not in audit:
        audit = audit | {"ledger_head": Ledger.open(ledger_file(run), read_only=True).head}
    (run.path / "audit/audit.json").write_text(json.dumps(audit))
    html = written(run)
    assert EVIL not in html
    return Page(html).text


def test_what_the_audit_found(audited: RunDir) -> None:
    assert "Audit" not in Page(written(audited)).sections
    text = with_audit(audited, AUDIT)
    for content in (
        "Nothing contradicts the claims.", "≤ 0.3",
        "≥ 0.1357, 45 % of the claim (4,321 trials with the record and without)",
        "≥ 0.0246, 8 % of the claim (987 canaries)", "1.5 times less: 88 %",
        "exact", "2 of 2 flagged", "significance 0.001", "A clean audit is no proof",
    ):  # fmt: skip
        assert content in text, content
    assert OLD not in text
    assert OLD in with_audit(audited, AUDIT | {"ledger_head": "0" * 64})  # the ledger went on since
    tuning = FOUND | {"name": "tune", "one_run": None}
    assert "not for private tuning" in with_audit(audited, AUDIT | {"mechanisms": [FOUND, tuning]})
    for change in ({"attempt": 2}, {"plan": {"steps": 119}}, {"name": "finetune"}):
        text = with_audit(audited, AUDIT | {"mechanisms": [FOUND | change]})
        assert OLD in text
    failed = FOUND | {"replay": {"flagged": True}, "controls": []}
    text = with_audit(audited, AUDIT | {"passed": False, "outcome": "contradiction", "mechanisms": [failed]})
    for content in ("The audit contradicts the claims", "contradicts", "not run"):
        assert content in text
    for broken in ({"format": 1}, AUDIT | {"mechanisms": []}, AUDIT | {"mechanisms": [{}]}, [1]):
        with pytest.raises(CheckpointError, match=r"audit\.json is corrupt"):
            with_audit(audited, broken)


SHOWN = 0.31  # more than FOUND claims


@pytest.mark.parametrize(("change", "says"), [
    ({"two_world": FOUND["two_world"] | {"epsilon_lower": SHOWN}}, "contradicts the claims: do not rely on them"),
    ({"one_run": FOUND["one_run"] | {"epsilon_lower": SHOWN}}, "contradicts the claims: do not rely on them"),
    ({"replay": {"flagged": True}}, "contradicts the claims: do not rely on them"),
    ({"controls": [{"flagged": True}, {"flagged": False}]}, "missed a fault that it had put in itself"),
])  # fmt: skip
def test_an_edited_verdict_does_not_hide_the_figures(audited: RunDir, change: dict, says: str) -> None:
    """The file still says that all is well; its figures do not."""
    text = with_audit(audited, AUDIT | {"mechanisms": [FOUND | change]})
    assert says in text
    assert "Nothing contradicts" not in text
