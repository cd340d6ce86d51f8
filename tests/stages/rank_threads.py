"""Several ranks in one process: followers that do their tasks at once, or threads that take steps together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dprandp.dpsgd import followers
from dprandp.runs import parallel
from dprandp.runs.console import Console


class DoneAtOnce(parallel.Ranks):
    """The leader of followers that are objects of this process; messages are packed and unpacked as between processes.

    Attributes:
        sent: (rank, task, names of the tensors) of each message.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.sent: list[tuple[int, str, list[str]]] = []
        self._answers: list[dict[str, Tensor]] = []
        self._hands = [Hand(self, rank) for rank in range(1, size)]

    def tell(self, task: str, facts: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor] | None = None):
        for hand in self._hands:
            hand.do(task, facts or {}, tensors or {})

    def ask(self, task: str, parts: Sequence[tuple[Mapping[str, Any], Mapping[str, Tensor]]], *, together=False):
        assert len(parts) == self.size - 1
        assert self._answers == []
        self._answers = [hand.do(task, *part) for hand, part in zip(self._hands, parts, strict=True)]

    def answers(self) -> list[dict[str, Tensor]]:
        given, self._answers = self._answers, []
        return given


class Hand:
    """One follower: keeps the tasks that ``followers.serve`` gives it, and does them when told."""

    def __init__(self, leader: DoneAtOnce, rank: int) -> None:
        self.rank, self.size, self._leader = rank, leader.size, leader
        followers.serve(self, Console(quiet=True))

    def serve(self, tasks: Mapping[str, parallel.Task], describe: object) -> int:
        self.tasks = dict(tasks)
        return 0

    def do(self, task: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._leader.sent.append((self.rank, task, sorted(tensors)))
        header, received = parallel.unpack(bytes(parallel.pack({"facts": dict(facts)}, tensors)))
        made = self.tasks[task](header["facts"], received)
        return parallel.unpack(bytes(parallel.pack({}, made or {})))[1]


class ThreadRank:
    """One of several threads that take steps together."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, table: list[Any]) -> None:
        self.rank, self.size, self._barrier, self._table = rank, size, barrier, table

    def gathered(self, own: Tensor, counts: Sequence[int]) -> list[Tensor]:
        assert len(own) == counts[self.rank]
        return self._exchanged(own)

    def summed(self, own: Tensor) -> Tensor:
        return torch.stack(self._exchanged(own)).sum(dim=0)

    def _exchanged(self, own: Tensor) -> list[Tensor]:
        self._table[self.rank] = own.clone()
        self._barrier.wait(60)
        everyone = list(self._table)
        self._barrier.wait(60)
        return everyone


def in_threads(size: int, work: Callable[[ThreadRank], Any]) -> list[Any]:
    """What ``work`` returns on each of several ranks that run at the same time."""
    barrier, table, results = threading.Barrier(size), [None] * size, [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRank(rank, size, barrier, table))
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
