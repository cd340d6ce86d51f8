"""A tripwire around private arrays: whatever adds up, compares or sorts *over examples* outside the charged sums trips.

The number of training examples and the size of a batch are made numbers that nothing else has. An operation that takes
an array with such an axis and returns one without it has put many examples into one number: a mean, a maximum, a
covariance, a set of classes, a count. Taking one example, or part of them, out of an array is no such operation.

What runs in threads of its own is not seen (PatchNet's extraction, one image at a time); a test of isolated
extraction covers that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dprandp import data, tune
from dprandp.dpsgd import clipped_sums, units
from dprandp.privacy.randomness import PoissonSampler
from dprandp.privacy.selection import Trial
from dprandp.probe import head

EXAMPLES, BATCH = 117, 29
"""Sizes of the axes that are watched."""

TAKES_A_PART = {
    "slice", "select", "index", "index_select", "unbind", "split", "split_with_sizes", "narrow", "as_strided", "gather",
    "view", "_unsafe_view", "reshape", "expand", "unsqueeze", "squeeze",
}  # fmt: skip
"""Operations that hand out elements as they are."""


class Tripped(AssertionError):
    """Something was computed over many private examples."""


class Watched(np.ndarray):
    """A numpy array that trips on functions and reductions over examples."""

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        plain = [np.asarray(x) if isinstance(x, Watched) else x for x in inputs]
        result = getattr(ufunc, method)(*plain, **options)
        _judge(f"numpy.{ufunc.__name__}.{method}", plain, [result])
        return _watch(result)

    def __array_function__(self, function, types, arguments, options):
        plain = [np.asarray(x) if isinstance(x, Watched) else x for x in arguments]
        result = function(*plain, **options)
        parts = result if isinstance(result, tuple | list) else [result]
        _judge(f"numpy.{function.__name__}", plain, parts)
        return _watch(result)

    def tolist(self) -> list:
        raise Tripped("private values were taken out of their array")


_allowed = 0


@contextlib.contextmanager
def charged() -> Iterator[None]:
    """Inside, examples may be added up: what comes out is charged and gets noise."""
    global _allowed
    _allowed += 1
    try:
        yield
    finally:
        _allowed -= 1


def _private(value: Any) -> bool:
    if not isinstance(value, torch.Tensor | np.ndarray):
        return False
    return any(size > 0 and (size % EXAMPLES == 0 or size % BATCH == 0) for size in value.shape)  # flattened ones too


def _judge(name: str, inputs: list[Any], outputs: list[Any]) -> None:
    if _allowed or not any(_private(value) for value in inputs):
        return
    results = [value for value in outputs if isinstance(value, torch.Tensor | np.ndarray | np.generic | float | int)]
    if any(not _private(value) for value in results if 0 not in getattr(value, "shape", ())):
        raise Tripped(f"{name} has computed something over many private examples")


def _watch(value: Any) -> Any:
    return value.view(Watched) if isinstance(value, np.ndarray) and _private(value) else value


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        name = function.overloadpacket.__name__
        if name.rstrip("_") not in TAKES_A_PART:
            _judge(f"torch.{name}", tree_leaves((arguments, options)), tree_leaves(result))
        return result


def install(patch: pytest.MonkeyPatch) -> list[str]:
    """Set the tripwire for data of ``EXAMPLES`` records; batches of the sampler have ``BATCH`` of them.

    Returns:
        The charged sums, as they are made.
    """
    train, examine, sums = data.Dataset.train, data.Dataset.examine, []

    def charged_sum(function: Callable) -> Callable:
        def wrapped(*arguments, **options):
            sums.append(function.__name__)
            with charged():
                return function(*arguments, **options)

        return wrapped

    def draw(sampler: PoissonSampler) -> np.ndarray:
        assert sampler.examples == EXAMPLES
        return np.arange(EXAMPLES if sampler.sample_rate == 1 else BATCH)

    def watched_train(dataset: data.Dataset) -> data.Split:
        with charged():  # the check of what is read may refuse it, and a rest is read through the whole
            split = train(dataset)
        return data.Split(split.images.view(Watched), split.labels.view(Watched))

    def unwatched_examine(dataset: data.Dataset) -> data.Examination:
        with charged():  # before the first charge: what is refused, and counts for the owner, which no stage uses
            return examine(dataset)

    for owner, name in (
        (head, "clipped_softmax_sum"), (clipped_sums, "sum_of_clipped"), (units, "clipped_softmax_sum_of_units"),
        (tune, "clipped_softmax_sum"), (Trial, "score"),  # a count of right answers, with noise
    ):  # fmt: skip
        patch.setattr(owner, name, charged_sum(getattr(owner, name)))
    patch.setattr(PoissonSampler, "draw", draw)
    patch.setattr(data.Dataset, "train", watched_train)
    patch.setattr(data.Dataset, "examine", unwatched_examine)
    return sums


def watching() -> TorchDispatchMode:
    """A context in which torch is watched."""
    return _Watch()
