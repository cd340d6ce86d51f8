"""A network of torchvision from public weights to a private model, and a user's own network, as commands."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from cli_process import Dprandp, arrays, good, refused
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

SAID = "drawn in a test, from no data at all"
RESNET = ("--arch", "torchvision:resnet18")

NET = """
from pathlib import Path
from torch import nn

Path("has-run").touch()

def small():
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
"""


def public(path: Path) -> Path:
    """A resnet18 with GroupNorm and random weights, under torchvision's names."""
    torch.manual_seed(7)
    network = models.resnet18(norm_layer=lambda width: nn.GroupNorm(32, width))
    save_file(network.state_dict(), path)
    return path


@pytest.mark.slow
def test_from_public_weights_to_a_private_model(dprandp: Dprandp, tmp_path: Path) -> None:
    weights, run = public(tmp_path / "public.safetensors"), tmp_path / "run"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()

    def do(*command: object) -> dict:
        return good(dprandp(*command, "--run", run, "--json"))

    small = ("--config", "small.toml", "--precision", "float32")  # as a graph computes
    do("generate", *small[:2], "--workers", 1)
    made = do("pretrain", *small, *RESNET, "--init", weights, "--init-source", SAID)
    assert (made["feature_dim"], made["init_file"], made["init_sha256"]) == (512, weights.name, digest)
    probed = do("probe", *small, "--data", "npz:tiny.npz", "--eps", 8)
    tuned = do("finetune", *small, "--train", "last:1", "--batch-size", 8)
    replaced = "20 BatchNorm2d (bn1, layer1.0.bn1, layer1.0.bn2 and 17 more) by GroupNorm"
    assert probed["replaced"] == tuned["replaced"] == replaced
    assert tuned["trained_weights"].startswith("the last 1 of 9 blocks")
    assert 0 < probed["epsilon"] < tuned["epsilon"] <= 8

    # the model: everything below the last block is the file's, to the byte
    before, after = load_file(weights), load_file(run / "model/model.safetensors")
    for name, value in before.items():
        if not name.startswith("fc."):
            same = torch.equal(value.view(torch.int32), after[f"extractor.network.{name}"].view(torch.int32))
            assert same != name.startswith("layer4.1."), name

    # what is published says what was public, what was replaced and what was trained
    do("report")
    for page in (run / "model/MODEL_CARD.md", run / "report.html"):
        text = page.read_text(encoding="utf-8").replace("\\", "")
        for said in (digest, weights.name, SAID, replaced, "the last 1 of 9 blocks"):
            assert said in text, (page.name, said)
        assert str(tmp_path) not in text
    assert str(tmp_path) not in (run / "model/config.json").read_text(encoding="utf-8")
    assert all(check["state"] == "ok" for check in do("verify")["checks"])

    # used: by predict, and as graphs by torch and onnxruntime alone
    pixels = arrays()["x_test"][:5]
    for place, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{place}.png")
    rows = do("predict", *(tmp_path / f"{place}.png" for place in range(5)))["predictions"]
    expected = np.array([list(row["probabilities"].values()) for row in rows])
    for format, suffix in (("torch-export", "pt2"), ("onnx", "onnx")):
        out = tmp_path / f"model.{suffix}"
        assert do("export", "--format", format, "--out", out)["largest_difference"] < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert np.abs(session.run(None, {"pixels": pixels[..., None]})[0] - expected).max() < 1e-4
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert np.abs(program(torch.from_numpy(pixels[..., None])).numpy() - expected).max() < 1e-4


def test_wrong_weights_are_refused_in_one_line(dprandp: Dprandp, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({f"module.{name}": value for name, value in models.resnet18().state_dict().items()}, path)
    command = ("finetune", "--run", tmp_path / "run", *RESNET, "--data", "npz:tiny.npz", "--init", path)
    done = dprandp(*command, "--init-source", SAID)
    refused(done, 4, "60 missing (bn1.bias, bn1.weight, conv1.weight, ...); 102 unexpected (module.bn1.bias, ")
    assert len(done.err) < 1500
    assert not (tmp_path / "run/privacy/ledger.jsonl").exists()
    small = ("finetune", "--run", tmp_path / "other", "--from", "scratch", "--data", "npz:tiny.npz", "--plan")
    refused(dprandp(*small, "--arch", "torchvision:alexnet"), 2, "cannot see images of 32 × 32 pixels", "--input-size")


@pytest.mark.slow
def test_a_users_code_runs_only_with_the_flag(dprandp: Dprandp, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "net.py").write_text(NET, encoding="utf-8")
    run, ran = tmp_path / "run", tmp_path / "has-run"
    command = ("finetune", "--run", run, "--from", "scratch", "--arch", "module:net.py:small", "--eps", 8,
               "--data", f"npz:{folder}/tiny.npz", "--steps", 2, "--batch-size", 8)  # fmt: skip
    for more in ((), ("--plan",)):
        refused(dprandp(*command, *more, folder=tmp_path), 2, "it can do whatever you can", "--trust-code")
    assert not ran.exists()
    assert dprandp(*command, "--trust-code", "--plan", folder=tmp_path).code == 0
    result = good(dprandp(*command, "--trust-code", "--json", folder=tmp_path))
    assert (result["arch"], result["replaced"]) == ("module:net.py:small", "1 BatchNorm2d (1) by GroupNorm")
    again = dprandp(*command, "--trust-code", "--json", "--plan", folder=tmp_path)
    assert good(again)["action"] == "skip"
    assert dprandp("report", "--run", run, folder=tmp_path).code == 0
    assert re.search(r"dprandp finetune .*--trust-code", (run / "report.html").read_text(encoding="utf-8"))
    # from Python the same: not without saying so
    ran.unlink()
    load = f"import dprandp; dprandp.load_model({str(run)!r}, trust_code=%s)"
    for trusted in (False, True):
        python = [sys.executable, "-c", load % trusted]
        done = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode == 0, ran.exists()) == (trusted, trusted), done.stderr
        assert trusted or "in Python: trust_code=True" in done.stderr
    # the model holds no code either: whoever uses it has to have the file, and to trust it
    ran.unlink()
    Image.fromarray(arrays()["x_test"][0]).save(tmp_path / "scan.png")
    predict = ("predict", "scan.png", "--run", run, "--json")
    refused(dprandp(*predict, folder=tmp_path), 2, "--trust-code")
    assert not ran.exists()
    assert len(good(dprandp(*predict, "--trust-code", folder=tmp_path))["predictions"]) == 1
    assert all(check["state"] == "ok" for check in good(
        dprandp("verify", "--run", run, "--trust-code", "--json", folder=tmp_path))["checks"])  # fmt: skip
    # a run of somebody else cannot bring code along: the flag is not remembered, and changed code does not run
    (tmp_path / "net.py").write_text(NET + "# changed\n", encoding="utf-8")
    ran.unlink()
    refused(dprandp(*predict, "--trust-code", folder=tmp_path), 3, "its sha256 differs")
    assert not ran.exists()
    stored = json.loads((run / "run.json").read_text(encoding="utf-8"))["stages"]["finetune"]["config"]
    assert stored["code"] == hashlib.sha256(NET.encode()).hexdigest()


LATE = """
import torch
from torch import nn

class Late(nn.Module):
    \"\"\"Keeps a statistic of its images, once it has computed often enough not to be found by a trial.\"\"\"

    def __init__(self):
        super().__init__()
        self.body, self.calls = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(4), nn.Flatten()), 0
        self.keep = KEEP

    def forward(self, images):
        self.calls += 1
        if self.calls > LATER:
            CHANGE(images.detach().mean().reshape(1))
        return self.body(images)
"""


def test_what_a_users_network_keeps_of_its_images_is_not_released(
    dprandp: Dprandp, tmp_path: Path, folder: Path
) -> None:
    """Neither in a buffer nor in a parameter that is not trained."""
    for name, later in (("late", 20), ("later", 20), ("never", 10**9)):
        kind, change = "nn.Buffer", "self.keep = "
        if name == "later":  # and has no gradients: with them vmap refuses to change a tensor in place
            kind, change = "nn.Parameter", "torch.is_grad_enabled() or self.keep.data.copy_"
        source = LATE.replace("LATER", str(later)).replace("KEEP", f"{kind}(torch.zeros(1))").replace("CHANGE", change)
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        command = ("finetune", "--run", tmp_path / name, "--from", "scratch", "--arch", f"module:{name}.py:Late",
                   "--eps", 8, "--data", f"npz:{folder}/tiny.npz", "--steps", 2, "--batch-size", 40, "--trust-code",
                   "--train", "head")
        done = dprandp(*command, folder=tmp_path)  # fmt: skip
        if name == "never":
            assert done.code == 0, done.err
            assert "module:never.py:Late" in (tmp_path / name / "model/MODEL_CARD.md").read_text().replace("\\", "")
        else:
            refused(done, 2, "has changed its state", "extractor.network.keep", "what was spent stays spent")
            assert not (tmp_path / name / "model/model.safetensors").exists()
