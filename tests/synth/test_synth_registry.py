"""The registry: names, arguments, and the promise that a block's bytes depend on its arguments alone."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from dprandp.errors import UsageError
from dprandp.synth import PROCESSES, block_generator, process_named, render_block

COUNT, RESOLUTION = 3, 16
BLOCKS = [("stylegan-oriented", 0), ("stylegan-oriented", 1), ("dead-leaves", 0), ("dead-leaves", 1)]

RENDER_ELSEWHERE = f"""
import hashlib, sys, torch
from dprandp.synth import render_block
torch.set_num_threads(int(sys.argv[1]))
for entry in sys.argv[2:]:
    process, block = entry.split(":")
    images = render_block(process, 11, int(block), {COUNT}, {RESOLUTION})
    print(entry, hashlib.sha256(images.tobytes()).hexdigest())
    assert torch.get_num_threads() == int(sys.argv[1])
"""


def digest(process: str, block: int, seed: int = 11) -> str:
    return hashlib.sha256(render_block(process, seed, block, COUNT, RESOLUTION).tobytes()).hexdigest()


def test_the_registry() -> None:
    assert set(PROCESSES) == {"stylegan-oriented", "dead-leaves"}
    for name, spec in PROCESSES.items():
        assert spec.name == name
        assert spec.default_resolution == 64
        assert process_named(name) is spec
    assert PROCESSES["stylegan-oriented"].block_size == 400


@pytest.mark.parametrize("process", sorted(PROCESSES))
def test_shape_and_type(process: str) -> None:
    images = render_block(process, 0, 0, 2, RESOLUTION)
    assert images.shape == (2, RESOLUTION, RESOLUTION, 3)
    assert images.dtype == np.uint8


def test_other_processes_threads_and_order_give_the_same_bytes() -> None:
    wanted = {f"{process}:{block}": digest(process, block) for process, block in BLOCKS}
    assert len(set(wanted.values())) == len(BLOCKS)
    for threads, entries in ((1, list(wanted)), (2, list(reversed(wanted)))):
        result = subprocess.run(
            [sys.executable, "-c", RENDER_ELSEWHERE, str(threads), *entries],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert dict(line.split() for line in result.stdout.splitlines()) == wanted


@pytest.mark.parametrize("process", sorted(PROCESSES))
def test_seed_and_block_matter_and_a_smaller_count_is_a_prefix(process: str) -> None:
    assert digest(process, 0) == digest(process, 0)
    assert len({digest(process, 0), digest(process, 1), digest(process, 0, seed=12)}) == 3
    more = render_block(process, 11, 0, COUNT + 1, RESOLUTION)
    np.testing.assert_array_equal(more[:COUNT], render_block(process, 11, 0, COUNT, RESOLUTION))


def test_generators_differ_in_every_argument() -> None:
    first = block_generator(1, "dead-leaves", 2).integers(2**63, size=4)
    np.testing.assert_array_equal(first, block_generator(1, "dead-leaves", 2).integers(2**63, size=4))
    for other in ((2, "dead-leaves", 2), (1, "dead-leaves", 3), (1, "stylegan-oriented", 2), (12, "dead-leaves", 0)):
        assert (block_generator(*other).integers(2**63, size=4) != first).all()


def test_threads_are_restored_even_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def broken(random: np.random.Generator, count: int, resolution: int) -> np.ndarray:
        seen.append(torch.get_num_threads())
        raise RuntimeError("broken process")

    spec = PROCESSES["dead-leaves"]
    monkeypatch.setitem(PROCESSES, "dead-leaves", type(spec)(**{**vars(spec), "render": broken}))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="broken process"):
            render_block("dead-leaves", 0, 0, 1, 16)
        assert torch.get_num_threads() == 2
        assert seen == [1]
    finally:
        torch.set_num_threads(before)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(UsageError, match=r"stylegan-orientd.*(\n.*)did you mean 'stylegan-oriented'"):
        process_named("stylegan-orientd")
    with pytest.raises(UsageError, match="resolution of 65"):
        render_block("dead-leaves", 0, 0, 1, 65)
    with pytest.raises(UsageError, match="1 to 400 images, 401"):
        render_block("stylegan-oriented", 0, 0, 401, 16)
    with pytest.raises(UsageError, match="0 were asked for"):
        render_block("stylegan-oriented", 0, 0, 0, 16)
    with pytest.raises(UsageError, match="block -1"):
        render_block("dead-leaves", 0, -1, 1, 16)
