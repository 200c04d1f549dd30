"""One rank: a local process that `launch` started, or a process of a torchrun job."""

import dataclasses
import datetime
import faulthandler
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch.distributed import FileStore, Store  # type: ignore[attr-defined]

from pipetrain.derived import num_replicas
from pipetrain.engine.connect import connect
from pipetrain.engine.transport import PeerLost
from pipetrain.errors import Exit, PipetrainError
from pipetrain.paths import RunPaths
from pipetrain.processes import SIGNALS, die_with_parent
from pipetrain.training.job import Job
from pipetrain.training.loop import Request, Signals, train
from pipetrain.training.memory import memory_advice

Settle = Callable[[Job, torch.device], Job]
TIMEOUT = datetime.timedelta(minutes=30)


def run_local_worker(job_json: str, rank: int) -> None:
    """Body of a local worker process: one rank of a training run."""

    def body(job: Job, signals: Signals) -> Exit:
        world = len(job.devices)
        return run_rank(job, rank, world, signals, FileStore(str(job.run.store), world))

    run_process(job_json, rank, body)


def run_process(job_json: str, rank: int, body: Callable[[Job, Signals], Exit]) -> None:
    """Runs `body` in this process, which the launcher has started for a rank, and leaves its failure for the launcher.

    Leaves through `os._exit`: sockets close at once, and if this rank has failed its neighbours notice within
    milliseconds.
    """
    signals = Signals()
    _listen(signals)
    _die_with_launcher()
    faulthandler.enable()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    job = Job.from_json(job_json)
    _log_to(job, rank)
    job.run.pid(rank).write_text(str(os.getpid()))
    try:
        code = body(job, signals)
    except BaseException as error:
        failure = explain_failure(job, rank, error)
        _record(job.run, failure)
        code = Exit(failure.exit_code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_torchrun_rank(job: Job, settle: Settle) -> Exit:
    """Runs this process as one rank of the job that torchrun (or another launcher with its variables) started."""
    signals = Signals()
    _listen(signals)
    return run_rank(job, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), signals, None, settle)


def run_rank(
    job: Job, rank: int, world: int, signals: Signals, store: Store | None, settle: Settle = lambda job, device: job
) -> Exit:
    """Joins the process group and trains this rank's stage.

    Args:
        store: where the ranks find each other; None takes torchrun's variables.
        settle: chooses what the job leaves open, on all ranks together.
    """
    device = join(job, rank, world, store)
    job = settle(_with_common_folder(job), device)
    _log_to(job, rank)
    code = train(job, connect(device, TIMEOUT, num_replicas(job.cfg)), device, signals)
    dist.destroy_process_group()
    return code


def join(job: Job, rank: int, world: int, store: Store | None) -> torch.device:
    """Joins the process group; returns this rank's device.

    Raises:
        PeerLost: if the ranks do not find each other.
    """
    torch.set_num_threads(num_threads(job))
    device = torch.device(job.devices[rank])
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    except RuntimeError as error:
        raise PeerLost(f"the ranks did not find each other: {error}") from error
    return device


def _log_to(job: Job, rank: int) -> None:
    logging.basicConfig(
        filename=job.run.log, level=logging.INFO, format=f"[%(asctime)s][stage {rank}] %(message)s", force=True
    )
    logging.captureWarnings(True)


def _with_common_folder(job: Job) -> Job:
    """Under torchrun every rank names a run folder of its own; the first rank's is taken."""
    roots = [str(job.run.root)]
    try:
        dist.broadcast_object_list(roots, src=0)
    except RuntimeError as error:
        raise PeerLost(f"the ranks did not find each other: {error}") from error
    return dataclasses.replace(job, run=RunPaths(Path(roots[0])))


@dataclasses.dataclass(frozen=True)
class Failure:
    """What ended a rank, in words for the user.

    Attributes:
        error: one line, or several where the error is one that is meant for the user.
        traceback: of the cause; empty where the text says it all.
        secondary: this rank has only lost its neighbour.
        time_ns: when it happened.
    """

    rank: int
    error: str
    traceback: str
    exit_code: int
    secondary: bool
    time_ns: int


def explain_failure(job: Job, rank: int, error: BaseException) -> Failure:
    """Puts an exception into words and writes it into the log."""
    cause = error if isinstance(error, PeerLost) else error.__cause__ or error
    known = isinstance(error, PipetrainError)
    failure = Failure(
        rank=rank,
        error=str(error) if known else f"{job.place_of(rank)} failed{memory_advice(error)}",
        traceback="" if known and cause is error else "".join(traceback.format_exception(cause)),
        exit_code=int(error.exit_code if isinstance(error, PipetrainError) else Exit.FAILED),
        secondary=isinstance(cause, PeerLost),
        time_ns=time.time_ns(),
    )
    logging.getLogger(__name__).error("%s\n%s", failure.error, failure.traceback)
    return failure


def _record(run: RunPaths, failure: Failure) -> None:
    """Leaves the failure for the launcher, which chooses the one to blame."""
    aside = run.failure(failure.rank).with_suffix(".writing")
    aside.write_text(json.dumps(dataclasses.asdict(failure)))
    os.replace(aside, run.failure(failure.rank))


def num_threads(job: Job) -> int:
    """CPU threads of each worker."""
    if job.cfg.threads == "auto":
        return max(1, num_cores() // _workers_here(job))
    return int(job.cfg.threads)


def crowding(job: Job) -> float:
    """How many times as slow workers are as one alone: threads for each core, where these are more than one."""
    if job.devices[0] != "cpu":
        return 1.0
    return max(1.0, _workers_here(job) * num_threads(job) / num_cores())


def num_cores() -> int:
    """Of this machine, that this process may use."""
    return len(os.sched_getaffinity(0))


def _workers_here(job: Job) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", len(job.devices)))


def _listen(signals: Signals) -> None:
    """Turns signals into requests that the loop answers at the end of its step."""

    def handle(number: int, frame: FrameType | None) -> None:
        signals.request = Request.INTERRUPT if number == signal.SIGINT else Request.PREEMPT

    for number in SIGNALS:
        signal.signal(number, handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # see processes.prepare_fork_server


def _die_with_launcher() -> None:
    """No orphans: the kernel ends this process with its parent, and a thread watches the launcher itself.

    (The parent is the fork server, which ends as soon as the launcher does; the thread covers systems without prctl.)
    """
    die_with_parent()
    launcher = multiprocessing.parent_process()
    if launcher is None:
        return

    def watch() -> None:
        launcher.join()
        os._exit(Exit.FAILED)

    threading.Thread(target=watch, daemon=True, name="launcher-watch").start()
