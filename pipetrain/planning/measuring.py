"""The worker processes that measure: what each layer takes on its device, and what a message takes between two."""

import contextlib
import ctypes
import gc
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

from pipetrain.costs import Link, ModelCost
from pipetrain.engine.connect import connect
from pipetrain.engine.message import Wire
from pipetrain.engine.transport import Transport
from pipetrain.errors import Exit
from pipetrain.planning.engine_cost import engine_s
from pipetrain.profile.bench import Bench, Conditions, signatures_of
from pipetrain.profile.observe import measure
from pipetrain.profile.store import Profile
from pipetrain.training.build import AUTOCAST, build_recipe
from pipetrain.training.data import full_batch, to_device
from pipetrain.training.job import Job
from pipetrain.training.loop import Signals
from pipetrain.training.memory import is_out_of_memory
from pipetrain.training.optim import build_optimizer
from pipetrain.worker import TIMEOUT, crowding, join, run_process

_SMALL, _LARGE = 64, 4 * 2**20  # bytes of the messages that are measured
_MESSAGES = 30
_DISTURBED = 1.2  # times as long as with a core for each thread


def run_measuring_worker(argument: str, rank: int) -> None:
    """Body of a local worker process that measures; the first rank leaves the profile in its folder."""
    job, rows = json.loads(argument)
    run_process(job, rank, partial(_body, rows=rows, rank=rank))


def _body(job: Job, signals: Signals, *, rows: Sequence[int], rank: int) -> Exit:
    device = join(job, rank, len(job.devices), FileStore(str(job.run.store), len(job.devices)))
    profile = measure_together(job, rows, device, job.run.measuring.write_text)
    if profile is not None:
        job.run.profile.write_text(profile.to_json())
    dist.destroy_process_group()
    return Exit.DONE


def measure_together(
    job: Job, rows: Sequence[int], device: torch.device, announce: Callable[[str], object] = lambda layer: None
) -> Profile | None:
    """All ranks of the process group call it.

    All measure the same layers at the same time, as they will compute at the same time: they share what a machine's
    processes share. The first rank's seconds count, the others' give the slowness of other kinds of devices. Messages
    are measured between the first two ranks.

    Args:
        rows: samples in a micro-batch, one or several sizes, ascending.
        announce: is told the name of each layer before it is measured.

    Returns:
        The profile on the first rank, None on the others.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    kinds: list[str] = [""] * world
    dist.all_gather_object(kinds, kind_of(device))
    watch = _Watch()
    costs = _costs_that_fit(job, rows, device, announce, watch)
    measured: list[list[int]] = [[]] * world
    dist.all_gather_object(measured, list(costs))
    seconds: list[float] = [0.0] * world
    dist.all_gather_object(seconds, sum(layer.forward_s + layer.backward_s for layer in costs[rows[0]].layers))
    transport = connect(device, TIMEOUT)
    link = measure_link(transport, device) if world > 1 else Link()
    sums = _measure_sums(device) if world > 1 else Link()
    own_s = engine_s(transport, device)
    memory: list[float] = [0.0] * world
    dist.all_gather_object(memory, memory_of(device))
    if rank != 0:
        return None
    return Profile(
        about={},
        memory_bytes=dict(zip(kinds, memory, strict=True)),
        slowness={kind: own / seconds[0] for kind, own in reversed(list(zip(kinds, seconds, strict=True)))},
        link=link,
        sums=sums,
        engine_s=own_s,
        crowding=crowding(job),
        disturbed=device.type == "cpu" and watch.waited_more_than(_DISTURBED * crowding(job)),
        process_bytes=_process_bytes() if device.type == "cpu" else 0,
        costs={number: costs[number] if all(number in each for each in measured) else None for number in rows},
    )


class _Watch:
    """Adds up wall time, and the time in which this process had a core."""

    def __init__(self) -> None:
        self._wall_s = self._own_s = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        wall_s, own_s = time.perf_counter(), time.process_time()
        yield
        self._wall_s += time.perf_counter() - wall_s
        self._own_s += time.process_time() - own_s

    def waited_more_than(self, times: float) -> bool:
        """Whether it took so many times as long as the process alone would have."""
        return self._wall_s > times * self._own_s


def _costs_that_fit(
    job: Job, rows: Sequence[int], device: torch.device, announce: Callable[[str], object], watch: _Watch
) -> dict[int, ModelCost]:
    """Of the sizes up to the first one for which this device has no memory."""
    cfg, costs, is_full = job.cfg, dict[int, ModelCost](), False
    recipe = build_recipe(cfg, job.data)
    conditions = Conditions(
        device=device,
        seed=cfg.seed,
        dtype=torch.float64 if cfg.precision == "fp64" else None,
        autocast_dtype=AUTOCAST[cfg.precision],
        observe=partial(measure, make_optimizer=partial(build_optimizer, cfg.optimizer)),
        announce=announce,
    )
    bench = Bench(recipe, signatures_of(recipe), conditions)
    batch = full_batch(cfg, job.data)
    for number in rows:
        dist.barrier()
        *inputs, targets = (to_device(tensor[:number], cfg, device) for tensor in (*batch[0], batch[1]))
        try:
            if not is_full:
                with watch.running():
                    costs[number] = bench.run(tuple(inputs), (targets,))
        except (MemoryError, RuntimeError) as error:
            if not costs or not is_out_of_memory(error):
                raise
            is_full = True
    return costs


def measure_link(transport: Transport, device: torch.device) -> Link:
    """From halves of the time there and back between the first two ranks; the others return what costs nothing."""
    rank = transport.rank
    if rank > 1:
        return Link()
    medians = []
    for size in (_SMALL, _LARGE):
        message, taken = torch.zeros(size // 4, device=device), []
        wire = Wire(message.numel(), message.dtype)
        for number in range(_MESSAGES):
            started = time.perf_counter()
            for sender in (0, 1):
                if rank == sender:
                    transport.send(message, 1 - rank, number).wait()
                else:
                    transport.post(wire, 1 - rank, number).wait()
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
            taken.append((time.perf_counter() - started) / 2)
        medians.append(statistics.median(taken))
    return _link(*medians)


def _measure_sums(device: torch.device) -> Link:
    """As gradients of two replicas are added up, by the first two ranks; all must call it."""
    pair = dist.new_group([0, 1], backend="nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    if dist.get_rank() > 1:
        return Link()
    medians = []
    for size in (_SMALL, _LARGE):
        bucket, taken = torch.zeros(size // 4, device=device), []
        for _ in range(_MESSAGES):
            started = time.perf_counter()
            dist.all_reduce(bucket, group=pair, async_op=True).wait()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - started)
        medians.append(statistics.median(taken))
    return _link(*medians)


def _link(small_s: float, large_s: float) -> Link:
    """From what small and large messages take."""
    return Link(small_s, (_LARGE - _SMALL) / max(large_s - small_s, 1e-9))


def kind_of(device: torch.device) -> str:
    """What a device is: two of one kind are as fast as each other."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """Of this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def memory_of(device: torch.device) -> float:
    """Bytes that there are for one rank: of a GPU what is free, of this machine its share."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError):
        total = min(total, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def _process_bytes() -> int:
    """What this process holds without any tensors, once it has done everything that training does: by then the code of
    all operations is in memory, which is most of it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)
    try:
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # no Linux: the most that it ever held
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return resident_pages * os.sysconf("SC_PAGE_SIZE")
