"""Images made on the fly: which image is there at which step depends on the step alone, whoever makes them and when."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
import torch

from dprandp.errors import StorageError
from dprandp.stages import fresh_images
from dprandp.stages.fresh_images import AHEAD, FreshImages, Supply, render, supply_for
from dprandp.synth import render_block

TINY = Supply("perlin", 3, 8, first=2, block=3, blocks=4, period=5, colour="both")
CPU = torch.device("cpu")


class Now:
    """An executor that does the work at once, and says how much there was."""

    def __init__(self, delay=0.0):
        self.asked, self.delay = [], delay

    def submit(self, function, supply, block):
        self.asked.append(block)
        done = Future()
        done.set_result(function(supply, block))
        return done


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    """An image tells its block and its place in it."""

    def numbered(process, seed, block, count, resolution):
        images = np.zeros((count, resolution, resolution, 3), dtype=np.uint8)
        images[...] = (10 * block + np.arange(count))[:, None, None, None]
        return images

    monkeypatch.setattr(fresh_images, "render_block", numbered)


def held(pool, step):
    return pool.at(step)[:, 0, 0, 0].tolist()


def expected(step):
    oldest = TINY.first + step // TINY.period
    return sorted(10 * block + place for block in range(oldest, oldest + 4) for place in range(3))


def test_the_pool_of_a_step_is_the_blocks_from_its_oldest_on():
    pool = FreshImages(TINY, CPU, Now())
    before = held(pool, 0)
    for step in range(60):
        now = held(pool, step)
        assert sorted(now) == expected(step)
        moved = sum(a != b for a, b in zip(now, before, strict=True))
        assert moved == (TINY.block if step and step % TINY.period == 0 else 0)  # the others stay where they are
        before = now


@pytest.mark.parametrize("begin", [0, 3, 5, 24, 25, 41])
def test_a_training_that_goes_on_finds_the_same_images_in_the_same_places(begin):
    whole, resumed = FreshImages(TINY, CPU, Now()), FreshImages(TINY, CPU, Now())
    for step in range(begin):
        whole.at(step)
    for step in range(begin, begin + 12):
        assert held(resumed, step) == held(whole, step)


def test_neither_the_number_of_workers_nor_their_speed_has_a_say(monkeypatch):
    plain = FreshImages(TINY, CPU, Now())
    quick = fresh_images.render

    def slow(supply, block):
        time.sleep(0.002 * (block * 7 % 5))  # blocks are ready in another order than they are needed
        return quick(supply, block)

    monkeypatch.setattr(fresh_images, "render", slow)
    with ThreadPoolExecutor(3) as workers:
        pool = FreshImages(TINY, CPU, workers)
        for step in range(40):
            assert held(pool, step) == held(plain, step)


def test_only_what_is_needed_and_a_little_ahead_is_made_each_block_once():
    workers = Now()
    pool = FreshImages(TINY, CPU, workers)
    for step in range(23):
        pool.at(step)
        assert len(workers.asked) == 4 + step // TINY.period + AHEAD
    assert workers.asked == list(range(2, 2 + len(workers.asked)))
    resumed = Now()
    FreshImages(TINY, CPU, resumed).at(22)
    assert resumed.asked == list(range(6, 6 + 4 + AHEAD))
    assert len(pool._coming) == AHEAD  # and no more is kept


def test_it_does_not_go_back():
    pool = FreshImages(TINY, CPU, Now())
    pool.at(10)
    with pytest.raises(ValueError, match="before the last one"):
        pool.at(4)


def test_who_waits_for_the_first_images_can_be_stopped():
    class Never:
        def submit(self, *job):
            return Future()

    class Stopped(Exception):
        pass

    def stop():
        raise Stopped

    with pytest.raises(Stopped):
        FreshImages(TINY, CPU, Never(), stop).at(0)


def test_a_dead_worker_is_an_error_in_words():
    class Broken:
        def submit(self, *job):
            dead = Future()
            dead.set_exception(BrokenProcessPool("gone"))
            return dead

    with pytest.raises(StorageError, match="a worker process died"):
        FreshImages(TINY, CPU, Broken()).at(0)


def test_images_are_the_process_own_in_the_colours_asked_for(monkeypatch):
    monkeypatch.setattr(fresh_images, "render_block", render_block)
    whole = render_block("perlin", 3, 7, 3, 8).transpose(0, 3, 1, 2)
    made = render(TINY, 7)
    assert made.dtype == np.uint8
    assert np.array_equal(made[1], whole[1])
    assert (made[[0, 2]].std(axis=1) == 0).all()  # both: every second one has lost its colour


@pytest.mark.parametrize(
    ("pool", "uses", "batch", "block", "blocks", "period"),
    [(4000, 4, 32, 400, 10, 50), (4100, 1, 64, 400, 11, 6), (20, 4, 8, 5, 4, 2), (1, 1, 256, 1, 4, 1)],
)
def test_the_supply_that_settings_ask_for(pool, uses, batch, block, blocks, period):
    made = supply_for("perlin", 0, 8, 3, pool=pool, uses=uses, batch_size=batch, colour="rgb")
    assert (made.block, made.blocks, made.period, made.first) == (block, blocks, period, 3)
    assert made.count >= pool
    # an image stays for blocks * period steps, each of which chooses batch of count images
    if pool > batch:
        assert made.blocks * made.period * batch / made.count == pytest.approx(uses, rel=0.3)
    assert made.made(1) == made.made(made.period) == made.count
    assert made.made(made.period + 1) == made.count + made.block
