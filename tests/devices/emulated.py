"""An accelerator that is not there: tensors with real values on a device of their own, held in the CPU's memory.

    with emulation() as (device, waits):   # torch.device("emulated")
        model.to(device)(images)           # raises where a tensor of the CPU meets one of the device
    waits                                  # where the processor had to wait for the device

torch knows one such device in a process, and only if it is told before the first gradient: ``own_process`` runs a test
in a process where it was.

What holds of it is what holds of CUDA: operations want all tensors on one device (a CPU tensor without dimensions, or
one of positions in an index, may be mixed in), ``numpy()`` is refused, and values leave the device by ``.cpu()``,
``.item()`` and what is built on them. Each time is noted, with the line of the package that asked.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import torch
from rank_processes import PROCESSES, start_server
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

NAME = "emulated"
PACKAGE = Path(__file__).resolve().parents[2] / "dprandp"

aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
POSITIONS = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""CUDA takes positions from the CPU, for tensors of its own."""
VALUES_ASKED = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "nonzero_numpy", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "repeat_interleave",
}  # fmt: skip
"""What makes CUDA's host wait: a number is handed over, or the size of the result depends on values."""


class DeviceMismatchError(RuntimeError):
    """A tensor of the CPU and one of the device in one operation."""


class OnDevice(torch.Tensor):
    """A tensor of the device; ``inner`` has its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.inner!r})"

    def tolist(self) -> list:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {}, Counter())


def computed(func: Any, args: tuple, kwargs: dict[str, Any], waits: Counter[str]) -> Any:
    """The operation, on the values; refused where it mixes devices, noted in ``waits`` where the host has to wait."""
    flat, shape = tree_flatten((args, kwargs))
    own = [value for value in flat if isinstance(value, OnDevice)]
    others = [value for value in flat if isinstance(value, torch.Tensor) and not isinstance(value, OnDevice)]
    asked = kwargs.get("device")
    name = func.overloadpacket.__name__
    if own and func not in MOVES:
        wrong = [value for value in others if value.ndim and not (func in POSITIONS and not value.is_floating_point())]
        if wrong or (func in POSITIONS and not isinstance(args[0], OnDevice)):
            raise DeviceMismatchError(f"{func}: a tensor of the CPU meets one of the device")
    left = asked is not None and torch.device(asked).type == "cpu"
    left = left or (func is aten.copy_.default and not isinstance(args[0], OnDevice))
    masked = func in POSITIONS and any(value.dtype == torch.bool for value in own[1:])
    if own and (name in VALUES_ASKED or masked or (func in MOVES and left)):
        waits[f"{caller()}: {name}"] += 1
    if name == "_pin_memory":
        return args[0]
    known = {id(value.inner): value for value in own}
    flat = [value.inner if isinstance(value, OnDevice) else value for value in flat]
    args, kwargs = tree_unflatten(flat, shape)
    if asked is not None:
        kwargs["device"] = torch.device("cpu")
    result = func(*args, **kwargs)
    there = bool(own) if asked is None else torch.device(asked).type == NAME
    there = there and not left

    def placed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, OnDevice):
            return value
        return known.get(id(value)) if id(value) in known else OnDevice(value) if there else value

    return tree_map(placed, result)


def caller() -> str:
    """``file.py function`` of the line of the package that is at work."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents:
            return f"{path.relative_to(PACKAGE)} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside"


class _Mode(TorchDispatchMode):
    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {}, self.waits)


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_Generator = torch.Generator


class _Kind(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, _Generator)


class _CpuGenerator(metaclass=_Kind):
    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        return _Generator("cpu" if torch.device(device).type == NAME else device)


@contextlib.contextmanager
def emulation() -> Iterator[tuple[torch.device, Counter[str]]]:
    """The device, and where the host waited for it: ``file.py function: operation`` -> how often.

    Its generators are the CPU's, so that draws are the same on both.
    """
    if torch._C._get_privateuse1_backend_name() != NAME:
        backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    waits: Counter[str] = Counter()
    torch.Generator = _CpuGenerator
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Mode(waits):
            yield torch.device(NAME, 0), waits
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.Generator = _Generator


def own_process(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test of plain arguments in the one process of all tests that has the device."""

    @functools.wraps(test)
    def there(**arguments: Any) -> None:
        _process().apply(_called, (test.__module__, test.__name__, arguments))

    return there


@functools.cache
def _process() -> Pool:
    start_server()
    return PROCESSES.Pool(1, _begun)


def _begun() -> None:
    os.environ["DPRANDP_PRETEND_BFLOAT16"] = "0"  # devices are compared in one precision, whatever the processor is
    torch.set_num_threads(1)
    with emulation():
        pass


def _called(module: str, name: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    getattr(importlib.import_module(module), name).__wrapped__(**arguments)
