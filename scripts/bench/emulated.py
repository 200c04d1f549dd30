"""Emulated devices: layers that take a set time and no CPU, so that more of them than cores can be measured."""

import ctypes
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contestants import Pipetrain, Work, of_torch, on_rank_0, schedule_of, torchgpipe_step
from measure import cell, in_processes, in_turns, median, message_s, ratios
from torch import Tensor, nn

from pipetrain.costs import Link, StageCost
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
_AWAKE_S = 0.0002  # before its end a sleep is waited out awake, since it would end up to so much late
_PR_SET_TIMERSLACK = 29


def device_works_until(second: float) -> None:
    """Sleeps until `time.perf_counter()` says so."""
    if (left := second - _AWAKE_S - time.perf_counter()) > 0:
        time.sleep(left)
    while time.perf_counter() < second:
        pass


def wake_punctually() -> None:
    """This process's sleeps end within 0.1 ms (Linux): what is waited out awake takes a core from other ranks."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


class _Input(torch.autograd.Function):
    """The way from input to output, whose backward is the first half."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        end_s = time.perf_counter() + ctx.backward_s
        gradient = gradients[0].contiguous()
        device_works_until(end_s)
        return gradient, None


class _Weight(torch.autograd.Function):
    """The way from weight to output, whose backward is the second half."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        device_works_until(time.perf_counter() + ctx.backward_s)
        return gradients[0], None


class SleepingLayer(nn.Module):
    """[B, n] -> [B, n]. What it computes is part of its time."""

    def __init__(self, forward_s: float, input_s: float, weight_s: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seconds = forward_s, input_s, weight_s

    def seconds_of(self, samples: int) -> tuple[float, float, float]:
        """Of a forward and both halves of a backward."""
        return self.seconds

    def forward(self, x: Tensor) -> Tensor:
        forward_s, input_s, weight_s = self.seconds_of(len(x))
        end_s = time.perf_counter() + forward_s
        out: Tensor = _Input.apply(x, input_s) + _Weight.apply(self.weight, weight_s)  # type: ignore
        device_works_until(end_s)
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
    wake_punctually()
    world = dist.get_world_size()
    per_rank = SCHEDULES[name].usual
    seconds = tuple(s * times_slower for s in (FORWARD_S, INPUT_S, WEIGHT_S))
    work = sleeping_work(world * per_rank, num_microbatches, seconds)  # type: ignore[arg-type]
    contestants = {"pipetrain": Pipetrain(name, work)}
    if (theirs := of_torch(name, work)) is not None:
        contestants["torch"] = theirs
    if name == "gpipe" and world <= MOST_FOR_TORCHGPIPE:
        contestants["torchgpipe"] = on_rank_0(torchgpipe_step(work) if dist.get_rank() == 0 else None)
    link_s = message_s(MESSAGE_BYTES)
    return {"seconds": in_turns(contestants, STEPS), "link_s": link_s}


def simulated_s(name: str, num_ranks: int, num_microbatches: int, link_s: float, times_slower: float = 1.0) -> float:
    """What the simulator says of a step."""
    per_rank = SCHEDULES[name].usual
    f, i, w = (s * times_slower for s in (FORWARD_S, INPUT_S, WEIGHT_S))
    plan = schedule_of(name, num_ranks, sleeping_work(num_ranks * per_rank, num_microbatches, (f, i, w)))
    cost = StageCost(f, i, w) if plan.is_split else StageCost(f, i + w)
    return simulate(plan, [cost] * plan.num_stages, Link(link_s))[-1].end_s


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
