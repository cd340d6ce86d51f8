"""A WRN whose features are the first layer of its projection head, as Tang et al. 2023 have them for a probe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import CLASSES, Copy, make_public, run_finetune, run_probe

from dprandp.config.schema import PretrainConfig, as_dict, resolve
from dprandp.models.extractor import build_extractor, without_projection
from dprandp.models.wrn import WideResNet
from dprandp.pretrain.contrastive import ContrastiveTrainer

CONFIG = PretrainConfig(
    arch="wrn-10-1", feature_stages="projection", projection_hidden=32, projection_dim=16, steps=3, batch_size=6,
    pooling="1",
)  # fmt: skip


def network_of(config: PretrainConfig = CONFIG) -> WideResNet:
    return build_extractor(config, torch.Generator().manual_seed(0))


def images_of(side: int = 32) -> torch.Tensor:
    return torch.randint(256, (12, 3, side, side), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


@pytest.mark.parametrize("side", [32, 36, 50, 64])
def test_features_are_products_with_the_whole_last_map(side: int) -> None:
    network = network_of(replace(CONFIG, input_size=side))
    images = network.normalise(images_of(side)[:2])
    with torch.no_grad():
        found, trunk = network.features(images), network.trunk(images)
    channels, rows, columns = trunk.shape[1:]
    weight = network.projection.weight.view(32, channels, rows, columns)
    wanted = torch.stack([(weight.double() * each.double()).sum(dim=(1, 2, 3)) for each in trunk])
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-4)
    assert network.feature_dim == 32


def test_it_is_trained_as_the_first_layer_of_a_head_that_is_thrown_away() -> None:
    """The same numbers, step by step, as a head of its own with equal initial weights."""
    kept = ContrastiveTrainer(network_of(), CONFIG, images_of())
    thrown = ContrastiveTrainer(network_of(replace(CONFIG, feature_stages="last")), CONFIG, images_of())
    thrown.network.load_state_dict({k: v for k, v in kept.network.state_dict().items() if not k.startswith("proj")})
    thrown.head.load_state_dict(
        kept.head.state_dict() | {"linear1.weight": kept.network.projection.weight.detach().clone()}
    )
    before = kept.network.projection.weight.detach().clone()
    for step in range(3):
        assert float(kept.step(step)) == pytest.approx(float(thrown.step(step)), abs=1e-6)
    torch.testing.assert_close(kept.network.projection.weight, thrown.head.linear1.weight)
    assert not torch.equal(kept.network.projection.weight, before)
    names = [name for name in kept.state() if not name.startswith("optimizer.")]
    assert sum(name.endswith(("projection.weight", "linear1.weight")) for name in names) == 1


def test_without_it_the_network_is_the_one_whose_last_map_is_averaged() -> None:
    network = network_of()
    network.precision = "bfloat16"
    plain = without_projection(network)
    x = network.normalise(images_of()[:3])
    assert plain.built_from == replace(CONFIG, feature_stages="last")
    assert (plain.precision, plain.feature_dim) == ("bfloat16", 64)
    assert torch.equal(plain.features(x), network.head_of(network.trunk(x)))
    assert without_projection(plain) is plain


def test_what_is_recorded_builds_it_again() -> None:
    for config in (CONFIG, replace(CONFIG, random_init=True)):
        assert as_dict(config)["projection_hidden"] == 32
    assert "projection_hidden" not in as_dict(replace(CONFIG, random_init=True, feature_stages="last"))


def test_size_paper_has_it_unless_the_weights_are_public_ones(tmp_path: Path) -> None:
    assert resolve("pretrain", "paper", None, {}).feature_stages == "projection"
    weights = {"init": str(tmp_path / "w.safetensors"), "init_source": "elsewhere"}
    assert resolve("pretrain", "paper", None, weights).feature_stages == "last"
    asked = resolve("pretrain", "paper", None, weights | {"feature_stages": "projection"})
    assert asked.feature_stages == "projection"


@pytest.mark.slow
def test_a_probe_has_the_projection_and_a_fine_tune_of_the_pretrained_network_has_not(
    tmp_path: Path, copy: Copy, data: str
) -> None:
    run = tmp_path / "run"
    trained = {"steps": 2, "batch_size": 6, "projection_hidden": 32, "projection_dim": 16}
    make_public(run, arch="wrn-10-1", feature_stages="projection", pooling="1", **trained)
    made = load_file(run / "2-pretrain/extractor.safetensors")
    assert made["projection.weight"].shape == (32, 64 * 8 * 8)
    other = copy(run)
    run_probe(run, data)
    assert load_file(run / "model/model.safetensors")["extractor.projection.weight"].shape == (32, 64 * 8 * 8)
    tuned = run_finetune(other, data, source="pretrain", steps=2, batch_size=10, views=1, refit_steps=0)
    assert tuned["source"] == "pretrain"
    released = load_file(other / "model/model.safetensors")
    assert "extractor.projection.weight" not in released
    assert released["head"].shape == (64, CLASSES)
