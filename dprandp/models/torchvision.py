"""Networks from elsewhere as extractors: torchvision's classifiers, and a user's own module.

    torchvision:NAME       a classifier of ``torchvision.models``; its last linear layer is left out, what goes into it
                           are the features. Nothing is fetched: weights come from a file, or are random.
    module:FILE.py:NAME    NAME() in a Python file is an ``nn.Module``, float [B, 3, S, S] -> features [B, D]. This runs
                           the file, which only the user may allow (``trust_code``).

Opacus' validator says which layers cannot be trained privately, and its fixers replace them: BatchNorm by GroupNorm.
Some that it names for the sake of its hooks (attention, recurrent layers) do not mix images, and stay: gradients are
taken record by record with ``torch.func``. Networks always compute as in evaluation, without dropout or stochastic
depth: a record's gradient must not depend on random numbers that it shares with others.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.abc import SourceLoader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dprandp.config.schema import MODULE, TORCHVISION, FinetuneConfig, PretrainConfig, module_of
from dprandp.errors import InputError, UsageError, nearest
from dprandp.models.whitening import Part

# Public constants, with which torchvision's weights were learned: means and deviations of ImageNet's three colours.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

SAME, ROUNDING = 1e-3, 1e-5
"""Accepted difference between features of an image alone and in a batch, as a part of their size: rounding."""

NAMED = 3
"""Most layers of a kind that a sentence names."""

UNMIXED = (nn.MultiheadAttention, nn.LSTM, nn.GRU, nn.RNN)
"""Layers that Opacus replaces because its hooks cannot differentiate them; they compute one image at a time."""

_trusted = False


def trust_code() -> None:
    """Allow this process to run the files of ``module:FILE.py:NAME``: the user has said so."""
    global _trusted
    _trusted = True


def code_is_trusted() -> bool:
    """Whether ``trust_code`` was called."""
    return _trusted


class Backbone(nn.Module):
    """A network from elsewhere as an extractor, see ``extractor.py``.

    Attributes:
        network: float [B, 3, S, S] -> [B, feature_dim].
        replaced: its layers that were replaced, and by what, in words; None for none.
        classifier: name of the linear layer that was left out, such as ``fc``; None where there was none.
        one_by_one: whether the network may see one image at a time only (``extractor.extract``), since its code is not
            known: a user's.
    """

    def __init__(self, network: nn.Module, feature_dim: int, replaced: str | None, classifier: str | None) -> None:
        super().__init__()
        self.one_by_one = classifier is None
        self.network, self.feature_dim, self.replaced, self.classifier = network, feature_dim, replaced, classifier
        self.parts = (Part(feature_dim, 1.0),)
        self.eval()

    @staticmethod
    def normalise(images: Tensor) -> Tensor:
        """Pixels, uint8 or float in [0, 1], [..., 3, H, W], to float32 with ImageNet's mean and deviation."""
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        return (pixels - mean) / std

    def features(self, x: Tensor) -> Tensor:
        """Float [B, 3, S, S] -> [B, feature_dim]."""
        return self.network(x)

    forward = features

    def train(self, mode: bool = True) -> Backbone:
        """Stays in evaluation mode, whatever is asked."""
        return super().train(False)


def build_backbone(
    arch: str, size: int, *, norm: str = "group", code: str | None = None, generator: torch.Generator | None = None
) -> Backbone:
    """An untrained network, on torch's default device (which may be ``meta``).

    Args:
        arch: ``torchvision:NAME`` or ``module:FILE.py:NAME``. size: side of its images in pixels.
        norm: what takes the place of BatchNorm: 'group', GroupNorm; 'frozen', the layer with its statistics as
            constants, which public weights bring along.
        code: sha256 that the file of ``module:`` must have; None: any.
        generator: its seed is that of the initial weights; None: torch's global one.

    Raises:
        UsageError: no such network, one that cannot be trained privately (each layer is named), one that cannot see
            images of this size, or code that the user has not allowed. InputError: its file is missing, or another.
    """
    with _seeded(generator):
        published = arch.startswith(TORCHVISION)
        network, classifier = _of_torchvision(arch, size) if published else (_module(arch, code), None)
    replaced = _replace(network, arch, norm)
    network.eval()
    if any(isinstance(layer, nn.MultiheadAttention) for layer in network.modules()):
        torch.backends.mha.set_fastpath_enabled(False)  # it has no gradients
    width = _width(network, arch, size)
    if classifier is None:
        _refuse_mixing(network, arch, size)
    return Backbone(network, width, replaced, classifier)


def code_hash(arch: str) -> str:
    """sha256 of the file of ``module:FILE.py:NAME``. Runs nothing.

    Raises:
        InputError: there is no such file.
    """
    return hashlib.sha256(_code(arch)).hexdigest()


def with_code(config: PretrainConfig | FinetuneConfig) -> PretrainConfig | FinetuneConfig:
    """The configuration of a stage that begins, with the hash of the user's code that it runs, if it does."""
    if not config.arch.startswith(MODULE) or config.code is not None:
        return config
    return replace(config, code=code_hash(config.arch))


@contextmanager
def _seeded(generator: torch.Generator | None) -> Iterator[None]:
    with torch.random.fork_rng(devices=[], enabled=generator is not None):
        if generator is not None:
            torch.manual_seed(generator.initial_seed())
        yield


def _of_torchvision(arch: str, size: int) -> tuple[nn.Module, str]:
    """The network without its classifier, and the name of that layer."""
    from torchvision import models

    name, known = arch.removeprefix(TORCHVISION), models.list_models(module=models)
    if name not in known:
        raise UsageError(f"torchvision has no classifier {name!r}", fix=nearest(name, known))
    options: dict[str, Any] = {"weights": None, "num_classes": 2}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        options["image_size"] = size
    try:
        try:
            network = models.get_model(name, **options)
        except NotImplementedError:  # some compute their shapes with tensors, which have no values on meta
            with torch.device("cpu"):
                network = models.get_model(name, **options)
            network.to(torch.get_default_device())
    except (AssertionError, ValueError) as error:
        raise _cannot_see(arch, size, error) from error
    last = [path for path, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not last or network.get_submodule(last[-1]).out_features != options["num_classes"]:
        raise UsageError(f"{arch} does not end in a linear layer, whose input would be the features",
                         fix="use another one, such as torchvision:resnet18")  # fmt: skip
    _put(network, last[-1], nn.Identity())
    return network, last[-1]


def _code(arch: str) -> bytes:
    path = Path(module_of(arch)[0]).expanduser()
    if not path.is_file():
        raise InputError(f"there is no file {path}, the code of {arch}",
                         fix="give the path of the Python file, or run the command in its folder")  # fmt: skip
    return path.read_bytes()


class _Given(SourceLoader):
    """Source that was read before: what runs is what was hashed."""

    def __init__(self, path: str, source: bytes) -> None:
        self._path, self._source = path, source

    def get_filename(self, fullname: str) -> str:
        return self._path

    def get_data(self, path: str) -> bytes:
        return self._source


def _module(arch: str, code: str | None) -> nn.Module:
    """What NAME() in the user's file returns; the file runs, so it must have been allowed."""
    path, name = module_of(arch)
    if not _trusted:
        raise UsageError(
            f"{arch} is code: to build the network, the file {path} is run, and it can do whatever you can, such as "
            "copy the private images",
            fix="read the file, and if you trust it, give --trust-code (in Python: trust_code=True), to each command "
            "that needs the network",
        )
    source = _code(arch)
    if code not in (None, hashlib.sha256(source).hexdigest()):
        raise InputError(f"{path} is not the code that this run or model was made with: its sha256 differs",
                         fix=f"restore the file whose sha256 is {code}")  # fmt: skip
    spec = importlib.util.spec_from_loader(Path(path).stem, _Given(path, source))
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        network = getattr(module, name)()
    except Exception as error:  # whatever the user's code raises
        raise UsageError(f"{arch} cannot be built: {type(error).__name__}: {error}",
                         fix=f"correct {path}: {name}() must return an nn.Module") from error  # fmt: skip
    if not isinstance(network, nn.Module):
        raise UsageError(f"{name}() in {path} is a {type(network).__name__}, not an nn.Module",
                         fix=f"let {name}() return the network")  # fmt: skip
    return network


# ----------------------------------------------------------------------------------------------- what cannot be private


def _replace(network: nn.Module, arch: str, norm: str) -> str | None:
    """Replace what Opacus' validator refuses, in place; the layers and what replaced them in words, None for none.

    Raises:
        UsageError: layers that nothing replaces; each is named.
    """
    from opacus.validators import ModuleValidator
    from torchvision.ops.misc import FrozenBatchNorm2d

    network.train()  # the validator refuses others
    changes: dict[tuple[str, str], list[str]] = {}
    refused: dict[str, list[str]] = {}
    for path, layer in list(network.named_modules()):
        kind = type(layer)
        known = (each for each in kind.__mro__ if each in ModuleValidator.VALIDATORS)  # subclasses too
        validator = ModuleValidator.VALIDATORS.get(next(known, None))
        if validator is None or isinstance(layer, UNMIXED) or not validator(layer):
            continue
        if norm == "frozen" and kind is nn.BatchNorm2d:
            new: nn.Module = FrozenBatchNorm2d(layer.num_features, layer.eps)
        elif kind in ModuleValidator.FIXERS and path:
            new = ModuleValidator.FIXERS[kind](layer)
        else:
            refused.setdefault(kind.__name__, []).append(path or "the module itself")
            continue
        _put(network, path, new.to(next(network.parameters()).device))
        changes.setdefault((kind.__name__, type(new).__name__), []).append(path)
    if refused:
        said = "; ".join(f"{len(paths)} {kind} ({', '.join(paths)})" for kind, paths in refused.items())
        raise UsageError(f"{arch} has layers that cannot be trained privately, and that nothing replaces: {said}",
                         fix="use GroupNorm or LayerNorm in their place")  # fmt: skip
    return "; ".join(
        f"{len(paths)} {old} ({_listed(paths)}) by {new}" for (old, new), paths in changes.items()
    ) or None  # fmt: skip


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _put(network: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, layer)


@torch.no_grad()
def _width(network: nn.Module, arch: str, size: int) -> int:
    """The number of features. Of torchvision's networks without arithmetic; a user's may hold tensors of its own."""
    named = dict(network.named_parameters()) | dict(network.named_buffers())
    device = "meta" if arch.startswith(TORCHVISION) else next(iter(named.values()), torch.empty(0)).device
    images = torch.zeros(2, 3, size, size, device=device)
    with torch.device(device):
        out = _seen(network, {name: value.to(device) for name, value in named.items()}, images, arch)
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != 2:
        what = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise UsageError(f"{arch} makes {what} of 2 images, not features [2, D]",
                         fix="return one row of features for each image")  # fmt: skip
    return out.shape[1]


def _seen(network: nn.Module, tensors: dict[str, Tensor], images: Tensor, arch: str) -> Any:
    """What a network makes of images, with other tensors in the place of its own where there are any."""
    try:
        return functional_call(network, tensors, (images,))
    except Exception as error:  # of any network
        raise _cannot_see(arch, images.shape[-1], error) from error


def _cannot_see(arch: str, size: int, error: Exception) -> UsageError:
    why = " ".join(str(error).split())
    return UsageError(f"{arch} cannot see images of {size} × {size} pixels: {type(error).__name__}: {why[:200]}",
                      fix="give another --input-size (16 to 512; torchvision's networks are made for 224)")  # fmt: skip


@torch.no_grad()
def _refuse_mixing(network: nn.Module, arch: str, size: int) -> None:
    """Refuse a user's network whose features of an image depend on other images, on chance, or on earlier calls.

    Tried on public noise: a test, not a proof.
    """
    if next(network.parameters(), torch.empty(0)).is_meta:
        return
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    alone = torch.cat([_seen(network, {}, image[None], arch) for image in images])
    together = _seen(network, {}, images, arch)
    spread = (alone - alone.mean(dim=0)).abs().max()
    if not (alone - together).abs().max() <= SAME * spread + ROUNDING * together.abs().max():
        raise UsageError(f"{arch} computes other features for an image alone than for the same image in a batch",
                         fix="remove what mixes images, keeps state or draws random numbers")  # fmt: skip
    changed = [name for name, value in network.state_dict().items() if not torch.equal(value, before[name])]
    if changed:
        raise UsageError(f"{arch} changes its buffers when it sees images: {_listed(changed)}",
                         fix="remove statistics that are kept: of private images they would be a release")  # fmt: skip
