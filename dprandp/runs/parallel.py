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

Messages are data, never code. Everything goes through gloo and the memory of the CPU, also where
tensors live on accelerators: sums are float64, added in the order of the ranks, and needed where the noise is drawn.
Messages are neither encrypted nor authenticated, and hold private images, labels and gradients. *The processes and the
network between them are inside the trust boundary*, like the disk with the data.

Imports nothing of the package but ``errors`` and ``rankwire``.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from dprandp.errors import DprandpError, StorageError, UsageError
from dprandp.runs.checkpoint import tensors_from_bytes, tensors_to_bytes

# ------------------------------------------------------------------------------------------------------------ rankwire
#
# Messages between ranks: JSON and tensors, over gloo.
#
# A message is the length of its header, the header, and a safetensors file: what a peer sends is data, never code (the
# object collectives of torch.distributed unpickle). Messages are neither encrypted nor authenticated.
#
# Imports nothing of the package but ``errors`` and ``tensorfile``.

TIMEOUT = 1800.0
"""Seconds that a process waits for another that gives no sign. One that dies is noticed at once: its sockets close."""

AGAIN = "run the same command again, with as many processes as you like: it goes on from the last checkpoint"
_ENDED = "ended"


class RankLostError(StorageError):
    """A process is gone, or cannot be reached (exit code 6)."""


class Wire:
    """Bytes between the leader and one follower, and a word that outlives the leader.

    Attributes:
        rank: of this process. size: processes in all.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store, self.rank, self.size = store, rank, size

    @classmethod
    def from_environment(cls) -> Wire:
        """Meet the processes that ``torchrun`` started.

        Raises:
            UsageError: the environment is not one that ``torchrun`` makes. RankLostError: they cannot be reached.
        """
        wait = timedelta(seconds=TIMEOUT)
        # a restarted job meets in the same store, where the words of the job before still stand
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=wait))
            store = dist.PrefixStore(f"dprandp/{attempt}", store)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
        except ValueError as error:
            raise UsageError(
                f"RANK and WORLD_SIZE are set, but not as torchrun sets them: {error}",
                fix="start several processes with `torchrun --nproc-per-node N -m dprandp ...`, or unset both for one",
            ) from error
        except RuntimeError as error:
            raise RankLostError(
                "the processes of this job could not reach one another",
                fix="check torchrun's address and port; GLOO_SOCKET_IFNAME names the network interface to use",
            ) from error
        return cls(store, rank, size)

    def send(self, rank: int, message: bytearray) -> None:
        """Send to a rank that receives; returns when it has. Raises RankLostError."""
        try:
            dist.send(torch.tensor([len(message)]), dst=rank)
            dist.send(torch.frombuffer(message, dtype=torch.uint8), dst=rank)
        except RuntimeError as error:
            self._lost(rank, error)

    def receive(self, rank: int) -> bytes:
        """The next message of a rank. Raises RankLostError."""
        length = torch.zeros(1, dtype=torch.int64)
        try:
            dist.recv(length, src=rank)
            message = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(message, src=rank)
        except RuntimeError as error:
            self._lost(rank, error)
        return message.numpy().tobytes()

    def together(self, exchange: Callable[[], Any]) -> None:
        """Take part in a collective operation. Raises RankLostError."""
        try:
            exchange()
        except RuntimeError as error:
            raise RankLostError(
                f"rank {self.rank} of {self.size} lost another, which ended or has not answered for "
                f"{TIMEOUT / 60:.0f} minutes",
                fix=AGAIN,
            ) from error

    def say_ended(self, exit_code: int) -> None:
        """Leave the leader's exit code where followers find it that are at work."""
        try:
            self._store.set(_ENDED, str(exit_code))
        except RuntimeError:
            return  # the store is gone: so are those who would look

    def ended(self) -> int | None:
        """The leader's exit code, if it has left one."""
        try:
            return int(self._store.get(_ENDED)) if self._store.check([_ENDED]) else None
        except RuntimeError:
            return None

    def _lost(self, rank: int, error: RuntimeError) -> NoReturn:
        raise RankLostError(
            f"rank {self.rank} of {self.size} lost rank {rank}, which ended or has not answered for "
            f"{TIMEOUT / 60:.0f} minutes",
            fix=AGAIN,
        ) from error


def pack(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytearray:
    """The length of the header in 8 bytes, the header, and a safetensors file."""
    text = json.dumps(header).encode()
    return bytearray(len(text).to_bytes(8, "little") + text + tensors_to_bytes(tensors))


def unpack(message: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of what ``pack`` made."""
    end = 8 + int.from_bytes(message[:8], "little")
    return json.loads(message[8:end]), tensors_from_bytes(message[end:], "a message of another rank")


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
