"""Networks from elsewhere: what cannot be private is replaced or refused by name, and code runs only where allowed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models, transforms

from dprandp.config.schema import PretrainConfig, public_arch
from dprandp.errors import CheckpointError, InputError, UsageError
from dprandp.models import torchvision as backbones
from dprandp.models.extractor import build_extractor, extract
from dprandp.models.torchvision import Backbone, build_backbone, code_hash
from dprandp.pretrain.weights import load_public_weights
from dprandp.privacy.clipping import refuse_cross_example_layers

RESNET = "torchvision:resnet18"

NET = """
import torch
from pathlib import Path
from torch import nn

Path("has-run").touch()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, stride=8)
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.norm(self.conv(x)).flatten(2).mT
        return self.attention(x, x, x, need_weights=False)[0].mean(dim=1)

class Mixing(Net):
    def forward(self, x):
        return super().forward(x - x.mean(dim=0))

class Offset(Net):
    large = 1e3

    def forward(self, x):
        x = super().forward(x)
        return self.large + x - x.mean(dim=0)

class Hidden(Offset):
    large = 1e6

class Counting(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return super().forward(x)

class OwnNorm(nn.BatchNorm2d):
    pass

class Derived(Net):
    def __init__(self):
        super().__init__()
        self.norm = OwnNorm(8)

class Random(Net):
    def forward(self, x):
        return super().forward(x) + torch.rand(1)

class Pixels(nn.Module):
    def forward(self, x):
        return x

class Broken(nn.Module):
    def __init__(self):
        raise ValueError("not today")

number = lambda: 3
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """``module:net.py`` in the working directory; the process is not allowed to run it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backbones, "_trusted", False)
    Path("net.py").write_text(NET, encoding="utf-8")
    return "module:net.py"


@pytest.fixture
def trusted(net: str) -> str:
    backbones.trust_code()
    return net


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def with_statistics() -> nn.Module:
    """torchvision's own resnet18, as if it had learned: with statistics in its BatchNorms."""
    network = models.resnet18(num_classes=10)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 2)
            layer.weight.data.uniform_(0.5, 1.5)
    return network.eval()


def test_what_opacus_refuses_is_replaced_and_said() -> None:
    extractor = build_extractor(PretrainConfig(arch=RESNET), seed(0))
    assert extractor.replaced == "20 BatchNorm2d (bn1, layer1.0.bn1, layer1.0.bn2 and 17 more) by GroupNorm"
    refuse_cross_example_layers(extractor)
    assert sum(isinstance(layer, nn.GroupNorm) for layer in extractor.modules()) == 20
    assert not isinstance(extractor.network.fc, nn.Linear)
    x = extractor.normalise(torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8))
    assert extractor.features(x).shape == (2, extractor.feature_dim) == (2, 512)
    assert not extractor.train().training  # no dropout, ever


def test_a_seed_gives_the_same_weights_and_touches_no_other_randomness() -> None:
    before = torch.random.get_rng_state()
    one, same, other = (build_backbone(RESNET, 32, generator=seed(number)) for number in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [each.network.layer4[1].conv2.weight for each in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("arch", [RESNET, "torchvision:regnet_y_400mf"])
def test_a_layout_without_memory_has_the_same_names(arch: str) -> None:
    with torch.device("meta"):
        layout = build_backbone(arch, 32)
    made = build_backbone(arch, 32, generator=seed(0))
    assert {name: value.shape for name, value in layout.state_dict().items()} == {
        name: value.shape for name, value in made.state_dict().items()
    }
    assert all(value.is_meta for value in layout.state_dict().values())


def test_pixels_are_normalised_as_torchvisions_weights_expect() -> None:
    pixels = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    right = transforms.Normalize(backbones.IMAGE_MEAN, backbones.IMAGE_STD)(pixels / 255)
    assert torch.allclose(Backbone.normalise(pixels), right)
    assert torch.allclose(Backbone.normalise(pixels / 255), right)


@pytest.mark.parametrize(
    ("arch", "size", "said"),
    [
        ("torchvision:resnet81", 32, "no classifier 'resnet81'"),
        ("torchvision:fasterrcnn_resnet50_fpn", 32, "no classifier"),
        ("torchvision:squeezenet1_0", 32, "does not end in a linear layer"),
        ("torchvision:alexnet", 32, "cannot see images of 32 × 32 pixels"),
        ("torchvision:vit_b_32", 48, "cannot see images of 48 × 48 pixels: AssertionError: Input shape indivisible"),
        ("module:net.txt:Net", 32, "not of the form module:FILE.py:NAME"),
    ],
)
def test_what_cannot_be_an_extractor_is_refused(arch: str, size: int, said: str) -> None:
    with pytest.raises(UsageError) as caught, torch.device("meta"):
        build_backbone(arch, size)
    assert said in caught.value.problem


# ------------------------------------------------------------------------------------------------------ public weights


def test_frozen_statistics_compute_what_torchvision_computes(tmp_path: Path) -> None:
    """The oracle: torchvision's own network in evaluation mode, its last layer left out."""
    network = with_statistics()
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    extractor = build_backbone(RESNET, 32, norm="frozen")
    assert load_public_weights(tmp_path / "w.safetensors", extractor, RESNET) == ["fc.bias", "fc.weight"]
    assert "by FrozenBatchNorm2d" in extractor.replaced
    refuse_cross_example_layers(extractor)
    images, network.fc = torch.randn(3, 3, 32, 32), nn.Identity()
    with torch.no_grad():
        assert torch.allclose(extractor.features(images), network(images), atol=1e-4)
        assert not torch.allclose(build_backbone(RESNET, 32).features(images), network(images), atol=0.1)


def test_statistics_that_nothing_would_use_are_refused(tmp_path: Path) -> None:
    save_file(with_statistics().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_public_weights(tmp_path / "w.safetensors", build_backbone(RESNET, 32), RESNET)
    assert "40 unexpected (bn1.running_mean, bn1.running_var, " in caught.value.problem
    assert "--norm frozen" in caught.value.fix


@pytest.mark.slow
def test_the_conversion_of_the_documentation_is_right(tmp_path: Path) -> None:
    """Outside the package, which reads no pickles."""
    page = Path(backbones.__file__).parents[2] / "docs/stages.md"
    [source] = re.findall(r"^```python\n(.*?torch.load.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    network = with_statistics()
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    subprocess.run([sys.executable, "-c", source], cwd=tmp_path, check=True)
    extractor = build_backbone(RESNET, 32, norm="frozen")
    load_public_weights(tmp_path / "resnet18.safetensors", extractor, RESNET)
    assert torch.equal(extractor.network.conv1.weight, network.conv1.weight)


# ------------------------------------------------------------------------------------------------------- a user's code


def test_code_runs_only_where_the_user_allows_it(net: str) -> None:
    with pytest.raises(UsageError, match=r"net.py is run(.|\n)*--trust-code"):
        build_backbone(f"{net}:Net", 32)
    assert not Path("has-run").exists()
    digest = code_hash(f"{net}:Net")
    backbones.trust_code()
    extractor = build_backbone(f"{net}:Net", 32, code=digest)
    assert Path("has-run").exists()
    assert (extractor.feature_dim, extractor.replaced) == (8, "1 BatchNorm2d (norm) by GroupNorm")
    assert public_arch("module:/home/me/net.py:Net") == "module:net.py:Net"


def test_changed_code_does_not_run(trusted: str) -> None:
    with pytest.raises(InputError, match="sha256 differs"):
        build_backbone(f"{trusted}:Net", 32, code="0" * 64)
    assert not Path("has-run").exists()
    with pytest.raises(InputError, match="there is no file"):
        build_backbone("module:absent.py:Net", 32)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Mixing", "other features for an image alone"),
        ("Offset", "other features for an image alone"),
        ("Random", "other features for an image alone"),
        ("Counting", "changes its buffers when it sees images: seen"),
        ("Pixels", "makes (2, 3, 32, 32) of 2 images"),
        ("Broken", "cannot be built: ValueError: not today"),
        ("Absent", "cannot be built: AttributeError"),
        ("number", "is a int, not an nn.Module"),
    ],
)
def test_code_that_is_no_extractor_is_refused(trusted: str, name: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_backbone(f"{trusted}:{name}", 32)
    assert said in caught.value.problem


def test_code_that_mixes_unnoticed_cannot_mix_private_images(trusted: str) -> None:
    """No trial sees it beside so large a constant, which a whitener takes out. The control: in a batch it does mix."""
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    other = torch.cat([255 - images[:1], images[1:]])
    extractor = build_extractor(PretrainConfig(arch=f"{trusted}:Hidden", init="w", init_source="x"))
    extractor.network.large = 0.0
    for mirror in (False, True):
        first, second = (extract(extractor, each, mirror=mirror) for each in (images, other))
        assert torch.equal(first[1:], second[1:])
    first, second = (extractor.features(extractor.normalise(each)) for each in (images, other))
    assert not torch.allclose(first[1:], second[1:], atol=1e-3)


def test_a_layer_that_nothing_replaces_is_named(trusted: str) -> None:
    with pytest.raises(UsageError, match=r"nothing replaces: 1 OwnNorm \(norm\)"):
        build_backbone(f"{trusted}:Derived", 32)
