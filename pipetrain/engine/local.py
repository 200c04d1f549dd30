"""All ranks in one process: a transport for tests, debuggers and in-process comparisons.

Each rank runs in a thread of its own, but only one runs at a time: a rank gives way only where it waits for another. So
random layers, which draw from one generator for the whole process, see the same numbers as in separate processes.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from pipetrain.engine.message import Wire
from pipetrain.engine.replicas import ALONE
from pipetrain.engine.transport import Replicas

T = TypeVar("T")


class _Network:
    def __init__(self, num_ranks: int) -> None:
        self.turn = threading.Condition()
        self.mail: dict[tuple[str, int, int, int], list[Tensor]] = {}
        self.meetings: dict[tuple[range, int], dict[int, Tensor]] = {}
        self.waiting = 0
        self.running = num_ranks
        self.failure: BaseException | None = None

    def wait_for(self, there: Callable[[], bool]) -> None:
        """Gives way to the other ranks until `there()`; call it with the turn held."""
        while not there():
            if self.failure is not None:
                raise RuntimeError("another rank failed") from self.failure
            self.waiting += 1
            if self.waiting == self.running:
                self.failure = RuntimeError("all ranks wait for each other")
                self.turn.notify_all()
                raise self.failure
            self.turn.wait()

    def meet(self, members: range, number: int, rank: int, given: Tensor) -> list[Tensor]:
        """What all members have given to their meeting of that number, in their order."""
        meeting = self.meetings.setdefault((members, number), {})
        meeting[rank] = given
        self.changed()
        self.wait_for(lambda: len(meeting) == len(members))
        return [meeting[member] for member in members]

    def changed(self) -> None:
        self.waiting = 0  # everybody looks again, and counts again if still waiting
        self.turn.notify_all()


class _Delivered:
    def wait(self) -> None:
        """In memory a message is there as soon as it is sent."""


@dataclass
class _Letter:
    network: _Network
    address: tuple[str, int, int, int]
    wire: Wire | None

    def wait(self) -> Tensor:
        self.network.wait_for(lambda: bool(self.network.mail.get(self.address)))
        tensor = self.network.mail[self.address].pop(0)
        if self.wire is not None and Wire(tensor.numel(), tensor.dtype) != self.wire:
            raise RuntimeError(f"message {self.address} is {tensor.dtype} {tensor.shape}, but {self.wire} was posted")
        return tensor


class LocalTransport:
    """One rank's end of an in-memory network. Made by `run_ranks` and `alone`."""

    def __init__(self, network: _Network, rank: int, ranks: range, replicas: Replicas) -> None:
        """
        Args:
            rank: among all in the network.
            ranks: those that are this pipeline.
        """
        self.rank = ranks.index(rank)
        self.num_ranks = len(ranks)
        self.replicas = replicas
        self._network, self._ranks, self._meetings = network, ranks, 0

    def send(self, tensor: Tensor, to_rank: int, tag: int, kind: str = "tensor") -> _Delivered:
        address = (kind, self._ranks[self.rank], self._ranks[to_rank], tag)
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._network.mail.setdefault(address, []).append(copy)
        self._network.changed()
        return _Delivered()

    def post(self, wire: Wire, from_rank: int, tag: int) -> _Letter:
        return _Letter(self._network, ("tensor", self._ranks[from_rank], self._ranks[self.rank], tag), wire)

    def tell(self, data: Tensor, to_rank: int, tag: int) -> _Delivered:
        return self.send(data, to_rank, tag, kind="control")

    def hear(self, like: Tensor, from_rank: int, tag: int) -> Tensor:
        address = ("control", self._ranks[from_rank], self._ranks[self.rank], tag)
        data = _Letter(self._network, address, None).wait()
        like.copy_(data)
        return like

    def all_reduce(self, vector: Tensor) -> Tensor:
        self._meetings += 1
        return torch.stack(self._network.meet(self._ranks, self._meetings, self._ranks[self.rank], vector)).sum(0)


@dataclass
class _Meeting:
    """A sum over replicas that has been started."""

    result: Callable[[], Tensor]

    def wait(self) -> Tensor:
        return self.result()


class LocalReplicas:
    """One rank's way to its counterparts in an in-memory network."""

    def __init__(self, network: _Network, rank: int, members: range) -> None:
        """
        Args:
            members: the ranks, among all in the network, with one place in their pipelines.
        """
        self.number, self.count = members.index(rank), len(members)
        self._network, self._rank, self._members, self._meetings = network, rank, members, 0

    def start_sum(self, bucket: Tensor) -> _Meeting:
        self._meetings += 1
        number = self._meetings
        self._network.meetings.setdefault((self._members, number), {})[self._rank] = bucket
        self._network.changed()

        def result() -> Tensor:
            return torch.stack(self._network.meet(self._members, number, self._rank, bucket)).sum(0)

        return _Meeting(result)

    def sum(self, vector: Tensor) -> Tensor:
        return self.start_sum(vector).wait()

    def gather(self, vector: Tensor) -> list[Tensor]:
        self._meetings += 1
        return self._network.meet(self._members, self._meetings, self._rank, vector)


def alone() -> LocalTransport:
    """Of one rank without others, in the thread that calls this."""
    network = _Network(1)
    network.turn.acquire()  # it is always this one's turn
    return LocalTransport(network, 0, range(1), ALONE)


def run_ranks(num_ranks: int, rank_main: Callable[[LocalTransport], T], num_replicas: int = 1) -> list[T]:
    """Runs `rank_main(transport)` for every rank in this process and returns their results in rank order.

    Args:
        num_ranks: of all replicas together; those that follow each other are a pipeline.

    Raises:
        BaseException: the first one that a rank raised.
    """
    network, length = _Network(num_ranks), num_ranks // num_replicas
    results: list[T | None] = [None] * num_ranks
    threads_in_use = torch.get_num_threads()

    def main(rank: int) -> None:
        with network.turn:
            torch.set_num_threads(threads_in_use)
            try:
                first, place = rank - rank % length, rank % length
                replicas = LocalReplicas(network, rank, range(place, num_ranks, length)) if num_replicas > 1 else ALONE
                results[rank] = rank_main(LocalTransport(network, rank, range(first, first + length), replicas))
            except BaseException as error:
                network.failure = network.failure or error
            finally:
                network.running -= 1
                if network.running and network.waiting == network.running and network.failure is None:
                    network.failure = RuntimeError("the remaining ranks wait for one that has finished")
                network.changed()

    threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if network.failure is not None:
        raise network.failure
    return cast(list[T], results)
