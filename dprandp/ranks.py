"""Several processes as one: rank 0 leads, the others compute what it asks for (torch.distributed, under ``torchrun``).

Rank 0 runs a command as if it were alone and alone has the run directory, the data, the ledger, the random bits, the
optimizer and the printing. The others wait for a *task*, compute it and answer; they hold no state that a resumed run
would need. So a run may go on with any number of processes.

    ranks.tell("task", facts, tensors)          to every follower, without an answer
    ranks.ask("task", [(facts, tensors), ...])  a part for each follower ...
    own = compute(first part)                   ... the leader does its own meanwhile ...
    ranks.answers()                             ... and has theirs, in the order of the ranks

In a task that is done *together* all ranks also exchange tensors among themselves (``gathered``, ``summed``).

``ALONE``, the one process of an ordinary run, has no followers: ``tell`` and ``ask`` do nothing, ``answers`` is empty,
and a stage reads the same for one process and for many.

Messages (``rankwire.py``) are data, never code. Everything goes through gloo and the memory of the CPU, also where
tensors live on accelerators: sums are float64, added in the order of the ranks, and needed where the noise is drawn.
Messages are neither encrypted nor authenticated, and hold private images, labels and gradients. *The processes and the
network between them are inside the trust boundary*, like the disk with the data.

Imports nothing of the package but ``errors`` and ``rankwire``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dprandp.errors import DprandpError
from dprandp.rankwire import RankLostError, Wire, pack, unpack

Facts = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Task = Callable[[dict[str, Any], dict[str, Tensor]], Tensors | None]

SIGN_OF_LIFE = 60.0
"""Seconds between two signs that the leader gives to followers it has nothing to ask."""

END, ALIVE = "end", "alive"


class RankError(DprandpError):
    """A follower could not do its task; its own words and its exit code."""

    def __init__(self, rank: int, size: int, told: Mapping[str, Any]) -> None:
        self.exit_code = int(told["exit_code"])
        super().__init__(f"rank {rank} of {size}: {told['problem']}", fix=told["fix"])


def shares(count: int, size: int, block: int = 1) -> list[slice]:
    """Cut ``count`` rows into ``size`` runs of rows, in order, as evenly as whole blocks of rows allow.

    Guarantee:
        Every row is in exactly one share. Shares may be empty.
    """
    blocks = -(-count // block)
    ends = [min(count, block * (rank * blocks // size)) for rank in range(size + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


class Ranks:
    """The leader of ``size`` processes, which may be 1.

    Attributes:
        rank: 0.
        size: processes in all, the leader among them.
    """

    rank, size = 0, 1

    def shares(self, count: int, block: int = 1) -> list[slice]:
        """One share of ``count`` rows for each rank; see the function of this name."""
        return shares(count, self.size, block)

    def tell(self, task: str, facts: Facts | None = None, tensors: Tensors | None = None) -> None:
        """Send every follower the same; an error there is raised here by the next ``answers``."""

    def ask(self, task: str, parts: Sequence[tuple[Facts, Tensors]], *, together: bool = False) -> None:
        """Send each follower its part, in the order of the ranks from 1; ``answers`` must follow.

        ``together``: the leader takes part in the task, and a follower that cannot must end, not answer.
        """
        if parts:
            raise RuntimeError("one process alone has nobody to ask")

    def answers(self) -> list[dict[str, Tensor]]:
        """What the followers made of their parts, CPU tensors by name, in the order of the ranks from 1.

        Raises:
            RankLostError: a follower is gone. RankError: a follower could not do it.
        """
        return []

    def end(self, exit_code: int) -> None:
        """Let the followers go, with the exit code that the leader will have."""


ALONE = Ranks()
"""One process."""


class _Together:
    """What all ranks do at the same time."""

    size: int
    _wire: Wire

    def gathered(self, own: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Every rank's rows, in the order of the ranks.

        Args:
            own: float [counts[rank], D].
            counts: rows of each rank, known to all.

        Raises:
            RankLostError: a process is gone.
        """
        padded = torch.zeros(max(counts), own.shape[1], dtype=own.dtype)
        padded[: len(own)] = own
        received = [torch.empty_like(padded) for _ in range(self.size)]
        self._wire.together(lambda: dist.all_gather(received, padded))
        return [rows[:count].to(own.device) for rows, count in zip(received, counts, strict=True)]

    def summed(self, own: Tensor) -> Tensor:
        """The sum of all ranks' tensors of one shape, the same bits on every rank; replaces ``own``.

        Raises:
            RankLostError: a process is gone.
        """
        total = own.cpu()  # on the CPU the tensor itself
        self._wire.together(lambda: dist.all_reduce(total))
        return own if total is own else own.copy_(total)


class Leader(_Together, Ranks):
    """Rank 0 of several processes."""

    def __init__(self, wire: Wire) -> None:
        self.size, self._wire = wire.size, wire
        self._speaking = threading.Lock()
        self._owed = False  # followers are at work, or a message was cut short: they listen to nothing else
        self._over = threading.Event()
        threading.Thread(target=self._give_signs, daemon=True).start()

    def tell(self, task: str, facts: Facts | None = None, tensors: Tensors | None = None) -> None:
        message = pack({"task": task, "facts": dict(facts or {}), "answer": False}, tensors or {})
        with self._speaking:
            self._owed = True
            for rank in range(1, self.size):
                self._wire.send(rank, message)
            self._owed = False

    def ask(self, task: str, parts: Sequence[tuple[Facts, Tensors]], *, together: bool = False) -> None:
        if len(parts) != self.size - 1:
            raise RuntimeError(f"{len(parts)} parts for {self.size - 1} followers")
        self._speaking.acquire()
        self._owed = True
        for rank, (facts, tensors) in enumerate(parts, 1):
            header = {"task": task, "facts": dict(facts), "answer": True, "together": together}
            self._wire.send(rank, pack(header, tensors))

    def answers(self) -> list[dict[str, Tensor]]:
        if not self._owed:
            raise RuntimeError("nothing was asked")
        received = [unpack(self._wire.receive(rank)) for rank in range(1, self.size)]
        self._owed = False
        self._speaking.release()
        for rank, (header, _) in enumerate(received, 1):
            if header["error"] is not None:
                raise RankError(rank, self.size, header["error"])
        return [tensors for _, tensors in received]

    def end(self, exit_code: int) -> None:
        self._over.set()
        self._wire.say_ended(exit_code)  # for those who are at work and will find nobody to answer to
        if self._owed or not self._speaking.acquire(timeout=SIGN_OF_LIFE):
            return
        message = pack({"task": END, "facts": {"exit_code": exit_code}, "answer": False}, {})
        for rank in range(1, self.size):
            try:
                self._wire.send(rank, message)
            except RankLostError:
                continue  # it is gone already; the others are to be told all the same

    def _give_signs(self) -> None:
        message = pack({"task": ALIVE, "facts": {}, "answer": False}, {})
        while not self._over.wait(SIGN_OF_LIFE):
            if self._speaking.acquire(blocking=False):
                try:
                    for rank in range(1, self.size):
                        self._wire.send(rank, message)
                except RankLostError:
                    return  # the leader will find out when it wants something
                finally:
                    self._speaking.release()


class Follower(_Together):
    """One of the other ranks."""

    def __init__(self, wire: Wire) -> None:
        self.rank, self.size, self._wire = wire.rank, wire.size, wire

    def serve(self, tasks: Mapping[str, Task], describe: Callable[[Exception], Mapping[str, Any]]) -> int:
        """Do the leader's tasks until it ends.

        Args:
            tasks: name -> function of (facts, tensors) that returns tensors where an answer is wanted.
            describe: what the leader is told of an error: exit_code, problem, fix; nothing private.

        Returns:
            The exit code that the leader has.

        Raises:
            RankLostError: the leader is gone without a word.
            Exception: of a task that is done together, where the leader waits for more than an answer.
        """
        trouble: Mapping[str, Any] | None = None
        try:
            while True:
                header, tensors = unpack(self._wire.receive(0))
                if header["task"] == END:
                    return int(header["facts"]["exit_code"])
                if header["task"] == ALIVE:
                    continue
                made = None
                if trouble is None:
                    try:
                        made = tasks[header["task"]](header["facts"], tensors)
                    except RankLostError:
                        raise
                    except Exception as error:  # of any kind: the leader is told, and ends this process
                        if header.get("together"):
                            raise
                        trouble = describe(error)
                if header["answer"]:
                    self._wire.send(0, pack({"error": trouble}, made or {}))
        except RankLostError:
            ended = self._wire.ended()
            if ended is None:
                raise
            return ended


def join() -> Leader | Follower:
    """Meet the other processes that ``torchrun`` started.

    Raises:
        UsageError: the environment is not one that ``torchrun`` makes. RankLostError: they cannot be reached.
    """
    wire = Wire.from_environment()
    return Leader(wire) if wire.rank == 0 else Follower(wire)
