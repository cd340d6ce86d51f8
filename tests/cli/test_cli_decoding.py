"""Declared decoding rules from the command line to the released model, which applies them to new images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_process import Dprandp, RunAfter, good, refused
from PIL import Image

WINDOW = ("--grey-levels", "window:1000,3550")


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 16-bit images: brightness tells the class."""
    root = tmp_path_factory.mktemp("deep") / "scans"
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for label, name in enumerate(("dark", "bright")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                values = 1000 + 1200 * label + random.integers(0, 1200, (40, 36))
                Image.fromarray(values.astype(np.uint16)).save(root / split / name / f"{index}.png")
    return root


@pytest.mark.slow
def test_rules_are_recorded_shown_and_applied_by_predict(
    dprandp: Dprandp, run_after: RunAfter, deep: Path, folder: Path, tmp_path: Path
) -> None:
    run = run_after("pretrain")
    probe = ("probe", "--run", run, "--config", folder / "small.toml", "--data", f"folder:{deep}", "--eps", 5)
    refused(dprandp(*probe), 3, "16-bit", "--grey-levels window:LO,HI")
    plan = dprandp(*probe, *WINDOW, "--plan")
    assert "--grey-levels window:1000,3550" in plan.out
    assert good(dprandp(*probe, *WINDOW, "--json"))["decoding"] == "--grey-levels window:1000,3550"
    refused(dprandp(*probe, "--grey-levels", "full"), 3, "not those that this run began with", "the same rules")
    tuned = dprandp("finetune", "--run", run, "--config", folder / "small.toml", "--json")  # keeps the probe's rules
    assert good(tuned)["decoding"] == "--grey-levels window:1000,3550"
    assert "grey-levels window:1000,3550" in (run / "model/MODEL_CARD.md").read_text()
    assert good(dprandp("verify", "--run", run, "--json"))

    values = np.array(Image.open(deep / "test/bright/0.png")).astype(float)
    plain = np.floor((values - 1000) / 10 + 0.5).clip(0, 255).astype(np.uint8)
    Image.fromarray(plain).save(tmp_path / "plain.png")
    said = good(dprandp("predict", "--run", run, deep / "test/bright/0.png", tmp_path / "plain.png", "--json"))
    deep_row, plain_row = said["predictions"]
    assert deep_row["probabilities"] == plain_row["probabilities"]
    other = dprandp("predict", "--run", run_after("finetune"), deep / "test/bright/0.png")  # a model without rules
    assert other.code == 3
    assert "0.png is 16-bit" in other.out


def test_a_rule_that_is_none_damages_a_model(dprandp: Dprandp, run_after: RunAfter, folder: Path) -> None:
    run = run_after("probe")
    config = run / "model/config.json"
    text = config.read_text()
    assert '"decoding": {}' in text
    for wrong in ('{"grey_levels": "window:9,1"}', '{"no_rule": "apply"}', '{"orientation": "guess"}', "[3]", '"full"'):
        config.write_text(text.replace('"decoding": {}', f'"decoding": {wrong}'))
        refused(dprandp("predict", "--run", run, "--data", "npz:tiny.npz"), 4, "config.json cannot be used")
    config.write_text(text.replace('"decoding": {}', '"older": 1'))
    assert dprandp("predict", "--run", run, "--data", "npz:tiny.npz").code == 0
