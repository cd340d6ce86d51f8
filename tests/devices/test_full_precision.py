"""Clipped parts are added with all the bits of float32, or not at all: with fewer one record would weigh too much."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from dprandp.errors import UsageError
from dprandp.privacy.clipping import clipped_softmax_sum, clipped_softmax_sum_of_units, clipped_sum
from dprandp.runs.context import prepare_device

ROWS, LABELS, WEIGHT = torch.ones(4, 3), torch.zeros(4, dtype=torch.int64), torch.ones(3, 2)

SUMS = {
    "gradients": lambda: clipped_sum({"w": ROWS}, 1.0),
    "a head's": lambda: clipped_softmax_sum(ROWS, LABELS, WEIGHT, 1.0),
    "units'": lambda: clipped_softmax_sum_of_units(ROWS, LABELS, torch.tensor([0, 2, 4]), WEIGHT, 1.0),
}


@contextlib.contextmanager
def fewer_bits(how: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    try:
        if how == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                yield
        else:
            torch.set_float32_matmul_precision(how)
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("how", ["high", "medium", "autocast"])
@pytest.mark.parametrize("kind", SUMS)
def test_products_of_fewer_bits_are_refused(kind, how):
    SUMS[kind]()
    with fewer_bits(how), pytest.raises(UsageError, match="more than the clip norm"):
        SUMS[kind]()


def test_settings_of_torch_that_contradict_each_other_are_refused(monkeypatch):
    def contradiction():
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", contradiction)
    with pytest.raises(UsageError, match="more than the clip norm"):
        SUMS["a head's"]()


def test_a_command_asks_for_all_bits_whatever_its_container_set():
    with fewer_bits("high"):
        prepare_device("cpu")
        assert torch.get_float32_matmul_precision() == "highest"
