"""The other side: a DP-SGD step by jax-privacy, compiled, with its own clipped gradients and noise.

``jax_privacy.clipped_grad`` takes gradients example by example (``vmap``, in microbatches), clips and adds them up; its
``gaussian_privatizer`` adds the noise (a seeded generator: no noise for production). Everything is one compiled
function. The library is in no extra of this package; where it is installed, it takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmark.cases import PeerMissing
from benchmark.peer_opacus import DpSgd
from dprandp.models.wrn import WideResNet

JAX = "jax-privacy"

Loss = Callable[[Any, Any, Any], Any]
"""(parameters, one record's inputs, its label) -> scalar."""


def library() -> tuple[Any, Any]:
    """The modules ``jax`` and ``jax_privacy``.

    Raises:
        PeerMissing: not installed.
    """
    try:
        import jax
        import jax_privacy
    except ImportError as error:
        raise PeerMissing(f"cannot be imported ({error}); pip install jax-privacy brings it") from error
    return jax, jax_privacy


class JaxStep:
    """One step of SGD with momentum on the noisy mean of clipped gradients.

    Args:
        loss: of one record.
        parameters: name -> array; moved by every call.
        settings: of the step.
        microbatch: records whose gradients are in memory together; the number of records must be a multiple.
    """

    def __init__(self, loss: Loss, parameters: Mapping[str, Tensor], settings: DpSgd, microbatch: int) -> None:
        jax, privacy = library()
        clipped = privacy.clipped_grad(
            loss, l2_clip_norm=settings.clip_norm, batch_argnums=(1, 2), keep_batch_dim=False,
            microbatch_size=microbatch,
        )  # fmt: skip
        noise = privacy.noise_addition.gaussian_privatizer(
            stddev=settings.noise_multiplier * settings.clip_norm, prng_key=0
        )

        def update(state: tuple, inputs: Any, labels: Any) -> tuple:
            values, velocity, key = state
            noisy, key = noise.update(clipped(values, inputs, labels), key)
            velocity = jax.tree.map(lambda v, g: settings.momentum * v + g / settings.batch, velocity, noisy)
            return jax.tree.map(lambda value, v: value - settings.lr * v, values, velocity), velocity, key

        values = {name: as_array(value) for name, value in parameters.items()}
        self._update = jax.jit(update)
        self._state = (values, jax.tree.map(jax.numpy.zeros_like, values), noise.init(values))
        self._wait = jax.block_until_ready

    def __call__(self, inputs: Any, labels: Any) -> None:
        """One update on the records of a batch, jax arrays."""
        self._state = self._wait(self._update(self._state, inputs, labels))

    def parameters(self) -> dict[str, Tensor]:
        """Those that the steps have moved."""
        return {name: torch.from_numpy(np.array(value)) for name, value in self._state[0].items()}


def as_array(value: Tensor) -> Any:
    """A copy for jax."""
    return library()[0].numpy.array(value.detach().numpy())


def linear_loss(values: Any, x: Any, label: Any) -> Any:
    """Softmax cross-entropy of a linear layer without bias, for one row."""
    jax, _ = library()
    return -jax.nn.log_softmax(x @ values["head"])[label]


def wrn_loss(extractor: WideResNet) -> Loss:
    """The mean cross-entropy over the views [K, channels, H, W] of one record: a WRN of the published layer order, its
    filters not standardised, global and quarter means, and a linear head; parameters by the classifier's names."""
    jax, _ = library()
    numpy = jax.numpy

    def conv(values: Any, name: str, x: Any, stride: int, padding: int) -> Any:
        out = jax.lax.conv_general_dilated(
            x, values[f"{name}.weight"], (stride, stride), [(padding, padding)] * 2,
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
        )  # fmt: skip
        return out + values[f"{name}.bias"][:, None, None]

    def activated(values: Any, name: str, x: Any, groups: int, eps: float) -> Any:
        x = jax.nn.relu(x)
        grouped = x.reshape(len(x), groups, -1)
        mean, variance = grouped.mean(axis=2, keepdims=True), grouped.var(axis=2, keepdims=True)
        x = ((grouped - mean) * jax.lax.rsqrt(variance + eps)).reshape(x.shape)
        return x * values[f"{name}.weight"][:, None, None] + values[f"{name}.bias"][:, None, None]

    def loss(values: Any, views: Any, label: Any) -> Any:
        groups, eps = extractor.final_norm.num_groups, extractor.final_norm.eps
        x = conv(values, "extractor.stem", views, 1, 1)
        for number, block in enumerate(extractor.blocks):
            name, stride, skip = f"extractor.blocks.{number}", block.conv1.stride[0], x
            if block.reshapes:
                skip = conv(
                    values, f"{name}.skip_conv", activated(values, f"{name}.skip_norm", x, groups, eps), stride, 0
                )
            x = conv(values, f"{name}.conv1", activated(values, f"{name}.norm1", x, groups, eps), stride, 1)
            x = skip + conv(values, f"{name}.conv2", activated(values, f"{name}.norm2", x, groups, eps), 1, 1)
        x = activated(values, "extractor.final_norm", x, groups, eps)
        half = x.shape[2] // 2
        quarters = x.reshape(*x.shape[:2], 2, half, 2, half).mean(axis=(3, 5)).reshape(len(x), -1)
        features = numpy.concatenate([x.mean(axis=(2, 3)), quarters], axis=1)
        return -jax.nn.log_softmax(features @ values["head"])[:, label].mean()

    return loss
