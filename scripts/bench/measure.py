"""Ranks as processes, contestants in turns, medians: what all parts share."""

import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

CPU = torch.device("cpu")
TIMEOUT = datetime.timedelta(minutes=10)
ROUNDS = 3

Step = Callable[[], None]


def in_processes(world: int, rank_main: Callable[..., Any], *args: Any) -> Any:
    """Runs `rank_main(*args)` on `world` gloo ranks, one thread each; returns what rank 0 returned."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (world, folder, rank_main, args), nprocs=world, start_method="forkserver")
        return json.loads((Path(folder) / "result").read_text())


def _rank(rank: int, world: int, folder: str, rank_main: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    result = rank_main(*args)
    if rank == 0:
        (Path(folder) / "result").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def seconds_per_step(step: Step, steps: int) -> float:
    """From barrier to barrier."""
    dist.barrier()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    dist.barrier()
    return (time.perf_counter() - started) / steps


def in_turns(contestants: Mapping[str, Step], steps: int, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of a step of each contestant in each round; every round in another order, after a step to warm up."""
    for step in contestants.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in list(contestants)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(seconds_per_step(contestants[name], steps))
    return times


def message_s(num_bytes: int, times: int = 50) -> float:
    """Seconds of one message from rank 0 to rank 1: half the median of there and back. All ranks must call it."""
    message = torch.zeros(num_bytes // 4)
    rank, taken = dist.get_rank(), []
    for _ in range(times):
        started = time.perf_counter()
        if rank == 0:
            dist.send(message, 1)
            dist.recv(message, 1)
        elif rank == 1:
            dist.recv(message, 0)
            dist.send(message, 0)
        taken.append((time.perf_counter() - started) / 2)
    dist.barrier()
    return statistics.median(taken)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(over, under, strict=True)]


def cell(folder: Path, name: str, measure: Callable[[], Any]) -> Any:
    """The result of a measurement: from its file, if an earlier run was that far, else measured and kept there."""
    path = folder / f"{name}.json"
    if not path.exists():
        found = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".writing").write_text(json.dumps(found, indent=2))
        path.with_suffix(".writing").rename(path)
    return json.loads(path.read_text())
