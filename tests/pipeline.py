"""Runs a recipe through the engine with all ranks in this process."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipetrain import schedule
from pipetrain.engine.local import LocalTransport, run_ranks
from pipetrain.engine.report import StepReport
from pipetrain.engine.runtime import Runtime
from pipetrain.engine.stage import Stage
from pipetrain.engine.tied import Tie
from pipetrain.models import Recipe
from pipetrain.partition.split import dataflow_of, stages_of_ties, take_stage

CPU = torch.device("cpu")


@dataclass
class Result:
    """What all ranks together ended with; all tensors by unsplit name."""

    reports: list[StepReport]
    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def build_runtime(
    recipe: Recipe,
    balance: Sequence[int],
    transport: LocalTransport,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    autocast_dtype: torch.dtype | None = None,
) -> Runtime:
    layers = [(n, p, m.to(dtype)) for n, p, m in take_stage(recipe, balance, transport.rank, seed=seed, device=CPU)]
    stage = Stage(
        transport.rank,
        layers,
        dataflow_of(recipe, balance),
        device=CPU,
        seed=seed,
        loss_sum=recipe.loss_sum if transport.rank == len(balance) - 1 else None,
        autocast_dtype=autocast_dtype,
    )
    ties = [Tie(tuple(uses)) for uses in stages_of_ties(recipe, balance)]
    return Runtime([stage], len(balance), transport, CPU, ties=ties)


def _tuple(inputs: Tensor | tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)


def train(
    recipe: Recipe,
    balance: Sequence[int],
    batches: Sequence[tuple[Tensor | tuple[Tensor, ...], Tensor]],
    *,
    num_microbatches: int,
    recompute: bool = True,
    lr: float = 1e-2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    autocast_dtype: torch.dtype | None = None,
) -> Result:
    """Trains one step a batch with AdamW; the gradients are those of the last step."""
    skips = dataflow_of(recipe, balance).skips()
    plan = schedule.build("gpipe", len(balance), num_microbatches, recompute=recompute, skips=skips)

    def rank_main(transport: LocalTransport) -> Result:
        runtime = build_runtime(recipe, balance, transport, seed=seed, dtype=dtype, autocast_dtype=autocast_dtype)
        optimizer = torch.optim.AdamW(
            [{"params": list(runtime.own_parameters.values())}], lr=lr
        )  # a stage may have none
        program = runtime.prepare(plan)
        reports = []
        for step, (inputs, targets) in enumerate(batches):
            total = recipe.count((targets,))
            xs, ys = _tuple(inputs, dtype), _tuple(targets, dtype)
            report = runtime.train_step(program, step, xs, ys, total=total, update=lambda _: optimizer.step() and None)
            reports.append(report)
        parameters = {n: p.detach().clone() for n, p in runtime.parameters.items()}
        buffers = {n: b.clone() for stage in runtime.stages.values() for n, b in stage.named_buffers()}
        gradients = {n: p.grad.clone() for n, p in runtime.parameters.items() if p.grad is not None}
        return Result(reports, parameters, gradients, buffers)

    results = run_ranks(len(balance), rank_main)
    merged = Result(results[0].reports, {}, {}, {})
    for result in results:
        merged.parameters |= result.parameters
        merged.gradients |= result.gradients
        merged.buffers |= result.buffers
    return merged
