"""Local worker processes: starts one for each rank, watches them, and leaves none behind.

Workers come from a fork server that has torch loaded already (spawn where there are GPUs: CUDA does not survive a
fork). They meet through a file, so there is no port to collide on and nothing listens but gloo's own loopback pairs.

Multiprocessing and not torch's elastic agent: the agent reports the exit code of one rank only, often a victim's, waits
half a minute for a hung rank whatever it is told, and opens a store that listens on all addresses.
"""

import contextlib
import ctypes
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

PRELOADED = ["pipetrain.worker", "pipetrain.cli"]  # what the fork server imports before it makes workers
SAVE_GRACE_S = 120.0  # how long workers may take to finish a step and write a checkpoint after a signal
_PR_SET_PDEATHSIG = 1
_FAILURE_GRACE_S = 5.0  # how long the others may take to notice that a rank has failed
_POLL_S = 0.2
_REPEAT_S = 1.0  # how often a signal is handed on again
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass
class Ended:
    """How the workers ended.

    Attributes:
        codes: exit code of each rank, minus the signal's number if one killed it; None if it had to be ended from here.
        signalled: the first signal that this process got, or None.
        timed_out: they took longer than they were given, and were ended.
    """

    codes: list[int | None]
    signalled: signal.Signals | None = None
    timed_out: bool = False


@dataclass
class _Inbox:
    """Signals that came in and have not been answered yet."""

    numbers: list[signal.Signals] = field(default_factory=list)


def prepare_fork_server() -> None:
    """Starts importing torch for the workers, while this process still checks the settings."""
    if _has_gpu_driver():
        return
    # Signals are often sent to a whole group of processes: the server must outlive them, or all workers die with it.
    # It inherits that they are blocked, and so do the workers until they listen; none is lost meanwhile.
    resource_tracker.ensure_running()  # it would unblock them again, were it started by the server's start
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        multiprocessing.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_workers(
    worker_main: Callable[[str, int], None], argument: str, num_ranks: int, *, gpus: bool, limit_s: float = math.inf
) -> Ended:
    """Runs `worker_main(argument, rank)` in a process for each rank and waits until all have ended.

    The first signal is handed on, and the workers have SAVE_GRACE_S to end by themselves; a second one ends them at
    once. After `limit_s` seconds they are ended in any case. When a rank fails the others have a moment to notice; then
    they are ended too.
    """
    context: Any = multiprocessing.get_context("spawn" if gpus else "forkserver")
    workers: list[BaseProcess] = [
        context.Process(target=worker_main, args=(argument, rank), name=f"rank {rank}") for rank in range(num_ranks)
    ]
    with _inbox() as inbox:
        try:
            for worker in workers:
                worker.start()
            end = time.monotonic() + limit_s
            signalled = _watch(workers, inbox, end)
            return Ended([worker.exitcode for worker in workers], signalled, time.monotonic() > end)
        finally:
            for worker in workers:
                if worker.pid is not None and worker.exitcode is None:
                    worker.kill()
                    worker.join()


def _watch(workers: list[BaseProcess], inbox: _Inbox, end: float) -> signal.Signals | None:
    first: signal.Signals | None = None
    deadline = sent = float("inf")
    while alive := [worker for worker in workers if worker.exitcode is None]:
        if time.monotonic() > min(deadline, end):
            return first
        while inbox.numbers:
            number = inbox.numbers.pop(0)
            if first is not None:
                return first
            first, deadline, sent = number, time.monotonic() + SAVE_GRACE_S, 0.0
        if (
            first is not None and time.monotonic() - sent > _REPEAT_S
        ):  # a worker that was still starting did not hear it
            sent = time.monotonic()
            for worker in alive:
                _signal(worker, first)
        if deadline == float("inf") and any(worker.exitcode for worker in workers):
            deadline = time.monotonic() + _FAILURE_GRACE_S
        wait([worker.sentinel for worker in alive], timeout=_POLL_S)
    return first


def _signal(worker: BaseProcess, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        if worker.pid is not None:
            os.kill(worker.pid, number)


@contextlib.contextmanager
def _inbox() -> Iterator[_Inbox]:
    """Collects signals instead of being interrupted by them."""
    inbox = _Inbox()

    def put(number: int, frame: FrameType | None) -> None:
        inbox.numbers.append(signal.Signals(number))

    before = {number: signal.signal(number, put) for number in SIGNALS}
    try:
        yield inbox
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_with_parent() -> None:
    """The kernel ends this process when its parent dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _has_gpu_driver() -> bool:
    return Path("/dev/nvidia0").exists()
