"""Stale schedules on emulated devices: what a step takes, beside the simulator and beside one device."""

import statistics
import time
from functools import partial
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
MODULES = (3, 4, 5, 8)
REPLICAS = (("ouroboros", 3, 2), ("ouroboros", 5, 2), ("ouroboros", 3, 4))  # with modules and replicas
FORWARD_S, BACKWARD_S = 0.050, 0.100
STEPS, MARGIN = 40, 12  # mini-batches of a segment; so many at both ends are not the steady state
HEADER = [
    "schedule",
    "modules K",
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
    found = {}
    for name, modules, replicas in (*((name, k, 1) for name in FAMILIES for k in MODULES), *REPLICAS):
        key = f"{name}_{modules}".replace(" ", "_") + (f"_{replicas}" if replicas > 1 else "")
        devices = replicas * (modules - FAMILIES[name].extra)
        make = partial(in_processes, devices, _rank, name, modules, replicas)
        found[key] = cell(folder / "stale", key, make)
    return found


def sizes_of(name: str, modules: int) -> list[float]:
    """Of the modules, 1.0 for one in the middle: in a ring the two outer ones together are as heavy as that."""
    outer = 0.5 if FAMILIES[name].extra else 1.0
    return [outer, *[1.0] * (modules - 2), outer]


def _rank(name: str, modules: int, replicas: int) -> dict[str, Any]:
    wake_punctually()
    sizes = sizes_of(name, modules)
    # A backward's time is all in the weight's gradient: the first module has no other.
    recipe = Recipe(
        layers=tuple(
            LayerRecipe(f"layer{i}", lambda size=size: SleepingLayer(size * FORWARD_S, 0.0, size * BACKWARD_S))
            for i, size in enumerate(sizes)
        ),
        loss_sum=lambda output, targets: output.sum(),
        count=lambda targets: targets[0].numel(),
    )
    balance, transport = [1] * modules, connect(CPU, TIMEOUT, replicas)
    order = build_stale(FAMILIES[name], transport.num_ranks, 1, STEPS, recompute="never", reduces=replicas > 1)
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
    costs = [StageCost(size * FORWARD_S, size * BACKWARD_S, 0.0, reduce_s=sum_s) for size in sizes]
    simulated = simulate(order, costs, Link(link_s))
    return {
        "schedule": name,
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
