"""The benchmark as a whole at sizes of no meaning: what it finds, what it refuses, what it says aloud."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from benchmark import bounds, curves, finetuning, memory, pairs, peer_stylegan, probe, registry, suite, table
from benchmark.cases import Case, Comparison, Figure, Limit, Side
from benchmark.peer_jax import JAX
from benchmark.peer_opacus import GHOST, HOOKS
from benchmark.timing import spread

from dprandp.errors import BenchmarkError, UsageError
from dprandp.synth import stylegan


def silent(text: str) -> None:
    pass


def figure(ratio: float, **values) -> Figure:
    return Figure("probe", "time", HOOKS, "× as fast", spread([ratio]), 1.0, ratio, "seconds per step", "", **values)


@pytest.fixture
def without_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = ("opacus", "jax_privacy")
    for name in [name for name in sys.modules if name.partition(".")[0] in peers]:
        monkeypatch.delitem(sys.modules, name)
    for name in peers:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails


@pytest.mark.slow
def test_a_tiny_run_is_plain_values_and_a_table() -> None:
    result = suite.run(["generator", "probe"], "tiny", 2, silent)
    assert json.loads(json.dumps(result)) == result
    assert {row["pair"] for row in result["figures"]} == {"generator", "probe"}
    for row in result["figures"]:
        assert 0 < row["lowest"] <= row["ratio"] <= row["highest"]
        assert row["met"] in (None, True, False)
        assert (row["quantity"] == "memory") == (row["unit"] == "bytes")
    times = [row for row in result["figures"] if row["quantity"] == "time"]
    assert all(row["rounds"] == 2 and row["difference"] < 1e-3 and row["cpu_ratio"] > 0 for row in times)
    assert [row["against"] for row in result["figures"] if row["quantity"] == "memory"] == ["the features' bytes"]
    assert {"torch", "processor", "cores", "threads", "opacus", "python"} <= set(result["machine"])
    text = table.lines(result)
    assert len(re.findall(r"^\| (?:generator|probe) \|", text, re.M)) == len(result["figures"])
    assert "≥ 20" in text


def test_a_missing_peer_is_named_in_both_outputs(without_peers: None) -> None:
    result = suite.run(["one-view-opacus"], "tiny", 1, silent)
    assert [row["against"] for row in result["figures"] if row["quantity"] == "time"] == []
    missing = {entry["peer"]: entry["reason"] for entry in result["left_out"]}
    assert list(missing) == ["Opacus hooks", "Opacus functorch", "Opacus ghost", "jax-privacy"]
    assert "pip install jax-privacy" in missing.pop("jax-privacy")
    assert all("pip install 'dprandp[bench]'" in reason for reason in missing.values())
    assert table.lines(result).count("LEFT OUT: ") == 4


@pytest.mark.slow
def test_ghost_clipping_is_left_out_where_views_are_averaged() -> None:
    found = pairs.measure(registry.PAIRS["finetune-opacus"], "tiny", 1, silent, weigh=False)
    left_out = {entry.peer: entry.reason for entry in found.left_out if entry.peer != JAX}  # it is in no extra
    assert list(left_out) == [GHOST]
    assert "each view by itself" in left_out[GHOST]
    assert len([figure for figure in found.figures if figure.against != JAX]) == 2


@pytest.mark.parametrize(
    "name", ["pretraining", "finetune", "one-view", "patchnet", "two-layers", "patchnet-gradients", "predict"]
)
def test_the_sides_of_the_other_pairs_agree(name: str) -> None:
    case = registry.PAIRS[name].build("tiny")
    assert case.check()
    for entry in case.comparisons:
        case.side(entry.against).make()()


def test_both_sides_compute_in_bfloat16_where_the_processor_is_fast_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In full sizes; quick ones are float32, so that a bound means the same on every processor."""
    monkeypatch.setenv("DPRANDP_PRETEND_BFLOAT16", "1")
    pair = "finetune-opacus"
    assert finetuning.shape_of(pair, "quick").precision == "float32"
    assert finetuning.shape_of(pair, "full").precision == "bfloat16"
    tiny = finetuning.SHAPES[pair, "tiny"]
    half = finetuning.Bench(replace(tiny, precision="bfloat16")).check((HOOKS,))
    assert all(difference > 1e-4 for difference in half.values())  # bfloat16 it was, on our side or on both
    assert all(difference < 1e-3 for difference in finetuning.Bench(tiny).check((HOOKS,)).values())


def test_sides_that_disagree_are_refused_and_leave_the_others_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    near = torch.ones(5)
    assert pairs.agree("x", near * (1 + 1e-6), near, 1e-4) < 1e-5
    for other in (near * 1.01, near * torch.nan, torch.ones(4)):
        with pytest.raises(BenchmarkError, match=r"^x: "):
            pairs.agree("x", other, near, 1e-4)

    def check():
        return {HOOKS: pairs.agree(HOOKS, torch.zeros(2), torch.ones(2), 0.1)}

    broken = replace(registry.PAIRS["probe"].build("tiny"), check=check)
    monkeypatch.setitem(suite.PAIRS, "probe", pairs.Pair("probe", "", lambda scale: broken))
    result = suite.run(["probe", "patchnet"], "tiny", 1, silent)
    assert {row["pair"] for row in result["figures"]} == {"patchnet"}
    assert [each["pair"] for each in result["failed"]] == ["probe"]
    text = table.lines(result)
    assert "FAILED: probe: " in text
    assert "| patchnet |" in text
    with pytest.raises(BenchmarkError, match="differ by 1"):
        suite.raise_for(result)


def test_another_clip_norm_shows_in_the_check_of_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control of the comparison with Opacus: were we to clip elsewhere, it would not pass."""
    clipped = probe.clipped_softmax_sum
    monkeypatch.setattr(probe, "clipped_softmax_sum", lambda f, y, w, norm: clipped(f, y, w, 0.9 * norm))
    with pytest.raises(BenchmarkError, match="differ"):
        registry.PAIRS["probe"].build("tiny").check()


@pytest.mark.slow
def test_the_dense_network_makes_the_same_bytes_but_for_rounding() -> None:
    ours = stylegan.render(np.random.default_rng(5), stylegan.CHUNK, 16).astype(int)
    random = np.random.default_rng(5)
    network = stylegan.draw_network(random, 16)
    theirs = peer_stylegan.render(random, network, stylegan.CHUNK).astype(int)
    assert np.abs(ours - theirs).max() <= 1
    network = stylegan.draw_network(np.random.default_rng(0), 16)
    draws = stylegan.draw_images(np.random.default_rng(1), network, 3)
    other = replace(draws, noise=draws.noise.flip(0))
    with pytest.raises(BenchmarkError):  # control
        pairs.agree("x", stylegan.synthesise(network, other), peer_stylegan.synthesise(network, draws), 1e-4)


def test_bounds_hold_and_a_regression_ends_with_an_error() -> None:
    assert [Limit(2).holds(ratio) for ratio in (2, 1.9)] == [True, False]
    assert [Limit(2, at_most=True).holds(ratio) for ratio in (2, 2.1)] == [True, False]
    key = figure(1.0).key
    limit = bounds.BOUNDS[key]
    good, bad = bounds.bounded([figure(2 * limit.value), figure(limit.value / 2)])
    assert (good.held, bad.held) == (True, False)
    assert bounds.regressions([good, bad]) == [bad]
    assert figure(1.0).held is None
    assert figure(float("nan"), bound=limit).held is False
    result = {"figures": [good.to_dict()], "failed": [], "regressions": []}
    suite.raise_for(result)
    with pytest.raises(BenchmarkError, match=re.escape(key)) as error:
        suite.raise_for(result | {"figures": [good.to_dict(), bad.to_dict()], "regressions": [key]})
    assert error.value.exit_code == 1


def test_every_bound_belongs_to_a_figure_of_a_quick_run() -> None:
    keys = set()
    for name in suite.QUICK:
        keys |= {f"{name} time {entry.against}" for entry in registry.PAIRS[name].build("tiny").comparisons}
    assert set(bounds.BOUNDS) <= keys
    assert set(suite.QUICK) <= set(registry.PAIRS)


def test_units_and_costs_enter_the_ratio() -> None:
    """Two sides of the same speed per unit, one with twice the units a call: a ratio of about 1, not of 2."""
    spin = sum

    def side(name: str, units: int) -> Side:
        return Side(name, lambda: lambda: [spin(range(20_000)) for _ in range(units)], units)

    comparisons = (Comparison("x"), Comparison("x", cost=True))
    case = Case(side("dprandp", 8), (side("x", 2),), comparisons, dict, "", "spin")
    found = pairs.measure(pairs.Pair("p", "", lambda scale: case), "tiny", 5, silent).figures
    assert all(0.4 < each.ratio.median < 2.5 for each in found)
    assert found[0].ratio.median == pytest.approx(1 / found[1].ratio.median)


def test_unknown_parts_and_impossible_rounds_are_refused() -> None:
    with pytest.raises(UsageError, match="no part 'prob'") as error:
        suite.run(["prob"], "tiny", 1, silent)
    assert "probe" in error.value.fix
    with pytest.raises(UsageError, match="below 1"):
        suite.run(["probe"], "tiny", 0, silent)
    with pytest.raises(UsageError, match="no ranks"):
        suite.run(["ranks"], "quick", 1, silent)


PEAK = """
import json, torch
from benchmark import memory
before = memory.resident()
peak = memory.peak_of(lambda: lambda: torch.ones(25_000_000).sum(), before)  # 100 MB, gone at once
print(json.dumps({"work": peak.bytes, "since": memory.resident("VmHWM") - before if memory.forget_peak() else None}))
"""


@pytest.mark.slow
def test_a_peak_is_that_of_the_work() -> None:
    """In a process of its own, as the benchmark does it: one with a past gives memory back in between."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, env=memory.environment()
    )
    found = json.loads(done.stdout)
    assert 0.9e8 < found["work"] < 2e8
    assert found["since"] is None or found["since"] < 0.9e8


@pytest.mark.slow
@pytest.mark.parametrize("name", curves.CURVES)
def test_every_curve_has_its_points(name: str) -> None:
    curve = curves.measure(name, "tiny", 1, silent)
    assert [point["size"] for point in curve["points"]] == list(curves.CURVES[name].values["tiny"])
    assert curve["points"][0]["memory"] == 1.0
    assert all(point["seconds"] > 0 and point["bytes"] > 0 for point in curve["points"])
    assert curve["title"] in table.lines({"machine": {}, "scale": "tiny", "rounds": 1, "figures": [], "failed": [],
                                          "curves": [curve], "left_out": []})  # fmt: skip


@pytest.mark.slow
def test_processes_are_measured_together_and_alone() -> None:
    from benchmark import processes

    found = processes.measure("tiny", 1, silent, cores=2)
    works = ("generate", "extract", "finetune", "pretrain")
    assert [each.pair for each in found.figures] == [f"ranks-{work}" for work in works]
    assert all(each.ratio.median > 0 for each in found.figures)
    assert [entry.peer for entry in processes.measure("tiny", 1, silent, cores=1).left_out] == ["2 processes"]
