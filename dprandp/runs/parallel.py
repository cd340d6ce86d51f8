"""Several processes that run one stage together: one program, many ranks, under ``torchrun`` (torch.distributed).

Every rank runs the same stage function. Only rank 0 writes to the run directory, charges the ledger, draws batches and
noise, and prints. Each rank computes its part of the rows; sums are reduced to rank 0, which broadcasts the update. So
a run may continue with any number of processes. ``ALONE``, the only process of an ordinary run, has all the rows and
exchanges nothing.

Tensors on accelerators go through NCCL, all else through gloo. Messages are numbers and JSON, never code (the object
collectives of torch.distributed unpickle). They are neither encrypted nor authenticated, and hold gradients and
features of private images: *the processes and the network between them are inside the trust boundary*, like the disk
with the data.

A rank that dies ends the job at once; a rank that hangs ends it after ``timeout()`` seconds, the time limit of a
collective. Where rank 0 may work alone for longer (``first``), threads signal meanwhile that the processes live.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dprandp.errors import DprandpError, InputError, StorageError, UsageError
from dprandp.runs.files import atomic_write

TIMEOUT, TIMEOUT_VARIABLE = 300.0, "DPRANDP_RANKS_TIMEOUT"
"""Default of ``timeout()``."""

MEETING = timedelta(minutes=10)
"""The time that the processes may take to start."""

SEEN_WITHIN = 60.0
"""Seconds after which a file that one machine wrote is seen by all that share its folder."""


class RankLostError(StorageError):
    """A process died, hangs or cannot be reached (exit code 6)."""


class RankError(DprandpError):
    """Another rank ended with an error; with that error's message and exit code."""

    def __init__(self, rank: int, size: int, told: Mapping[str, Any]) -> None:
        self.exit_code = int(told["exit_code"])
        super().__init__(f"rank {rank} of {size}: {told['problem']}", fix=told["fix"])


def timeout() -> float:
    """Seconds without a sign of life after which a rank is taken to be lost.

    Raises:
        UsageError: the environment holds no number above 0.
    """
    given = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise UsageError(f"{TIMEOUT_VARIABLE}={given} is not a number of seconds above 0", fix="unset it, or give 300")
    return seconds


class Ranks:
    """The processes that run a stage together, as seen by one of them; by default a single process.

    Every method but ``shares`` is a collective: all ranks call the same ones, in the same order.

    Attributes:
        rank: of this process. size: processes in all.

    Raises:
        RankLostError: a process died, or gave no sign of life for ``timeout()`` seconds. RankError: one ended with an
        error.
    """

    def __init__(self, store: dist.Store | None = None, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size, self._timeout = rank, size, timeout() if store else TIMEOUT
        self._store = store
        self._between = ExitStack()  # on rank 0: sends signs of life between two stages

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the only one that writes, charges, draws and prints."""
        return self.rank == 0

    def shares(self, count: int, block: int = 1) -> list[slice]:
        """Divide ``count`` rows into consecutive rows for each rank, as evenly as whole blocks of rows allow.

        Guarantee:
            Every row is in exactly one share. Shares may be empty.
        """
        blocks = -(-count // block)
        ends = [min(count, block * (rank * blocks // self.size)) for rank in range(self.size + 1)]
        return [slice(start, end) for start, end in pairwise(ends)]

    def first(self, work: Callable[[], Any], told: Callable[[Any], Any] = lambda made: made) -> Any:
        """Let rank 0 do some work alone, for any length of time; its exceptions end the job.

        Returns:
            On rank 0 the result of ``work``, elsewhere what ``told`` makes of it (a JSON value).
        """
        if self.size == 1:
            return work()
        with self._patience():
            made = work() if self.is_first else None
        message = self._message(json.dumps(told(made)).encode() if self.is_first else b"")
        return made if self.is_first else json.loads(message)

    def announce(self, stage: Mapping[str, Any] | None) -> None:
        """On rank 0, announce the next stage to all (a JSON value); None: the command has ended without an error."""
        if self.size > 1:
            self._between.close()
            self._message(json.dumps(stage).encode())

    def stage_done(self) -> None:
        """On rank 0, before each ``announce``: the others wait for it without a time limit."""
        if self.size > 1 and self.is_first:
            self._between.enter_context(self._patience())

    def announced(self) -> dict[str, Any] | None:
        """On another rank, the stage that rank 0 announces."""
        with self._patience():
            pass
        return json.loads(self._message(b""))

    def require_one_folder(self, folder: Path) -> None:
        """Raise InputError on every rank unless all see this folder of rank 0: a copy would have another ledger."""
        if self.size == 1:
            return
        file = folder / ".shared"
        token = secrets.token_hex(8)
        token = self.first(lambda: atomic_write(file, token), told=lambda made: token) or token
        deadline = time.monotonic() + SEEN_WITHIN
        while not (seen := file.is_file() and file.read_text(encoding="ascii", errors="replace") == token):
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        every = self.gather(torch.tensor([[seen]]), [1] * self.size, everywhere=True)
        if not bool(torch.cat(every).all()):
            raise InputError(
                f"the {self.size} processes do not work in the same run directory: {folder} is not a shared folder",
                fix="name a --run in a folder that all machines share",
            )

    def refuse_different(self, what: str, digest: Callable[[], str]) -> None:
        """Raise InputError on every rank unless a hash (hexadecimal, made without a time limit) is the same on all.

        ``what`` is for the message. A single process does not call ``digest``.
        """
        if self.size == 1:
            return
        with self._patience():
            own = torch.frombuffer(bytearray.fromhex(digest()), dtype=torch.uint8)[None]
        every = torch.cat(self.gather(own, [1] * self.size, everywhere=True))
        if not bool((every == every[0]).all()):
            raise InputError(
                f"the {self.size} processes do not have the same {what}",
                fix="give every process the same files: on one machine, in a shared folder, or as equal copies",
            )

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors, of the same shapes and dtypes on every rank, with those of rank 0."""
        if self.size == 1:
            return
        tensors = list(tensors)
        device = tensors[0].device
        packed = torch.cat([tensor.detach().to(device).flatten().view(torch.uint8) for tensor in tensors])
        self._collective(lambda: dist.broadcast(packed, 0), packed)
        if not self.is_first:
            parts = packed.split([tensor.numel() * tensor.element_size() for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.detach().copy_(part.clone().view(tensor.dtype).view(tensor.shape))

    def broadcast_rows(self, rows: Tensor | None) -> Tensor:
        """Rank 0's int64 [n] on every rank, for any n; the others give None."""
        message = self._message(b"" if rows is None else rows.numpy().tobytes())
        return torch.frombuffer(bytearray(message), dtype=torch.int64) if message else torch.zeros(0, dtype=torch.int64)

    def reduce(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace tensors of one dtype by their sums over the ranks, on rank 0, in place; undefined elsewhere."""
        if self.size > 1:
            flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
            self._collective(lambda: dist.reduce(flat, 0), flat)
            for tensor, part in zip(tensors.values(), flat.split([t.numel() for t in tensors.values()]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum of all ranks' tensors, in place: the same bits on every rank."""
        if self.size > 1:
            self._collective(lambda: dist.all_reduce(tensor), tensor)

    def gather(self, own: Tensor, counts: Sequence[int], *, everywhere: bool = False) -> list[Tensor]:
        """Every rank's rows, in the order of the ranks: on rank 0, or everywhere; none ([]) on the others.

        Args:
            own: [counts[rank], ...] of any dtype.
            counts: rows of each rank, known to all.
        """
        if self.size == 1:
            return [own]
        padded = own.new_zeros(max(counts), *own.shape[1:])
        padded[: len(own)] = own
        received = [torch.empty_like(padded) for _ in counts] if everywhere or self.is_first else None
        if everywhere:
            self._collective(lambda: dist.all_gather(received, padded), padded)
        else:
            self._collective(lambda: dist.gather(padded, received, 0), padded)
        return [rows[:count] for rows, count in zip(received or [], counts, strict=False)]

    def leave_words(self, told: Mapping[str, Any]) -> None:
        """Before this rank ends with an error: leave exit_code, problem and fix in the store for the others."""
        try:
            self._store.set(f"ended/{self.rank}", json.dumps(dict(told)))
        except RuntimeError:
            return  # the store is gone, and the other ranks too

    def _message(self, data: bytes) -> bytes:
        length = torch.tensor([len(data)])
        self._collective(lambda: dist.broadcast(length, 0))
        sent = torch.zeros(int(length), dtype=torch.uint8)
        if data:
            sent = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if len(sent):
            self._collective(lambda: dist.broadcast(sent, 0))
        return sent.numpy().tobytes()

    def _collective(self, exchange: Callable[[], Any], on: Tensor | None = None) -> None:
        try:
            if on is not None and on.is_cuda:  # NCCL does not notice a dead process; gloo does
                dist.all_reduce(torch.zeros(1))
            exchange()
        except RuntimeError as error:
            raise self._explained() from error

    def _explained(self) -> DprandpError:
        for rank in range(self.size):
            try:
                if self._store.check([f"ended/{rank}"]):
                    return RankError(rank, self.size, json.loads(self._store.get(f"ended/{rank}")))
            except RuntimeError:
                break
        return RankLostError(
            f"rank {self.rank} of {self.size} lost another, which ended or was silent for {self._timeout:g} seconds",
            fix="run the same command again, with any number of processes: it continues from the last checkpoint",
        )

    @contextmanager
    def _patience(self) -> Iterator[None]:
        """All ranks leave this block together, without a time limit; meanwhile they send signs of life."""
        done, gone, failed = threading.Event(), threading.Event(), []

        def show() -> None:
            everyone = torch.zeros(1)
            try:
                while not everyone:
                    done.wait(self._timeout / 4)
                    if gone.is_set():
                        return
                    everyone.fill_(done.is_set())
                    self._collective(lambda: dist.all_reduce(everyone, dist.ReduceOp.MIN))
            except DprandpError as error:
                failed.append(error)

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            gone.set()
            done.set()
            raise
        done.set()
        thread.join()
        if failed:
            raise failed[0]


ALONE = Ranks()
"""One process."""


def join() -> Ranks:
    """Connect to the other processes that ``torchrun`` started.

    Raises:
        UsageError: the environment is not one that ``torchrun`` makes. RankLostError: they cannot be reached.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    # a restarted job uses the same store, which still holds the errors of the job before
    attempt, wait = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), timedelta(seconds=timeout())
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=MEETING))
        store = dist.PrefixStore(f"dprandp/{attempt}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
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
    return Ranks(store, rank, size)
