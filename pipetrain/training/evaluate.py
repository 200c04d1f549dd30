"""Evaluation through the pipeline: forwards only, the same stages, no dropout."""

import math
from collections.abc import Callable

import torch

from pipetrain.data.batches import Batches
from pipetrain.engine.loss import Tensors
from pipetrain.engine.runtime import Program, Runtime
from pipetrain.schedule import Skips, build_forward_only


class Evaluator:
    """Runs one split through the pipeline."""

    def __init__(
        self,
        runtime: Runtime,
        num_stages: int,
        skips: Skips,
        num_microbatches: int,
        count: Callable[[Tensors], int],
    ) -> None:
        """
        Args:
            count: targets -> tokens that count.
        """
        self._runtime = runtime
        self._num_stages = num_stages
        self._skips = skips
        self._num_microbatches = num_microbatches
        self._count = count
        self._programs: dict[int, Program] = {}

    def run(
        self,
        data: Batches,
        max_batches: int | None,
        *,
        characters_per_token: float | None,
        request: Callable[[], float],
    ) -> tuple[dict[str, float], float]:
        """Mean loss over all tokens or samples of the split; the same numbers on every rank.

        Args:
            characters_per_token: turns nats per token into bits per character (UTF-8 bytes); None if there is no text.
            request: what this rank is asked for by signals; if any rank is, the evaluation is given up.

        Returns:
            The metrics (none if given up), and the sum of the requests.
        """
        last = self._num_stages - 1
        first_or_last = 0 in self._runtime.stages or last in self._runtime.stages
        loss_sum, count = 0.0, 0
        for index in range(min(data.num_batches, max_batches or data.num_batches)):
            if requests := self._sum(request()):
                return {}, requests
            program = self._program(min(self._num_microbatches, data.rows(index)))
            inputs = targets = None
            if first_or_last:
                inputs, targets = ((tensor.to(self._runtime.device),) for tensor in data.batch(index))
            loss_sum += self._runtime.evaluate_step(program, inputs, targets)
            if last in self._runtime.stages and targets is not None:
                count += self._count(targets)
        mean = self._sum(loss_sum) / self._sum(count)
        values = {"loss/val": mean}
        if characters_per_token is not None:
            values["val/perplexity"] = math.exp(min(mean, 700.0))
            values["val/bits_per_character"] = mean / math.log(2) / characters_per_token
        return values, 0.0

    def _sum(self, value: float) -> float:
        return float(self._runtime.transport.all_reduce(torch.tensor([value], dtype=torch.float64))[0])

    def _program(self, num_microbatches: int) -> Program:
        """Every rank meets the sizes in the same order, so they agree on each schedule once, together."""
        if num_microbatches not in self._programs:
            schedule = build_forward_only(self._num_stages, num_microbatches, self._skips)
            self._programs[num_microbatches] = self._runtime.prepare(schedule)
        return self._programs[num_microbatches]
