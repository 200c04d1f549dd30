"""Chooses how the ranks of the default process group exchange tensors, and which of them are a pipeline together."""

import datetime

import torch
import torch.distributed as dist

from pipetrain.engine.replicas import ALONE, DistributedReplicas
from pipetrain.engine.shared_memory import SharedMemoryTransport, machine
from pipetrain.engine.transport import DistributedTransport, Replicas, Transport


def connect(device: torch.device, timeout: datetime.timedelta, num_replicas: int = 1) -> Transport:
    """CPU processes of one machine share memory; all others use NCCL or gloo.

    Ranks that follow each other are a pipeline: with two replicas of three stages, 0 to 2 and 3 to 5. Where a machine
    has a whole one, micro-batches stay inside it, and only gradients leave it, once a mini-batch.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    length = world // num_replicas
    everything = dist.group.WORLD
    assert everything is not None
    pipeline: dist.ProcessGroup = everything
    replicas: Replicas = ALONE
    if num_replicas > 1:  # all ranks make all groups, in one order
        for replica in range(num_replicas):
            group = dist.new_group(range(replica * length, (replica + 1) * length), timeout=timeout, backend="gloo")
            pipeline = group if rank // length == replica else pipeline
        for place in range(length):
            members = range(place, world, length)
            vectors = dist.new_group(members, timeout=timeout, backend="gloo")
            gradients = dist.new_group(members, timeout=timeout, backend="nccl") if device.type == "cuda" else vectors
            if rank % length == place:
                replicas = DistributedReplicas(rank // length, num_replicas, gradients, vectors)
    ranks = range(replicas.number * length, (replicas.number + 1) * length)
    if device.type == "cpu":
        machines: list[str] = [""] * world
        dist.all_gather_object(machines, machine())
        if machines[0] != "" and len(set(machines)) == 1:
            return SharedMemoryTransport(timeout, ranks, replicas)
    return DistributedTransport(device, timeout, ranks, pipeline, replicas)
