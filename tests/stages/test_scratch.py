"""Public weights from a file: what fits is taken, what does not is named; who declares them public is disclosed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import forbid_reading, ledger_of, read_json, run_scratch
from torch import Tensor

from dprandp import finetune
from dprandp.config.schema import FinetuneConfig, build
from dprandp.errors import CheckpointError, InputError, UsageError
from dprandp.pretrain.weights import private_origin, weights_hash
from dprandp.release import load_model

SOURCE = {"source": "init", "init_source": "made-up weights, drawn in a test"}
SHAPE = {"padding": "same", "pooling": "1"}


def network(**given) -> FinetuneConfig:
    return build("finetune", {"source": "scratch", "arch": "wrn-10-1"} | given)


def weights(**given) -> dict[str, Tensor]:
    model, _ = finetune.start_model(network(seed=7, **given), 3)
    return {name: value.clone() for name, value in model.extractor.state_dict().items()}


def loaded(path: Path, **given) -> tuple[dict[str, Tensor], list[str]]:
    model, left_out = finetune.start_model(network(**(SOURCE | {"init": str(path)} | given)), 3)
    return model.extractor.state_dict(), left_out


@pytest.mark.parametrize(("prefix", "kind"), [("", torch.float32), ("extractor.", torch.bfloat16)])
def test_weights_that_fit_are_taken(tmp_path, prefix, kind):
    path = tmp_path / "w.safetensors"
    given = {name: value.to(kind) for name, value in weights().items()}
    another_task = {"head": torch.zeros(4, 10), "fc.bias": torch.zeros(10)}
    save_file({f"{prefix}{name}": value for name, value in given.items()} | another_task, path)
    found, left_out = loaded(path)
    assert left_out == ["fc.bias", "head"]
    assert all(torch.equal(found[name], value.float()) for name, value in given.items())
    with pytest.raises(CheckpointError, match="instead of"):
        loaded(path, arch="wrn-10-2")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("stem.gain"), r"1 missing \(stem.gain\)"),
        (lambda w: w.update({"bn1.running_mean": torch.zeros(3)}), r"wrn-10-1: 1 unexpected \(bn1.running_mean\)"),
        (lambda w: w.update({"final_norm.bias": torch.zeros(65)}), r"shape \(final_norm.bias: \(65,\) instead of"),
        (lambda w: w.update({"stem.bias": torch.zeros(16).double()}), "stem.bias: torch.float64"),
        (lambda w: w["stem.bias"].fill_(float("nan")), r"1 not finite \(stem.bias\)"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, said):
    given = weights()
    change(given)
    save_file(given, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=said):
        loaded(tmp_path / "w.safetensors")


def test_weights_of_another_network_are_refused_in_one_line(tmp_path):
    """Not a line for each of its tensors."""
    path = tmp_path / "w.safetensors"
    save_file({f"layer{place}.weight": torch.zeros(1) for place in range(500)}, path)
    with pytest.raises(CheckpointError) as caught:
        loaded(path)
    said = caught.value.problem
    assert "500 unexpected (layer0.weight, layer1.weight, layer10.weight, ...)" in said
    assert "45 missing (blocks.0.conv1.bias, " in said
    assert "\n" not in said
    assert len(said) < 400


def test_files_and_architectures_that_are_none_are_refused(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        loaded(tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="patchnet"):
        finetune.network_config(network(arch="patchnet"))
    with pytest.raises(UsageError, match="one layer order"):
        finetune.network_config(network(arch="nf-resnet-50", padding="same"))


def test_the_networks_shape_is_that_of_the_configuration():
    order = "relu-norm-conv+norm-relu-skip"
    extractor = finetune.start_model(network(layer_order=order, **SHAPE), 3)[0].extractor
    assert extractor.blocks[0].order.skip == "norm-relu"
    assert (extractor.blocks[0].pads, extractor.blocks[1].pads) == (False, True)
    assert extractor.feature_dim == 64


def test_a_run_from_public_weights_discloses_who_says_so(tmp_path: Path, data: str) -> None:
    path, run = tmp_path / "weights.safetensors", tmp_path / "run"
    save_file(weights(**SHAPE), path)
    settings = SOURCE | SHAPE | {"init": str(path), "freeze": "last", "scope": "block", "keep": 0.3}
    result = run_scratch(run, data, **settings)
    (digest,) = weights_hash(str(path)).values()
    said = tuple(result[f"init_{name}"] for name in ("file", "sha256", "source"))
    assert said == (path.name, digest, SOURCE["init_source"])
    card = (run / "model/MODEL_CARD.md").read_text(encoding="utf-8")
    assert all(text in card for text in (path.name, digest, "declared public by the user", SOURCE["init_source"]))
    assert str(tmp_path) not in (run / "model/config.json").read_text(encoding="utf-8") + card
    # frozen weights are those of the file, the others are not
    released, own = load_file(run / "model/model.safetensors"), weights(**SHAPE)
    for name, kept in (("stem.weight", True), ("blocks.2.conv1.weight", False)):
        assert torch.equal(released[f"extractor.{name}"], own[name]) == kept
    assert load_model(run / "model").network.extractor.blocks[1].pads
    assert read_json(run / "run.json")["stages"]["finetune"]["inputs"] == {"public weights": digest}
    # other weights under the same name are another run's
    save_file(own | {"head": torch.ones(1)}, path)
    with pytest.raises(UsageError, match="public weights changed"):
        run_scratch(run, data, **settings)


def test_weights_that_do_not_fit_cost_nothing(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(weights(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="wrn-10-2"):
        run_scratch(tmp_path / "run", data, **SOURCE, init=str(tmp_path / "w.safetensors"), arch="wrn-10-2")
    ledger = tmp_path / "run/privacy/ledger.jsonl"
    assert not ledger.exists() or not ledger_of(tmp_path / "run").charges
    forbid_reading(monkeypatch)  # an absent file is noticed before a pixel is read
    with pytest.raises(InputError, match="there is no file"):
        run_scratch(tmp_path / "other", data, **SOURCE, init=str(tmp_path / "absent"))


def test_a_checkpoint_of_private_steps_is_called_so_for_ever(tmp_path: Path, data: str) -> None:
    """The control: the same weights without the description. That they are public is declared in both."""
    run_scratch(tmp_path / "first", data)
    private = tmp_path / "first/4-finetune/model.safetensors"
    save_file(load_file(private), tmp_path / "plain.safetensors")
    for path, known in ((private, True), (tmp_path / "plain.safetensors", False)):
        run = tmp_path / f"second-{known}"
        result = run_scratch(run, data, **SOURCE, init=str(path))
        assert bool(result.get("init_origin")) == known
        card = (run / "model/MODEL_CARD.md").read_text(encoding="utf-8")
        assert ("add up the ε of both" in card) == known


@pytest.mark.parametrize("epsilon", [1.0001, "inf"])
def test_weights_that_are_the_model_of_a_private_run_are_called_so(tmp_path: Path, epsilon: float | str) -> None:
    weights = tmp_path / "model.safetensors"
    weights.touch()
    assert private_origin(weights) is None
    (tmp_path / "config.json").write_text('{"result": {"stage": "generate"}}')
    assert private_origin(weights) is None
    (tmp_path / "config.json").write_text(json.dumps({"result": {"data": "scans", "epsilon": epsilon}}))
    said = private_origin(weights)
    assert "the model of a run on scans that " in said
    assert "add up the ε of both" in said
    assert ("was not private" in said) == (epsilon == "inf")
    assert ("spent ε = 1.001," in said) == (epsilon != "inf")
