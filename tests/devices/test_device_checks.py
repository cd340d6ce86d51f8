"""The checks of ``scripts/gpu_check.py`` on an accelerator that is emulated: each architecture, each kind of sum."""

from __future__ import annotations

import dataclasses

import device_checks
import pytest
import torch
from device_checks import QUICK, Sizes
from emulated import emulation, own_process
from test_device_stages import KNOWN

from dprandp.models.wrn import LAYER_ORDERS

WIDE = {"arch": "wrn-10-1", "feature_stages": "all"}
FURTHER: dict[str, dict] = {
    **{order: WIDE | {"layer_order": order, "padding": "same"} for order in LAYER_ORDERS},
    "plain filters": WIDE | {"weight_standardisation": False},
    "nf-resnet-50": {"arch": "nf-resnet-50"},
}
NAMES = [name for name, _ in device_checks.checks(torch.device("cpu"), QUICK)]


def run(sizes: Sizes, name: str) -> None:
    """One check on the device; nothing in it waits but what is known to."""
    with emulation() as (device, waits):
        found = dict(device_checks.checks(device, sizes))[name]()
    assert found["passed"], found
    unknown = {place for place in waits if not place.startswith("outside")} - KNOWN
    assert not unknown, f"the processor waits for the device: {sorted(unknown)}"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "stages" else name for name in NAMES]
)  # the stages have tests of their own
@own_process
def test_a_check_passes(name):
    run(QUICK, name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FURTHER)
@own_process
def test_a_clipped_sum_is_that_of_the_cpu(kind):
    sizes = dataclasses.replace(QUICK, architectures={"wrn": WIDE, kind: FURTHER[kind]}, views=(1,), records=2)
    run(sizes, f"clipped sum, {kind}, 1 views")


@own_process
def test_what_differs_is_noticed():
    """A device that computes other numbers does not pass."""
    wrong = iter((1.0, 1.0, 1.2))
    found = device_checks.compared(lambda where, asked: {"x": torch.full((2,), next(wrong))}, torch.device("cpu"))
    assert not found["passed"]
    assert found["float32 error"] == 0
