"""The configuration files of published systems: each is the published recipe, and states its cost as it is."""

from __future__ import annotations

import functools
import re
import tomllib
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dprandp.config import presets
from dprandp.config.schema import STAGE_CONFIGS, PretrainConfig, StageConfig, resolve
from dprandp.models.extractor import build_extractor
from dprandp.pretrain.contrastive import ProjectionHead

FOLDER = Path(__file__).resolve().parents[2] / "scripts/recipes"
FILES = sorted(FOLDER.glob("*.toml"))
EPSILONS = (1, 2, 3, 4, 6, 8)


def config_of(file: Path, stage: str, epsilon: float) -> StageConfig:
    private = stage in ("probe", "finetune")
    return resolve(stage, "paper", file, {"epsilon": float(epsilon)} if private else {})


def rows_of(file: Path) -> dict[int, dict[str, str]]:
    """ε -> column -> cell, of the table in a file's comments."""
    lines = [line.removeprefix("# ") for line in file.read_text("utf-8").splitlines() if re.match(r"# (ε|\d) ", line)]
    names, *rows = [re.split(r"\s{2,}", line.strip()) for line in lines]
    return {int(row[0]): dict(zip(names, row, strict=True)) for row in rows}


@functools.cache
def flops(arch: str, backwards: bool) -> int:
    """Of one view in the network."""
    with torch.device("meta"):
        network = build_extractor(PretrainConfig(arch=arch, pooling="1"))
    with FlopCounterMode(display=False) as counter:
        features = network.features(torch.zeros(1, 3, 32, 32, device="meta"))
        if backwards:
            features.sum().backward()
    return counter.get_total_flops()


def pretraining_flops(config: PretrainConfig) -> int:
    """Forwards and backwards, of all steps: two views of each image, through network and projection head."""
    with torch.device("meta"):
        head = ProjectionHead(64 * 4 * 64, hidden_dim=config.projection_hidden, embedding_dim=config.projection_dim)
    weights = sum(value.numel() for value in head.parameters() if value.ndim > 1)
    return 2 * config.batch_size * config.steps * (flops(config.arch, backwards=True) + 3 * 2 * weights)


def test_there_is_one_for_each_system_and_network() -> None:
    names = sorted(file.stem for file in FILES)
    assert names == ["de2022-wrn-16-4", "de2022-wrn-40-4", "dp-randp", "dp-randp-probe"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_says_nothing_but_what_the_size_paper_has_anyway(file: Path) -> None:
    """So nothing is overridden, and a change of either is noticed."""
    for stage, table in tomllib.loads(file.read_text("utf-8")).items():
        assert stage in STAGE_CONFIGS
        own = {name: table[name] for name in ("arch", "source", "recipe", "data", "share") if name in table}
        for epsilon in EPSILONS:
            asked = own | ({"epsilon": float(epsilon)} if stage in ("probe", "finetune") else {})
            if asked.get("recipe") == "dp-randp":
                del asked["recipe"]
            plain = resolve(stage, "paper", None, asked)
            found = config_of(file, stage, epsilon)
            assert {name: getattr(found, name) for name in table} == table
            ours = {name for name in table if getattr(plain, name) != table[name]} - {"delta", "lr"}
            assert ours == set(), epsilon


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_table_in_a_file_is_true(file: Path) -> None:
    rows, stages = rows_of(file), tomllib.loads(file.read_text("utf-8"))
    assert tuple(rows) == EPSILONS
    for epsilon, row in rows.items():
        private = config_of(file, "probe" if "probe" in stages else "finetune", epsilon)
        assert int(row["T"]) == private.steps
        assert row["run with this program"] == "no"
        assert row["published, %"] == "-" or 50 < float(row["published, %"]) < 90
        if "pretrain" in stages:
            needed = pretraining_flops(config_of(file, "pretrain", epsilon))
            assert float(row["PFLOP, pretraining"]) == pytest.approx(needed / 1e15, rel=0.01)
        if "probe" in stages:
            one = flops("wrn-16-4", backwards=False) + 2 * 64 * 64 * 4 * 4096
            assert float(row["PFLOP, private"]) == pytest.approx(60_000 * 2 * one / 1e15, abs=0.05)
            continue
        arch = private.arch if private.source == "scratch" else stages["pretrain"]["arch"]
        assert presets.note(vars(private), arch).find(", but") == -1
        views, head = private.batch_size * private.views, private.head_steps or 0
        needed = head * views * flops(arch, backwards=False)  # the network is frozen in these
        needed += (private.steps - head) * views * flops(arch, backwards=True)
        assert float(row["PFLOP, private"]) == pytest.approx(needed / 1e15, rel=0.01)
