"""``finetune --init FILE --init-source TEXT`` as a command: public weights, and whose word it is that they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from cli_process import Dprandp, good
from safetensors.torch import load_file, save_file

from dprandp.models.wrn import WideResNet

SAID = "drawn in a test, from no data at all"


@pytest.mark.slow
def test_hash_and_declaration_stand_in_everything_that_is_published(dprandp: Dprandp, tmp_path: Path) -> None:
    weights, run = tmp_path / "public.safetensors", tmp_path / "run"
    save_file(WideResNet(10, 1, generator=torch.Generator().manual_seed(5)).state_dict(), weights)
    command = ("finetune", "--run", run, "--arch", "wrn-10-1", "--steps", 1, "--batch-size", 8, "--eps", 4, "--json")
    result = good(dprandp(*command, "--data", "npz:tiny.npz", "--init", weights, "--init-source", SAID))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    described = json.loads((run / "model/config.json").read_text(encoding="utf-8"))["result"]
    for said in (result, described):
        assert (said["source"], said["init_sha256"], said["init_source"]) == ("init", digest, SAID)
    assert dprandp("report", "--run", run).code == 0
    for page in (run / "model/MODEL_CARD.md", run / "report.html"):
        text = page.read_text(encoding="utf-8")
        assert digest in text
        assert SAID in text
    # the released network began at these weights: one noisy step is not far, a draw of its own would be
    before, after = load_file(weights), load_file(run / "model/model.safetensors")
    gap = (after["extractor.stem.weight"] - before["stem.weight"]).norm() / before["stem.weight"].norm()
    assert 0 < gap < 0.7
