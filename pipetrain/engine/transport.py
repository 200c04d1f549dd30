"""Moves tensors between ranks: torch.distributed, on gloo (CPU) or NCCL (GPU).

What gloo asks for, and where it is kept: a `Work` handle that is dropped closes the connection (`Sent` and `Posted`
hold it); `is_completed` never turns true before `wait` (nothing polls); a buffer of another size than the message is
filled in part or aborts the process (`runtime` agrees on every structure first, and `message` checks it). What NCCL
asks for: one order of messages on all ranks (the schedule has it), and point-to-point traffic apart from collectives
(its own group).
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pipetrain.engine.message import Wire


class PeerLost(RuntimeError):
    """Another rank is gone, or cannot be reached: this rank is a victim, not the cause."""


class _PeersMayBeLost:
    """Tells what the network raises from what the model raises. A class, as it is entered for every message."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise PeerLost(f"the connection to another rank is gone: {error}") from error


PEERS_MAY_BE_LOST = _PeersMayBeLost()


class Sent(Protocol):
    """A message on its way."""

    def wait(self) -> None:
        """Returns when the message has left; at once if its receiver has it."""


class Posted(Protocol):
    """A message to come, with its buffer."""

    def wait(self) -> Tensor:
        """Returns the tensor when it is there."""


class Replicas(Protocol):
    """This rank among those with its place in the other replicas.

    Attributes:
        number: the replica that this rank belongs to.
        count: how many there are.
    """

    number: int
    count: int

    def start_sum(self, bucket: Tensor) -> Posted:
        """Starts to add up a tensor on the device over all replicas, in its own memory; returns at once."""

    def sum(self, vector: Tensor) -> Tensor:
        """Adds up a CPU vector over all replicas."""

    def gather(self, vector: Tensor) -> list[Tensor]:
        """The CPU vectors of all replicas, equally long, in their order."""


class Transport(Protocol):
    """What the runtime needs of a network. `tag` tells the messages of one step between two ranks apart.

    Attributes:
        rank, num_ranks: in this rank's pipeline, which is all that the methods reach.
        replicas: the way to the other pipelines.
    """

    rank: int
    num_ranks: int
    replicas: Replicas

    def send(self, tensor: Tensor, to_rank: int, tag: int) -> Sent:
        """Starts a message and returns at once."""

    def post(self, wire: Wire, from_rank: int, tag: int) -> Posted:
        """Makes room for a message and returns at once."""

    def tell(self, data: Tensor, to_rank: int, tag: int) -> Sent:
        """Starts a small message of CPU bytes or integers, whose size the receiver knows."""

    def hear(self, like: Tensor, from_rank: int, tag: int) -> Tensor:
        """Waits for a small message of the shape and dtype of `like`."""

    def all_reduce(self, vector: Tensor) -> Tensor:
        """Adds up a CPU vector over all ranks of the pipeline; every rank gets the sum."""


@dataclass
class _OnItsWay:
    """Handle and tensor of one message: both must live until the message is through."""

    work: dist.Work | None
    tensor: Tensor | None

    def wait(self) -> Tensor:
        assert self.tensor is not None
        if self.work is not None:
            with PEERS_MAY_BE_LOST:
                self.work.wait()
        return self.tensor


class _Leaving(_OnItsWay):
    def wait(self) -> None:  # type: ignore[override]
        super().wait()
        self.work, self.tensor = None, None


class DistributedTransport:
    """The default process group for small messages (CPU), and a group of its own for tensors."""

    def __init__(
        self,
        device: torch.device,
        timeout: datetime.timedelta,
        ranks: Sequence[int],
        pipeline: dist.ProcessGroup,
        replicas: Replicas,
    ) -> None:
        """
        Args:
            ranks: those of the default process group that are this pipeline.
            pipeline: a group of them for CPU vectors.
        """
        self.rank = ranks.index(dist.get_rank())
        self.num_ranks = len(ranks)
        self.replicas = replicas
        self._device, self._ranks, self._pipeline = device, ranks, pipeline
        if device.type == "cuda":
            self._group = dist.new_group(backend="nccl", device_id=device, timeout=timeout)
        else:
            self._group = dist.new_group(timeout=timeout)

    def send(self, tensor: Tensor, to_rank: int, tag: int) -> Sent:
        with PEERS_MAY_BE_LOST:
            return _Leaving(dist.isend(tensor, self._ranks[to_rank], group=self._group, tag=tag), tensor)

    def post(self, wire: Wire, from_rank: int, tag: int) -> Posted:
        buffer = wire.empty(self._device)
        with PEERS_MAY_BE_LOST:
            return _OnItsWay(dist.irecv(buffer, self._ranks[from_rank], group=self._group, tag=tag), buffer)

    def tell(self, data: Tensor, to_rank: int, tag: int) -> Sent:
        with PEERS_MAY_BE_LOST:
            return _Leaving(dist.isend(data, self._ranks[to_rank], tag=tag), data)

    def hear(self, like: Tensor, from_rank: int, tag: int) -> Tensor:
        with PEERS_MAY_BE_LOST:
            dist.recv(like, self._ranks[from_rank], tag=tag)
        return like

    def all_reduce(self, vector: Tensor) -> Tensor:
        if self.num_ranks > 1:
            with PEERS_MAY_BE_LOST:
                dist.all_reduce(vector, group=self._pipeline)
        return vector
