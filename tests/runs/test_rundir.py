"""The run directory: skip, resume, refuse, overwrite; staleness."""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dprandp import __version__
from dprandp.errors import CheckpointError, InputError, UsageError
from dprandp.runs import directory
from dprandp.runs.directory import RunDir
from dprandp.runs.files import atomic_write
from dprandp.runs.results import GenerateResult, ProbeResult

CONFIG = {"steps": 10, "lr": 0.1, "epsilon": math.inf, "device": "cpu"}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    run = RunDir.open(tmp_path / "x", create=True)
    with run.lock():
        yield run


def complete(
    run: RunDir, stage: str, content: str = "made", inputs: dict[str, str] | None = None, **flags: bool
) -> None:
    """Run a stage that writes one file."""
    begun = run.begin(stage, CONFIG, inputs or {}, **flags)
    assert begun.action in ("fresh", "resume")
    (begun.directory / "out.bin").write_text(content)
    run.finish(stage, run.hash_outputs(stage, ["out.bin"]), {"loss": 1.5, "epsilon": math.inf})


def states(run: RunDir) -> dict[str, str]:
    return {row.stage: row.state for row in run.status()}


def test_fresh_partial_done_skip(run: RunDir) -> None:
    assert set(states(run).values()) == {"missing"}
    begun = run.begin("generate", CONFIG, {"seed": "7"})
    assert begun.action == "fresh"
    assert begun.directory == run.path / "1-generate"
    assert tomllib.loads((begun.directory / "config.toml").read_text()) == CONFIG
    assert states(run)["generate"] == "partial"
    (begun.directory / "half").write_text("kept")

    begun = run.begin("generate", CONFIG, {"seed": "7"})
    assert begun.action == "resume"
    assert begun.config == CONFIG
    assert (begun.directory / "half").read_text() == "kept"

    made = GenerateResult(process="perlin", count=3, resolution=8, images_per_second=math.inf, seconds=0.5)
    run.finish("generate", {}, made)
    assert states(run)["generate"] == "done"
    assert run.result(GenerateResult) == made
    assert run.result(ProbeResult) is None
    for flags in ({}, {"resume": True}):
        assert run.begin("generate", CONFIG, {"seed": "7"}, **flags).action == "skip"
    environment = json.loads((run.path / "env.json").read_text())
    assert set(environment) == {"python", "torch", "platform", "cpu_count", "device"}


def test_run_json_is_what_other_programs_expect(run: RunDir) -> None:
    complete(run, "generate", inputs={"seed": "7"})
    document = json.loads((run.path / "run.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert (document["format"], document["dprandp"]) == (1, __version__)
    record = document["stages"]["generate"]
    assert set(record) == {"state", "config", "inputs", "outputs", "result", "started", "finished"}
    assert record["state"] == "done"
    assert record["config"]["epsilon"] == "inf"
    assert record["started"].endswith("+00:00")
    assert re.fullmatch("[0-9a-f]{64}", record["outputs"]["out.bin"])


@pytest.mark.parametrize("done", [False, True])
def test_changed_configuration_is_refused_by_name_with_both_ways_out(run: RunDir, done: bool) -> None:
    run.begin("generate", CONFIG, {})
    if done:
        run.finish("generate", {}, {})
    before = (run.path / "run.json").read_bytes()
    changed = {"steps": 20, "lr": 0.1, "epsilon": 1.0, "momentum": 0.9, "device": "cuda"}
    with pytest.raises(UsageError) as caught:
        run.begin("generate", changed, {})
    problem = caught.value.problem
    assert "steps was 10, is now 20" in problem
    assert 'epsilon was "inf", is now 1.0' in problem
    assert "momentum was unset, is now 0.9" in problem
    assert "lr" not in problem
    assert "device" not in problem
    assert "--resume" in caught.value.fix
    assert "--overwrite" in caught.value.fix
    assert (run.path / "run.json").read_bytes() == before

    kept = run.begin("generate", changed, {}, resume=True)
    assert kept.action == ("skip" if done else "resume")
    assert kept.config == CONFIG | {"device": "cuda"}  # the device never changes the result: the present one counts

    fresh = run.begin("generate", changed, {}, overwrite=True)
    assert (fresh.action, fresh.config) == ("fresh", changed)
    assert tomllib.loads((fresh.directory / "config.toml").read_text()) == changed


def test_settings_are_compared_after_json(run: RunDir) -> None:
    run.begin("generate", {"sizes": (1, 2), "none": None, "nan": math.nan}, {})
    assert run.begin("generate", {"sizes": [1, 2], "nan": math.nan}, {}).action == "resume"


def test_ignore_is_the_callers_choice(run: RunDir) -> None:
    run.begin("generate", {"device": "cpu", "note": 1}, {}, ignore=("note",))
    assert run.begin("generate", {"device": "cpu", "note": 2}, {}, ignore=("note",)).config["note"] == 2
    with pytest.raises(UsageError, match="device was"):
        run.begin("generate", {"device": "cuda", "note": 1}, {}, ignore=("note",))


@pytest.mark.parametrize("resume", [False, True])
def test_changed_inputs_are_refused_even_with_resume(run: RunDir, resume: bool) -> None:
    run.begin("pretrain", CONFIG, {"generate/manifest.json": "a", "code": "c"})
    with pytest.raises(UsageError, match=r"generate/manifest\.json changed") as caught:
        run.begin("pretrain", CONFIG, {"generate/manifest.json": "b", "code": "c"}, resume=resume)
    assert "--resume" not in caught.value.fix
    assert "--overwrite" in caught.value.fix


def test_private_inputs_are_compared_and_stay_private(run: RunDir) -> None:
    secret = "5ecret" * 10
    run.begin("probe", CONFIG, {}, private_inputs={"data": secret})
    assert run.begin("probe", CONFIG, {}, private_inputs={"data": secret}).action == "resume"
    with pytest.raises(UsageError, match="data changed") as caught:
        run.begin("probe", CONFIG, {}, private_inputs={"data": "other"}, resume=True)
    assert secret not in str(caught.value)
    holders = [p for p in run.path.rglob("*") if p.is_file() and secret in p.read_text()]
    assert holders == [run.path / "private" / "inputs-probe.json"]
    holders[0].unlink()
    with pytest.raises(CheckpointError, match=r"inputs-probe\.json"):
        run.begin("probe", CONFIG, {}, private_inputs={"data": secret})


def test_overwrite_empties_the_stage_and_nothing_else(run: RunDir) -> None:
    complete(run, "generate")
    complete(run, "pretrain", inputs=run.inputs_from("generate"))
    for folder in (run.privacy_dir, run.private_dir, run.model_dir):
        (folder / "ledger.jsonl").write_text("spent")
    begun = run.begin("pretrain", CONFIG, run.inputs_from("generate"), overwrite=True)
    assert os.listdir(begun.directory) == ["config.toml"]
    assert (run.path / "1-generate" / "out.bin").exists()
    for folder in (run.privacy_dir, run.private_dir, run.model_dir):
        assert (folder / "ledger.jsonl").read_text() == "spent"
    assert not list(run.path.glob(".trash*"))
    with pytest.raises(UsageError, match="exclude each other"):
        run.begin("pretrain", CONFIG, {}, overwrite=True, resume=True)


def test_overwrite_interrupted_in_the_deletion_leaves_no_half_emptied_stage(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old checkpoints that a half-done deletion left must not be resumed under the new configuration."""
    complete(run, "generate")

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.begin("generate", {"steps": 1}, {}, overwrite=True)
    monkeypatch.undo()
    assert not run.stage_dir("generate").exists()
    assert states(run)["generate"] == "stale"
    assert run.begin("generate", {"steps": 1}, {}, overwrite=True).action == "fresh"
    assert not list(run.path.glob(".trash*"))


def test_later_stages_become_stale_and_fresh_again(run: RunDir) -> None:
    def found() -> tuple[str, ...]:
        return tuple(states(run)[stage] for stage in ("generate", "pretrain", "probe"))

    complete(run, "generate", "a")
    complete(run, "pretrain", inputs=run.inputs_from("generate"))
    complete(run, "probe", inputs=run.inputs_from("pretrain") | {"data": "digits"})
    assert found() == ("done", "done", "done")
    run.begin("generate", CONFIG, {}, overwrite=True)
    assert found() == ("partial", "stale", "stale")
    assert json.loads((run.path / "run.json").read_text())["stages"]["probe"]["state"] == "stale"

    (run.stage_dir("generate") / "out.bin").write_text("b")
    run.finish("generate", run.hash_outputs("generate", ["out.bin"]), {})
    assert states(run)["pretrain"] == "stale"
    with pytest.raises(UsageError, match=r"generate/out\.bin changed"):
        run.begin("pretrain", CONFIG, run.inputs_from("generate"))
    with pytest.raises(UsageError, match="stale"):
        run.begin("probe", CONFIG, run.inputs_from("pretrain") | {"data": "digits"})
    with pytest.raises(InputError, match=r"another generate/out\.bin") as caught:
        run.require("pretrain", "finetune")
    assert "dprandp pretrain --run" in caught.value.fix
    assert "--overwrite" in caught.value.fix

    complete(run, "generate", "a", overwrite=True)  # the same bytes again
    assert found() == ("done", "done", "done")
    assert run.begin("probe", CONFIG, run.inputs_from("pretrain") | {"data": "digits"}).action == "skip"


def test_what_was_made_before_the_extractor_was_continued_is_stale(run: RunDir) -> None:
    complete(run, "generate")
    complete(run, "pretrain", inputs=run.inputs_from("generate"))
    complete(run, "probe", inputs=run.inputs_from("pretrain") | {"data": "digits"})
    assert states(run)["probe"] == "done"
    run.begin("continue", CONFIG, run.inputs_from("pretrain"))
    assert (states(run)["pretrain"], states(run)["continue"], states(run)["probe"]) == ("done", "partial", "stale")
    run.finish("continue", {}, {})
    with pytest.raises(InputError, match="continued since"):
        run.require("probe", "finetune")


def test_a_vanished_output_makes_a_stage_stale(run: RunDir) -> None:
    complete(run, "generate")
    (run.stage_dir("generate") / "out.bin").unlink()
    assert states(run)["generate"] == "stale"
    with pytest.raises(UsageError, match=r"out\.bin is missing"):
        run.begin("generate", CONFIG, {})


def test_require_names_the_command(run: RunDir) -> None:
    with pytest.raises(InputError, match="does not have") as caught:
        run.require("generate", "pretrain")
    assert caught.value.fix == f"run: dprandp generate --run {run.path}"
    run.begin("generate", CONFIG, {})
    with pytest.raises(InputError, match="not finished") as caught:
        run.require("generate", "pretrain")
    assert caught.value.fix == f"run: dprandp generate --run {run.path} --resume"
    run.finish("generate", {}, {})
    run.require("generate", "pretrain")
    with pytest.raises(UsageError, match="did you mean 'generate'"):
        run.require("genrate", "pretrain")


def test_files_of_unknown_origin_are_not_mixed_with_ours(run: RunDir) -> None:
    run.stage_dir("generate").mkdir()
    (run.stage_dir("generate") / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="has no record of stage 'generate'"):
        run.begin("generate", CONFIG, {})
    assert (run.stage_dir("generate") / "thesis.tex").exists()


def test_the_private_folder_is_closed_to_others(run: RunDir) -> None:
    assert run.private_dir.stat().st_mode & 0o777 == 0o700
    run.private_dir.chmod(0o755)
    assert run.private_dir.stat().st_mode & 0o777 == 0o700


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no run at") as caught:
        RunDir.open(tmp_path / "my run", create=False)
    assert f"'{tmp_path}/my run'" in caught.value.fix  # quoted for the shell
    assert not (tmp_path / "my run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        RunDir.open(tmp_path / "file", create=True)
    with pytest.raises(UsageError, match=r"not a run directory: it has no run\.json, but holds 'file'"):
        RunDir.open(tmp_path, create=True)


def test_reading_creates_nothing(tmp_path: Path) -> None:
    RunDir.open(tmp_path / "x", create=True)
    reader = RunDir.open(tmp_path / "x", create=False)
    reader.status()
    assert (reader.privacy_dir, reader.private_dir) == (tmp_path / "x/privacy", tmp_path / "x/private")
    assert os.listdir(tmp_path / "x") == []


PARTIAL = '{"format": 1, "stages": {"probe": {"state": "partial", "outputs": {}, "result": {}, "finished": null, %s}}}'


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "[" * 100_000, '{"format": 1}', '{"format": true, "stages": {}}',
        '{"format": 1, "stages": {"generate": {}}}', '{"format": 1, "stages": {"brew": {}}}',
        PARTIAL % '"config": [], "inputs": {}, "started": ""',
        PARTIAL % '"config": {}, "inputs": {"a": 1}, "started": ""',
    ],
)  # fmt: skip
def test_corrupt_run_json(run: RunDir, content: str) -> None:
    (run.path / "run.json").write_text(content)
    for call in (run.status, lambda: run.begin("generate", CONFIG, {}, overwrite=True)):
        with pytest.raises(CheckpointError, match=r"run\.json is corrupt"):
            call()
    assert (run.path / "run.json").read_text() == content


def test_run_json_of_a_newer_version(run: RunDir) -> None:
    (run.path / "run.json").write_text('{"format": 2, "dprandp": "9.1", "stages": "unheard of"}')
    with pytest.raises(CheckpointError, match=r"format 2, written by dprandp 9\.1.*reads up to format 1"):
        run.status()


def test_begin_and_finish_need_the_lock(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "x", create=True)
    for call in (lambda: run.begin("generate", {}, {}), lambda: run.finish("generate", {}, {})):
        with pytest.raises(RuntimeError, match="lock"):
            call()


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_kept_file_is_the_old_one_or_the_new_one_after_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Wherever it was; and a file that is neither is refused."""
    run = RunDir.open(tmp_path / "run", create=True)
    with run.lock():
        run.write_kept("a", b"old")
        writes = iter(range(1, 9))

        def write(path: Path, content: bytes | str) -> None:
            if next(writes) == stop:
                raise KeyboardInterrupt
            atomic_write(path, content)

        monkeypatch.setattr(directory, "atomic_write", write)
        with pytest.raises(KeyboardInterrupt):
            run.write_kept("a", b"new")
        monkeypatch.undo()
        assert run.read_kept("a") == (b"old" if stop < 3 else b"new")
        run.write_kept("a", b"newer")
    assert run.read_kept("a") == b"newer"
    assert run.read_kept("b") is None
    (run.private_dir / "a").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="not the file that this run wrote"):
        run.read_kept("a")
    (run.private_dir / "a").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        run.read_kept("a")
