"""The architectures by name, behind one interface.

An extractor is an ``nn.Module`` with

* ``feature_dim``: int;
* ``normalise(images)``: uint8 [..., 3, H, W] to float input, with public constants;
* ``parts``: the ``whitening.Part``s of the features, each of which is whitened separately;
* ``features(x)``: float [B, 3, S, S] to float [B, feature_dim], differentiable, one image at a time;
* ``precision`` ('float32' or 'bfloat16'), ``built_from`` (the ``PretrainConfig``) and ``input_size`` (S, the side of an
  image in pixels): set by ``build_extractor``;
* ``replaced``, in words, where layers of a network from elsewhere were replaced (``torchvision.py``);
* ``form``, where its features have changed since an earlier version: see ``PatchExtractor.form``.

To add one: write its module, name it here, and add its training to ``pretrain/__init__.py``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dprandp.config.presets import INPUT_SIZE, PROJECTION
from dprandp.config.schema import MODULE, PretrainConfig, input_size_of, is_backbone
from dprandp.errors import CheckpointError, UsageError
from dprandp.models.nf_resnet import NFResNet50
from dprandp.models.patchnet import DeepPatchNet, PatchExtractor, PatchLayer, PatchNet, ResponseLayer, positions_above
from dprandp.models.precision import AUTO, FLOAT32, autocast, full_precision, precision_of
from dprandp.models.torchvision import build_backbone
from dprandp.models.vit import VisionTransformer, parse_vit
from dprandp.models.wrn import WideResNet, parse_wrn

NF_RESNET = "nf-resnet-50"
ARCHITECTURES = (
    f"patchnet, wrn-DEPTH-WIDTH such as wrn-16-4, vit-DEPTH-WIDTH-PATCH such as vit-4-64-4, {NF_RESNET}, "
    "torchvision:NAME, or module:FILE.py:NAME"
)

EARLIER_GRIDS = ("4+16", "1+9")
"""Pooling of a WRN's first two stages, which makes the parts of its three stages equally wide."""


def build_extractor(config: PretrainConfig, generator: torch.Generator | None = None) -> nn.Module:
    """An untrained extractor; one whose precision is undecided computes in float32.

    The generator of the initial weights is public randomness; None means torch's global one.

    Raises:
        UsageError: unknown architecture, or sizes that do not fit together.
    """
    network = _build(config, generator)
    network.built_from, network.input_size = config, input_size_of(config)
    network.precision = FLOAT32 if config.precision == AUTO else config.precision
    return network


def layout_device(arch: str) -> torch.device:
    """Where a network is built to see its shapes alone: without memory; on the CPU if it is a user's code, which may
    need values."""
    return torch.device("cpu" if arch.startswith(MODULE) else "meta")


def _build(config: PretrainConfig, generator: torch.Generator | None) -> nn.Module:
    if config.arch == "patchnet":
        return _patchnet(config, generator)
    if config.arch.startswith("wrn-"):
        depth, width = parse_wrn(config.arch)
        return WideResNet(
            depth,
            width,
            layer_order=config.layer_order,
            weight_standardisation=config.weight_standardisation,
            pooling=config.pooling or "1+4",
            padding=config.padding or "symmetric",
            earlier=EARLIER_GRIDS if config.feature_stages == "all" else (),
            projection=config.projection_hidden if config.feature_stages == PROJECTION else None,
            input_size=input_size_of(config),
            generator=generator,
        )
    if config.arch == NF_RESNET:
        return NFResNet50(pooling=config.pooling or "1", generator=generator)
    if config.arch.startswith("vit-"):
        sizes = parse_vit(config.arch, input_size_of(config))
        return VisionTransformer(*sizes, input_size=input_size_of(config), generator=generator)
    if is_backbone(config.arch):
        settings = {"norm": config.norm or "group", "code": config.code, "generator": generator}
        return build_backbone(config.arch, input_size_of(config), **settings)
    raise UsageError(f"unknown architecture {config.arch!r}", fix=f"use {ARCHITECTURES}")


def without_projection(extractor: nn.Module) -> nn.Module:
    """The extractor whose features are averages of its last map, where they are those of its ``projection``."""
    config = extractor.built_from
    if getattr(extractor, "projection", None) is None:
        return extractor
    network = build_extractor(dataclasses.replace(config, feature_stages="last"))
    network.load_state_dict({name: value for name, value in extractor.state_dict().items()
                             if not name.startswith("projection.")})  # fmt: skip
    network.precision = extractor.precision
    return network


@torch.no_grad()
def first_filters(network: nn.Module) -> Tensor | None:
    """The filters of the first layer as patches of pixels, float32 [F, 3, k, k]: of a patchnet, the patches of its
    dictionary before whitening. None where they are no squares of coloured pixels."""
    if isinstance(network, PatchExtractor):
        layer = network.chain[0]
        patches = layer.weight @ torch.linalg.pinv(layer.basis).T
        return patches.view(len(patches), 3, layer.patch_size, layer.patch_size)
    weight = next((each.weight for each in network.modules() if isinstance(each, nn.Conv2d | nn.Linear)), None)
    side = 0 if weight is None else math.isqrt(weight[0].numel() // 3)
    if weight is None or tuple(weight.shape[1:]) not in ((3, side, side), (3 * side**2,)):
        return None
    return weight.detach().float().reshape(len(weight), 3, side, side)


def refuse_unlearnable(config: PretrainConfig) -> None:
    """Refuse (UsageError) an architecture that Phase I cannot train; random and public weights need no training."""
    if (config.arch == NF_RESNET or is_backbone(config.arch)) and not config.random_init and config.init is None:
        raise UsageError(
            f"{config.arch} is not learned from synthetic images",
            fix="give public weights (--init FILE --init-source TEXT), pretrain patchnet or a wrn, or train it "
                f"privately: dprandp finetune --from scratch --arch {config.arch}",
        )


def _patchnet(config: PretrainConfig, generator: torch.Generator | None) -> nn.Module:
    two = config.layers == 2
    side = input_size_of(config)
    stride = config.stride * max(1, side // INPUT_SIZE)
    positions = (side - config.patch_size) // stride + 1
    if (positions_above(positions) if two else positions) < 2:  # quarters need two patches a side
        raise UsageError(
            f"patch_size = {config.patch_size} with stride = {stride} leaves fewer than two patches a side "
            f"of a {side}-pixel image" + (", after two layers" if two else ""),
            fix="give a smaller patch_size or stride" + (", or one layer" if two else ""),
        )
    patch_dims = min(config.patch_dims, 3 * config.patch_size**2)
    first = PatchNet(
        config.filters, patch_size=config.patch_size, patch_dims=patch_dims, stride=stride, input_size=side
    )
    _random_dictionary(first, generator)
    if not two:
        return first
    second = ResponseLayer(config.second_filters, first)
    _random_unit_rows(second.map_weight, generator)
    _random_rows(second.channel_basis, generator)
    _random_dictionary(second, generator)
    return DeepPatchNet(first, second)


def _random_dictionary(layer: PatchLayer, generator: torch.Generator | None) -> None:
    _random_rows(layer.basis, generator)
    _random_unit_rows(layer.weight.data, generator)


def _random_rows(basis: Tensor, generator: torch.Generator | None) -> None:
    """Orthonormal rows."""
    basis.copy_(torch.linalg.qr(torch.randn(*reversed(basis.shape), generator=generator))[0].t())


def _random_unit_rows(weight: Tensor, generator: torch.Generator | None) -> None:
    """Patches have a length of about √d, so responses of unit-norm filters have unit variance."""
    weight.normal_(generator=generator)
    weight.div_(weight.norm(dim=1, keepdim=True))


def load_weights(extractor: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Fill an extractor with the weights of a checkpoint.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape or type; all are named.
    """
    own = extractor.state_dict()
    wrong = [f"{name}: missing" for name in own.keys() - tensors.keys()]
    wrong += [f"{name}: unknown" for name in tensors.keys() - own.keys()]
    for name in own.keys() & tensors.keys():
        given, needed = tensors[name], own[name]
        if given.shape != needed.shape:
            wrong.append(f"{name}: {tuple(given.shape)} instead of {tuple(needed.shape)}")
        elif given.dtype != needed.dtype:
            wrong.append(f"{name}: {given.dtype} instead of {needed.dtype}")
    if wrong:
        raise CheckpointError(
            "the checkpoint does not fit the architecture: " + "; ".join(sorted(wrong)),
            fix="use the configuration that the checkpoint was made with",
        )
    extractor.load_state_dict(tensors)


@torch.no_grad()
def extract(
    extractor: nn.Module,
    images: Tensor,
    *,
    mirror: bool,
    batch_size: int = 256,
    after: Callable[[Tensor], Tensor] = lambda features: features,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Features of many images, uint8 [N, 3, S, S], each computed independently: float32 [N, ...] on the CPU.

    Guarantee:
        Row i depends on image i alone: no network of this package mixes the images of a batch, and a network whose code
        is the user's sees one at a time. (That it keeps nothing of one for the next is assumed of such code.)

    Args:
        extractor: on the device that computes.
        mirror: average the features of each image and its mirror image.
        batch_size: images at a time.
        after: applied to each batch of features [b, feature_dim]; its results are collected.
        on_batch: called with the number of images done, for progress.
    """
    side = extractor.input_size
    if images.shape[1:] != (3, side, side):
        raise ValueError(f"images of shape {tuple(images.shape[1:])}, expected (3, {side}, {side})")
    device = next(extractor.parameters()).device
    compute = _features_of(extractor)
    out: Tensor | None = None
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size].to(device)
        with autocast(extractor, device):
            features = compute(batch)
            if mirror:
                features = (features + compute(batch.flip(-1))) / 2
        with full_precision(device):
            values = after(features.to(torch.float32)).to("cpu")
        if out is None:
            out = torch.empty(len(images), *values.shape[1:])
        out[start : start + len(values)] = values
        on_batch(len(values))
    return out if out is not None else after(torch.empty(0, extractor.feature_dim, device=device)).to("cpu")


def _features_of(extractor: nn.Module) -> Callable[[Tensor], Tensor]:
    """From images, uint8 [b, 3, S, S], to features [b, feature_dim]; one image at a time through code of a user's."""
    compute = getattr(extractor, "extract", None) or (lambda batch: extractor.features(extractor.normalise(batch)))
    if not getattr(extractor, "one_by_one", False):
        return compute
    return lambda batch: torch.cat([compute(image) for image in batch.split(1)])


def replaced_in(network: nn.Module) -> str | None:
    """The layers of an extractor that were replaced, and by what, in words; None for none."""
    return getattr(network, "replaced", None)


def form_of(network: nn.Module) -> int | None:
    """``PatchExtractor.form``; None for other networks, whose features have not changed."""
    return getattr(network, "form", None)


def add_weights(digest: hashlib._Hash, module: nn.Module) -> None:
    """Add a module to a digest: its weights and their names, its configuration, its precision, its form."""
    digest.update(repr(getattr(module, "built_from", None)).encode())  # not all settings show in the weights
    digest.update(f"{precision_of(module)} {form_of(module)}".encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
