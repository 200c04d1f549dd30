"""Measures the engine: against plain PyTorch, against itself on one stage, and against the ideal of its schedule.

    make bench                                  all parts, a table, and bench/bench.json
    .venv/bin/python scripts/bench.py emulated  one part: plain, two_stages, emulated or structures

Everything compared is measured in one run, in turns, and medians are printed. Wall time goes from barrier to barrier
over `STEPS` steps. Run it on an idle machine: other work shows up as lost efficiency.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from pipetrain import schedule
from pipetrain.config import AdamConfig, TextConfig, TransformerConfig
from pipetrain.engine import layer as layer_module
from pipetrain.engine import runtime as runtime_module
from pipetrain.engine.message import Layout
from pipetrain.engine.runtime import Runtime
from pipetrain.engine.stage import Stage
from pipetrain.engine.transport import DistributedTransport
from pipetrain.engine.wiring import Wiring
from pipetrain.models import LayerRecipe, Recipe, build
from pipetrain.partition.split import build_layer, dataflow_of, take_stage
from pipetrain.sim.balance import even
from pipetrain.training.optim import build_optimizer, clip_gradients

STEPS, ROUNDS = 10, 3
CPU = torch.device("cpu")
TIMEOUT = datetime.timedelta(minutes=10)
MICRO_BATCHES, EMULATED_MICRO_BATCHES = 16, 32
FORWARD_S, BACKWARD_S, MESSAGE_FLOATS = 0.010, 0.020, 64 * 1024 // 4


def in_processes(world: int, rank_main: Callable[..., Any], *args: Any) -> Any:
    """Runs `rank_main(*args)` on `world` gloo ranks; returns what rank 0 returned."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (world, folder, rank_main, args), nprocs=world, start_method="forkserver")
        return json.loads((Path(folder) / "result").read_text())


def _rank(rank: int, world: int, folder: str, rank_main: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    result = rank_main(*args)
    if rank == 0:
        (Path(folder) / "result").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def seconds_per_step(step: Callable[[], None]) -> float:
    """Barrier to barrier over STEPS steps."""
    dist.barrier()
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    dist.barrier()
    return (time.perf_counter() - started) / STEPS


def in_turns(contestants: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Measures all contestants ROUNDS times, each round in another order, after one step to warm up."""
    for step in contestants.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(ROUNDS):
        for name in list(contestants)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(seconds_per_step(contestants[name]))
    return times


# ---- real model ------------------------------------------------------------------------------------------------------


def default_model() -> tuple[Recipe, Tensor, Tensor]:
    """The default Transformer and one mini-batch of its size."""
    model, data = TransformerConfig(), TextConfig()
    settings = {k: v for k, v in vars(model).items() if k != "name"}
    recipe = build("transformer", **settings, vocab_size=256, seq_len=data.seq_len)
    tokens = torch.randint(0, 256, (MICRO_BATCHES, data.seq_len + 1), generator=torch.Generator().manual_seed(0))
    return recipe, tokens[:, :-1], tokens[:, 1:]


def pipeline_step(recipe: Recipe, inputs: Tensor, targets: Tensor) -> Callable[[], None]:
    """One training step of this process group's pipeline: recompute never, AdamW, global clip."""
    transport = DistributedTransport(CPU, TIMEOUT)
    world, rank = transport.num_ranks, transport.rank
    layers = take_stage(recipe, even(len(recipe.layers), world), rank, seed=0, device=CPU)
    loss_sum = recipe.loss_sum if rank == world - 1 else None
    dataflow = dataflow_of(recipe, even(len(recipe.layers), world))
    stage = Stage(rank, layers, dataflow, device=CPU, seed=0, loss_sum=loss_sum)
    runtime = Runtime([stage], world, transport, CPU)
    program = runtime.prepare(schedule.build("gpipe", world, MICRO_BATCHES, recompute="never"))
    optimizer = build_optimizer(AdamConfig(name="adamw"), runtime.own_parameters)
    number = iter(range(1_000_000))

    def update(report: Any) -> None:
        clip_gradients(runtime.own_parameters.values(), report.grad_norm, 1.0)
        optimizer.step()

    return lambda: (
        runtime.train_step(program, next(number), (inputs,), (targets,), total=targets.numel(), update=update) and None
    )


def plain_step(recipe: Recipe, inputs: Tensor, targets: Tensor) -> Callable[[], None]:
    """The loop that one writes without a pipeline: the same micro-batches, accumulated."""
    model = nn.Sequential(*(build_layer(layer, seed=0) for layer in recipe.layers))
    optimizer = build_optimizer(AdamConfig(name="adamw"), dict(model.named_parameters()))
    pieces = list(zip(inputs.split(1), targets.split(1), strict=True))

    def step() -> None:
        optimizer.zero_grad()
        loss = 0.0
        for x, y in pieces:
            piece = recipe.loss_sum(model(x), (y,)) / targets.numel()
            piece.backward()
            loss += piece.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def forward_ms(recipe: Recipe, inputs: Tensor) -> float:
    """Milliseconds of one micro-batch through the whole model."""
    model = nn.Sequential(*(build_layer(layer, seed=0) for layer in recipe.layers))
    times = []
    for _ in range(10):
        started = time.perf_counter()
        model(inputs[:1])
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1000


def _plain_rank() -> dict[str, Any]:
    recipe, inputs, targets = default_model()
    contestants = {"plain": plain_step(recipe, inputs, targets), "one stage": pipeline_step(recipe, inputs, targets)}
    return in_turns(contestants) | {"forward_ms": forward_ms(recipe, inputs)}


def part_plain() -> dict[str, Any]:
    """One stage of pipetrain against a plain loop, in one process, one thread."""
    times = in_processes(1, _plain_rank)
    ratios = [a / b for a, b in zip(times["plain"], times["one stage"], strict=True)]
    return {**_medians(times), "speed_of_plain": statistics.median(ratios), "spread": _spread(ratios), "wanted": 0.95}


def _pipeline_rank() -> list[float]:
    step = pipeline_step(*default_model())
    step()
    return [seconds_per_step(step)]


def part_two_stages() -> dict[str, Any]:
    """Two stages with a thread each against one stage with one thread."""
    one, two = [], []
    for number in range(ROUNDS):
        for world in (1, 2) if number % 2 == 0 else (2, 1):
            (one if world == 1 else two).append(in_processes(world, _pipeline_rank)[0])
    ratios = [a / b for a, b in zip(one, two, strict=True)]
    return {
        "one_stage_s": statistics.median(one),
        "two_stages_s": statistics.median(two),
        "speed_up": statistics.median(ratios),
        "spread": _spread(ratios),
        "ideal": 2 * MICRO_BATCHES / (MICRO_BATCHES + 1),
        "wanted": 1.6,
    }


# ---- emulated devices ------------------------------------------------------------------------------------------------


def device_works_for(seconds: float) -> None:
    """Sleeps, and waits out the last moment awake: a plain sleep wakes up to half a millisecond late."""
    until = time.perf_counter() + seconds
    time.sleep(seconds - 0.0005)
    while time.perf_counter() < until:
        pass


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        device_works_for(FORWARD_S)
        return x + weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        device_works_for(BACKWARD_S)
        gradient = gradients[
            0
        ].contiguous()  # torch receives into buffers of the same strides, and gloo wants them plain
        return gradient, gradient.sum().reshape(1)


class SleepingLayer(nn.Module):
    """A device that takes a set time and no CPU: more of them than cores can be measured."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return _Sleep.apply(x, self.weight)  # type: ignore[no-any-return, no-untyped-call]


def _emulated_rank(num_microbatches: int) -> dict[str, list[float]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    inputs = torch.zeros(num_microbatches, MESSAGE_FLOATS)
    return in_turns(
        {
            "pipetrain": _emulated_pipetrain(rank, world, inputs, num_microbatches),
            "torch ScheduleGPipe": _emulated_torch(rank, world, inputs, num_microbatches),
        }
    )


def _emulated_pipetrain(
    rank: int, world: int, inputs: Tensor, num_microbatches: int, layer: type[nn.Module] = SleepingLayer
) -> Callable[[], None]:
    recipe = Recipe(
        layers=tuple(LayerRecipe(f"layer{i}", layer) for i in range(world)),
        loss_sum=lambda output, targets: (output["x"] if isinstance(output, dict) else output).sum(),
        count=lambda targets: targets[0].numel(),
    )
    layers = take_stage(recipe, [1] * world, rank, seed=0, device=CPU)
    loss_sum = recipe.loss_sum if rank == world - 1 else None
    dataflow = dataflow_of(recipe, [1] * world)
    stage = Stage(rank, layers, dataflow, device=CPU, seed=0, loss_sum=loss_sum)
    runtime = Runtime([stage], world, DistributedTransport(CPU, TIMEOUT), CPU)
    program = runtime.prepare(schedule.build("gpipe", world, num_microbatches, recompute="never"))
    optimizer = torch.optim.SGD(runtime.own_parameters.values(), lr=0.1)
    return lambda: (
        runtime.train_step(
            program, 0, (inputs,), (inputs,), total=inputs.numel(), update=lambda report: optimizer.step()
        )
        and None
    )


def _emulated_torch(rank: int, world: int, inputs: Tensor, num_microbatches: int) -> Callable[[], None]:
    layer = SleepingLayer()
    stage = PipelineStage(layer, rank, world, CPU)
    pipeline = ScheduleGPipe(stage, num_microbatches, loss_fn=lambda output, target: output.sum() / inputs.numel())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        if rank == 0:
            pipeline.step(inputs)
        elif rank == world - 1:
            pipeline.step(target=inputs, losses=[])
        else:
            pipeline.step()
        optimizer.step()

    return step


def part_emulated() -> dict[str, Any]:
    """Layers that sleep, 64 KiB messages: the share of the schedule's own ideal that is reached."""
    results: dict[str, Any] = {}
    for world in (2, 4, 8):
        times = in_processes(world, _emulated_rank, EMULATED_MICRO_BATCHES)
        ideal_s = (EMULATED_MICRO_BATCHES + world - 1) * (FORWARD_S + BACKWARD_S)
        shares = {name: [ideal_s / t for t in values] for name, values in times.items()}
        results[f"K={world}"] = {
            "ideal_s": ideal_s,
            **{name: statistics.median(values) for name, values in shares.items()},
            "spread": {name: _spread(values) for name, values in shares.items()},
            "wanted": 0.90,
        }
    return results


# ---- what learning and checking of structures costs ------------------------------------------------------------------


class RichLayer(nn.Module):
    """A device that hands on a dict of three tensors, two numbers and a word."""

    def __init__(self) -> None:
        super().__init__()
        self.device = SleepingLayer()

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


def _structures_rank(num_microbatches: int, layer: type[nn.Module]) -> list[float]:
    """The share of a step that goes into structures and layouts, on this rank; the largest of all ranks."""
    machinery = [
        *((Wiring, name) for name in ("inputs", "layout", "learn", "learn_batch", "structure", "knows")),
        (Stage, "_check_output"),
        (Layout, "pack"),
        (Layout, "unpack"),
        (runtime_module, "key_of"),
        (layer_module, "flatten"),
    ]
    timed = _Timed(*machinery)
    rank, world = dist.get_rank(), dist.get_world_size()
    step = _emulated_pipetrain(rank, world, torch.zeros(num_microbatches, MESSAGE_FLOATS), num_microbatches, layer)
    step()
    timed.seconds = 0.0
    elapsed = seconds_per_step(step)
    share = torch.tensor([timed.seconds / STEPS / elapsed], dtype=torch.float64)
    dist.all_reduce(share, dist.ReduceOp.MAX)
    return [float(share[0])]


def part_structures() -> dict[str, Any]:
    """What finding out and checking what travels costs, at stages of 10 ms."""
    results: dict[str, Any] = {"wanted": 0.02}
    for name, layer in (("one tensor", SleepingLayer), ("3 tensors, 2 numbers", RichLayer)):
        shares = [in_processes(2, _structures_rank, EMULATED_MICRO_BATCHES, layer)[0] for _ in range(ROUNDS)]
        results[name] = {"share_of_step": statistics.median(shares), "spread": [f"{s:.2%}" for s in sorted(shares)]}
    return results


# ---- the table -------------------------------------------------------------------------------------------------------


def _medians(times: dict[str, Any]) -> dict[str, float]:
    return {
        f"{k}_s": statistics.median(v) if isinstance(v, list) else v for k, v in times.items() if k != "forward_ms"
    } | {k: v for k, v in times.items() if k == "forward_ms"}


def _spread(values: list[float]) -> list[float]:
    return [round(min(values), 3), round(max(values), 3)]


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": part_plain,
    "two_stages": part_two_stages,
    "emulated": part_emulated,
    "structures": part_structures,
}


def show(results: dict[str, Any]) -> None:
    """Prints one line for each figure that is wanted."""
    row = "{:<58} {:>9} {:>16} {:>8}".format
    print(row("figure (median of rounds)", "measured", "min .. max", "wanted"))
    if "plain" in results:
        r = results["plain"]
        name = f"one stage / plain loop, speed ({r['forward_ms']:.0f} ms a micro-batch forward)"
        print(row(name, f"{r['speed_of_plain']:.3f}", " .. ".join(map(str, r["spread"])), f"{r['wanted']:.2f}"))
    if "two_stages" in results:
        r = results["two_stages"]
        name = f"2 stages / 1 stage, speed (ideal {r['ideal']:.2f})"
        print(row(name, f"{r['speed_up']:.2f}", " .. ".join(map(str, r["spread"])), f"{r['wanted']:.2f}"))
    for name, r in results.get("structures", {}).items():
        if name != "wanted":
            title = f"structures, messages of {name}: share of step"
            print(row(title, f"{r['share_of_step']:.2%}", " .. ".join(r["spread"][::2]), "2.00%"))
    for stages, r in results.get("emulated", {}).items():
        for name in ("pipetrain", "torch ScheduleGPipe"):
            wanted = f"{r['wanted']:.2f}" if name == "pipetrain" else ""
            title = f"emulated, {stages}, M={EMULATED_MICRO_BATCHES}: {name}, share of ideal"
            print(row(title, f"{r[name]:.3f}", " .. ".join(map(str, r["spread"][name])), wanted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"any of {', '.join(PARTS)}")
    parser.add_argument("--output", type=Path, default=Path("bench/bench.json"))
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "processor": platform.processor(),
            "torch": torch.__version__,
        }
    }
    for part in arguments.parts:
        results[part] = PARTS[part]()
    show(results)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2))
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    mp.set_forkserver_preload(["torch", "torch.distributed.pipelining"])
    main()
