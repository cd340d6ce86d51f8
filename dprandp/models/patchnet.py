"""Patch layers: convolutional layers whose filters are a dictionary of synthetic patches; ``PatchNet`` has one.

The classical patch pipeline (Coates & Ng 2011, "The importance of encoding versus training with sparse coding and
vector quantization") with every learned part taken from images of a random process (``dictionary.py``):

    local contrast normalisation -> whitening to ``patch_dims`` components -> filters -> two-sided thresholded ReLU
    -> square root -> averages over five regions

The square root (Perronnin et al. 2010, "Improving the Fisher kernel for large-scale image classification") reduces the
differences among responses: a linear head on averages of roots reads how often a pattern occurs rather than where it is
strongest. Filters and biases are ordinary ``nn.Parameter``s, so DP-SGD can tune them; the whitening of patches is not
trained. No layer mixes images.

``PatchExtractor.precision`` decides whether products are in float32 or bfloat16; all else is in float32.

*Compiled loops* run over one image on a CPU, each in a single pass over memory. Torch would write and read an array as
large as all responses several times for each of them. Numba compiles the loops on first use (a few seconds) and keeps
the machine code in a cache on disk. The same arithmetic is here in torch, for gradients and for other devices; a test
compares the two. Responses are float32, or bfloat16 as NumPy can hold it: uint16, the upper half of a float32's bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor, nn
from torch.nn import functional

from dprandp import losses
from dprandp.models.precision import dtype_of, full_precision
from dprandp.models.whitening import Part
from dprandp.threads import in_parts

THRESHOLD = 0.25
"""Responses in [-THRESHOLD, THRESHOLD] count as zero."""

CENTRE = 0.25
"""Standard deviation of the central region's Gaussian, as a fraction of the side."""


CONTRAST_FLOOR = 10 / 255
"""Added to a patch's standard deviation before dividing by it, in units of [0, 1] pixels, so that flat patches stay
flat."""

RESPONSE_FLOOR = 1e-4
"""Added to a response beyond the threshold before its root is taken, so that the slope at zero is 50 and not infinite;
the root of the floor is subtracted again."""

TILE = 400
"""Filters handled together in ``extract``: 729 positions x 400 filters x 4 bytes stay near a core's L2 cache."""


class Product(NamedTuple):
    """``rows @ matrix + offset`` in one precision, float32 or bfloat16, for rows float32 [n, a]."""

    matrix: Tensor  # [a, b], contiguous
    offset: Tensor  # [b]

    @classmethod
    def of(cls, weight: Tensor, offset: Tensor, kind: torch.dtype) -> Product:
        """From a weight [b, a] as layers have it."""
        return cls(weight.detach().t().to(kind).contiguous(), offset.detach().to(kind))

    def tiles(self) -> list[Product]:
        """The same for ``TILE`` columns at a time."""
        columns = zip(self.matrix.split(TILE, dim=1), self.offset.split(TILE), strict=True)
        return [Product(matrix.contiguous(), offset) for matrix, offset in columns]

    def __call__(self, rows: Tensor, room: Tensor | None = None) -> Tensor:
        """[n, b] in the product's precision; in ``room``, [n b] or more numbers, where that is given."""
        out = None if room is None else room[: len(rows) * len(self.offset)].view(len(rows), -1)
        return torch.addmm(self.offset, rows.to(self.matrix.dtype), self.matrix, out=out)


def as_array(responses: Tensor) -> np.ndarray:
    """Of the same memory, for compiled loops: NumPy has no bfloat16, whose bits are a uint16's there."""
    return (responses.view(torch.uint16) if responses.dtype == torch.bfloat16 else responses).numpy()


def region_profiles(positions: int) -> Tensor:
    """Weights of the first half of a side, its second half, and its middle, for so many positions: [positions, 3].

    The halves overlap between 1/4 and 3/4 of the side. Each column has sum 1.
    """
    places = (torch.arange(positions) + 0.5) / positions
    first = torch.cos(math.pi / 2 * (2 * places - 0.5).clamp(0, 1)).square()
    middle = torch.exp(-(((places - 0.5) / CENTRE) ** 2) / 2)
    profiles = torch.stack([first, 1 - first, middle], dim=1)
    return profiles / profiles.sum(dim=0)


def region_weights(positions: int) -> Tensor:
    """Regions to average responses over: four overlapping quarters, and a centre that fades out.

    As no region has a hard border, averages change little when an object moves a little; experiment in
    ``scripts/README.md``, "Regions". For so many positions of patches per side: float32 [5, positions**2], each row of
    sum 1.
    """
    first, second, middle = region_profiles(positions).t()
    pairs = [(first, first), (first, second), (second, first), (second, second), (middle, middle)]
    return torch.stack([torch.outer(down, across).flatten() for down, across in pairs])


class PatchLayer(nn.Module):
    """A dictionary over patches of pixels (``PatchNet``) or of responses (``ResponseLayer``).

    Args:
        filters: size of the dictionary, F. width: numbers in a patch, d.
        patch_dims: components r to which patches are whitened.
        positions: patches per side; there are L = positions**2 of them.

    Attributes:
        basis: [r, d] float32, whitening of patches in the order of ``torch.nn.functional.unfold``; centre: [r] float32,
            the whitened mean patch. Not trained.
        weight: [F, r] float32, the filters on whitened patches. bias: [F] float32.
        pooling: [R, L] float32, the weights of R regions over the positions. feature_dim: 2 * R * F.
    """

    def __init__(self, filters: int, *, width: int, patch_dims: int, positions: int) -> None:
        super().__init__()
        self.positions = positions
        self.weight = nn.Parameter(torch.zeros(filters, patch_dims))
        self.bias = nn.Parameter(torch.zeros(filters))
        self.register_buffer("basis", torch.eye(patch_dims, width))
        self.register_buffer("centre", torch.zeros(patch_dims))
        self.register_buffer("pooling", region_weights(positions), persistent=False)
        self.register_buffer("profiles", region_profiles(positions), persistent=False)
        self.feature_dim = 2 * len(self.pooling) * filters

    def whitened(self, patches: Tensor) -> Tensor:
        """Whitened patches: [B, d, L] to [B, r, L]."""
        return self.basis @ patches - self.centre[:, None]

    def pooled(self, patches: Tensor) -> Tensor:
        """Features, differentiable: contrast-normalised patches [B, d, L] to [B, 2, R, F].

        The results are for each sign, in each region, of each filter: the mean of √(excess + floor) - √floor with the
        part of ±response beyond ``THRESHOLD`` as excess, and ``RESPONSE_FLOOR``.
        """
        responses = (self.weight @ self.whitened(patches) + self.bias[:, None]).transpose(1, 2).float()
        signs = [root(functional.relu(sign * responses - THRESHOLD)) for sign in (1, -1)]
        with full_precision(patches.device):
            return torch.stack([self.pooling @ sign for sign in signs], dim=1)

    def products(self, kind: torch.dtype) -> list[Product]:
        """What ``pooled_rows`` of this layer and a precision need: the whitening, then the filters in tiles."""
        return [Product.of(self.basis, -self.centre, kind), *Product.of(self.weight, self.bias, kind).tiles()]

    @torch.no_grad()
    def pooled_rows(self, patches: Tensor, products: list[Product], room: Tensor, out: Tensor) -> None:
        """The same numbers of one image, several times faster, on a CPU: a tile's responses stay in the cache.

        Args:
            patches: float32 [L, d], patch after patch. products: of this layer.
            room: [L TILE] or more, in their precision; overwritten, as fresh memory for each tile would take long.
            out: float32 [2, R, F], to be filled.
        """
        whitening, *filters = products
        whitened, profiles, start = whitening(patches), self.profiles.numpy(), 0
        for tile in filters:
            count = len(tile.offset)
            sums, means = torch.empty(6, count), torch.empty(2, len(self.pooling), count)
            responses = as_array(tile(whitened, room))
            pooled_roots(responses, profiles, THRESHOLD, RESPONSE_FLOOR, sums.numpy(), means.numpy())
            out[..., start : start + count] = means
            start += count


def root(excess: Tensor) -> Tensor:
    """√(excess + ``RESPONSE_FLOOR``) - √``RESPONSE_FLOOR``, elementwise."""
    return (excess + RESPONSE_FLOOR).sqrt() - math.sqrt(RESPONSE_FLOOR)


class PatchExtractor:
    """What one patch layer and two have in common as an extractor; ``chain`` has the layers from the pixels upwards.

    ``precision`` is of its products, 'float32' or 'bfloat16'.
    """

    chain: tuple[PatchLayer, ...]
    form: int = 2
    """Raised when the features of the same weights change, so that nothing fitted to the earlier ones is used with
    them. In form 1 the root was taken after pooling."""

    @staticmethod
    def normalise(images: Tensor) -> Tensor:
        """uint8 [..., 3, H, W] to float32 in [0, 1]. The patches' own contrast normalisation does the rest."""
        return images.to(torch.float32) / 255

    def levels(self, images: Tensor) -> list[Tensor]:
        """Patches of each layer, before they are whitened: float [B, 3, 32, 32] in [0, 1] to [B, d, L] each."""
        first, *later = self.chain
        found = [first.pixel_patches(images)]
        for layer in later:
            found.append(layer.lift(found[-1]))
        return found

    def features(self, images: Tensor) -> Tensor:
        """Differentiable features: float [B, 3, 32, 32] in [0, 1] to [B, feature_dim].

        For each layer, in order, what ``PatchLayer.pooled`` gives.
        """
        pooled = [layer.pooled(patches) for layer, patches in zip(self.chain, self.levels(images), strict=True)]
        return torch.cat([each.flatten(1) for each in pooled], dim=1)

    @torch.no_grad()
    def extract(self, images: Tensor) -> Tensor:
        """The same numbers as ``features`` of uint8 [B, 3, S, S], several times faster on a CPU, without gradients.

        It computes a tile of filters at a time, in as many threads as torch may use, each with whole images.
        """
        if images.device.type != "cpu":
            return self.features(self.normalise(images))
        out = torch.empty(len(images), sum(layer.feature_dim for layer in self.chain))
        if not len(images):
            return out
        kind = dtype_of(self)
        products = [layer.products(kind) for layer in self.chain]
        lifts = [layer.lifts(kind) for layer in self.chain[1:]]
        widths = [layer.feature_dim for layer in self.chain]

        def work(part: int, parts: int) -> None:
            room = torch.empty(max(layer.positions for layer in self.chain) ** 2 * TILE, dtype=kind)
            for image, row in zip(self.normalise(images[part::parts]), out[part::parts], strict=True):
                patches = self.chain[0].pixel_rows(image)
                for index, (layer, own) in enumerate(zip(self.chain, row.split(widths), strict=True)):
                    if index > 0:
                        patches = layer.lift_rows(patches, lifts[index - 1])
                    layer.pooled_rows(patches, products[index], room, own.unflatten(0, (2, len(layer.pooling), -1)))

        with full_precision(images.device):
            in_parts(work, min(torch.get_num_threads(), len(images)))
        return out


class PatchNet(PatchExtractor, PatchLayer):
    """A dictionary over patches of pixels.

    Args:
        filters: size of the dictionary, F. patch_size: side of a patch in pixels.
        patch_dims: components r to which patches are whitened; None: all 3 * patch_size**2.
        stride: pixels between neighbouring patches. 2 costs a quarter of 1, so that four times the filters fit.
        input_size: side of an image in pixels.
    """

    def __init__(
        self, filters: int, *, patch_size: int = 6, patch_dims: int | None = None, stride: int = 1, input_size: int = 32
    ) -> None:
        width = 3 * patch_size**2
        positions = (input_size - patch_size) // stride + 1
        super().__init__(filters, width=width, patch_dims=patch_dims or width, positions=positions)
        self.patch_size, self.stride, self.input_size = patch_size, stride, input_size
        self.parts = (Part(self.feature_dim, 1.0),)

    @property
    def chain(self) -> tuple[PatchLayer, ...]:
        return (self,)

    def pixel_patches(self, images: Tensor) -> Tensor:
        """Contrast-normalised patches: float [B, 3, H, W] in [0, 1] to [B, d, L]."""
        return normalise_patches(functional.unfold(images, self.patch_size, stride=self.stride))

    def pixel_rows(self, image: Tensor) -> Tensor:
        """The same of one image, float32 [3, H, W] in [0, 1], patch after patch: [L, d]."""
        rows = torch.empty(self.positions**2, self.basis.shape[1])
        normalised_rows(image.numpy(), self.patch_size, self.stride, CONTRAST_FLOOR, rows.numpy())
        return rows


def normalise_patches(patches: Tensor) -> Tensor:
    """Patches of pixels [..., d, L] minus their mean, over (their standard deviation + ``CONTRAST_FLOOR``)."""
    centred = patches - patches.mean(dim=-2, keepdim=True)
    deviation = centred.square().mean(dim=-2, keepdim=True).add(1e-12).sqrt()  # 1e-12: sqrt has no gradient at 0
    return centred / (deviation + CONTRAST_FLOOR)


WINDOW, STEP = 3, 2
"""Responses are averaged over WINDOW x WINDOW positions, at every STEP-th."""

RESPONSE_PATCH = 3
"""Side of a patch of responses, in positions of the maps."""

ROOT_FLOOR = 0.01
"""Added to a window's average before its root is taken, so that the slope at zero is 5 and not infinite."""

LENGTH_FLOOR = 0.1
"""Added to a patch's length, relative to √d, the length of one with unit variance, so that empty patches stay short."""

SHARE = 0.35
"""Of the second layer in the squared length of all features; experiment in ``scripts/README.md``, "Shares"."""


class ResponseLayer(PatchLayer):
    """The second layer: a dictionary over patches of the responses to the patches below.

    The same recipe a second time (compare Coates & Ng 2011, "Selecting receptive fields in deep networks"):

        a small dictionary on the patches below -> two-sided ReLU -> 3 x 3 averages at every second position -> root
        -> whitened channels -> patches of 3 x 3 positions, each divided by its length -> ``PatchLayer``

    These features describe neighbouring patterns, which those of one layer do not. On a 32-pixel image a first layer of
    6-pixel patches has 27 x 27 of them, the second 11 x 11 (of 12 pixels).

    Args:
        filters: size of the dictionary, F. below: the layer below; only read, not kept.
        map_filters: size M of the small dictionary; the maps have 2 M channels, one for each sign.
        map_dims: channels kept after whitening, C.
        patch_dims: components r to which patches of responses are whitened; at most C RESPONSE_PATCH**2.

    Attributes:
        map_weight: [M, d of the layer below] float32 on patches before whitening, map_bias: [M]; channel_basis:
            [C, 2 M], channel_centre: [C]: whitening of the channels. None of the four is trained privately.
    """

    def __init__(
        self, filters: int, below: PatchLayer, *, map_filters: int = 256, map_dims: int = 64, patch_dims: int = 192
    ) -> None:
        width = map_dims * RESPONSE_PATCH**2
        positions = positions_above(below.positions)
        super().__init__(filters, width=width, patch_dims=min(patch_dims, width), positions=positions)
        self.below_positions = below.positions
        self.register_buffer("map_weight", torch.zeros(map_filters, below.basis.shape[1]))
        self.register_buffer("map_bias", torch.zeros(map_filters))
        self.register_buffer("channel_basis", torch.eye(map_dims, 2 * map_filters))
        self.register_buffer("channel_centre", torch.zeros(map_dims))

    def maps(self, below: Tensor) -> Tensor:
        """Patches below [B, d, L] to roots of averaged responses, [B, 2 M, S, S]; first all positive ones."""
        responses = self.map_weight @ below + self.map_bias[:, None]
        responses = responses.unflatten(2, (self.below_positions, self.below_positions))
        both = torch.cat([responses - THRESHOLD, -responses - THRESHOLD], dim=1)
        return functional.avg_pool2d(functional.relu(both), WINDOW, STEP).add(ROOT_FLOOR).sqrt()

    def lift(self, below: Tensor) -> Tensor:
        """Patches below [B, d, L] to patches u of responses [B, d', L'], each over (‖u‖ / √d' + ``LENGTH_FLOOR``)."""
        maps = self.maps(below)
        channels = self.channel_basis @ maps.flatten(2) - self.channel_centre[:, None]
        patches = functional.unfold(channels.unflatten(2, maps.shape[2:]), RESPONSE_PATCH)
        return patches / (patches.norm(dim=1, keepdim=True) / math.sqrt(patches.shape[1]) + LENGTH_FLOOR)

    def lifts(self, kind: torch.dtype) -> tuple[Product, Product]:
        """What ``lift_rows`` needs in a precision: the small dictionary, and the whitening of the channels."""
        return (
            Product.of(self.map_weight, self.map_bias, kind),
            Product.of(self.channel_basis, -self.channel_centre, kind),
        )

    @torch.no_grad()
    def lift_rows(self, below: Tensor, lifts: tuple[Product, Product]) -> Tensor:
        """The same as ``lift`` of one image, faster on a CPU: [L, d] to [L', d'], patch after patch."""
        dictionary, whitening = lifts
        responses = dictionary(below)
        side = self.positions + RESPONSE_PATCH - 1
        maps = torch.empty(side**2, 2 * responses.shape[1])
        window_roots(as_array(responses), self.below_positions, THRESHOLD, ROOT_FLOOR, maps.numpy())
        channels = whitening(maps).float().view(side, side, -1)
        windows = channels.unfold(0, RESPONSE_PATCH, 1).unfold(1, RESPONSE_PATCH, 1)
        patches = windows.reshape(self.positions**2, -1)
        return patches.div_(patches.norm(dim=1, keepdim=True).div_(math.sqrt(patches.shape[1])).add_(LENGTH_FLOOR))


class DeepPatchNet(PatchExtractor, nn.Module):
    """A ``PatchNet`` and a ``ResponseLayer`` on top: the features of both, side by side, each whitened separately."""

    def __init__(self, first: PatchNet, second: ResponseLayer) -> None:
        super().__init__()
        self.first, self.second, self.input_size = first, second, first.input_size
        self.feature_dim = first.feature_dim + second.feature_dim
        self.parts = (Part(first.feature_dim, 1 - SHARE), Part(second.feature_dim, SHARE))

    @property
    def chain(self) -> tuple[PatchLayer, ...]:
        return (self.first, self.second)


def positions_above(positions: int) -> int:
    """Patches of responses per side over so many patches below; under 1 where there is no room for any."""
    return (positions - WINDOW) // STEP + 1 - RESPONSE_PATCH + 1


# ------------------------------------------------------------------------------------------- per-example gradients


def patch_layers(extractor: nn.Module) -> dict[str, PatchLayer]:
    """The layers of an extractor by the prefix of their parameters' names in a ``Classifier``; none for other kinds."""
    if isinstance(extractor, PatchNet):
        return {"extractor": extractor}
    if isinstance(extractor, PatchExtractor):
        return {f"extractor.{name}": layer for name, layer in extractor.named_children()}
    return {}


@torch.no_grad()
def per_example_gradients(
    model: nn.Module, views: Tensor, labels: Tensor, class_weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Gradients of the mean loss over each example's views, in closed form, on the CPU.

    Several times faster than automatic ones. In each layer: responses R = W P + b, features f = pooled roots of the
    excess of ±R, u = (f − mean) A, z = √share · u / ‖u‖; then scores = z H. Backwards, the gradient of R is the root's
    slope times a weighted sum of five regions' numbers, so one example costs two matrix products of the forward's size
    and stays in the cache. Each layer is a separate chain: nothing below its dictionary is trained. Features are in the
    extractor's precision, whitening too, also backwards; the other products of the gradients are in float32.

    Args:
        model: a ``Classifier`` whose extractor has ``patch_layers``. views: uint8 [B, K, 3, 32, 32].
        labels, class_weights: as of ``losses.residual``, for B examples.

    Returns:
        float32 by the model's names: of each layer 'weight' [B, F, r] and 'bias' [B, F]; 'head' [B, dims, classes].

    Guarantee:
        Row i is a function of example i alone.
    """
    with full_precision(views.device):
        return _gradients(model, views, labels, class_weights)


def _gradients(
    model: nn.Module, views: Tensor, labels: Tensor, class_weights: Tensor | None
) -> dict[str, Tensor]:
    examples, count = views.shape[:2]
    flat = views.flatten(0, 1)
    features, whitener = model.extractor.extract(flat), model.whitener
    units, lengths = [], []
    for own, _ in whitener.rows():
        whitened = whitener.mapped(features, own)
        lengths.append(whitened.norm(dim=1, keepdim=True).clamp_min(1e-12))
        units.append(whitened / lengths[-1])
    unit = torch.cat([part * length for part, (_, length) in zip(units, whitener.rows(), strict=True)], dim=1)
    residual, towards = losses.through_head(unit, model.head, labels, count, class_weights)
    gradients = {"head": torch.einsum("bkd,bkc->bdc", *(x.unflatten(0, (examples, count)) for x in (unit, residual)))}
    towards = towards.chunk(len(units), dim=1)
    layers = patch_layers(model.extractor)
    towards_features = []
    for index, ((own, length), (name, layer)) in enumerate(zip(whitener.rows(), layers.items(), strict=True)):
        part = length * towards[index]
        part = (part - units[index] * (units[index] * part).sum(dim=1, keepdim=True)) / lengths[index]
        filters, width = layer.weight.shape
        back = (part.to(whitener.projection.dtype) @ whitener.projection[own].t()).float()
        towards_features.append(back.view(len(flat), 2, len(layer.pooling), filters))
        gradients[f"{name}.weight"] = torch.zeros(examples, filters, width)
        gradients[f"{name}.bias"] = torch.zeros(examples, filters)
    filled = [(layer, gradients[f"{name}.weight"], gradients[f"{name}.bias"]) for name, layer in layers.items()]

    def work(part: int, parts: int) -> None:
        for example in range(part, examples, parts):
            levels = model.extractor.levels(model.extractor.normalise(views[example]))
            for (layer, weight, bias), patches, towards in zip(filled, levels, towards_features, strict=True):
                own = towards[example * count : (example + 1) * count]
                _of_filters(layer, layer.whitened(patches), own, weight[example], bias[example])

    in_parts(work)
    return gradients


def _of_filters(layer: PatchLayer, patches: Tensor, pooled: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Add up one example's gradients over its views, a tile of filters at a time.

    Args:
        patches: [K, r, L], whitened. pooled: [K, 2, R, F], gradients of the features.
        weight: [F, r], bias: [F], to be added to.
    """
    for columns, (positive, negative) in zip(patches, pooled, strict=True):
        for start in range(0, len(layer.weight), TILE):
            tile = slice(start, start + TILE)
            responses = torch.addmm(layer.bias[tile, None], layer.weight[tile], columns)
            above, below = (sign[:, tile].t() @ layer.pooling for sign in (positive, negative))
            slope = above.mul_(responses > THRESHOLD).sub_(below.mul_(responses < -THRESHOLD))
            slope.div_(responses.abs_().sub_(THRESHOLD).clamp_(min=0).add_(RESPONSE_FLOOR).sqrt_().mul_(2))  # root's
            weight[tile].addmm_(slope, columns.t())
            bias[tile].add_(slope.sum(dim=1))


# ------------------------------------------------------------------------------------------------------- compiled loops


def compiled(loop: Callable) -> Callable:
    """``nogil``: threads run it side by side. ``fastmath``: sums may be reordered, as in every BLAS."""
    settings = {"nogil": True, "fastmath": True}
    try:
        return njit(cache=True, **settings)(loop)
    except RuntimeError:  # no folder for the cache can be written: each process compiles
        return njit(**settings)(loop)


@intrinsic
def as_float32(context: Any, number: types.Type) -> tuple[Any, Callable]:
    """In a compiled loop: a float32 as it is, or the float32 whose upper half a uint16 has (a bfloat16's value)."""
    if number == types.float32:
        return types.float32(types.float32), lambda target, builder, signature, given: given[0]

    def shifted(target: Any, builder: ir.IRBuilder, signature: Any, given: list[ir.Value]) -> ir.Value:
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(given[0], word), ir.Constant(word, 16)), ir.FloatType())

    return types.float32(types.uint16), shifted


@compiled
def normalised_rows(image: np.ndarray, size: int, stride: int, floor: float, out: np.ndarray) -> None:
    """Each patch minus its mean, over (its standard deviation + ``floor``).

    Args:
        image: float32 [C, H, W]. size: side of a patch. stride: pixels between patches.
        out: float32 [L, C size²], to be filled, patch after patch.
    """
    channels, width = image.shape[0], image.shape[2]
    across = (width - size) // stride + 1
    for place in range(len(out)):
        top, left = place // across * stride, place % across * stride
        patch = out[place]
        at = 0
        for channel in range(channels):
            for y in range(size):
                for x in range(size):
                    patch[at + x] = image[channel, top + y, left + x]
                at += size
        total = np.float32(0)
        for value in patch:
            total += value
        mean = total / np.float32(len(patch))
        squares = np.float32(0)
        for k in range(len(patch)):
            patch[k] -= mean
            squares += patch[k] * patch[k]
        scale = np.float32(1) / (np.sqrt(squares / np.float32(len(patch)) + np.float32(1e-12)) + np.float32(floor))
        for k in range(len(patch)):
            patch[k] *= scale


@compiled
def pooled_roots(
    responses: np.ndarray, profiles: np.ndarray, threshold: float, floor: float, sums: np.ndarray, out: np.ndarray
) -> None:
    """Roots of thresholded responses of both signs, averaged over the five regions of ``region_weights``.

    A region's weight is a product of one profile down and one across. So each row of positions is summed with the three
    profiles, for both signs, and its sums are added to the five regions. A response has one sign, so it needs one root:
    √(max(|response| - threshold, 0) + floor) - √floor.

    Args:
        responses: float32 or bfloat16 [S², F], position after position.
        profiles: float32 [S, 3], ``region_profiles``.
        sums: float32 [6, F], overwritten.
        out: float32 [2, 5, F], to be filled: both signs, the regions, the filters.
    """
    side, filters = len(profiles), responses.shape[1]
    zero, low, least, root = np.float32(0), np.float32(threshold), np.float32(floor), np.float32(np.sqrt(floor))
    out[:] = 0
    for row in range(side):
        sums[:] = 0
        for column in range(side):
            p = row * side + column
            first, last, middle = profiles[column, 0], profiles[column, 1], profiles[column, 2]
            for f in range(filters):
                response = as_float32(responses[p, f])
                both = np.sqrt(max(abs(response) - low, zero) + least) - root
                positive = both if response > zero else zero
                negative = both - positive
                sums[0, f] += first * positive
                sums[1, f] += last * positive
                sums[2, f] += middle * positive
                sums[3, f] += first * negative
                sums[4, f] += last * negative
                sums[5, f] += middle * negative
        upper, lower, centre = profiles[row, 0], profiles[row, 1], profiles[row, 2]
        for sign in range(2):
            left, right, between = sums[3 * sign], sums[3 * sign + 1], sums[3 * sign + 2]
            for f in range(filters):
                out[sign, 0, f] += upper * left[f]
                out[sign, 1, f] += upper * right[f]
                out[sign, 2, f] += lower * left[f]
                out[sign, 3, f] += lower * right[f]
                out[sign, 4, f] += centre * between[f]


@compiled
def window_roots(responses: np.ndarray, side: int, threshold: float, floor: float, out: np.ndarray) -> None:
    """Roots of (averages of thresholded responses over 3 x 3 windows at every second position + ``floor``).

    Args:
        responses: float32 or bfloat16 [side², M].
        out: float32 [S'², 2 M], to be filled: all positive responses, then all negative ones.
    """
    filters = responses.shape[1]
    above = (side - 3) // 2 + 1
    zero, low, least, ninth = np.float32(0), np.float32(threshold), np.float32(floor), np.float32(1 / 9)
    for place in range(above * above):
        p = place // above * 2 * side + place % above * 2
        both, positive, negative = out[place], out[place, :filters], out[place, filters:]
        both[:] = 0
        for down in range(3):
            x, y, z = responses[p + down * side], responses[p + down * side + 1], responses[p + down * side + 2]
            for f in range(filters):
                a, b, c = as_float32(x[f]), as_float32(y[f]), as_float32(z[f])
                positive[f] += max(a - low, zero) + max(b - low, zero) + max(c - low, zero)
                negative[f] += max(-a - low, zero) + max(-b - low, zero) + max(-c - low, zero)
        for f in range(2 * filters):
            both[f] = np.sqrt(both[f] * ninth + least)
