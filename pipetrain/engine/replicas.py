"""Copies of the whole pipeline that share each mini-batch (data parallelism), and what a rank tells its counterparts.

A mini-batch is cut into micro-batches once, for all replicas together; each replica takes a run of them. So the numbers
depend on how many micro-batches there are, and not on how many replicas train them, except for the order in which
floating-point sums are added up.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipetrain.engine.transport import PEERS_MAY_BE_LOST, Posted, Replicas


class Alone:
    """The only replica."""

    number, count = 0, 1

    def start_sum(self, bucket: Tensor) -> Posted:
        raise AssertionError("a schedule with reductions is for several replicas")

    def sum(self, vector: Tensor) -> Tensor:
        return vector

    def gather(self, vector: Tensor) -> list[Tensor]:
        return [vector]


ALONE = Alone()


def gather_rows(tensor: Tensor, replicas: Replicas) -> list[Tensor]:
    """The CPU tensors of all replicas, which may differ in the size of their first dimension."""
    sizes = [int(size) for size in replicas.gather(torch.tensor([len(tensor)]))]
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return [found[:size] for found, size in zip(replicas.gather(padded), sizes, strict=True)]


@dataclass
class _Summing:
    work: dist.Work | None
    bucket: Tensor

    def wait(self) -> Tensor:
        if self.work is not None:
            with PEERS_MAY_BE_LOST:
                self.work.wait()
        return self.bucket


class DistributedReplicas:
    """Through torch.distributed: gradients by NCCL or gloo, vectors by gloo."""

    def __init__(self, number: int, count: int, gradients: dist.ProcessGroup, vectors: dist.ProcessGroup) -> None:
        """
        Args:
            gradients, vectors: this rank and its counterparts, in the order of the replicas.
        """
        self.number, self.count = number, count
        self._gradients, self._vectors = gradients, vectors

    def start_sum(self, bucket: Tensor) -> Posted:
        with PEERS_MAY_BE_LOST:
            return _Summing(dist.all_reduce(bucket, group=self._gradients, async_op=True), bucket)

    def sum(self, vector: Tensor) -> Tensor:
        with PEERS_MAY_BE_LOST:
            dist.all_reduce(vector, group=self._vectors)
        return vector

    def gather(self, vector: Tensor) -> list[Tensor]:
        found = [torch.empty_like(vector) for _ in range(self.count)]
        with PEERS_MAY_BE_LOST:
            dist.all_gather(found, vector, group=self._vectors)
        return found
