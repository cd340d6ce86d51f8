"""Phase I, first half: images of a random process, as shards on disk. No data is read; no privacy is spent.

    shard-00000.npy ...   uint8 [<= block, R, R, 3], one block of the process each
    manifest.json         process, seed, count, resolution, and every shard's SHA-256
    preview.png           a contact sheet of the first images

A shard is a function of (process, seed, block, resolution) alone: any number of workers or ranks makes the same bytes,
and a resumed run makes only the shards that are missing. Of several ranks each renders whole shards; they are gathered
on rank 0, which writes them.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from dprandp.config.schema import GenerateConfig, as_dict
from dprandp.errors import CheckpointError, StorageError, UsageError
from dprandp.runs import faults
from dprandp.runs.context import Context, recorded
from dprandp.runs.files import Count, Text, atomic_path, atomic_write, file_sha256, from_json, read_record, to_json
from dprandp.runs.parallel import Ranks
from dprandp.runs.results import GenerateResult
from dprandp.runs.signals import Stop, graceful_stop
from dprandp.synth import RESOLUTIONS, process_named, render_block
from dprandp.vision.images import contact_sheet

STAGE = "generate"
PREVIEW_IMAGES = 96
PREVIEW_COLUMNS = 16


@dataclass(frozen=True)
class Shard:
    """One file of images."""

    file: Text
    count: Count  # images
    sha256: Text


@dataclass(frozen=True)
class Manifest:
    """manifest.json."""

    process: Text
    seed: Count
    count: Count  # images in all
    resolution: Count  # pixels
    shards: tuple[Shard, ...]  # in the order of the process's blocks


def run(config: GenerateConfig, context: Context) -> GenerateResult | None:
    """Write the images of ``config`` into the run directory; None on ranks other than rank 0."""
    check(config)
    todo = context.ranks.first(lambda: _to_render(config, context))
    if todo is None:
        return context.rundir.result(GenerateResult)
    config = recorded(STAGE, todo["config"])
    blocks = blocks_of(config)  # of the recorded configuration, which --resume keeps
    started = time.perf_counter()
    made = _render_all(config, {block: blocks[block] for block in todo["missing"]}, context)
    seconds = time.perf_counter() - started
    return _finish(config, made, seconds, context) if context.ranks.is_first else None


def _to_render(config: GenerateConfig, context: Context) -> dict[str, Any] | None:
    """Begin the stage in the run directory and return its configuration and the blocks to render, for all ranks; None
    if it is done."""
    begun = context.rundir.begin(STAGE, as_dict(config), {}, resume=context.resume, overwrite=context.overwrite)
    if begun.action == "skip":
        return None
    config = recorded(STAGE, begun.config)
    sizes = blocks_of(config).items()
    missing = [block for block, count in sizes if not _is_whole(begun.directory, block, count, config.resolution)]
    return {"config": as_dict(config), "missing": missing}


def _finish(config: GenerateConfig, made: int, seconds: float, context: Context) -> GenerateResult:
    folder, blocks = context.rundir.stage_dir(STAGE), blocks_of(config)
    manifest = Manifest(
        process=config.process,
        seed=config.seed,
        count=sum(blocks.values()),
        resolution=config.resolution,
        shards=tuple(
            Shard(shard_name(block), count, file_sha256(folder / shard_name(block))) for block, count in blocks.items()
        ),
    )
    atomic_write(folder / "manifest.json", to_json(manifest, indent=1) + "\n")
    with atomic_path(folder / "preview.png") as temporary:
        Image.fromarray(contact_sheet(load_images(folder, PREVIEW_IMAGES), PREVIEW_COLUMNS)).save(temporary)
    result = GenerateResult(
        process=config.process,
        count=sum(blocks.values()),
        resolution=config.resolution,
        images_per_second=round(made / seconds, 1) if made else None,
        seconds=round(seconds, 2),
    )
    context.rundir.finish(STAGE, context.rundir.hash_outputs(STAGE, ["manifest.json"]), result)
    return result


def check(config: GenerateConfig) -> None:
    """Raise UsageError for an unknown process, an unsupported resolution, or a sample of more than ``count``."""
    process_named(config.process)
    if config.sample is not None and config.sample > config.count:
        raise UsageError(
            f"a sample of {config.sample} cannot be taken of {config.count} images", fix="give a smaller sample"
        )
    if config.resolution not in RESOLUTIONS:
        raise UsageError(f"resolution = {config.resolution} is not offered", fix=f"choose one of {RESOLUTIONS}")


def blocks_of(config: GenerateConfig) -> dict[int, int]:
    """The blocks of the process that are rendered, and their numbers of images.

    With ``sample`` these are exactly the images that ``open_images(folder, sample)`` would take of all ``count``.
    """
    size = process_named(config.process).block_size
    sizes = [min(size, config.count - start) for start in range(0, config.count, size)]
    return {block: count for block, count in enumerate(_spread(sizes, config.sample)) if count}


def open_images(
    folder: Path, limit: int | None = None, *, from_end: bool = False, without_end: int = 0
) -> list[np.ndarray]:
    """The images of a finished ``generate`` stage, memory-mapped, taken evenly from its shards.

    Args:
        folder: the stage's folder.
        limit: at most this many (None: all). Equally many images (± 1) are taken from the beginning of every shard; if
            a shard is too short, more are taken from the others.
        from_end: take them from the shards' ends instead.
        without_end: leave out those that ``from_end`` takes for this limit.

    Returns:
        uint8 [n, R, R, 3] for each shard of which n > 0 are taken, memory-mapped and read-only.

    Raises:
        CheckpointError: a shard is missing or its bytes are not those of the manifest.
    """
    shards = _shards(folder)
    held_out = _spread([len(shard) for shard in shards], without_end)
    shards = [shard[: len(shard) - held] for shard, held in zip(shards, held_out, strict=True)]
    counts = _spread([len(shard) for shard in shards], limit)
    parts = zip(shards, counts, strict=True)
    taken = [shard[len(shard) - count :] if from_end else shard[:count] for shard, count in parts]
    return [part for part in taken if len(part)] or taken[:1]


def load_images(folder: Path, limit: int | None = None) -> np.ndarray:
    """The images of ``open_images`` copied into memory, uint8 [N, R, R, 3]: for a few images."""
    return np.concatenate(open_images(folder, limit))


def _spread(sizes: list[int], limit: int | None) -> list[int]:
    """The number of images to take from each shard: min(limit, all) in total, as evenly as the sizes allow."""
    left = sum(sizes) if limit is None else min(limit, sum(sizes))
    counts = [0] * len(sizes)
    while left:
        open_shards = [index for index, size in enumerate(sizes) if counts[index] < size]
        for index in open_shards[:left]:
            counts[index] += 1
        left -= min(left, len(open_shards))
    return counts


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished ``generate`` stage.

    Raises:
        CheckpointError: missing, not JSON, or not a manifest.
    """
    try:
        manifest = read_record(Manifest, from_json((folder / "manifest.json").read_bytes()))
        listed = [shard.file for shard in manifest.shards]
        if listed and listed == [shard_name(block) for block in range(len(listed))]:
            return manifest
        problem = None
    except (OSError, ValueError) as error:
        problem = error
    raise CheckpointError(
        f"{folder / 'manifest.json'} is missing or damaged", fix="run `dprandp generate --overwrite`"
    ) from problem


def _shards(folder: Path) -> list[np.ndarray]:
    """All shards, memory-mapped, their bytes checked."""
    manifest = read_manifest(folder)
    shards = []
    for block, shard in enumerate(manifest.shards):
        path, problem = folder / shard.file, None
        if not path.is_file() or file_sha256(path) != shard.sha256:
            problem = "is missing or has changed (its SHA-256 differs from the manifest's)"
        elif not _is_whole(folder, block, shard.count, manifest.resolution):
            problem = "does not hold the images that the manifest describes"
        if problem:
            fix = "run `dprandp generate --overwrite` to make the images again"
            raise CheckpointError(f"{path} {problem}", fix=fix)
        shards.append(np.load(path, mmap_mode="r", allow_pickle=False))
    return shards


def shard_name(block: int) -> str:
    """File name of a block's shard."""
    return f"shard-{block:05d}.npy"


# ----------------------------------------------------------------------------------------------------------- rendering


REFRESH = 0.2
"""Seconds between two looks at the workers."""

Told = Callable[[int], None]
"""Hears of further images."""


class Job(NamedTuple):
    """One shard to make."""

    process: str
    seed: int
    block: int
    count: int
    resolution: int
    folder: Path

    def images(self, told: Told | None = None) -> np.ndarray:
        """uint8 [count, resolution, resolution, 3]."""
        return render_block(self.process, self.seed, self.block, self.count, self.resolution, told)


def _render_all(config: GenerateConfig, blocks: dict[int, int], context: Context) -> int:
    """Render the given blocks (block -> images) and return how many images that were."""
    total, folder, ranks = sum(blocks.values()), context.rundir.stage_dir(STAGE), context.ranks
    process, seed, resolution = config.process, config.seed, config.resolution
    jobs = [Job(process, seed, block, count, resolution, folder) for block, count in blocks.items()]
    with graceful_stop() as stop, context.console.progress(total, "images") as progress:
        if ranks.size > 1:
            for start in range(0, len(jobs), ranks.size):
                progress.advance(_render_round(jobs[start : start + ranks.size], ranks))
                stop.raise_if_requested()
        elif context.workers == 1 or len(jobs) == 1:
            for job in jobs:
                _write(job, progress.advance)
                stop.raise_if_requested()
        elif jobs:
            _render_with_workers(jobs, min(context.workers, len(jobs)) - 1, stop, progress.advance)
    return total


def _render_with_workers(jobs: list[Job], workers: int, stop: Stop, told: Told) -> None:
    """Render jobs in this process, from the last one on, and in workers, from the first one on, once these have
    started, which takes seconds."""
    context = get_context("spawn")  # a fork of a process whose torch has started threads may hang
    counter, counted, todo = context.Value("q"), 0, deque(jobs)
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(counter,)) as pool:
        # Workers inherit the mask of signals: only this process handles Ctrl-C.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            running = {pool.submit(os.getpid) for _ in range(workers)}  # done when the worker is there
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

        def advance(count: int = 0, seconds: float = 0.0) -> None:
            nonlocal counted, running
            done, running = wait(running, seconds, FIRST_COMPLETED)
            for future in done:
                future.result()
                if todo:
                    running.add(pool.submit(_write_in_worker, todo.popleft()))
            now = counter.value
            told(count + now - counted)
            counted = now

        try:
            while todo or running:
                if todo:
                    _write(todo.pop(), advance)
                else:
                    advance(seconds=REFRESH)
                stop.raise_if_requested()
        except BrokenProcessPool as error:
            stop.raise_if_requested()  # the signal may have ended a worker as well
            raise StorageError(
                "a worker process died while it made images, probably for lack of memory",
                fix="run the same command again with fewer --workers; whole shards are kept",
            ) from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _begin(made: Synchronized[int]) -> None:
    """Start of a worker, which counts its images in ``made``: end it when its parent is gone, even by kill -9."""
    global _made
    _made = made

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_made: Synchronized[int]
"""In a worker: images that all workers have made."""


def _write_in_worker(job: Job) -> None:
    def told(count: int) -> None:
        with _made.get_lock():
            _made.value += count

    _write(job, told)


def _render_round(jobs: list[Job], ranks: Ranks) -> int:
    """Render one shard on each rank; rank 0 writes them. Returns the number of images."""
    counts = [job.count for job in jobs] + [0] * (ranks.size - len(jobs))
    own = np.zeros((0, jobs[0].resolution, jobs[0].resolution, 3), np.uint8)
    if ranks.rank < len(jobs):
        own = jobs[ranks.rank].images()
    for job, made in zip(jobs, ranks.gather(torch.from_numpy(own), counts), strict=False):
        _save(job, made.numpy())
    return sum(counts)


def _write(job: Job, told: Told) -> None:
    """Render and write a shard; ``told`` hears of all its images, as they are made."""
    left = job.count

    def some(count: int) -> None:
        nonlocal left
        count = min(count, left)
        left -= count
        told(count)

    _save(job, job.images(some))
    told(left)


def _save(job: Job, images: np.ndarray) -> None:
    with atomic_path(job.folder / shard_name(job.block)) as temporary:
        np.save(temporary, images, allow_pickle=False)
    faults.point("shard-written")


def _is_whole(folder: Path, block: int, count: int, resolution: int) -> bool:
    """Whether the block's shard is there with the right shape and type (it gets its name only when complete)."""
    path = folder / shard_name(block)
    if not path.is_file():
        return False
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
        return images.dtype == np.uint8 and images.shape == (count, resolution, resolution, 3)
    except (ValueError, OSError, EOFError):
        return False
