"""Evaluation through the pipeline: forwards only, the same stages, no dropout."""

from collections.abc import Callable

import torch
from torch import Tensor

from pipetrain.data.batches import Batches
from pipetrain.engine.loss import Tensors
from pipetrain.engine.runtime import Program, Runtime
from pipetrain.models import Recipe
from pipetrain.schedule import Schedule, forward_only_like

# (data, number of a batch) -> inputs and targets, where this rank needs them
Part = Callable[[Batches, int], tuple[Tensors | None, Tensors | None]]


class Evaluator:
    """Runs one split through the pipeline."""

    def __init__(self, runtime: Runtime, recipe: Recipe, schedule: Schedule, part: Part) -> None:
        """
        Args:
            schedule: of training.
        """
        self._runtime, self._recipe, self._schedule, self._part = runtime, recipe, schedule, part
        self._programs: dict[int, Program] = {}

    def run(
        self, data: Batches, max_batches: int | None, request: Callable[[], float]
    ) -> tuple[dict[str, float], float]:
        """Means over all tokens or samples of the split; the same numbers on every rank.

        Args:
            request: what this rank is asked for by signals; if any rank is, the evaluation is given up.

        Returns:
            The loss and what else the model measures (nothing if given up), and the sum of the requests.
        """
        names = ["loss/val", *(f"val/{name}" for name in self._recipe.measures)]
        sums, count = torch.zeros(len(names), dtype=torch.float64), 0
        for index in range(min(data.num_batches, max_batches or data.num_batches)):
            if requests := float(self._sum(torch.tensor([request()], dtype=torch.float64))):
                return {}, requests
            share, rows = data.share, data.rows(index)
            program = self._program(share.microbatches(rows))
            if not range(rows)[share.rows(rows)]:
                continue  # fewer rows than replicas
            inputs, targets = self._part(data, index)
            sums += self._runtime.evaluate_step(program, inputs, targets, index)
            count += self._recipe.count(targets) if targets is not None else 0
        total = self._sum(torch.cat([sums, torch.tensor([count], dtype=torch.float64)]))
        return dict(zip(names, (total[:-1] / total[-1]).tolist(), strict=True)), 0.0

    def _sum(self, values: Tensor) -> Tensor:
        transport = self._runtime.transport
        return transport.replicas.sum(transport.all_reduce(values))

    def _program(self, num_microbatches: int) -> Program:
        """Every rank meets the sizes in the same order, so they agree on each schedule once, together."""
        if num_microbatches not in self._programs:
            schedule = forward_only_like(self._schedule, num_microbatches)
            self._programs[num_microbatches] = self._runtime.prepare(schedule)
        return self._programs[num_microbatches]
