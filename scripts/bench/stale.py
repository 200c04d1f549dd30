"""Stale schedules on emulated devices: what a step takes, beside the simulator and beside one device."""

import statistics
import time
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from emulated import MESSAGE_BYTES, SleepingLayer, wake_punctually
from measure import CPU, TIMEOUT, cell, in_processes, message_s

from pipetrain.costs import Link, StageCost
from pipetrain.engine.connect import connect
from pipetrain.engine.minibatch import MiniBatch
from pipetrain.engine.runtime import Runtime
from pipetrain.engine.stage import Stage
from pipetrain.engine.transport import Transport
from pipetrain.models import LayerRecipe, Recipe
from pipetrain.partition.split import dataflow_of, take_stage
from pipetrain.schedule import LOCKED, STALE, Kind, Span, build_stale
from pipetrain.sim.simulate import simulate
from pipetrain.training.trace import gather_spans, start_together

FAMILIES = {"ouroboros": STALE["ouroboros"], "ouroboros locked": LOCKED, "pipedream": STALE["pipedream"]}


@dataclass(frozen=True)
class Case:
    """A schedule, modules of so many layers, and what each layer takes: 1.0 is a module of usual size."""

    name: str
    balance: tuple[int, ...]
    sizes: tuple[float, ...]
    replicas: int = 1

    @property
    def key(self) -> str:
        parts = (self.name.replace(" ", "_"), len(self.balance), self.replicas, sum(self.balance), self.sizes[0])
        return "_".join(map(str, parts))

    @property
    def devices(self) -> int:
        return self.replicas * (len(self.balance) - FAMILIES[self.name].extra)


def _usual(name: str, modules: int, replicas: int = 1) -> Case:
    """A layer each. In a ring the two outer ones together are as heavy as one in the middle."""
    outer = 0.5 if FAMILIES[name].extra else 1.0
    return Case(name, (1,) * modules, (outer, *[1.0] * (modules - 2), outer), replicas)


CASES = [
    *(_usual(name, modules) for name in FAMILIES for modules in (3, 4, 5, 8)),
    _usual("ouroboros", 3, 2),
    _usual("ouroboros", 5, 2),
    _usual("ouroboros", 3, 4),
    # What the reviewers of Ouroboros asked for: 64 layers on 4 devices, and 12 on 11.
    Case("ouroboros", (8, 16, 16, 16, 8), (1 / 16,) * 64),
    _usual("ouroboros", 12),
    Case("ouroboros", (1,) * 12, (1.0,) * 12),
]
FORWARD_S, BACKWARD_S = 0.050, 0.100
STEPS, MARGIN = 40, 12  # mini-batches of a segment; so many at both ends are not the steady state
HEADER = [
    "schedule",
    "modules K",
    "layers",
    "replicas",
    "devices",
    "s a step",
    "simulated / measured",
    "bubble",
    "times one device",
    "updates late",
]


def measure(folder: Path) -> dict[str, Any]:
    """All cells."""
    return {
        case.key: cell(folder / "stale", case.key, partial(in_processes, case.devices, _rank, case)) for case in CASES
    }


def _rank(case: Case) -> dict[str, Any]:
    wake_punctually()
    modules, replicas = len(case.balance), case.replicas
    # A backward's time is all in the weight's gradient: the first module has no other.
    recipe = Recipe(
        layers=tuple(
            LayerRecipe(f"layer{i}", lambda size=size: SleepingLayer(size * FORWARD_S, 0.0, size * BACKWARD_S))
            for i, size in enumerate(case.sizes)
        ),
        loss_sum=lambda output, targets: output.sum(),
        count=lambda targets: targets[0].numel(),
    )
    balance, transport = list(case.balance), connect(CPU, TIMEOUT, replicas)
    order = build_stale(FAMILIES[case.name], transport.num_ranks, 1, STEPS, recompute="never", reduces=replicas > 1)
    stages = [
        Stage(
            s,
            take_stage(recipe, balance, s, seed=0, device=CPU),
            dataflow_of(recipe, balance),
            device=CPU,
            seed=0,
            first_microbatch=transport.replicas.number,
            loss_sum=recipe.loss_sum if s == modules - 1 else None,
        )
        for s in order.stages_of(transport.rank)
    ]
    runtime = Runtime(stages, modules, transport, CPU)
    optimizer = torch.optim.SGD(runtime.own_parameters.values(), 0.1)
    batch = torch.zeros(1, MESSAGE_BYTES // 4)
    link_s = message_s(MESSAGE_BYTES) if dist.get_world_size() > 1 else 0.0
    sum_s = _sum_s(transport) if replicas > 1 else 0.0
    program = runtime.prepare(order)
    start_together(transport)
    started = time.perf_counter()
    report = runtime.train_segment(
        program,
        0,
        lambda step: MiniBatch((batch,), (batch,), replicas * batch.numel()),
        update=lambda joint: optimizer.step() and None,
    )
    seconds = time.perf_counter() - started
    spans = gather_spans(order, runtime.spans, transport)
    ends = list(accumulate(case.balance))
    sizes = [sum(case.sizes[end - number : end]) for end, number in zip(ends, case.balance, strict=True)]
    costs = [StageCost(size * FORWARD_S, size * BACKWARD_S, 0.0, reduce_s=sum_s) for size in sizes]
    simulated = simulate(order, costs, Link(link_s))
    return {
        "schedule": case.name,
        "layers": sum(case.balance),
        "modules": modules,
        "replicas": replicas,
        "devices": replicas * transport.num_ranks,
        "segment_s": seconds,
        "period_s": period_s(spans),
        "simulated_period_s": period_s(simulated),
        "bubble": 1 - sum(sizes) * (FORWARD_S + BACKWARD_S) / transport.num_ranks / period_s(spans),
        "times_one_device": replicas * sum(sizes) * (FORWARD_S + BACKWARD_S) / period_s(spans),
        "staleness": [max(row) for row in report.staleness],
        "link_s": link_s,
        "sum_s": sum_s,
    }


def _sum_s(transport: Transport) -> float:
    """What it takes to add up the gradients of a layer over the replicas."""
    taken = []
    for _ in range(20):
        bucket, started = torch.zeros(2), time.perf_counter()
        transport.replicas.start_sum(bucket).wait()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def period_s(spans: list[Span]) -> float:
    """Between two updates of a stage, in the steady state."""
    ends = sorted(s.end_s for s in spans if s.action.kind is Kind.UPDATE and s.action.stage == 1)
    middle = ends[MARGIN:-MARGIN]
    return (middle[-1] - middle[0]) / (len(middle) - 1)


def rows(found: dict[str, Any]) -> list[list[object]]:
    """Of the table under `HEADER`."""
    return [
        [
            r["schedule"],
            r["modules"],
            r["layers"],
            r["replicas"],
            r["devices"],
            f"{r['period_s']:.4f}",
            f"{r['simulated_period_s'] / r['period_s']:.3f}",
            f"{r['bubble']:.1%}",
            f"{r['times_one_device']:.2f}",
            r["staleness"],
        ]
        for r in found.values()
    ]
