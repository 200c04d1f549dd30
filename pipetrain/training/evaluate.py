"""Evaluation through the pipeline: forwards only, the same stages, no dropout."""

import math
from collections.abc import Callable

import torch

from pipetrain.data.batches import TextBatches
from pipetrain.engine.layer import Tensors
from pipetrain.engine.runtime import Program, Runtime
from pipetrain.schedule import build_forward_only


class Evaluator:
    """Runs one split through the pipeline."""

    def __init__(
        self,
        runtime: Runtime,
        num_stages: int,
        num_microbatches: int,
        count: Callable[[Tensors], int],
        characters_per_token: float,
    ) -> None:
        """
        Args:
            count: targets -> tokens that count.
            characters_per_token: turns nats per token into bits per character (UTF-8 bytes).
        """
        self._runtime = runtime
        self._num_stages = num_stages
        self._num_microbatches = num_microbatches
        self._count = count
        self._characters_per_token = characters_per_token
        self._programs: dict[int, Program] = {}

    def run(self, data: TextBatches, max_batches: int | None) -> dict[str, float]:
        """Mean loss over all tokens of the split; the same numbers on every rank."""
        runtime, last = self._runtime, self._num_stages - 1
        loss_sum, count = 0.0, 0
        for index in range(min(data.num_batches, max_batches or data.num_batches)):
            program = self._program(min(self._num_microbatches, data.rows(index)))
            inputs = targets = None
            if 0 in runtime.stages or last in runtime.stages:
                inputs, targets = ((tensor,) for tensor in data.batch(index))
            loss_sum += runtime.evaluate_step(program, inputs, targets)
            if last in runtime.stages and targets is not None:
                count += self._count(targets)
        totals = runtime.transport.all_reduce(torch.tensor([loss_sum, count], dtype=torch.float64))
        mean = float(totals[0] / totals[1])
        return {
            "loss/val": mean,
            "val/perplexity": math.exp(min(mean, 700.0)),
            "val/bits_per_character": mean / math.log(2) / self._characters_per_token,
        }

    def _program(self, num_microbatches: int) -> Program:
        """Every rank meets the sizes in the same order, so they agree on each schedule once, together."""
        if num_microbatches not in self._programs:
            schedule = build_forward_only(self._num_stages, num_microbatches)
            self._programs[num_microbatches] = self._runtime.prepare(schedule)
        return self._programs[num_microbatches]
