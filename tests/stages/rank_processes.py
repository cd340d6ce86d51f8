"""Small processes that are forked from a server that has torch; and such as meet as ranks (gloo)."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dprandp.runs import parallel
from dprandp.runs.console import Console
from dprandp.runs.context import Context
from dprandp.runs.directory import RunDir
from dprandp.runs.parallel import Ranks

SECONDS = 120.0
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([
    "pytest", "hypothesis", "torch._dynamo", "dprandp.pipeline", "dprandp.tune", "dprandp.audit", "tiny_run",
    "compiled_loops",
])  # fmt: skip


class FailedRank(Exception):
    """What a rank raised: the name of its class, and its words."""


@functools.cache
def start_server() -> None:
    """Start it where it finds the modules of this folder: what cannot be imported is skipped without a word."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()


def process_of(work: Callable[..., Any], *given: Any) -> tuple[BaseProcess, Connection]:
    """Start ``work(sender, *given)`` in a process of its own; returns the process and the receiver."""
    start_server()
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=work, args=(sender, *given))
    process.start()
    sender.close()
    return process, receiver


def on_ranks(size: int, work: Callable[..., Any], *given: Any) -> list[Any]:
    """What ``work(ranks, *given)`` returns on each of several ranks; a ``FailedRank`` where it raised something."""
    start_server()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [PROCESSES.Pipe(duplex=False) for _ in range(size)]
    everyone = [
        PROCESSES.Process(target=_rank, args=(rank, size, store.port, pipes[rank][1], work, given))
        for rank in range(size)
    ]
    for process in everyone:
        process.start()
    try:
        results = []
        for receiver, sender in pipes:
            sender.close()
            assert receiver.poll(SECONDS), "a rank hangs"
            results.append(pickle.loads(receiver.recv_bytes()))
        return results
    finally:
        for process in everyone:
            process.kill()
            process.join()


def of_rank_0(size: int, work: Callable[..., Any], *given: Any) -> Any:
    """What ``work`` returns on rank 0; all ranks must end well. With one process it is called here."""
    if size == 1:
        return work(parallel.ALONE, *given)
    results = on_ranks(size, work, *given)
    for result in results:
        if isinstance(result, FailedRank):
            raise result
    return results[0]


@contextlib.contextmanager
def context_of(ranks: Ranks, run: Path, **options: Any) -> Iterator[Context]:
    """A context on a run: locked on rank 0, for reading elsewhere."""
    made = RunDir.open(run, create=True) if ranks.is_first else None
    ranks.first(lambda: None)  # the folder is there
    rundir = made or RunDir.open(run, create=False)
    with rundir.lock() if ranks.is_first else contextlib.nullcontext():
        yield Context(
            rundir=rundir, console=Console(quiet=True), device=torch.device("cpu"), data_dir=run.parent, ranks=ranks,
            **options,
        )  # fmt: skip


def _rank(rank: int, size: int, port: int, sender: Connection, work: Callable[..., Any], given: tuple) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", parallel.TIMEOUT_VARIABLE: "60",
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        made = work(parallel.join(), *given)
    except BaseException as error:
        made = FailedRank(type(error).__name__, str(error), traceback.format_exc())
    sender.send_bytes(pickle.dumps(made))
    os._exit(0)
