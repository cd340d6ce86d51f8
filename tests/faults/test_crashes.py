"""Promises 10 and 11: kill -9 anywhere in a private stage; whatever was used is charged, and nothing is used twice."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_process import refused
from safetensors.torch import load_file
from tiny_run import ledger_of, plans_of, write_blobs
from victims import KILLED, RECORD, STEPS, Victim

from dprandp.config.schema import STAGE_CONFIGS
from dprandp.privacy.accounting import compose


def slow(*values: object) -> list:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def kill_and_resume(made: Victim, fault: str) -> dict[str, Any]:
    done = made.command(fault=fault)
    assert done.code == KILLED, f"{fault}: the fault point was not passed so often\n{done.err}"
    made.assert_charged()
    return made.assert_finished(made.command())


# Files are written in this order: hashes of the inputs, run.json, configuration, hashes of the data, plan, heads of the
# ledger, (whitener), (features), metrics, then five a checkpoint.
# One of each kind is fast; the slow tests of test_kills.py take every hit of every point.
PROBE_FAULTS = [
    "ledger-appended:7", "update-applied:16", "temp-written:4", "pointer-moved:8",
    *slow("ledger-fsynced:16", "update-applied:1", "renamed:19"),
]  # fmt: skip
FINETUNE_FAULTS = [
    "ledger-fsynced:9", "update-applied:4", "renamed:14",
    *slow("ledger-appended:2", "temp-written:7", "pointer-moved:3"),
]  # fmt: skip


@pytest.mark.parametrize("fault", PROBE_FAULTS)
def test_10_probe_killed(victim: Callable[..., Victim], fault: str) -> None:
    kill_and_resume(victim("probe"), fault)


@pytest.mark.parametrize("fault", FINETUNE_FAULTS)
def test_10_finetune_killed(victim: Callable[..., Victim], fault: str) -> None:
    kill_and_resume(victim("finetune"), fault)


@pytest.mark.parametrize(("stage", "fault"), [("probe", "ledger-fsynced:6"), ("finetune", "update-applied:3")])
def test_10_no_batch_is_drawn_again(victim: Callable[..., Victim], stage: str, fault: str) -> None:
    made = victim(stage, "poisson.toml")
    kill_and_resume(made, fault)
    batches = [draw for draw in made.seen("draw") if draw["rate"] < 1]
    # one charged step was never used: either its batch was not drawn (killed before) or it was drawn and not saved
    assert len(batches) == STEPS[stage] - fault.startswith("ledger")
    assert len({tuple(draw["indices"]) for draw in batches}) == len(batches) > 3


def test_10_lost_steps_are_counted_and_disclosed(victim: Callable[..., Victim]) -> None:
    """Checkpoints are at every second step of sixteen: killed in the middle of step 8 (the eighth), 1 or 2 are lost."""
    made = victim("probe")
    assert made.command(fault="update-applied:8").code == KILLED
    assert (made.charged()["probe"], made.used()["probe"]) == (8, 8)
    result = made.assert_finished(made.command())
    assert (result["charged_steps"], result["lost_steps"]) == (16, 2)  # steps 7 and 8; the checkpoint holds 6
    assert made.used()["probe"] == 16
    card = (made.run / "model/MODEL_CARD.md").read_text(encoding="utf-8")
    assert "2 of these were lost in interruptions" in card


def test_10_killed_again_and_again(victim: Callable[..., Victim]) -> None:
    """Even a run that dies at every third step ends, with the ε it promised and fewer updates."""
    made = victim("probe")
    deaths = 0
    while (done := made.command(fault="update-applied:3")).code == KILLED:
        made.assert_charged()
        deaths += 1
        assert deaths < 10
    result = made.assert_finished(done)
    assert deaths == 5  # of three charged steps each; the sixteenth is made alone
    assert result["lost_steps"] == 5
    assert result["epsilon"] <= 1.2 + 1e-9


def test_10_a_ledger_line_torn_by_a_power_cut(victim: Callable[..., Victim]) -> None:
    """A line that was not whole on disk belongs to a charge that never returned; it is repaired, and aloud."""
    made = victim("probe")
    assert made.command(fault="ledger-fsynced:9").code == KILLED
    ledger = made.run / "privacy/ledger.jsonl"
    whole = ledger.read_bytes()
    ledger.write_bytes(whole[:-25])
    done = made.command()
    assert "cut off while it was written" in done.err
    made.assert_finished(done)


def test_10_a_ledger_older_than_its_checkpoint_is_refused(victim: Callable[..., Victim]) -> None:
    """Restored from a copy, the ledger would forget what was charged since."""
    made = victim("probe")
    assert made.command(fault="update-applied:2").code == KILLED
    old = (made.run / "privacy/ledger.jsonl").read_bytes()
    assert made.command(fault="update-applied:9").code == KILLED
    (made.run / "privacy/ledger.jsonl").write_bytes(old)
    refused(made.command(), 4, "lacks lines that this run has written")


@pytest.mark.parametrize("stage", ["probe", *slow("finetune")])
def test_11_changed_settings_or_data_are_refused(victim: Callable[..., Victim], stage: str, tmp_path: Path) -> None:
    made = victim(stage)
    assert made.command(fault="update-applied:3").code == KILLED
    before, used = made.charged(), made.used()
    refused(made.command("--steps", 17), 2, "steps was", "--resume", "--overwrite")
    refused(made.command("--clip", 2), 2, f"clip_norm was {STAGE_CONFIGS[stage].clip_norm}, is now 2.0")
    refused(made.command("--eps", 5), 5, "fixed at ε = 4")
    original = Path(made.work.data.removeprefix("npz:"))
    kept = original.read_bytes()
    try:
        write_blobs(original, seed=9)
        refused(made.command(), 3, "not those that this run began with", "new --run")
        refused(made.command("--resume"), 3, "not those that this run began with", "new --run")
    finally:
        original.write_bytes(kept)
    assert (made.charged(), made.used()) == (before, used)
    made.assert_finished(made.command("--resume", "--steps", 17))  # the recorded settings, not the new ones


@pytest.mark.parametrize("stage", ["finetune", *slow("probe")])
def test_11_sigterm_then_the_same_command(victim: Callable[..., Victim], stage: str) -> None:
    made = victim(stage)
    running = made.start(pause=0.05)
    running.wait_until(lambda: len(made.seen("release")) >= 3)
    running.signal(signal.SIGTERM)
    done = running.end()
    made.count_updates(done)
    assert done.code == 143, done.err
    made.assert_charged()
    assert sum(made.used().values()) < sum(STEPS[name] for name in STEPS if name.startswith(stage))
    result = made.assert_finished(made.command())
    assert result["lost_steps"] == 0  # saved before it stopped


def test_10_overwrite_after_a_kill_pays_again(victim: Callable[..., Victim]) -> None:
    """Started afresh, the stage is a new attempt on top of what was charged; the old steps stay charged."""
    made = victim("probe")
    assert made.command(fault="update-applied:5").code == KILLED
    done = made.command("--overwrite", "--share", 0.2)
    assert done.code == 0, done.err
    made.assert_charged()
    made.assert_nothing_repeated()
    ledger, result = ledger_of(made.run), done.json
    assert (ledger.charged_steps("probe", 1), ledger.charged_steps("probe", 2)) == (5, 16)
    assert result["epsilon"] == ledger.spent(result["delta"]).upper > ledger.spent(1e-5).lower * 0.99
    assert result["epsilon"] > compose([c.event for c in ledger.charges if c.attempt == 2], result["delta"]).upper
    assert result["lost_steps"] == 0


@pytest.mark.parametrize("hit", [3, *slow(1, 2)])
def test_10_an_overwrite_killed_before_its_plan_is_fixed(victim: Callable[..., Victim], hit: int) -> None:
    """Then the old plan, spent to the last step, must not be taken for the new attempt's: it would train nothing."""
    made = victim("probe")
    assert made.command().code == 0
    assert made.command("--overwrite", fault=f"renamed:{hit}").code == KILLED
    done = made.command("--overwrite") if hit == 1 else made.command()
    assert done.code == 0, done.err
    made.assert_charged()
    assert done.json["lost_steps"] == 0
    assert bool(load_file(made.run / "model/model.safetensors")["head"].any())


def test_10_a_plan_that_was_not_fixed_is_not_mixed_with_other_settings(victim: Callable[..., Victim]) -> None:
    """Killed between run.json and plan.json, resumed with --resume and another clip norm: noise has to fit the clip."""
    made = victim("finetune")
    assert made.command("--clip", 2, fault="renamed:3").code == KILLED  # run.json and config.toml say 2
    assert "finetune" not in plans_of(made.run)
    clips = "from dprandp.dpsgd import clipped_sums\nhonest = clipped_sums.sum_of_clipped\n"
    clips += "def recorded(rows, parameters, clip_norm, **how):\n"
    clips += "    write(kind='clip', clip_norm=clip_norm)\n    return honest(rows, parameters, clip_norm, **how)\n"
    clips += "clipped_sums.sum_of_clipped = recorded\n"
    done = made.dprandp(*made.arguments("--resume", "--clip", 1), before=RECORD + clips, **made.environment("", 0))
    assert done.code == 0, done.err
    used = {line["clip_norm"] for line in made.seen("clip")}
    assert used == {plans_of(made.run)["finetune"]["plan"]["clip_norm"]}
