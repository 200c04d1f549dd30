"""Chooses how the ranks of the default process group exchange tensors."""

import datetime

import torch
import torch.distributed as dist

from pipetrain.engine.shared_memory import SharedMemoryTransport, machine
from pipetrain.engine.transport import DistributedTransport, Transport


def connect(device: torch.device, timeout: datetime.timedelta) -> Transport:
    """CPU processes of one machine share memory; all others use NCCL or gloo."""
    if device.type != "cpu":
        return DistributedTransport(device, timeout)
    machines: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(machines, machine())
    on_one = machines[0] != "" and len(set(machines)) == 1
    return SharedMemoryTransport(timeout) if on_one else DistributedTransport(device, timeout)
