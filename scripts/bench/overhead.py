"""What the engine itself costs: actions of layers that do nothing, and learning and checking what travels."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contestants import Pipetrain, Work
from emulated import FORWARD_S, INPUT_S, MESSAGE_BYTES, WEIGHT_S, SleepingLayer
from measure import cell, in_processes, in_turns, median, seconds_per_step
from torch import Tensor, nn

from pipetrain.engine import layer as layer_module
from pipetrain.engine import runtime as runtime_module
from pipetrain.engine.message import Layout
from pipetrain.engine.stage import Stage
from pipetrain.engine.wiring import Wiring
from pipetrain.models import LayerRecipe, Recipe

MICRO_BATCHES, STEPS = 32, 20
NAMES = ("gpipe", "1f1b", "zb_h1")


class Nothing(nn.Module):
    """A layer that costs nothing but has a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


class Rich(nn.Module):
    """A device that hands on a dict of three tensors, two numbers and a word."""

    def __init__(self) -> None:
        super().__init__()
        self.device = SleepingLayer(FORWARD_S, INPUT_S, WEIGHT_S)

    def forward(self, value: Any) -> dict[str, Any]:
        x = value["x"] if isinstance(value, dict) else value
        return {
            "x": self.device(x),
            "mask": x > 0,
            "length": x.sum(1).long(),
            "rows": len(x),
            "scale": 0.5,
            "kind": "rich",
        }


def _work(num_stages: int, layer: Callable[[], nn.Module], floats: int) -> Work:
    recipe = Recipe(
        layers=tuple(LayerRecipe(f"layer{i}", layer) for i in range(num_stages)),
        loss_sum=lambda output, targets: (output["x"] if isinstance(output, dict) else output).sum(),
        count=lambda targets: targets[0].numel(),
    )
    inputs = torch.zeros(MICRO_BATCHES, floats)
    return Work(
        recipe, [1] * num_stages, inputs, inputs, MICRO_BATCHES, lambda parameters: torch.optim.SGD(parameters, 0.1)
    )


def _nothing_rank() -> dict[str, list[float]]:
    work = _work(dist.get_world_size(), Nothing, 64)
    return in_turns({name: Pipetrain(name, work, "always") for name in NAMES}, STEPS)


class _Timed:
    """Adds up the time inside some functions, by putting itself in their place."""

    def __init__(self, *places: tuple[Any, str]) -> None:
        self.seconds = 0.0
        self._inside = False
        for owner, name in places:
            setattr(owner, name, self._around(getattr(owner, name)))

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, started = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started
                self._inside = False

        return timed


def _structures_rank(is_rich: bool) -> float:
    """The share of a step that goes into structures and layouts, on the slowest rank."""
    timed = _Timed(
        *((Wiring, name) for name in ("inputs", "layout", "learn", "learn_batch", "structure", "knows")),
        (Stage, "_check_output"),
        (Layout, "pack"),
        (Layout, "unpack"),
        (runtime_module, "key_of"),
        (layer_module, "flatten"),
    )
    layer = Rich if is_rich else lambda: SleepingLayer(FORWARD_S, INPUT_S, WEIGHT_S)
    step = Pipetrain("gpipe", _work(dist.get_world_size(), layer, MESSAGE_BYTES // 4))
    step()
    timed.seconds = 0.0
    elapsed = seconds_per_step(step, 3)
    share = torch.tensor([timed.seconds / 3 / elapsed], dtype=torch.float64)
    dist.all_reduce(share, dist.ReduceOp.MAX)
    return float(share[0])


def measure(folder: Path) -> dict[str, Any]:
    """Microseconds for each F, R and B (or I and W) of layers that do nothing, and the share of structures."""
    found: dict[str, Any] = {"wanted_us": 250}
    for world in (1, 2):
        times = cell(folder / "overhead", f"nothing_K{world}", lambda k=world: in_processes(k, _nothing_rank))  # type: ignore
        for name, seconds in times.items():
            actions = MICRO_BATCHES * (4 if name == "zb_h1" else 3)
            found[f"{name}, {world} stages, us an action"] = median(seconds) / actions * 1e6
    for is_rich in (False, True):
        share = cell(
            folder / "overhead",
            f"structures_{is_rich}",
            lambda r=is_rich: in_processes(2, _structures_rank, r),  # type: ignore
        )
        found["structures, " + ("3 tensors, 2 numbers" if is_rich else "one tensor")] = share
    return found
