"""Moves tensors between ranks: torch.distributed, on gloo (CPU) or NCCL (GPU).

What gloo asks for, and where it is kept: a `Work` handle that is dropped closes the connection (`Sent` and `Posted`
hold it); `is_completed` never turns true before `wait` (nothing polls); a buffer of another size than the message is
filled in part or aborts the process (`runtime` agrees on every signature first, and `send` checks it). What NCCL asks
for: one order of messages on all ranks (the schedule has it), and point-to-point traffic apart from collectives (its
own group).
"""

import datetime
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pipetrain.engine.signature import Signature

TENSORS_PER_MESSAGE = 64  # at most; the tensors of one message take neighbouring tags


class PeerLost(RuntimeError):
    """Another rank is gone, or cannot be reached: this rank is a victim, not the cause."""


class _PeersMayBeLost:
    """Tells what the network raises from what the model raises. A class, as it is entered for every message."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise PeerLost(f"the connection to another rank is gone: {error}") from error


_PEERS_MAY_BE_LOST = _PeersMayBeLost()


class Sent(Protocol):
    """A message on its way."""

    def wait(self) -> None:
        """Returns when the message has left; at once if its receiver has it."""


class Posted(Protocol):
    """A message to come, with its buffers."""

    def wait(self) -> tuple[Tensor, ...]:
        """Returns the tensors when they are there."""


class Transport(Protocol):
    """What the runtime needs of a network. `tag` tells the messages of one step between two ranks apart."""

    rank: int
    num_ranks: int

    def send(self, tensors: tuple[Tensor, ...], to_rank: int, tag: int) -> Sent:
        """Starts a message and returns at once."""

    def post(self, signature: Signature, from_rank: int, tag: int) -> Posted:
        """Makes room for a message and returns at once."""

    def tell(self, data: Tensor, to_rank: int, tag: int) -> Sent:
        """Starts a small message of CPU bytes or integers, whose size the receiver knows."""

    def hear(self, like: Tensor, from_rank: int, tag: int) -> Tensor:
        """Waits for a small message of the shape and dtype of `like`."""

    def all_reduce(self, vector: Tensor) -> Tensor:
        """Adds up a CPU vector over all ranks; every rank gets the sum."""


@dataclass
class _Works:
    """Handles and tensors of one message: both must live until the message is through."""

    works: list[dist.Work] = field(default_factory=list)
    tensors: tuple[Tensor, ...] = ()

    def wait(self) -> tuple[Tensor, ...]:
        with _PEERS_MAY_BE_LOST:
            for work in self.works:
                work.wait()
        return self.tensors


class _SentWorks(_Works):
    def wait(self) -> None:  # type: ignore[override]
        super().wait()
        self.works, self.tensors = [], ()


class DistributedTransport:
    """The default process group for collectives and small messages (CPU), and a group of its own for tensors."""

    def __init__(self, device: torch.device, timeout: datetime.timedelta) -> None:
        self.rank = dist.get_rank()
        self.num_ranks = dist.get_world_size()
        self._device = device
        if device.type == "cuda":
            self._group = dist.new_group(backend="nccl", device_id=device, timeout=timeout)
        else:
            self._group = dist.new_group(timeout=timeout)

    def send(self, tensors: tuple[Tensor, ...], to_rank: int, tag: int) -> Sent:
        with _PEERS_MAY_BE_LOST:
            works = [
                dist.isend(tensor, to_rank, group=self._group, tag=tag * TENSORS_PER_MESSAGE + slot)
                for slot, tensor in enumerate(tensors)
            ]
        return _SentWorks([work for work in works if work is not None], tensors)

    def post(self, signature: Signature, from_rank: int, tag: int) -> Posted:
        buffers = tuple(spec.empty(self._device) for spec in signature)
        with _PEERS_MAY_BE_LOST:
            works = [
                dist.irecv(buffer, from_rank, group=self._group, tag=tag * TENSORS_PER_MESSAGE + slot)
                for slot, buffer in enumerate(buffers)
            ]
        return _Works([work for work in works if work is not None], buffers)

    def tell(self, data: Tensor, to_rank: int, tag: int) -> Sent:
        with _PEERS_MAY_BE_LOST:
            work = dist.isend(data, to_rank, tag=tag)
        return _SentWorks([work] if work is not None else [], (data,))

    def hear(self, like: Tensor, from_rank: int, tag: int) -> Tensor:
        with _PEERS_MAY_BE_LOST:
            dist.recv(like, from_rank, tag=tag)
        return like

    def all_reduce(self, vector: Tensor) -> Tensor:
        if self.num_ranks > 1:
            with _PEERS_MAY_BE_LOST:
                dist.all_reduce(vector)
        return vector
