"""Faults for the workers of a test run, chosen by the environment variable FAULT. Imported by the fork server."""

import os
import signal
import sys
import time
from typing import Any

from pipetrain.engine.stage import Stage

_backward = Stage.backward


def _at(self: Stage, microbatch: int, stage: int = 1) -> bool:
    return (self.index, microbatch, self.step) == (stage, 2, 3)


def raising(self: Stage, microbatch: int, gradients: Any) -> Any:
    if _at(self, microbatch):
        raise ValueError("boom")
    return _backward(self, microbatch, gradients)


def killed(self: Stage, microbatch: int, gradients: Any) -> Any:
    if _at(self, microbatch):
        os.kill(os.getpid(), signal.SIGKILL)
    return _backward(self, microbatch, gradients)


def crashing(self: Stage, microbatch: int, gradients: Any) -> Any:
    if _at(self, microbatch):
        os.kill(os.getpid(), signal.SIGSEGV)
    return _backward(self, microbatch, gradients)


def leaving(self: Stage, microbatch: int, gradients: Any) -> Any:
    if _at(self, microbatch):
        sys.exit(7)
    return _backward(self, microbatch, gradients)


def slow(self: Stage, microbatch: int, gradients: Any) -> Any:
    time.sleep(0.02)
    return _backward(self, microbatch, gradients)


def hanging(self: Stage, microbatch: int, gradients: Any) -> Any:
    if _at(self, microbatch):
        time.sleep(600)
    return _backward(self, microbatch, gradients)


if "FAULT" in os.environ:
    Stage.backward = globals()[os.environ["FAULT"]]  # type: ignore[method-assign]
