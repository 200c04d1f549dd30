"""What the engine takes for an action beside the layers: a small pipeline is run, and compared with its simulation."""

from functools import partial

import torch
from torch import Tensor, nn

from pipetrain.engine.runtime import Runtime
from pipetrain.engine.stage import Stage
from pipetrain.engine.transport import Transport
from pipetrain.models import LayerRecipe, Recipe
from pipetrain.partition.split import dataflow_of, take_stage
from pipetrain.schedule import NEVER, build
from pipetrain.sim.simulate import simulate
from pipetrain.training.trace import gather_spans, mean_costs, start_together

_WIDTH = 512
_MICRO_BATCHES, _STEPS = 16, 12


class _Block(nn.Module):
    """[B, 512] -> [B, 512]. Its weights have 8 MiB: no cache is left as it was, as behind real layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.up(x).relu())
        return out


def engine_s(transport: Transport, device: torch.device) -> float:
    """Seconds of one action, in the step with the least of it: others of this machine may disturb it, and would count
    many times. All ranks must call it."""
    number = transport.num_ranks
    recipe = Recipe(
        layers=tuple(LayerRecipe(f"block{place}", _Block) for place in range(number)),
        loss_sum=lambda output, targets: output.sum(),
        count=lambda targets: len(targets[0]),
    )
    ones, last = (1,) * number, transport.rank == number - 1
    stage = Stage(
        transport.rank,
        take_stage(recipe, ones, transport.rank, seed=0, device=device),
        dataflow_of(recipe, ones),
        device=device,
        seed=0,
        loss_sum=recipe.loss_sum if last else None,
    )
    order = build("1f1b", number, _MICRO_BATCHES, recompute=NEVER)
    runtime = Runtime([stage], number, transport, device)
    batch = (torch.zeros(2 * _MICRO_BATCHES, _WIDTH, device=device),)
    step = partial(
        runtime.train_step, runtime.prepare(order), 0, batch, batch, total=len(batch[0]) * last, update=lambda _: None
    )
    # The first and the last action of the simulation hang together by so many others.
    way, found = 2 * (_MICRO_BATCHES + number - 1), []
    for _ in range(_STEPS):
        start_together(transport)
        elapsed_s = max(stage.elapsed_s for stage in step().stages)
        spans = gather_spans(order, runtime.spans, transport)
        simulated_s = simulate(order, mean_costs(spans, number))[-1].end_s
        found.append((elapsed_s - simulated_s) / way)
    return max(0.0, min(found[1:]))
