"""NF-ResNet-50: a residual network without any normalisation layer (Brock, De & Smith 2021, arXiv 2101.08692).

De et al. 2022 train it on ImageNet with DP-SGD. No layer mixes examples, and none keeps statistics. In place of norms:

* scaled weight standardisation in every convolution (``wrn.StandardisedConv2d``: gain and bias per filter);
* ReLUs scaled by γ ≈ √(2/(1 − 1/π)), so that a unit Gaussian input leaves with unit variance;
* a residual block h + α · s · f(β γ ReLU(h)) with α = .2, β = 1/(the standard deviation that h has at the start), and
  a trained scalar s that starts at 0 (SkipInit), so that the branches start at zero.

β is known in advance: each block adds α² to the variance, and a block with a shortcut convolution resets it to 1 + α²,
as its shortcut starts from the scaled input β γ ReLU(h).

Order of operations: stem conv 7×7 (64, stride 2), max pool 3×3 (stride 2); 3, 4, 6, 3 bottleneck blocks of 256, 512,
1024, 2048 channels (convs 1×1, 3×3 with the stride, 1×1; a quarter of the channels inside), strides 1, 2, 2, 2; scaled
ReLU; global average. All paddings are those of ``wrn.pad_same``. Stochastic depth and dropout are left out: a
record's gradient must not depend on random numbers that it shares with others.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dprandp.models.whitening import Part
from dprandp.models.wrn import Pooling, StandardisedConv2d, initialise, normalise, pad_same

RELU_GAIN = 1.7139588594436646
"""The authors' number, by which their weights were trained; their formula √(2/(1 − 1/π)) gives 1.71286."""

ALPHA = 0.2
DEPTHS = (3, 4, 6, 3)
WIDTHS = (256, 512, 1024, 2048)
STEM_WIDTH = 64


def scaled_relu(x: Tensor) -> Tensor:
    """γ ReLU(x): variance 1 for a standard normal x."""
    return F.relu(x) * RELU_GAIN


class NFBlock(nn.Module):
    """A bottleneck block before which the input is activated.

    The 3×3 convolution and the shortcut have the stride; beta is 1 / the input's standard deviation at initialisation.
    """

    def __init__(self, wide_in: int, wide_out: int, stride: int, beta: float) -> None:
        super().__init__()
        inner = wide_out // 4
        self.beta, self.stride = beta, stride
        self.conv1 = StandardisedConv2d(wide_in, inner, 1)
        self.conv2 = StandardisedConv2d(inner, inner, 3, stride=stride)
        self.conv3 = StandardisedConv2d(inner, wide_out, 1)
        self.reshapes = stride > 1 or wide_in != wide_out
        if self.reshapes:
            self.shortcut = StandardisedConv2d(wide_in, wide_out, 1, stride=stride)
        self.skip_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, wide_in, H, W] to [B, wide_out, ⌈H/stride⌉, ⌈W/stride⌉]."""
        out = scaled_relu(x) * self.beta
        shortcut = self.shortcut(out) if self.reshapes else x
        out = self.conv1(out)
        out = self.conv2(pad_same(scaled_relu(out), 3, self.stride))
        out = self.conv3(scaled_relu(out))
        return shortcut + out * self.skip_gain * ALPHA


class NFResNet50(nn.Module):
    """The network as a feature extractor, with the grids of ``Pooling``; published: ``"1"``.

    For 224×224 images the last map is 7×7; for 32×32 ones it is 1×1. 23,508,048 parameters: those of a ResNet-50
    without its classifier (23,508,032, a gain and a bias per filter for the two of a norm) and 16 skip gains.
    """

    normalise = staticmethod(normalise)
    input_size = 32
    reads_earlier_stages = False

    def __init__(self, *, pooling: str = "1", generator: torch.Generator | None = None) -> None:
        super().__init__()
        self._pooling = Pooling(pooling)
        wide_in, variance = STEM_WIDTH, 1.0
        self.stem = StandardisedConv2d(3, wide_in, 7, stride=2)
        blocks: list[nn.Module] = []
        for depth, wide_out, stride in zip(DEPTHS, WIDTHS, (1, 2, 2, 2), strict=True):
            for place in range(depth):
                blocks.append(NFBlock(wide_in, wide_out, stride if place == 0 else 1, 1 / math.sqrt(variance)))
                variance = (1.0 if place == 0 else variance) + ALPHA**2
                wide_in = wide_out
        self.blocks = nn.Sequential(*blocks)
        self.feature_dim = wide_in * self._pooling.cells
        self.parts = (Part(self.feature_dim, 1.0),)
        initialise(self, generator)

    def units(self) -> list[tuple[str, nn.Module]]:
        """Names and modules in the order of the forward pass: the stem, then each block."""
        return [("stem", _Stem(self.stem)), *((f"blocks.{place}", block) for place, block in enumerate(self.blocks))]

    def trunk(self, x: Tensor) -> Tensor:
        """The residual stream after the last block: normalised float [B, 3, H, W] to [B, 2048, ⌈H/32⌉, ⌈W/32⌉]."""
        return self.blocks(_Stem(self.stem)(x))

    def features(self, x: Tensor) -> Tensor:
        """Average-pooled feature map, float [B, feature_dim]."""
        return self.head_of(self.trunk(x))

    def head_of(self, trunk: Tensor) -> Tensor:
        """The features of images whose :meth:`trunk` is given."""
        return self._pooling(scaled_relu(trunk))

    forward = features


class _Stem(nn.Module):
    """The first convolution with its padding, and the max pool; holds no weights of its own."""

    def __init__(self, conv: StandardisedConv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(pad_same(x, 7, 2))
        return F.max_pool2d(pad_same(out, 3, 2, value=-math.inf), 3, stride=2)
