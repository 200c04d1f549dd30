"""Evaluation through the pipeline: forwards only, the same stages, no dropout."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipetrain.data.batches import Batches
from pipetrain.data.text import TokenFolder
from pipetrain.engine.loss import Tensors
from pipetrain.engine.runtime import Program, Runtime
from pipetrain.models import Recipe
from pipetrain.schedule import Schedule, forward_only_like

_LARGEST = 700.0  # whose exponential is still a number
# (data, number of a batch) -> inputs and targets, where this rank needs them
Part = Callable[[Batches, int], tuple[Tensors | None, Tensors | None]]


class Evaluation(NamedTuple):
    """Means over all tokens or samples.

    Attributes:
        values: the loss and what else the model measures, by the names of metrics.
        of_group: the same of each group of samples that the data tell apart: their numbers by name.
        requests: the sum of those of all ranks; if there is one, the evaluation was given up and has no values.
    """

    values: dict[str, float]
    of_group: dict[str, dict[str, float]]
    requests: float


def text_values(loss: float, tokens: TokenFolder, split: str) -> dict[str, float]:
    """What else is said of a mean loss by token."""
    bytes_per_token = tokens.num_bytes[split] / tokens.num_tokens[split]
    return {
        "val/perplexity": math.exp(min(loss, _LARGEST)),
        "val/bits_per_character": loss / math.log(2) / bytes_per_token,
    }


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
        self,
        data: Batches,
        max_batches: int | None,
        *,
        group: Callable[[int], str] = lambda index: "",
        request: Callable[[], float] = lambda: 0.0,
    ) -> Evaluation:
        """Means over the split; the same numbers on every rank.

        Args:
            group: to which one a batch belongs.
            request: what this rank is asked for by signals; if any rank is, the evaluation is given up.
        """
        names = ["loss/val", *(f"val/{name}" for name in self._recipe.measures)]
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(len(names) + 1, dtype=torch.float64))
        for index in range(min(data.num_batches, max_batches or data.num_batches)):
            if requests := float(self._sum(torch.tensor([request()], dtype=torch.float64))):
                return Evaluation({}, {}, requests)
            share, rows, its = data.share, data.rows(index), sums[group(index)]
            program = self._program(share.microbatches(rows))
            if not range(rows)[share.rows(rows)]:
                continue  # fewer rows than replicas
            inputs, targets = self._part(data, index)
            its[:-1] += self._runtime.evaluate_step(program, inputs, targets, index)
            its[-1] += self._recipe.count(targets) if targets is not None else 0
        every = self._sum(torch.stack(list(sums.values())).flatten()).unflatten(0, (len(sums), -1))

        def means(total: Tensor) -> dict[str, float]:
            values = dict(zip(names, (total[:-1] / total[-1]).tolist(), strict=True))
            if "val/nll" in values:
                values["val/perplexity"] = math.exp(min(values["val/nll"], _LARGEST))
            return values

        return Evaluation(means(every.sum(0)), dict(zip(sums, map(means, every), strict=True)), 0.0)

    def _sum(self, values: Tensor) -> Tensor:
        transport = self._runtime.transport
        return transport.replicas.sum(transport.all_reduce(values))

    def _program(self, num_microbatches: int) -> Program:
        """Every rank meets the sizes in the same order, so they agree on each schedule once, together."""
        if num_microbatches not in self._programs:
            schedule = forward_only_like(self._schedule, num_microbatches)
            self._programs[num_microbatches] = self._runtime.prepare(schedule)
        return self._programs[num_microbatches]
