"""status --check: a whole run passes; each kind of damage is found, named, and gives its exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_process import Dprandp, state_of

from dprandp.inspection import Check, exit_code
from dprandp.inspection import check as examination
from dprandp.privacy.accounting import EpsilonBound
from dprandp.privacy.ledger import Ledger
from dprandp.runs import directory

RunAfter = Callable[[str], Path]


def test_a_whole_run(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path) -> None:
    run = run_after("finetune")
    before = state_of(run)
    done = dprandp("status", "--check", "--run", run, "--data-dir", tmp_path, "--json")
    assert done.code == 0, done.out
    checks = {check["name"]: check for check in done.json["checks"]}
    assert {
        "python", "libraries", "torch", "torchvision", "accelerator", "arithmetic", "disk", "writing", "data", "lock",
        "generate", "pretrain", "probe", "finetune", "ledger", "plan", "data record", "private", "model",
    } == set(checks)  # fmt: skip
    inside = ("lock", "generate", "pretrain", "probe", "finetune", "ledger", "plan", "private", "model", "torchvision")
    assert {name: checks[name]["state"] for name in inside} == dict.fromkeys(inside, "ok")
    assert done.json["exit_code"] == 0
    assert "digits" in checks["data"]["found"]
    assert "of 2 at δ = 1e-05" in checks["plan"]["found"]
    assert state_of(run) == before


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


# what happens to a run, the check that must see it, its state, the exit code, what is said
DAMAGES: dict[str, tuple[Callable[[Path], object], str, str, int, str]] = {
    "run.json": (lambda run: (run / "run.json").write_text("{"), "run.json", "fail", 4, "run.json is corrupt"),
    "shard": (lambda run: flipped(next((run / "1-generate").glob("*.npy"))), "generate", "fail", 4, "shard-0000"),
    "extractor": (lambda run: flipped(run / "2-pretrain/extractor.safetensors"), "pretrain", "fail", 4, "sha256"),
    "grey": (lambda run: flipped(run / "2-pretrain/grey/extractor.safetensors"), "pretrain", "fail", 4, "sha256"),
    "no head": (lambda run: (run / "3-probe/head.safetensors").unlink(), "probe", "fail", 4, "head.safetensors is"),
    "ledger": (lambda run: flipped(run / "privacy/ledger.jsonl"), "ledger", "fail", 4, "cannot be trusted"),
    "no ledger": (lambda run: (run / "privacy/ledger.jsonl").unlink(), "ledger", "fail", 4, "is missing"),
    "no plan": (lambda run: (run / "privacy/plan.json").unlink(), "ledger", "fail", 4, "plan.json is missing"),
    "plan": (lambda run: (run / "privacy/plan.json").write_text("[]"), "plan", "fail", 4, "plan.json is damaged"),
    "model": (lambda run: flipped(run / "model/model.safetensors"), "model", "fail", 4, "not the file that was"),
    "open": (lambda run: (run / "private").chmod(0o755), "private", "warn", 0, "mode 755"),
    "leftover": (
        lambda run: (run / "model/.model.0123abcd.partial.json").touch(), "leftovers", "warn", 0, "1 temporary files"
    ),
}  # fmt: skip


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the arithmetic of this machine."""
    monkeypatch.setattr(examination, "_arithmetic", lambda device: Check("arithmetic", "ok", ""))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(run_after: RunAfter, tmp_path: Path, name: str) -> None:
    damage, check, state, code, said = DAMAGES[name]
    run = run_after("finetune")
    damage(run)
    before = state_of(run)
    checks = examination.examine(run, tmp_path)
    assert [made.state for made in checks if made.name == check and said in made.found] == [state]
    assert exit_code(checks) == code
    assert state_of(run) == before


@pytest.mark.usefixtures("quick")
def test_overspent_budget_is_found(run_after: RunAfter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No command spends that much; so the spending is made up."""
    run = run_after("finetune")
    monkeypatch.setattr(Ledger, "spent", lambda ledger, delta: EpsilonBound(2.5, 2.5, 2.5, delta, "made up"))
    checks = examination.examine(run, tmp_path)
    assert [(check.name, check.found[:4]) for check in checks if check.state == "fail"] == [("plan", "ε = ")]
    assert exit_code(checks) == 5


@pytest.mark.usefixtures("quick")
def test_unfinished_and_stale_stages_are_no_failures(run_after: RunAfter, tmp_path: Path) -> None:
    run = run_after("finetune")
    document = json.loads((run / "run.json").read_text())
    document["stages"]["finetune"] |= {"state": "partial", "outputs": {}, "finished": None}
    document["stages"]["probe"]["inputs"]["generate/manifest.json"] = "0" * 64
    (run / "run.json").write_text(json.dumps(document))
    found = {check.name: check for check in examination.examine(run, tmp_path)}
    assert (found["finetune"].state, found["finetune"].found[:5]) == ("warn", "begun")
    assert (found["probe"].state, found["probe"].found[:5]) == ("warn", "stale")


def test_a_run_in_use(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path) -> None:
    run = run_after("probe")
    held = directory.acquire(run / ".lock", run)
    done = dprandp("status", "--check", "--run", run, "--data-dir", tmp_path)
    directory.release(held)
    assert done.code == 0
    assert "warn  lock          another dprandp process" in done.out
    (run / "1-generate/manifest.json").unlink()
    done = dprandp("status", "--check", "--run", run, "--data-dir", tmp_path)
    assert (done.code, done.err) == (4, "")
    assert "fail  generate" in done.out


@pytest.mark.usefixtures("quick")
def test_no_run_yet_and_no_place_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = examination.examine(tmp_path / "deep" / "new", tmp_path)
    assert exit_code(checks) == 0
    assert checks[-1].found.endswith("does not exist yet")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert exit_code(examination.examine(tmp_path / "file" / "x", tmp_path)) == 6
    monkeypatch.setattr(examination.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1e8}))
    assert exit_code(examination.examine(tmp_path / "new", tmp_path)) == 6
    monkeypatch.setattr(examination, "LIBRARIES", (*examination.LIBRARIES, "no-such-library"))
    checks = examination.examine(tmp_path / "new", tmp_path)
    assert exit_code(checks) == 3
    assert "missing: no-such-library" in examination.lines(checks)
