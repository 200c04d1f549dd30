"""Drop-path: a sample loses the result of an operation as a whole, more often in later cells and later in training.

Source: ScheduledDropPath of Zoph et al. 2018, section 3, which Real et al. 2019 train with; the authors' TensorFlow
code, network_utils.py. Their 'v1' schedule follows training alone, 'v2' depth alone, 'v3' both, as here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_ROUNDING = 1e-6  # of a step: three thirds may be less than one


@dataclass(frozen=True)
class DropPathSchedule:
    """How often paths are dropped.

    Attributes:
        rate: probability in the last cell at the end of the schedule.
        steps: mini-batches over which it grows from zero; 0: it is there at once.
        forwards_per_step: micro-batches of a mini-batch.
    """

    rate: float
    steps: int
    forwards_per_step: int

    def scaled(self, depth: float) -> "DropPathSchedule":
        """For a cell at a depth above 0 up to 1: the rate grows in proportion."""
        return DropPathSchedule(self.rate * depth, self.steps, self.forwards_per_step)


class DropPath(nn.Module):
    """[B, ...] -> the same, some samples zero and the others divided by the probability of being kept."""

    def forward(self, x: Tensor, keep: Tensor | float) -> Tensor:
        kept = torch.rand(len(x), *(1 for _ in x.shape[1:]), device=x.device) < keep
        return x * (kept / keep).to(x.dtype)


class KeepProbability(nn.Module):
    """The present probability of keeping a path.

    A layer is not told the step, so each of its forwards counts for its share of one, in a buffer: part of a
    checkpoint, the same on any number of stages, and right where a run goes on with other micro-batches.
    """

    steps: Tensor

    def __init__(self, schedule: DropPathSchedule) -> None:
        super().__init__()
        self._schedule = schedule
        if schedule.steps:
            self.register_buffer("steps", torch.zeros((), dtype=torch.float64))

    def forward(self) -> Tensor | float:
        rate, steps = self._schedule.rate, self._schedule.steps
        if not steps:
            return 1 - rate
        step = (self.steps + _ROUNDING).floor()
        self.steps += 1 / self._schedule.forwards_per_step
        return 1 - rate * (step / steps).clamp(max=1)
