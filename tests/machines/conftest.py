"""The tests of machines use the tiny run of tests/stages and the commands of tests/cli."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

for folder in ("cli", "stages", "faults"):
    path = str(Path(__file__).parents[1] / folder)
    if path not in sys.path:
        sys.path.append(path)

from cli_process import Dprandp, arrays  # noqa: E402


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


SETTINGS = """
[generate]
process = "dead-leaves"
count = 60
resolution = 32

[pretrain]
filters = 16
layers = 1
dictionary_patches = 2000
dictionary_iterations = 2

[probe]
dims = 16
statistics_images = 40
statistics_views = 2
steps = 4

[finetune]
steps = 2
refit_steps = 4
"""


@pytest.fixture(scope="session")
def dprandp(tmp_path_factory: pytest.TempPathFactory) -> Dprandp:
    """Commands in a folder that holds small.toml and tiny.npz."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "small.toml").write_text(SETTINGS)
    np.savez(folder / "tiny.npz", **arrays())
    return Dprandp(tmp_path_factory.mktemp("output"), folder)
