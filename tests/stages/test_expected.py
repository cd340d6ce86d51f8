"""The warning about a small N: its rule against what was measured, and where it is said."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from tiny_run import Copy, forbid_reading, run_probe

from dprandp.dpsgd.budget import default_delta, kept_gain, too_few

PAGE = Path(__file__).resolve().parents[2] / "docs/stages.md"


def measured() -> list[tuple[int, float, float]]:
    """N, ε and the part of the gain that was kept, from the table of the page."""
    head, *rows = re.findall(r"^\| (?:N \(10|[\d,]+ \|).*$", PAGE.read_text(encoding="utf-8"), re.M)
    epsilons = [float(value) for value in re.findall(r"ε = ([\d.]+)", head)]
    found = []
    for row in rows:
        count = int(row.split("|")[1].replace(",", ""))
        parts = [int(value) / 100 for value in re.findall(r"\((\d+) %\)", row)]
        found += [(count, epsilon, part) for epsilon, part in zip(epsilons, parts, strict=True)]
    return found


def test_the_rule_follows_what_was_measured() -> None:
    assert len(measured()) == 16
    for count, epsilon, part in measured():
        assert kept_gain(epsilon, default_delta(count), count, 10) == pytest.approx(part, abs=0.09), (count, epsilon)


def test_more_records_fewer_classes_and_a_larger_epsilon_help() -> None:
    base = kept_gain(1, 1e-5, 500, 10)
    assert kept_gain(1, 1e-5, 1000, 10) == kept_gain(1, 1e-5, 500, 5) > base
    assert kept_gain(2, 1e-5, 500, 10) > base > kept_gain(1, 1e-7, 500, 10)
    assert kept_gain(math.inf, 1e-5, 1, 10) == 1


def test_what_is_said() -> None:
    assert too_few(1, 1e-5, 1000, 10) is None
    assert too_few(math.inf, 1e-5, 1, 10) is None
    said = too_few(1, 1e-5, 200, 10, unit="patient")
    assert said.startswith("N = 200 is small for ε = 1 and 10 classes: expect about 43 % of the gain over guessing")
    assert said.endswith("More patients, fewer classes or a larger ε help")
    said = too_few(0.3, 1e-5, 100, 3, whole=1.0)
    assert "expect about 30 % of the gain over guessing, 33.3 %" in said
    assert "the run's whole ε = 1 (--share 1) it would keep about 56 % of the gain" in said
    assert "expect an accuracy near guessing, 10 %" in too_few(0.1, 1e-5, 200, 10)


def test_a_stage_warns_before_it_reads_a_pixel(
    copy: Copy, public_run: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dprandp.runs.console import Console

    said: list[str] = []
    monkeypatch.setattr(Console, "warn", lambda console, text: said.append(text))
    forbid_reading(monkeypatch)
    for epsilon, count in ((0.5, 1), (1000.0, 0)):
        said.clear()
        with pytest.raises(AssertionError, match="private values were read"):
            run_probe(copy(public_run), data, epsilon=epsilon, share=1.0)
        assert len([text for text in said if "is small for ε" in text]) == count
