"""Synthetic images made while a training goes on: never on disk, hardly ever twice the same.

A pool of images is there to choose from. Every ``period`` steps its oldest block is replaced by the next block of the
process, which worker processes have made meanwhile. Which images are there at a step is a function of (process, seed,
step) alone: a block that is not ready is waited for, so neither the number of workers nor their speed nor a stop and a
resume changes what is learned. Memory is the pool and the few blocks that are made ahead, however long the training is.

The blocks begin behind those that ``generate`` wrote: what is evaluated on those was never trained on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dprandp.stages.workers import interrupts_left_to_us, lost_worker
from dprandp.synth import process_named, render_block
from dprandp.vision.images import colour_mode

LEAST_BLOCKS = 4
"""In a pool: with one of them, no more than a quarter of the images is replaced at a time."""

AHEAD = 2
"""Blocks that are made before they are needed."""


@dataclass(frozen=True)
class Supply:
    """Which images are in the pool at which step.

    Attributes:
        process, seed, resolution: of the images.
        first: the number of the first block. block: images in one. blocks: in the pool at a time.
        period: steps between two replacements.
        colour: see ``vision.images.colour_mode``.
    """

    process: str
    seed: int
    resolution: int
    first: int
    block: int
    blocks: int
    period: int
    colour: str = "rgb"

    @property
    def count(self) -> int:
        """Images in the pool."""
        return self.block * self.blocks

    def oldest(self, step: int) -> int:
        """Number of the oldest block in the pool at a step (0-based); it holds the ``blocks`` from there on."""
        return self.first + step // self.period

    def made(self, steps: int) -> int:
        """Images that have been in the pool after so many steps."""
        return self.block * (self.blocks + (max(steps, 1) - 1) // self.period)


def supply_for(
    process: str, seed: int, resolution: int, first: int, *, pool: int, uses: int, batch_size: int, colour: str
) -> Supply:
    """The supply of at least ``pool`` images, of which each is chosen ``uses`` times on average.

    An image stays for blocks · period steps, in each of which batch_size of count images are chosen.

    Raises:
        UsageError: unknown process.
    """
    block = min(process_named(process).block_size, -(-pool // LEAST_BLOCKS))
    blocks = max(LEAST_BLOCKS, -(-pool // block))
    period = max(1, round(uses * block / batch_size))
    return Supply(process, seed, resolution, first, block, blocks, period, colour)


def render(supply: Supply, block: int) -> np.ndarray:
    """A block's images, uint8 [block, 3, R, R], in the supply's colours."""
    images = torch.from_numpy(render_block(supply.process, supply.seed, block, supply.block, supply.resolution))
    return colour_mode(images.permute(0, 3, 1, 2).contiguous(), supply.colour).numpy()


class FreshImages:
    """The pool at each step.

    Args:
        supply: what is in it when.
        device: where it is wanted.
        workers: that make the blocks; they are shut down by whoever made them.
        on_wait: called now and then while the first blocks are waited for; may raise.
    """

    def __init__(
        self, supply: Supply, device: torch.device, workers: Executor, on_wait: Callable[[], None] = lambda: None
    ) -> None:
        self.supply, self._workers, self._on_wait = supply, workers, on_wait
        side = supply.resolution
        self.images = torch.empty(supply.count, 3, side, side, dtype=torch.uint8, device=device)
        self._next = -1  # the block that comes into the pool next
        self._filling = True
        self._coming: deque[Future] = deque()  # that block, and those after it

    def at(self, step: int) -> Tensor:
        """The images to choose from at a step.

        Args:
            step: 0-based; no smaller than the last time.

        Returns:
            uint8 [count, 3, R, R]; the same tensor every time, changed in place.

        Raises:
            StorageError: a worker died. ValueError: an earlier step than before.
        """
        oldest = self.supply.oldest(step)
        wanted = oldest + self.supply.blocks
        if wanted < self._next:
            raise ValueError(f"step {step} lies before the last one")
        if self._filling:
            self._next = oldest
        self._order(wanted + AHEAD)
        while self._next < wanted:
            start = self._next % self.supply.blocks * self.supply.block
            made = self._taken(self._coming.popleft())
            self.images[start : start + self.supply.block] = torch.from_numpy(made)
            self._next += 1
        self._filling = False
        return self.images

    def _order(self, until: int) -> None:
        """Have the blocks before ``until`` made."""
        try:
            with interrupts_left_to_us():
                while self._next + len(self._coming) < until:
                    self._coming.append(self._workers.submit(render, self.supply, self._next + len(self._coming)))
        except BrokenProcessPool as error:
            raise lost_worker() from error

    def _taken(self, future: Future) -> np.ndarray:
        while not wait([future], timeout=0.2).done:
            if self._filling:  # later there are steps to be saved first
                self._on_wait()
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise lost_worker() from error
