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

T = TypeVar("T")


class _Network:
    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.turn = threading.Condition()
        self.mail: dict[tuple[str, int, int, int], list[Tensor]] = {}
        self.round = [0] * num_ranks
        self.sums: dict[int, list[Tensor]] = {}
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
    """One rank's end of an in-memory network. Made by `run_ranks`."""

    def __init__(self, network: _Network, rank: int) -> None:
        self.rank = rank
        self.num_ranks = network.num_ranks
        self._network = network

    def send(self, tensor: Tensor, to_rank: int, tag: int, kind: str = "tensor") -> _Delivered:
        address = (kind, self.rank, to_rank, tag)
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._network.mail.setdefault(address, []).append(copy)
        self._network.changed()
        return _Delivered()

    def post(self, wire: Wire, from_rank: int, tag: int) -> _Letter:
        return _Letter(self._network, ("tensor", from_rank, self.rank, tag), wire)

    def tell(self, data: Tensor, to_rank: int, tag: int) -> _Delivered:
        return self.send(data, to_rank, tag, kind="control")

    def hear(self, like: Tensor, from_rank: int, tag: int) -> Tensor:
        data = _Letter(self._network, ("control", from_rank, self.rank, tag), None).wait()
        like.copy_(data)
        return like

    def all_reduce(self, vector: Tensor) -> Tensor:
        network, turn = self._network, self._network.round[self.rank]
        network.round[self.rank] += 1
        network.sums.setdefault(turn, []).append(vector)
        network.changed()
        network.wait_for(lambda: len(network.sums[turn]) == self.num_ranks)
        return torch.stack(network.sums[turn]).sum(0)


def run_ranks(num_ranks: int, rank_main: Callable[[LocalTransport], T]) -> list[T]:
    """Runs `rank_main(transport)` for every rank in this process and returns their results in rank order.

    Raises:
        BaseException: the first one that a rank raised.
    """
    network = _Network(num_ranks)
    results: list[T | None] = [None] * num_ranks
    threads_in_use = torch.get_num_threads()

    def main(rank: int) -> None:
        with network.turn:
            torch.set_num_threads(threads_in_use)
            try:
                results[rank] = rank_main(LocalTransport(network, rank))
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
