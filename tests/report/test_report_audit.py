"""What the report says of an audit, from audit.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_run import EVIL, make_run, written
from html_page import Page

from dprandp.errors import CheckpointError
from dprandp.runs.directory import RunDir

PLANS = {"stages": {"probe": {"attempt": 1, "started": "x", "plan": {"steps": 120}}}}
AUDIT: dict[str, Any] = {
    "format": 1,
    "outcome": "nothing contradicts",
    "passed": True,
    "significance": 0.001,
    "data": f"synthetic {EVIL}",
    "mechanisms": [
        {
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
        }
    ],
}


def audited(path: Path, audit: object) -> RunDir:
    run = make_run(path / "run", stages=3)
    plans = json.loads((run.path / "privacy/plan.json").read_text()) | PLANS
    (run.path / "privacy/plan.json").write_text(json.dumps(plans))
    (run.path / "audit").mkdir()
    (run.path / "audit/audit.json").write_text(json.dumps(audit))
    return run


def test_the_section(tmp_path: Path) -> None:
    run = audited(tmp_path, AUDIT)
    html = written(run)
    page = Page(html)
    headings = [text for level, text in page.headings if level == 2]
    assert headings[headings.index("Audit") - 1] == "Budget"
    for content in (
        "Nothing contradicts the claims.", "≤ 0.3",
        "≥ 0.1357, 45 % of the claim (4321 trials with the record and without)",
        "≥ 0.0246, 8 % of the claim (987 canaries)", "1.5 times less: 88 %",
        "exact", "2 of 2 flagged", "significance 0.001", "A clean audit is no proof",
    ):  # fmt: skip
        assert content in page.text, content
    assert EVIL not in html
    assert "changed since the audit" not in page.text
    assert "audit" not in " ".join(path.name for path in (run.path / "model").glob("*")).lower()


def test_without_an_audit_there_is_no_section(tmp_path: Path) -> None:
    assert "Audit" not in [text for _, text in Page(written(make_run(tmp_path / "run", stages=3))).headings]


def test_paid_tuning_has_no_one_run(tmp_path: Path) -> None:
    tuning = AUDIT["mechanisms"][0] | {"name": "tune", "one_run": None}
    text = Page(written(audited(tmp_path, AUDIT | {"mechanisms": [*AUDIT["mechanisms"], tuning]}))).text
    assert "not for paid tuning" in text


@pytest.mark.parametrize("change", [{"attempt": 2}, {"plan": {"steps": 119}}, {"name": "finetune"}])
def test_an_audit_of_other_plans_is_called_old(tmp_path: Path, change: dict[str, Any]) -> None:
    audit = AUDIT | {"mechanisms": [AUDIT["mechanisms"][0] | change]}
    assert "The run's plans have changed since the audit" in Page(written(audited(tmp_path, audit))).text


def test_a_failed_audit_is_loud(tmp_path: Path) -> None:
    mechanism = AUDIT["mechanisms"][0] | {"replay": {"flagged": True}, "controls": []}
    failed = AUDIT | {"passed": False, "outcome": "contradiction", "mechanisms": [mechanism]}
    text = Page(written(audited(tmp_path, failed))).text
    assert "THE AUDIT FAILED" in text
    assert "contradicts" in text
    assert "not run" in text


@pytest.mark.parametrize("broken", [{"format": 1}, AUDIT | {"mechanisms": []}, AUDIT | {"mechanisms": [{}]}, [1]])
def test_a_damaged_audit_is_named(tmp_path: Path, broken: object) -> None:
    with pytest.raises(CheckpointError, match=r"audit\.json is corrupt"):
        written(audited(tmp_path, broken))
