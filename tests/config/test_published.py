"""The table of De et al. 2022 as it is printed, what lies between its entries, and what a recipe does not override."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dprandp.config import presets
from dprandp.config.schema import PretrainConfig, as_dict, build, lr_of, resolve
from dprandp.errors import UsageError
from dprandp.privacy.accounting import calibrate


def finetune(**flags):
    return resolve("finetune", "tiny", None, {"recipe": "de2022", "source": "scratch"} | flags)


@pytest.mark.parametrize(
    ("arch", "source", "epsilon", "batch", "steps", "lr", "views"),
    [
        ("wrn-16-4", "scratch", 1, 4096, 875, 2, 16),
        ("wrn-16-4", "scratch", 8, 4096, 2500, 2, 16),
        ("wrn-40-4", "scratch", 1, 16384, 906, 4, 16),
        ("wrn-40-4", "scratch", 8, 16384, 2000, 4, 16),
        ("wrn-28-10", "init", 4, 16384, 250, 1, 16),
        ("nf-resnet-50", "scratch", 8, 16384, 71589, 4, 4),
    ],
)
def test_the_table(arch, source, epsilon, batch, steps, lr, views):
    more = {"init": "w.safetensors", "init_source": "ImageNet"} if source == "init" else {}
    config = finetune(arch=arch, source=source, epsilon=float(epsilon), **more)
    assert (config.batch_size, config.steps, config.lr, config.views) == (batch, steps, lr, views)
    assert (config.clipping, config.clip_norm, config.momentum, config.ema) == ("rescaled", 1.0, 0.0, 0.9999)
    assert config.pooling == "1"
    assert config.padding == ("same" if arch.startswith("wrn") else None)
    note = presets.note(vars(config), arch)
    assert arch in note
    assert "interpolated" not in note
    assert "but" not in note


def test_steps_between_two_entries_are_interpolated_aloud():
    config = finetune(epsilon=5.0)
    assert build("finetune", as_dict(config)) == config  # what is recorded stands by itself
    part = math.log(5 / 4) / math.log(6 / 4)
    assert config.steps == round(1687 + part * (1843 - 1687))
    assert 1687 < config.steps < 1843
    assert "interpolated between ε = 4 and 6" in presets.note(vars(config), "wrn-16-4")
    assert finetune(epsilon=math.inf).steps == 2500
    assert "without privacy" in presets.note(vars(finetune(epsilon=math.inf)), "wrn-16-4")


def test_what_is_otherwise_than_published_is_named():
    config = finetune(steps=60, views=2, refit_steps=0)
    assert presets.note(vars(config), "wrn-16-4").endswith(", but views = 2, steps = 60")
    config = resolve("finetune", "paper", None, {"lr": 0.5})
    assert presets.note(vars(config), "wrn-10-1").endswith(", but lr = 0.5, the network is wrn-10-1")
    for none in (resolve("finetune", "tiny", None, {}), resolve("finetune", "paper", None, {"recipe": "ours"})):
        assert presets.note(vars(none), "wrn-16-4") is None


@pytest.mark.parametrize(("epsilon", "steps"), [(1, 875), (2, 1125), (3, 1593), (4, 1687), (6, 1843), (8, 2500)])
def test_size_paper_is_phases_two_and_three_of_the_paper(epsilon, steps):
    """The released settings of Tang et al. 2023: one training of T steps, the first 96 of head and last norm."""
    config = resolve("finetune", "paper", None, {"epsilon": float(epsilon)})
    assert (config.recipe, config.source) == ("dp-randp", "pretrain")
    assert (config.steps, config.batch_size, config.views, config.lr) == (steps, 4096, 16, 0.4)
    assert (config.head_steps, config.head_lr) == (96, 15.0)
    assert (config.clipping, config.clip_norm, config.optimizer, config.momentum) == ("norm", 1.0, "sgd", 0.0)
    assert (config.ema, config.extractor_scale, config.refit_steps) == (0.9999, 1.0, 0)
    network = resolve("pretrain", "paper", None, {})
    assert (network.arch, network.weight_standardisation, network.pooling) == ("wrn-16-4", False, "1")
    assert build("finetune", as_dict(config)) == config


def rows_of(*heading: str) -> list[tuple[str, str]]:
    """Setting and value of the table below a sentence of the documentation."""
    page = (Path(__file__).resolve().parents[2] / "docs/stages.md").read_text(encoding="utf-8")
    table = page.split(heading[0])[1].split("Different here")[0]
    cells = [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if line.startswith("| ")]
    return [(row[1], row[3]) for row in cells if row[1] != "setting"]


def shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_the_documented_comparison_with_the_paper_is_what_the_program_does():
    rows, configs = rows_of("DP-RandP on CIFAR-10 at ε = 1, as Tang"), {}
    for stage in ("generate", "pretrain", "finetune"):
        configs[stage] = resolve(stage, "paper", None, {"epsilon": 1.0} if stage == "finetune" else {})
    for name, value in rows[:-2]:
        stage, _, setting = name.strip("`").partition(".")
        assert shown(getattr(configs[stage], setting)) == value, name
    assert rows[-2] == ("learning rate of Phase I", str(lr_of(configs["pretrain"])))
    assert len(rows) == 26
    exact = calibrate(1.0, 1e-5, 4096 / 50_000, 875)
    assert rows[-1] == ("σ", f"calibrated for N, ε and δ: {exact:.2f}")
    configs["finetune"] = finetune(epsilon=1.0)
    for name, value in rows_of("De et al. 2022, CIFAR-10 from scratch, WRN-16-4")[:-1]:
        found = getattr(configs["finetune"], name.strip("`"))
        # left to the network, whose default it is
        assert shown(PretrainConfig.layer_order if found is None else found) == value, name


def test_the_recipe_of_a_size_gives_way():
    for given in ({"source": "probe"}, {"recipe": "ours"}):
        config = resolve("finetune", "paper", None, given)
        assert (config.source, config.recipe, config.steps, config.head_steps) == ("probe", None, 779, None)
    assert resolve("finetune", "paper", None, {"source": "scratch"}).recipe is None
    with pytest.raises(UsageError, match=r"not for ε = 0\.5") as refused:
        resolve("finetune", "paper", None, {"epsilon": 0.5})
    assert "--recipe ours" in refused.value.fix


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"epsilon": 0.5}, "not for ε = 0.5"),
        ({"epsilon": 9.0}, "ε = 1, 2, 3, 4, 6, 8"),
        ({"arch": "wrn-10-1"}, "no hyper-parameters for wrn-10-1"),
        ({"arch": "nf-resnet-50", "epsilon": 4.0}, "not for ε = 4"),
        ({"source": "probe"}, "--recipe sets a new network"),
        ({"recipe": "de2023"}, "de2022"),
    ],
)
def test_what_it_does_not_have_is_refused(flags, said):
    with pytest.raises(UsageError) as refused:
        finetune(**flags)
    assert said in f"{refused.value} {refused.value.fix}"


def test_flags_and_files_win_over_it_and_it_wins_over_the_size(tmp_path):
    assert finetune(steps=10, views=2).steps == 10
    assert finetune(steps=10, views=2).views == 2
    assert resolve("finetune", "paper", None, {"recipe": "de2022", "source": "scratch"}).steps == 875
    file = tmp_path / "c.toml"
    file.write_text('[finetune]\nrecipe = "de2022"\nsource = "scratch"\nlr = 1.5\n', encoding="utf-8")
    config = resolve("finetune", "tiny", file, {"epsilon": 2.0})
    assert (config.lr, config.steps) == (1.5, 1125)


@pytest.mark.parametrize(
    "odd", [{"arch": [1]}, {"epsilon": "much"}, {"epsilon": 10**400}, {"epsilon": True}, {"source": {}}]
)
def test_values_of_a_wrong_type_are_left_to_others(odd):
    assert presets.settings({"recipe": "de2022", "source": "scratch"} | odd) == {}
    with pytest.raises(UsageError):
        finetune(**odd)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"momentum": 1.0}, "momentum = 1.0"),
        ({"source": "init"}, "--from init needs a file"),
        ({"source": "scratch", "init": "f"}, "--from scratch does not use"),
        ({"source": "init", "init": "f"}, "you must declare"),
        ({"source": "scratch", "init_source": "x"}, "--init-source was given without --init"),
        ({"source": "init", "init": "f", "init_source": ""}, "init_source"),
        ({"layer_order": "relu-norm-conv"}, "--layer-order sets a new network"),
        ({"padding": "same"}, "--padding sets"),
        ({"recipe": "dp-randp"}, "not from probe"),
        ({"head_lr": 1.0}, "head_lr is set, but head_steps is not"),
        ({"head_steps": 3, "train": "head"}, "exclude each other"),
        ({"head_steps": 3, "steps": 2}, "more than the 2 steps"),
        ({"optimizer": "adm"}, "adam"),
    ],
)
def test_combinations_that_make_no_sense_are_refused_in_words(given, said):
    with pytest.raises(UsageError) as refused:
        build("finetune", given)
    assert said in f"{refused.value} {refused.value.fix}"
