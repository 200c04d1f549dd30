"""The planner's choice beside all that it could have chosen, every plan measured on emulated devices.

A layer takes a set time for each sample, so that micro-batches of other sizes take other times. The planner knows what
it has measured of the layers, as in a run, and never sees how long the plans take.
"""

import itertools
import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contestants import Pipetrain, Work
from emulated import MESSAGE_BYTES, SleepingLayer, wake_punctually
from measure import CPU, TIMEOUT, cell, in_processes, median, seconds_per_step

from pipetrain.costs import Device
from pipetrain.engine.connect import connect
from pipetrain.models import LayerRecipe, Recipe
from pipetrain.planning.engine_cost import engine_s
from pipetrain.planning.measuring import measure_link
from pipetrain.profile.bench import Bench, Conditions, signatures_of
from pipetrain.profile.observe import measure as measure_layer
from pipetrain.sim.balance import even
from pipetrain.sim.forecast import Choice, Setting, forecast
from pipetrain.sim.planner import plans

KS = (2, 4, 8)
SAMPLES = 32
# Milliseconds of the forward of one sample, and of each half of its backward.
MODELS = {
    "equal layers": [1.0] * 16,
    "large head": [0.2, *[0.9] * 15, 3.0],
    "shrinking cells": [2.0 - 0.1 * n for n in range(17)],
}
# With "never" and "always" and two cuts each: 48 plans.
SCHEDULES = (("1f1b", 1), ("interleaved", 2), ("zb_h1", 1), ("zb_v", 2))
MICRO_BATCHES = (4, 8, 16)
RECOMPUTE = ("never", "always")
STEPS = 3


class LayerBySample(SleepingLayer):
    """[B, n] -> [B, n], in a time for each of B samples."""

    def seconds_of(self, samples: int) -> tuple[float, float, float]:
        forward_s, input_s, weight_s = self.seconds
        return samples * forward_s, samples * input_s, samples * weight_s


def _work(milliseconds: list[float], balance: tuple[int, ...], num_microbatches: int) -> Work:
    recipe = Recipe(
        layers=tuple(
            LayerRecipe(f"layer{n}", lambda ms=ms: LayerBySample(ms / 1e3, ms / 1e3, ms / 1e3))  # type: ignore[misc]
            for n, ms in enumerate(milliseconds)
        ),
        loss_sum=lambda output, targets: output.sum(),
        count=lambda targets: targets[0].numel(),
    )
    inputs = torch.zeros(SAMPLES, MESSAGE_BYTES // 4 // (SAMPLES // min(MICRO_BATCHES)))
    return Work(recipe, balance, inputs, inputs, num_microbatches, lambda parameters: torch.optim.SGD(parameters, 0.1))


def _setting(milliseconds: list[float], own_s: float) -> Setting:
    """What the planner knows. All ranks must call it; those behind the first one know no layers.

    Args:
        own_s: what the engine takes for an action.
    """
    world = dist.get_world_size()
    link = measure_link(connect(CPU, TIMEOUT), CPU)
    costs = {}
    if dist.get_rank() == 0:
        work = _work(milliseconds, (), 1)
        observe = partial(measure_layer, make_optimizer=lambda parameters: work.optimizer(list(parameters.values())))
        bench = Bench(work.recipe, signatures_of(work.recipe), Conditions(CPU, 0, None, None, observe))
        for rows in (-(-SAMPLES // m) for m in MICRO_BATCHES):
            costs[rows] = bench.run((work.inputs[:rows],), (work.targets[:rows],))
    dist.barrier()
    return Setting(costs.__getitem__, SAMPLES, (Device("emulated"),) * world, link, (False,) * len(milliseconds), own_s)


def _engine_rank() -> float:
    return engine_s(connect(CPU, TIMEOUT), CPU)


def _rank(milliseconds: list[float], own_s: float) -> Any:
    wake_punctually()
    world, setting = dist.get_world_size(), _setting(milliseconds, own_s)
    grid: list[Any] = [None]
    if dist.get_rank() == 0:
        choices = [
            Choice(name, each, m, recompute)
            for (name, each), m, recompute in itertools.product(SCHEDULES, MICRO_BATCHES, RECOMPUTE)
        ]
        best = plans(setting, choices)[0]
        cut = {choice: plans(setting, [choice])[0].balance for choice in choices}
        evenly = {choice: even(len(milliseconds), world * choice.stages_per_rank) for choice in choices}
        grid[0] = list(dict.fromkeys([(best.choice, best.balance), *cut.items(), *evenly.items()]))
    dist.broadcast_object_list(grid, src=0)
    found = []
    for choice, balance in grid[0]:
        step = Pipetrain(choice.schedule, _work(milliseconds, balance, choice.num_microbatches), choice.recompute)
        step()
        taken = [seconds_per_step(step, 1) for _ in range(STEPS)]
        predicted_s = forecast(setting, choice, balance).step_s if dist.get_rank() == 0 else math.nan
        found.append({**asdict(replace(choice, balance=balance)), "predicted_s": predicted_s, "seconds": taken})
    return found


def measure(folder: Path) -> dict[str, Any]:
    """For each model and number of devices all plans, the planner's first."""
    # Two processes have a core each, as devices would: what the engine takes is not measured by more of them.
    own_s = cell(folder / "planned", "engine", lambda: in_processes(2, _engine_rank))
    found: dict[str, Any] = {}
    for (model, milliseconds), k in itertools.product(MODELS.items(), KS):
        name = f"{model.replace(' ', '_')}_K{k}"
        every = cell(folder / "planned", name, lambda ms=milliseconds, k=k: in_processes(k, _rank, ms, own_s))  # type: ignore
        for plan in every:
            plan["measured_s"] = median(plan.pop("seconds"))
        found[name] = {"model": model, "K": k, "chosen": every[0], "plans": every}
    return found
