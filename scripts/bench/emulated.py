"""Emulated devices: layers that take a set time and no CPU, so that more of them than cores can be measured."""

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contestants import Pipetrain, Work, of_torch, on_rank_0, schedule_of, torchgpipe
from measure import cell, in_processes, in_turns, median, message_s, ratios
from torch import Tensor, nn

from pipetrain.costs import StageCost
from pipetrain.models import LayerRecipe, Recipe
from pipetrain.schedule import SCHEDULES
from pipetrain.sim.simulate import simulate

KS, MS = (2, 4, 8, 16), (8, 32)
NAMES = ("gpipe", "1f1b", "interleaved", "looped_bfs", "zb_h1", "zb_v")
# Of each stage. A whole backward takes both halves.
FORWARD_S, INPUT_S, WEIGHT_S = 0.010, 0.010, 0.010
MESSAGE_BYTES = 64 * 1024
STEPS = 3
MOST_FOR_TORCHGPIPE = 4  # it has one thread for each device, and here all are the CPU: it takes K times as long
WANTED = {2: 0.95, 4: 0.95, 8: 0.92, 16: 0.88}  # gpipe's share of (M + K - 1)(F + B)
_AWAKE_S = 0.0005  # before its end a sleep is waited out awake: it would end up to half a millisecond late


def device_works_for(seconds: float) -> None:
    """Sleeps."""
    until = time.perf_counter() + seconds
    if seconds > _AWAKE_S:
        time.sleep(seconds - _AWAKE_S)
    while time.perf_counter() < until:
        pass


class _Input(torch.autograd.Function):
    """The way from input to output: the forward, and the first half of the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_s: float, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        device_works_for(forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        device_works_for(ctx.backward_s)
        return gradients[0].contiguous(), None, None


class _Weight(torch.autograd.Function):
    """The way from weight to output: the second half of the backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        device_works_for(ctx.backward_s)
        return gradients[0], None


class SleepingLayer(nn.Module):
    """[B, n] -> [B, n]."""

    def __init__(self, forward_s: float, input_s: float, weight_s: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seconds = forward_s, input_s, weight_s

    def forward(self, x: Tensor) -> Tensor:
        forward_s, input_s, weight_s = self.seconds
        out: Tensor = _Input.apply(x, forward_s, input_s) + _Weight.apply(self.weight, weight_s)  # type: ignore
        return out


def sleeping_work(num_stages: int, num_microbatches: int, seconds: tuple[float, float, float]) -> Work:
    """A chain of such layers, one a stage; each message has 64 KiB."""
    recipe = Recipe(
        layers=tuple(LayerRecipe(f"layer{i}", lambda: SleepingLayer(*seconds)) for i in range(num_stages)),
        loss_sum=lambda output, targets: output.sum(),
        count=lambda targets: targets[0].numel(),
    )
    inputs = torch.zeros(num_microbatches, MESSAGE_BYTES // 4)
    return Work(
        recipe, [1] * num_stages, inputs, inputs, num_microbatches, lambda parameters: torch.optim.SGD(parameters, 0.1)
    )


def _rank(name: str, num_microbatches: int, times_slower: float) -> dict[str, Any]:
    world = dist.get_world_size()
    per_rank = SCHEDULES[name].usual
    seconds = tuple(s * times_slower for s in (FORWARD_S, INPUT_S, WEIGHT_S))
    work = sleeping_work(world * per_rank, num_microbatches, seconds)  # type: ignore[arg-type]
    contestants = {"pipetrain": Pipetrain(name, work)}
    if (theirs := of_torch(name, work)) is not None:
        contestants["torch"] = theirs
    if name == "gpipe" and world <= MOST_FOR_TORCHGPIPE:
        contestants["torchgpipe"] = on_rank_0(torchgpipe(work) if dist.get_rank() == 0 else None)
    link_s = message_s(MESSAGE_BYTES)
    return {"seconds": in_turns(contestants, STEPS), "link_s": link_s}


def simulated_s(name: str, num_ranks: int, num_microbatches: int, link_s: float, times_slower: float = 1.0) -> float:
    """What the simulator says of a step."""
    per_rank = SCHEDULES[name].usual
    f, i, w = (s * times_slower for s in (FORWARD_S, INPUT_S, WEIGHT_S))
    plan = schedule_of(name, num_ranks, sleeping_work(num_ranks * per_rank, num_microbatches, (f, i, w)))
    cost = StageCost(f, i, w) if plan.is_split else StageCost(f, i + w)
    return simulate(plan, [cost] * plan.num_stages, link_s)[-1].end_s


def measure(folder: Path, ks: tuple[int, ...] = KS, ms: tuple[int, ...] = MS) -> dict[str, Any]:
    """All cells; for each the medians, their share of the ideal and of the simulator."""
    found: dict[str, Any] = {}
    for k in ks:
        for m in ms:
            for name in NAMES:
                key = f"{name}_K{k}_M{m}"
                raw = cell(folder / "emulated", key, lambda n=name, k=k, m=m: in_processes(k, _rank, n, m, 1.0))  # type: ignore
                found[key] = _evaluated(name, k, m, raw)
    return found


def _evaluated(name: str, k: int, m: int, raw: dict[str, Any]) -> dict[str, Any]:
    seconds = {contestant: median(values) for contestant, values in raw["seconds"].items()}
    ideal_s = simulated_s(name, k, m, 0.0)
    out = {
        "schedule": name,
        "K": k,
        "M": m,
        "link_s": raw["link_s"],
        "ideal_s": ideal_s,
        "simulated_s": simulated_s(name, k, m, raw["link_s"]),
        "seconds": seconds,
        "spread": {contestant: [min(values), max(values)] for contestant, values in raw["seconds"].items()},
        "share_of_ideal": {contestant: ideal_s / s for contestant, s in seconds.items()},
    }
    if "torch" in seconds:
        out["times_torch"] = median(ratios(raw["seconds"]["torch"], raw["seconds"]["pipetrain"]))
    return out


def measure_zero_bubble(folder: Path) -> dict[str, Any]:
    """zb_h1 over 1f1b with F = I = W = 50 ms, measured and simulated."""
    found: dict[str, Any] = {}
    for k in (4, 8):
        both = {
            name: cell(
                folder / "zero_bubble",
                f"{name}_K{k}",
                lambda n=name, k=k: in_processes(k, _rank, n, 2 * k, 5.0),  # type: ignore
            )
            for name in ("1f1b", "zb_h1")
        }
        measured = median(ratios(both["zb_h1"]["seconds"]["pipetrain"], both["1f1b"]["seconds"]["pipetrain"]))
        simulated = simulated_s("zb_h1", k, 2 * k, both["zb_h1"]["link_s"], 5.0) / simulated_s(
            "1f1b", k, 2 * k, both["1f1b"]["link_s"], 5.0
        )
        found[f"K{k}"] = {"measured": measured, "simulated": simulated}
    return found
