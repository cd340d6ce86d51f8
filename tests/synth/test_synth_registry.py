"""The registry: names, arguments, and the promise that a block's bytes depend on its arguments alone."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from dprandp.config.schema import GenerateConfig
from dprandp.config.settings import settings_of
from dprandp.errors import UsageError
from dprandp.synth import ALIASES, LEAVES, PROCESSES, block_generator, process_named, render_block

COUNT, RESOLUTION = 3, 8
COMPOSED = ("kml:dead-leaves", "kml-mixup:spectrum", "mixture:perlin,kml:dead-leaves-squares")
BLOCKS = [
    *(("stylegan-oriented", 0), ("stylegan-oriented", 1), ("dead-leaves", 0), ("dead-leaves", 1)),
    *((name, 0) for name in (*PROCESSES, *COMPOSED) if name not in ("stylegan-oriented", "dead-leaves")),
]

RENDER_ELSEWHERE = f"""
import hashlib, sys, torch
from dprandp.synth import render_block
torch.set_num_threads(int(sys.argv[1]))
for entry in sys.argv[2:]:
    process, block = entry.rsplit(":", 1)
    images = render_block(process, 11, int(block), {COUNT}, {RESOLUTION})
    print(entry, hashlib.sha256(images.tobytes()).hexdigest())
    assert torch.get_num_threads() == int(sys.argv[1])
"""


def digest(process: str, block: int, seed: int = 11) -> str:
    return hashlib.sha256(render_block(process, seed, block, COUNT, RESOLUTION).tobytes()).hexdigest()


def test_the_registry() -> None:
    assert {"stylegan-oriented", "dead-leaves-textures", "wmm", "fractal", "perlin"} <= set(PROCESSES)
    for name, spec in PROCESSES.items():
        assert spec.name == name
        assert process_named(name) is spec
    assert PROCESSES["stylegan-oriented"].block_size == 400


@pytest.mark.slow
def test_another_process_threads_and_order_give_the_same_bytes() -> None:
    wanted = {f"{process}:{block}": digest(process, block) for process, block in BLOCKS}
    assert len(set(wanted.values())) == len(BLOCKS)
    result = subprocess.run(
        [sys.executable, "-c", RENDER_ELSEWHERE, "2", *reversed(wanted)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert dict(line.split() for line in result.stdout.splitlines()) == wanted


@pytest.mark.parametrize("process", [*sorted(PROCESSES), *COMPOSED])
def test_seed_and_block_matter_and_a_smaller_count_is_a_prefix(process: str) -> None:
    assert len({digest(process, 0), digest(process, 1), digest(process, 0, seed=12)}) == 3
    more = render_block(process, 11, 0, 23, RESOLUTION)  # of several chunks
    assert (more.shape, more.dtype) == ((23, RESOLUTION, RESOLUTION, 3), np.uint8)
    assert more.std(axis=(1, 2)).max() > 5.0  # not flat
    assert len(np.unique(more.reshape(23, -1), axis=0)) == 23
    for count in (COUNT, 21):
        np.testing.assert_array_equal(more[:count], render_block(process, 11, 0, count, RESOLUTION))


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
    with pytest.raises(UsageError, match="resolution of 65"):
        render_block("dead-leaves", 0, 0, 1, 65)
    for count in (401, 0):
        with pytest.raises(UsageError, match=f"1 to 400 images, {count} were asked for"):
            render_block("stylegan-oriented", 0, 0, count, 16)


# ------------------------------------------------------------------------------------------------------- composed names


def test_aliases_and_canonical_names() -> None:
    assert process_named("dead-leaves-shapes") is process_named("dead-leaves")
    assert digest("kml:dead-leaves-shapes", 1) == digest("kml:dead-leaves", 1)
    names = {
        "kml:dead-leaves-shapes": "kml:dead-leaves",
        "mixture: perlin, dead-leaves-shapes": "mixture:perlin,dead-leaves",
        "kml:mixture:perlin,wmm": "kml:mixture:perlin,wmm",
        "mixture:kml:perlin,wmm": "mixture:kml:perlin,wmm",
    }
    assert {name: process_named(name).name for name in names} == names


def test_a_mixtures_blocks_keep_to_those_of_its_parts_and_its_images_are_its_own() -> None:
    sizes = {"stylegan-oriented,perlin": 400, "stylegan-oriented,dead-leaves": 200, "perlin,perlin,perlin": 399}
    assert {parts: process_named(f"mixture:{parts}").block_size for parts in sizes} == sizes
    first = render_block("mixture:perlin,spectrum", 0, 0, 2, 16)[0]
    assert (first != render_block("mixture:perlin,wmm", 0, 0, 2, 16)[0]).any()
    assert (first != render_block("perlin", 0, 0, 1, 16)[0]).any()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spectum", "did you mean 'spectrum'"),
        ("kml", "kml needs a process"),
        ("kml:perlim", "did you mean 'perlin'"),
        ("kml-mixup:kml:fractl", "did you mean 'fractal'"),
        ("mixture:perlin,stylegan-orientd", "did you mean 'stylegan-oriented'"),
        ("mixture:perlin,,wmm", "two or more processes"),
        ("mixture", "two or more processes"),
        ("mixtur:perlin,wmm", "did you mean 'mixture'"),
        ("perlin:wmm", "takes no other process"),
        ("", "known: .*wmm"),
    ],
)
def test_wrong_parts_are_named(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        render_block(name, 0, 0, 1, 16)
    assert caught.value.exit_code == 2


def test_the_error_and_the_help_list_every_process() -> None:
    with pytest.raises(UsageError) as caught:
        process_named("no such thing")
    helped = re.findall(r"[a-z][a-z-]+", settings_of(GenerateConfig)["process"].help)
    for name in (*PROCESSES, *ALIASES, *LEAVES, "mixture"):
        assert name in caught.value.fix
        assert name in helped
