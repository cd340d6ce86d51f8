"""The projection head of contrastive pretraining (Tang et al. 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dprandp.errors import UsageError
from dprandp.vision.wrn import initialise


class ProjectionHead(nn.Module):
    """The head of contrastive pretraining, thrown away afterwards: flatten, two hidden layers, a linear embedding.

    flatten -> Linear -> GroupNorm -> ReLU -> Linear -> GroupNorm -> ReLU -> Linear. No pooling before it. The first two
    layers have no bias, for GroupNorm follows. The embedding is not of unit length: the loss normalises it.

    Args:
        input_dim: size of a flattened feature map, ``map_channels · 8 · 8`` for 32×32 images (16384 for WRN-16-4).
        hidden_dim: published 4096, which is 84 million weights; 256 to 512 is enough for small networks.
        embedding_dim: published 128.
        norm_groups: must divide hidden_dim.
        generator: of the initial weights; None means torch's global one.

    Raises:
        UsageError: a size below 1, or norm_groups does not divide hidden_dim.
    """

    def __init__(
        self,
        input_dim: int,
        *,
        hidden_dim: int = 4096,
        embedding_dim: int = 128,
        norm_groups: int = 16,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = (input_dim, hidden_dim, embedding_dim, norm_groups)
        if min(sizes) < 1 or hidden_dim % norm_groups:
            raise UsageError(
                f"projection head sizes {sizes} (input, hidden, embedding, groups) do not fit",
                fix="use positive sizes and a hidden size that the number of groups divides",
            )
        self.linear1 = nn.Linear(input_dim, hidden_dim, bias=False)
        self.norm1 = nn.GroupNorm(norm_groups, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.norm2 = nn.GroupNorm(norm_groups, hidden_dim)
        self.linear3 = nn.Linear(hidden_dim, embedding_dim)
        initialise(self, generator)

    def first_layer(self, feature_map: Tensor) -> Tensor:
        """[B, C, H, W] or [B, input_dim] -> [B, hidden_dim], >= 0: the features of the published probe baseline."""
        # contiguous() first: flatten must list channel, row, column whatever the memory format
        return F.relu(self.norm1(self.linear1(feature_map.contiguous().flatten(1))))

    def forward(self, feature_map: Tensor) -> Tensor:
        """[B, C, H, W] or [B, input_dim] -> embedding [B, embedding_dim], not normalised."""
        return self.linear3(F.relu(self.norm2(self.linear2(self.first_layer(feature_map)))))
