"""Commands as they are started, on either kind of processor: the bare chain, one image, several ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_process import Dprandp
from PIL import Image
from rank_jobs import ranks_of

TINY = ["--config", "small.toml"]


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_whole_chain_and_one_image(dprandp: Dprandp, tmp_path: Path, processor: str, threads: int) -> None:
    """Every stage, then the prediction of a single image, which no other thread can take part in."""
    run = tmp_path / "run"
    Image.fromarray(np.full((12, 12), 200, np.uint8)).save(tmp_path / "one.png")
    machine = {"before": f"import torch; torch.set_num_threads({threads})", "DPRANDP_PRETEND_BFLOAT16": processor}
    for stage in ("generate", "pretrain", "probe", "finetune"):
        flags = ["--data", "npz:tiny.npz", "--eps", 2] if stage == "probe" else []
        done = dprandp(stage, "--run", run, *TINY, "--json", *flags, **machine)
        assert done.code == 0, done.err
    assert done.json["precision"] == {"1": "bfloat16", "0": "float32"}[processor]
    done = dprandp("predict", tmp_path / "one.png", "--run", run, "--json", **machine)
    assert done.code == 0, done.err


@pytest.mark.slow
def test_ranks(dprandp: Dprandp, tmp_path: Path, processor: str) -> None:
    """Each rank has one thread, as torchrun sets it."""
    run = tmp_path / "run"
    for stage in ("generate", "pretrain"):
        assert dprandp(stage, "--run", run, *TINY).code == 0
    flags = ["--run", run, *TINY, "--data", "npz:tiny.npz", "--eps", 2, "--json"]
    jobs = ranks_of(dprandp, 2, "probe", *flags, DPRANDP_PRETEND_BFLOAT16=processor)
    assert [done.code for done in jobs] == [0, 0], [done.err for done in jobs]
    assert json.loads(jobs[0].out)["precision"] == {"1": "bfloat16", "0": "float32"}[processor]


def test_precision_is_an_option_and_recorded(dprandp: Dprandp, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert dprandp("generate", "--run", run, *TINY).code == 0
    done = dprandp("pretrain", "--run", run, "--precision", "float16", "--json")
    assert done.code == 2
    assert "bfloat16" in done.err
    done = dprandp("pretrain", "--run", run, "--arch", "wrn-10-1", "--random-init", "--precision", "bfloat16", "--json")
    assert done.code == 0, done.err
    recorded = json.loads((run / "run.json").read_text(encoding="utf-8"))["stages"]["pretrain"]["config"]
    assert recorded["precision"] == done.json["precision"] == "bfloat16"


def test_status_check_computes(dprandp: Dprandp, tmp_path: Path, processor: str) -> None:
    done = dprandp("status", "--check", "--run", tmp_path / "run", "--json", DPRANDP_PRETEND_BFLOAT16=processor)
    check = next(check for check in done.json["checks"] if check["name"] == "arithmetic")
    assert check["state"] == "ok", check
    wrong = "from dprandp.inspection import check; check.NOISE_MULTIPLIER = 0.5"
    done = dprandp("status", "--check", "--run", tmp_path / "run", "--json", before=wrong)
    assert done.code == 1
    check = next(check for check in done.json["checks"] if check["name"] == "arithmetic")
    assert check["state"] == "fail"
    assert "noisy update" in check["found"]
