"""The page of a finished run: its content, that it stands alone, and that everybody can read it."""

from __future__ import annotations

import json
import re
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from fake_run import make_run, written
from html_page import Page, outside_references
from PIL import Image

from dprandp.config import schema
from dprandp.errors import AuditError, CheckpointError
from dprandp.privacy.opinions import Opinion
from dprandp.report import figures
from dprandp.report import page as report
from dprandp.report import page as style
from dprandp.report import run as run_module
from dprandp.runs import faults


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
        "Test accuracy 89.2 %",  # the fine-tune's, not the probe's
        "after stage finetune",
        "0.999 of 1 allowed",
        "10.3 %",
        "85.7 %",
        "0.988",
        "1 min 15 s",
        "k-NN 61.5 % on synthetic classes",
        "Some of the 4000 images that the random process stylegan-oriented made at 64 px",
        "ε = 0.3 spent after probe",
        "ε = 0.999 spent after finetune",
        "ε = 1 is the budget of the run, at δ = 1e-5",
        "probe (2 not default)",
        "views = 4 (default 1)",
        "torch",
    ):
        assert content in page.text, content
    assert "PRIVATE" in page.texts
    assert "NOT PRIVATE" not in full


def test_other_accountants_are_shown_and_a_contradiction_is_an_error(
    full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Other accountants" in full
    assert "prv-accountant" in full
    assert "opacus" in full
    run = make_run(tmp_path / "run")
    monkeypatch.setattr(run_module, "second_opinions", lambda events, delta: [Opinion("another (PRV)", 50.0, 60.0)])
    with pytest.raises(AuditError, match="contradict each other"):
        written(run)


def test_configuration_is_exact(full: str) -> None:
    page = Page(full)
    shown = [tomllib.loads(text) for text in page.texts if text.startswith('size = "')]
    assert shown[2] == schema.as_dict(schema.build("probe", {"views": 4, "clip_norm": 1.25}))
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


def test_a_training_by_gradients_shows_what_was_seen_of_its_features(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", stages=2)
    lines = [{"step": 10, "loss": -1.0}, {"step": 20, "knn_accuracy": 0.1, "effective_rank": 5.0},
             {"step": 40, "knn_accuracy": 0.4, "effective_rank": 9.0}]  # fmt: skip
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (run.stage_dir("pretrain") / "metrics.jsonl").write_text(text, encoding="utf-8")
    drawings = [drawing for drawing in Page(written(run)).all("svg") if drawing.get("role") == "img"]
    titles = {drawing["aria-labelledby"] for drawing in drawings}
    assert titles == {"pretrain-knn_accuracy-title", "pretrain-effective_rank-title"}  # one loss makes no curve


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
