"""Messages between ranks: JSON and tensors, over gloo.

A message is the length of its header, the header, and a safetensors file: what a peer sends is data, never code (the
object collectives of torch.distributed unpickle). Messages are neither encrypted nor authenticated.

Imports nothing of the package but ``errors`` and ``tensorfile``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from dprandp.errors import StorageError, UsageError
from dprandp.tensorfile import tensors_from_bytes, tensors_to_bytes

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
