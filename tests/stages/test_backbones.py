"""Private training of networks from elsewhere, and of parts of any network (``--train``).

Gradients are those of autograd, one example at a time, and what is not trained does not move by a bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import STEP, apart, batch_of, model_of, norm_of, scaled
from tiny_run import CLASSES, ledger_of, make_public, read_json, run_continue, run_finetune, run_probe, run_scratch
from torch import Tensor
from torch.nn import functional

from dprandp.config import schema
from dprandp.config.schema import PretrainConfig
from dprandp.dpsgd import masks
from dprandp.dpsgd.clipped_sums import ClippedSums, SumSettings
from dprandp.dpsgd.masks import COLUMNS, ROWS, Trained, blocks_of, choose_parameters, merged, rule_of
from dprandp.errors import InputError, UsageError
from dprandp.models import torchvision as backbones
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import build_extractor
from dprandp.models.whitening import PooledOnly
from dprandp.release import load_model
from dprandp.vision.views import keyed_uniforms, private_views

CLIP = 0.01
SETTINGS = {"views": 2, "seed": 5, "flip": True, "clip_norm": CLIP}

NET = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + self.conv(self.norm(x).relu())

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, stride=8)
        self.blocks = nn.Sequential(Block(), Block())
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.dropout = nn.Dropout()

    def forward(self, x):
        x = self.blocks(self.stem(x)).flatten(2).mT
        return self.dropout(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backbones, "_trusted", True)
    Path("net.py").write_text(NET, encoding="utf-8")
    return "module:net.py:Net"


def classifier(arch: str) -> Classifier:
    generator = torch.Generator().manual_seed(1)
    extractor = build_extractor(PretrainConfig(arch=arch), generator)
    model = Classifier(extractor, PooledOnly(extractor.feature_dim), CLASSES)
    model.head.data.normal_(generator=generator)
    return model


def choice(model: Classifier, train: str) -> Trained:
    return choose_parameters(schema.build("finetune", {"train": train}), model)


def by_hand(model: Classifier, names: list[str], records: int) -> dict[str, Tensor]:
    """Clipped gradients added up, one example after another, with plain autograd: no vmap, no library."""
    batch, total = batch_of(records), {name: torch.zeros_like(model.get_parameter(name)).double() for name in names}
    for record in range(records):
        draws = keyed_uniforms(np.array([record]), STEP, SETTINGS["seed"], SETTINGS["views"])
        views = private_views(batch.images[record : record + 1], SETTINGS["views"], draws, flip=SETTINGS["flip"])[0]
        gradients = {name: torch.zeros_like(value) for name, value in total.items()}
        for view in views:  # each by itself, then their mean
            model.requires_grad_(True).zero_grad()
            scores = model(model.extractor.normalise(view[None]))
            functional.cross_entropy(scores, batch.labels[record : record + 1]).backward()
            for name in names:
                gradients[name] += model.get_parameter(name).grad.double() / SETTINGS["views"]
        factor = min(1.0, CLIP / norm_of(gradients))
        assert factor < 1  # the clip has work to do
        for name in names:
            total[name] += gradients[name] * factor
    return total


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "train"), [("net", "all"), ("net", "last:2"), ("torchvision:resnet18", "all")])
@pytest.mark.parametrize("microbatch", [None, 3])
def test_sums_are_those_of_a_loop_over_single_examples(arch: str, train: str, microbatch: int | None, net: str) -> None:
    if microbatch and arch != "net":
        microbatch = 2
    model = classifier(net if arch == "net" else arch)
    start = choice(model, train).start(model, 0)
    right = by_hand(model, list(start), 3)
    found = ClippedSums(model, SumSettings(scale=1.0, **SETTINGS, microbatch=microbatch)).of(start, STEP, batch_of(3))
    assert apart(found, right) < 1e-4


def test_the_gradient_of_an_adapter_is_that_of_its_factors(net: str) -> None:
    """The oracle: autograd through W + B A, with factors that are leaves, one example at a time."""
    model = classifier(net)
    start = choice(model, "lora:2").start(model, 3)
    start = {name: value + 0.1 * torch.randn_like(value) for name, value in start.items()}  # B is no longer zero
    settings = SumSettings(scale=1.0, **(SETTINGS | {"clip_norm": 1e3}), adapters=True)
    found = ClippedSums(model, settings).of(start, STEP, batch_of(2))
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    batch = batch_of(2)
    draws = keyed_uniforms(np.arange(2), STEP, SETTINGS["seed"], SETTINGS["views"])
    views = private_views(batch.images, SETTINGS["views"], draws, flip=True)
    network = {name: value.detach() for name, value in model.named_parameters()}
    for name in network:
        if name + ROWS in leaves:
            network[name] = network[name] + (leaves[name + COLUMNS] @ leaves[name + ROWS]).view(network[name].shape)
    network["head"] = leaves["head"]
    for record in range(2):
        scores = torch.func.functional_call(model, network, (model.extractor.normalise(views[record]),))
        loss = functional.cross_entropy(scores, batch.labels[record].expand(2))
        loss.backward(retain_graph=True)
    assert apart(found, {name: leaf.grad for name, leaf in leaves.items()}) < 1e-4
    put = merged(dict(model.named_parameters()), start)
    assert all(torch.equal(value, network[name]) for name, value in put.items())


# -------------------------------------------------------------------------------------------------- what --train names


def named(model: Classifier, train: str) -> set[str]:
    return {name.removeprefix("extractor.") for name in choice(model, train).names or ()}


def test_the_last_block_of_a_resnet_is_its_last_residual_block() -> None:
    with torch.device("meta"):
        model = Classifier(build_extractor(PretrainConfig(arch="torchvision:resnet18")), PooledOnly(512), CLASSES)
    blocks = blocks_of(model.extractor)
    assert blocks[:2] + blocks[-1:] == ["network.conv1", "network.layer1.0", "network.layer4.1"]
    assert len(blocks) == 9
    last = named(model, "last:1")
    assert {name.rpartition(".")[0] for name in last if name != "head"} == {
        f"network.layer4.1.{part}" for part in ("conv1", "bn1", "conv2", "bn2")
    }
    assert named(model, "head") == {"head"}
    assert named(model, "norm-bias") - {"head"} == {
        f"network.{name}" for name, value in model.extractor.network.named_parameters() if value.ndim == 1
    }
    assert choice(model, "all").names is None
    assert choice(model, "last:1").words == (
        "the last 1 of 9 blocks of the extractor (from network.layer4.1 on), and the head"
    )


@pytest.mark.parametrize(
    ("arch", "count", "last"),
    [
        ("torchvision:vgg11", 10, "network.classifier.3"),
        ("torchvision:vit_b_32", 13, "network.encoder.layers.encoder_layer_11"),
        ("torchvision:densenet121", 62, "network.features.denseblock4.denselayer16"),
        ("torchvision:efficientnet_b0", 18, "network.features.8"),
        ("torchvision:swin_t", 16, "network.features.7.1"),
        ("vit-2-32-8", 3, "blocks.1"),
        ("wrn-10-1", 4, "blocks.2"),
        ("nf-resnet-50", 17, "blocks.15"),
    ],
)
def test_every_network_has_blocks(arch: str, count: int, last: str) -> None:
    with torch.device("meta"):
        extractor = build_extractor(PretrainConfig(arch=arch, **({"input_size": 32} if "vit_" in arch else {})))
    blocks = blocks_of(extractor)
    assert (len(blocks), blocks[-1]) == (count, last)


@pytest.mark.parametrize(
    ("arch", "train", "said"),
    [
        ("patchnet", "last:1", "patchnet has 0 blocks"),
        ("wrn-10-1", "last:4", "wrn-10-1 has 4 blocks, so --train last:4 leaves none out"),
        ("patchnet", "lora:2", "patchnet has no linear or convolution layers"),
    ],
)
def test_what_a_network_does_not_have_is_refused_by_name(arch: str, train: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        choice(model_of(arch), train)
    assert said in caught.value.problem


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train": "heads"}, "'heads' is unknown"),
        ({"train": "last:0"}, "'last:0' is unknown"),
        ({"train": "last"}, "'last' is unknown"),
        ({"train": "lora:two"}, "'lora:two' is unknown"),
        ({"train": "all:1"}, "'all:1' is unknown"),
        ({"train": "head", "freeze": "random", "keep": 0.1}, "exclude each other"),
        ({"train": "last:1", "extractor_scale": 0.0}, "extractor_scale = 0 freezes"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        rule_of(schema.build("finetune", settings))
    assert said in caught.value.problem


@pytest.mark.parametrize("train", ["norm-bias", "last:2", "head"])
@pytest.mark.parametrize("arch", ["wrn-10-1", "patchnet", "vit-1-16-16"])
def test_a_part_has_the_gradients_that_it_has_in_the_whole(arch: str, train: str) -> None:
    """Also of the layers whose other parameters are frozen, and where frozen blocks are left out of the pass."""
    if (arch, train) in {("patchnet", "last:2"), ("vit-1-16-16", "last:2")}:
        pytest.skip("it has fewer blocks")
    model = model_of(arch)
    trained, settings = choice(model, train), SETTINGS | {"clip_norm": 1e4, "scale": 0.5}
    whole = ClippedSums(model, SumSettings(**settings)).of(scaled(model, 0.5), STEP, batch_of(3))
    part = {name: value for name, value in scaled(model, 0.5).items() if trained.trains(name)}
    found = ClippedSums(model, SumSettings(**settings, frozen_first=trained.first)).of(part, STEP, batch_of(3))
    assert apart(found, {name: whole[name] for name in part}) < 1e-4
    assert trained.first == (2 if (arch, train) == ("wrn-10-1", "last:2") else 0)


# ------------------------------------------------------------------------------------------------------------ the stage


@pytest.mark.parametrize("train", ["head", "norm-bias", "last:2", "all", "lora:2"])
def test_what_is_not_trained_does_not_move(train: str, net: str, data: str) -> None:
    run = Path("run")
    weights = classifier(net).extractor.state_dict()
    save_file(weights, "w.safetensors")
    own = {"source": "init", "init": "w.safetensors", "init_source": "drawn in a test", "train": train, "lr": 1.0}
    result = run_scratch(run, data, arch=net, **own)
    released = load_file(run / "model/model.safetensors")
    model = classifier(net)
    trained = choice(model, train)
    moved = {name for name in released if name != "head" and not torch.equal(
        released[name].view(torch.int32), weights[name.removeprefix("extractor.")].view(torch.int32))}  # fmt: skip
    assert moved == {name for name in released if name != "head" and trained.trains(name)}
    assert released["head"].any()
    assert result["trained_weights"] == trained.words
    if trained.rank:
        change = released["extractor.network.stem.weight"] - weights["network.stem.weight"]
        assert torch.linalg.matrix_rank(change.flatten(1), atol=1e-5) == 2
    card = (run / "model/MODEL_CARD.md").read_text(encoding="utf-8")
    for said in ("2 BatchNorm2d (blocks.0.norm, blocks.1.norm) by GroupNorm", "drawn in a test", "w.safetensors"):
        assert said in card.replace("\\", "")
    assert load_model(run / "model").network.extractor.replaced == result["replaced"]


def test_only_what_is_trained_has_noise_and_a_state(net: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    step = masks.Trained.start
    monkeypatch.setattr(masks.Trained, "start", lambda *given: seen.append(set(made := step(*given))) or made)
    run_scratch(Path("run"), data, arch=net, train="last:1", optimizer="adam", steps=2)
    (names,) = seen
    assert names == {"head", *(f"extractor.network.attention.{name}" for name in (
        "in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"))}  # fmt: skip
    saved = load_file(Path("run/4-finetune/model.safetensors"))
    assert set(saved) == names


@pytest.mark.slow
def test_all_stages_take_a_network_from_elsewhere(net: str, data: str) -> None:
    run = Path("run")
    make_public(run, arch=net, random_init=True)
    assert read_json(run / "run.json")["stages"]["pretrain"]["result"]["replaced"].startswith("2 BatchNorm2d")
    continued, probed = run_continue(run, data), run_probe(run, data, epsilon=8.0)
    assert 0 < continued["epsilon"] < probed["epsilon"]
    charged = (run / "privacy/ledger.jsonl").read_bytes()
    with pytest.raises(UsageError, match="has 4 blocks, so --train last:9"):
        run_finetune(run, data, epsilon=8.0, train="last:9")
    assert (run / "privacy/ledger.jsonl").read_bytes() == charged
    tuned = run_finetune(run, data, epsilon=8.0, train="last:1", steps=2)
    assert probed["epsilon"] < tuned["epsilon"] <= 8
    before, after = load_file(run / "2b-continue/extractor.safetensors"), load_file(run / "model/model.safetensors")
    moved = {name for name, value in before.items() if not torch.equal(value, after[f"extractor.{name}"])}
    assert {name.split(".")[1] for name in moved} == {"attention"}


UNDIFFERENTIABLE = """
import torch
from torch import nn

class Double(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return 2 * x

    @staticmethod
    def backward(context, towards):
        return 2 * towards

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, stride=8)

    def forward(self, x):
        return Double.apply(self.stem(x)).mean(dim=(2, 3))
"""


@pytest.mark.parametrize("stage", [run_finetune, run_continue])
def test_a_network_without_gradients_is_refused_before_the_first_charge(stage: Callable, net: str, data: str) -> None:
    Path("net.py").write_text(UNDIFFERENTIABLE, encoding="utf-8")
    run = Path("run")
    make_public(run, arch=net, random_init=True)
    if stage is run_finetune:
        run_probe(run, data, epsilon=8.0)
    with pytest.raises(UsageError, match=r"the gradient of one image cannot be computed for module:net\.py:Net"):
        stage(run, data, epsilon=8.0)
    assert {charge.stage for charge in ledger_of(run).charges} == ({"probe"} if stage is run_finetune else set())


def test_a_model_of_a_users_code_holds_no_code_and_no_path(
    net: str, data: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_scratch(run, data, arch=f"module:{tmp_path}/net.py:Net", train="head", steps=1)
    config = (run / "model/config.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in config + (run / "model/MODEL_CARD.md").read_text(encoding="utf-8")
    assert read_json(run / "model/config.json")["extractor"]["arch"] == net
    assert load_model(run / "model").network.extractor.feature_dim == 8
    Path("net.py").write_text(NET + "# other\n", encoding="utf-8")
    with pytest.raises(UsageError, match="code"):
        run_scratch(run, data, arch=f"module:{tmp_path}/net.py:Net", train="head", steps=1)
    with pytest.raises(InputError, match="its sha256 differs"):
        load_model(run / "model")
    monkeypatch.setattr(backbones, "_trusted", False)
    with pytest.raises(UsageError, match="--trust-code"):
        load_model(run / "model")
