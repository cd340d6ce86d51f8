"""The table of De et al. 2022 as it is printed, what lies between its entries, and what a recipe does not override."""

from __future__ import annotations

import math

import pytest

from dprandp.config import presets
from dprandp.config.schema import as_dict, build, resolve
from dprandp.errors import UsageError


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
    note = presets.note("de2022", arch, source, epsilon)
    assert arch in note
    assert "interpolated" not in note


def test_steps_between_two_entries_are_interpolated_aloud():
    config = finetune(epsilon=5.0)
    assert build("finetune", as_dict(config)) == config  # what is recorded stands by itself
    part = math.log(5 / 4) / math.log(6 / 4)
    assert config.steps == round(1687 + part * (1843 - 1687))
    assert 1687 < config.steps < 1843
    assert "interpolated between ε = 4 and 6" in presets.note("de2022", "wrn-16-4", "scratch", 5.0)
    assert finetune(epsilon=math.inf).steps == 2500
    assert "without privacy" in presets.note("de2022", "wrn-16-4", "scratch", math.inf)


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
        ({"optimizer": "adm"}, "adam"),
    ],
)
def test_combinations_that_make_no_sense_are_refused_in_words(given, said):
    with pytest.raises(UsageError) as refused:
        build("finetune", given)
    assert said in f"{refused.value} {refused.value.fix}"
