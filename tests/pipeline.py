"""Runs a recipe through the engine with all ranks in this process."""

from collections.abc import Callable, Sequence
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
    placement: Sequence[int] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    autocast_dtype: torch.dtype | None = None,
    recomputes: Callable[[str], bool] = lambda name: True,
    narrow_messages: bool = False,
    stale_weights: str = "stash",
    replica_microbatches: int = 0,
) -> Runtime:
    """One stage on each rank where there is no placement."""
    here = [s for s, rank in enumerate(placement or range(len(balance))) if rank == transport.rank]
    stages = [
        Stage(
            s,
            [(n, p, m.to(dtype)) for n, p, m in take_stage(recipe, balance, s, seed=seed, device=CPU)],
            dataflow_of(recipe, balance),
            device=CPU,
            seed=seed,
            first_microbatch=transport.replicas.number * replica_microbatches,
            loss_sum=recipe.loss_sum if s == len(balance) - 1 else None,
            autocast_dtype=autocast_dtype,
            recomputes=recomputes,
        )
        for s in here
    ]
    ties = [Tie(tuple(uses)) for uses in stages_of_ties(recipe, balance)]
    return Runtime(
        stages,
        len(balance),
        transport,
        CPU,
        ties=ties,
        narrow_messages=narrow_messages,
        stale_weights=stale_weights,
    )


def _tuple(inputs: Tensor | tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)


def train(
    recipe: Recipe,
    balance: Sequence[int],
    batches: Sequence[tuple[Tensor | tuple[Tensor, ...], Tensor]],
    *,
    num_microbatches: int,
    recompute: bool | str = True,
    recomputes: Callable[[str], bool] = lambda name: True,
    narrow_messages: bool = False,
    name: str = "gpipe",
    stages_per_rank: int = 1,
    lr: float = 1e-2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    autocast_dtype: torch.dtype | None = None,
) -> Result:
    """Trains one step a batch with AdamW; the gradients are those of the last step."""
    skips = dataflow_of(recipe, balance).skips()
    policy = recompute if isinstance(recompute, str) else "always" if recompute else "never"
    num_ranks = len(balance) // stages_per_rank
    plan = schedule.build(
        name, num_ranks, num_microbatches, stages_per_rank=stages_per_rank, recompute=policy, skips=skips
    )

    def rank_main(transport: LocalTransport) -> Result:
        runtime = build_runtime(
            recipe,
            balance,
            transport,
            placement=plan.placement,
            seed=seed,
            dtype=dtype,
            autocast_dtype=autocast_dtype,
            recomputes=recomputes,
            narrow_messages=narrow_messages,
        )
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

    results = run_ranks(num_ranks, rank_main)
    merged = Result(results[0].reports, {}, {}, {})
    for result in results:
        merged.parameters |= result.parameters
        merged.gradients |= result.gradients
        merged.buffers |= result.buffers
    return merged
