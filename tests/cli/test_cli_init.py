"""``finetune --init FILE --init-source TEXT`` as a command: public weights, and whose word it is that they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from cli_process import Dprandp, refused
from safetensors.torch import load_file, save_file

from dprandp.models.wrn import WideResNet

SAID = "drawn in a test, from no data at all"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "public.safetensors"
    save_file(WideResNet(10, 1, generator=torch.Generator().manual_seed(5)).state_dict(), path)
    return path


def command(run: Path, weights: Path, *more: object) -> tuple[object, ...]:
    sizes = ("--arch", "wrn-10-1", "--steps", 1, "--batch-size", 8, "--data", "npz:tiny.npz", "--eps", 4)
    return ("finetune", "--run", run, "--init", weights, *sizes, "--json", *more)


@pytest.mark.slow
def test_hash_and_declaration_stand_in_everything_that_is_published(
    dprandp: Dprandp, weights: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = dprandp(*command(run, weights, "--init-source", SAID))
    assert done.code == 0, done.err
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    described = json.loads((run / "model/config.json").read_text(encoding="utf-8"))["result"]
    for result in (done.json, described):
        assert (result["source"], result["init_sha256"], result["init_source"]) == ("init", digest, SAID)
    assert dprandp("report", "--run", run).code == 0
    for page in (run / "model/MODEL_CARD.md", run / "report.html"):
        text = page.read_text(encoding="utf-8")
        assert digest in text
        assert SAID in text
    # the released network began at these weights: one noisy step is not far, a draw of its own would be
    before, after = load_file(weights), load_file(run / "model/model.safetensors")
    gap = (after["extractor.stem.weight"] - before["stem.weight"]).norm() / before["stem.weight"].norm()
    assert 0 < gap < 0.7


def test_weights_that_nobody_declared_public_are_refused(dprandp: Dprandp, weights: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    refused(dprandp(*command(run, weights)), 2, "--init needs --init-source", "--init-source")
    assert not list(run.rglob("privacy"))
    alone = [word for word in command(run, weights, "--init-source", SAID) if word not in ("--init", weights)]
    refused(dprandp(*alone, "--from", "scratch"), 2, "--init-source was given without --init", "--init FILE")
