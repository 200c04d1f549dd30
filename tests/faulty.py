"""Faults for the workers of a test run, chosen by the environment variable FAULT. Imported by the fork server."""

import os
import signal
import sys
import time
from typing import Any

import torch

from pipetrain.engine import connect
from pipetrain.engine.stage import Stage
from pipetrain.training import state

_backward = Stage.backward
_train = Stage.train
_restore = state.restore


def _at(self: Stage, microbatch: int, stage: int = 1) -> bool:
    return (self.index, microbatch, self.step) == (stage, 2, 3)


def raising(self: Stage, microbatch: int, gradients: Any, **options: Any) -> Any:
    if _at(self, microbatch):
        raise ValueError("boom")
    return _backward(self, microbatch, gradients, **options)


def killed(self: Stage, microbatch: int, gradients: Any, **options: Any) -> Any:
    if _at(self, microbatch):
        os.kill(os.getpid(), signal.SIGKILL)
    return _backward(self, microbatch, gradients, **options)


def crashing(self: Stage, microbatch: int, gradients: Any, **options: Any) -> Any:
    if _at(self, microbatch):
        os.kill(os.getpid(), signal.SIGSEGV)
    return _backward(self, microbatch, gradients, **options)


def leaving(self: Stage, microbatch: int, gradients: Any, **options: Any) -> Any:
    if _at(self, microbatch):
        sys.exit(7)
    return _backward(self, microbatch, gradients, **options)


def slow(self: Stage, microbatch: int, gradients: Any, **options: Any) -> Any:
    time.sleep(0.02)
    return _backward(self, microbatch, gradients, **options)


def hanging(self: Stage, microbatch: int, gradients: Any, **options: Any) -> Any:
    if _at(self, microbatch):
        time.sleep(600)
    return _backward(self, microbatch, gradients, **options)


def scaled(self: Stage, microbatch: int, gradients: Any, **options: Any) -> Any:
    result = _backward(self, microbatch, gradients, **options)
    if self.index == 1 and microbatch == 2:
        dict(self.named_parameters())["blocks.1.norm2.bias"].grad *= 1 + 1e-3
    return result


def while_measured(self: Stage, microbatch: int, gradients: Any, **options: Any) -> Any:
    raise RuntimeError("this layer does not like to be watched")


def short_of_memory(self: Stage, microbatch: int, gradients: Any, **options: Any) -> Any:
    """The second rank has no memory for backwards of more than two samples."""
    rows = max((gradient.shape[0] for gradient in gradients.values() if gradient.dim()), default=0)
    if rows > 2 and torch.distributed.get_rank() == 1:
        raise MemoryError
    return _backward(self, microbatch, gradients, **options)


def masks_of_the_stage(self: Stage, mode: bool) -> None:
    self.random._seed = 100 + self.index
    _train(self, mode)


def restored_with_a_difference(*args: Any) -> None:
    _restore(*args)
    runtime = args[1]
    with torch.no_grad():
        for name, parameter in runtime.parameters.items():
            if name == "head.norm.weight":
                parameter[3] += 1


def without_shared_memory() -> str:
    return ""


_ELSEWHERE = {
    "without_shared_memory": (connect, "machine", without_shared_memory),
    "masks_of_the_stage": (Stage, "train", masks_of_the_stage),
    "restored_with_a_difference": (state, "restore", restored_with_a_difference),
}

if "FAULT" in os.environ:
    fault = os.environ["FAULT"]
    owner, name, function = _ELSEWHERE[fault] if fault in _ELSEWHERE else (Stage, "backward", globals()[fault])
    setattr(owner, name, function)
