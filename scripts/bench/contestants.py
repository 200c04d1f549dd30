"""The same layers under pipetrain, torch.distributed.pipelining and torchgpipe: one training step of each."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from measure import CPU, TIMEOUT, Step
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torchs
from torchgpipe import GPipe

from pipetrain.costs import Link
from pipetrain.engine.connect import connect
from pipetrain.engine.runtime import Runtime
from pipetrain.engine.stage import Stage
from pipetrain.models import Recipe
from pipetrain.partition.split import build_layer, dataflow_of, take_stage
from pipetrain.schedule import Schedule, build, generate
from pipetrain.sim.simulate import simulate
from pipetrain.training.trace import gather_spans, mean_costs

# What torch calls each schedule, and whether it takes a list of stages.
OF_TORCH: dict[str, tuple[type, bool]] = {
    "gpipe": (torchs.ScheduleGPipe, False),
    "1f1b": (torchs.Schedule1F1B, False),
    "interleaved": (torchs.ScheduleInterleaved1F1B, True),
    "looped_bfs": (torchs.ScheduleLoopedBFS, True),
    "zb_h1": (torchs.ScheduleInterleavedZeroBubble, True),
    "zb_v": (torchs.ScheduleZBVZeroBubble, True),
}
Loss = Callable[[Any, Tensor], Tensor]  # (output, targets) -> sum over a micro-batch
Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Work:
    """Layers, a mini-batch, and what is trained with: the same for every contestant."""

    def __init__(
        self,
        recipe: Recipe,
        balance: Sequence[int],
        inputs: Tensor,
        targets: Tensor,
        num_microbatches: int,
        optimizer: Optimizer,
    ) -> None:
        self.recipe, self.balance = recipe, tuple(balance)
        self.inputs, self.targets, self.num_microbatches = inputs, targets, num_microbatches
        self.optimizer, self.total = optimizer, recipe.count((targets,))

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        """A micro-batch's share of the mean loss of the mini-batch."""
        return self.recipe.loss_sum(output, (targets,)) / self.total

    def modules(self, first: int = 0, number: int | None = None) -> list[nn.Module]:
        """Fresh layers, all or some, each a function of what the one before it returns."""
        end = len(self.recipe.layers) if number is None else first + number
        return [self._module(place) for place in range(first, end)]

    def _module(self, place: int) -> nn.Module:
        module = build_layer(self.recipe.layers[place], seed=0)
        (taken,) = self.recipe.taken_by(place)
        return module if taken.element is None or place == 0 else _Of(taken.element, module)

    def pieces(self) -> list[tuple[Tensor, Tensor]]:
        inputs, targets = (t.tensor_split(self.num_microbatches) for t in (self.inputs, self.targets))
        return list(zip(inputs, targets, strict=True))


class _Of(nn.Module):
    """A layer that takes one element of what the layer before it returns."""

    def __init__(self, element: Any, module: nn.Module) -> None:
        super().__init__()
        self.element, self.module = element, module

    def forward(self, value: Any) -> Any:
        return self.module(value[self.element])


class _Chain(nn.Sequential):
    """Takes a tuple as torch hands it from stage to stage, as so many arguments, and gives what gloo can send."""

    def forward(self, *values: Any) -> Any:
        value = values[0] if len(values) == 1 else values
        for module in self:
            value = module(value)
        return tuple(x.contiguous() for x in value) if isinstance(value, tuple) else value.contiguous()


def schedule_of(name: str, world: int, work: Work, recompute: str = "never") -> Schedule:
    """As pipetrain runs it."""
    stages_per_rank = len(work.balance) // world
    skips = dataflow_of(work.recipe, work.balance).skips()
    return build(name, world, work.num_microbatches, stages_per_rank=stages_per_rank, recompute=recompute, skips=skips)


class Pipetrain:
    """One training step on all ranks of the process group, each time it is called."""

    def __init__(self, name: str, work: Work, recompute: str = "never") -> None:
        self.transport = connect(CPU, TIMEOUT)
        self.plan = schedule_of(name, self.transport.num_ranks, work, recompute)
        stages = [
            Stage(
                s,
                take_stage(work.recipe, work.balance, s, seed=0, device=CPU),
                dataflow_of(work.recipe, work.balance),
                device=CPU,
                seed=0,
                loss_sum=work.recipe.loss_sum if s == self.plan.num_stages - 1 else None,
            )
            for s in self.plan.stages_of(self.transport.rank)
        ]
        self.runtime = Runtime(stages, self.plan.num_stages, self.transport, CPU)
        self.program = self.runtime.prepare(self.plan)
        self.optimizer = work.optimizer(list(self.runtime.own_parameters.values()))
        self.inputs, self.targets, self.total = (work.inputs,), (work.targets,), work.total

    def __call__(self) -> None:
        self.runtime.train_step(
            self.program, 0, self.inputs, self.targets, total=self.total, update=lambda report: self.optimizer.step()
        )

    def simulated_s(self, link_s: float) -> float:
        """What the simulator says of a step whose actions take what those of the last step took."""
        spans = gather_spans(self.plan, self.runtime.spans, self.transport)
        return simulate(self.plan, mean_costs(spans, self.plan.num_stages), Link(link_s))[-1].end_s


def of_torch(name: str, work: Work) -> Step | None:
    """torch.distributed.pipelining on all ranks; None where it refuses the numbers."""
    kind, takes_list = OF_TORCH[name]
    rank, world = dist.get_rank(), dist.get_world_size()
    placement = generate(name, world, 1, len(work.balance) // world).placement
    here = [s for s, home in enumerate(placement) if home == rank]
    stages = []
    for s in here:
        module = _Chain(*work.modules(sum(work.balance[:s]), work.balance[s]))
        stages.append(PipelineStage(module, s, len(placement), CPU))
    try:
        pipeline = kind(
            stages if takes_list else stages[0], work.num_microbatches, loss_fn=work.loss, scale_grads=False
        )
    except ValueError:
        return None
    optimizer = work.optimizer([p for stage in stages for p in stage.submod.parameters()])
    args = (work.inputs,) if 0 in here else ()
    options: dict[str, Any] = {"target": work.targets, "losses": []} if len(placement) - 1 in here else {}

    def step() -> None:
        optimizer.zero_grad()
        pipeline.step(*args, **options)
        optimizer.step()

    return step


def torchgpipe_step(work: Work, checkpoint: str = "never") -> Step:
    """In this process: a thread for each partition."""
    model = GPipe(
        nn.Sequential(*work.modules()),
        list(work.balance),
        devices=["cpu"] * len(work.balance),
        chunks=work.num_microbatches,
        checkpoint=checkpoint,
    )
    optimizer = work.optimizer(list(model.parameters()))

    def step() -> None:
        optimizer.zero_grad()
        work.loss(model(work.inputs), work.targets).backward()
        optimizer.step()

    return step


def plain(work: Work) -> Step:
    """The loop that one writes without a pipeline: the same micro-batches, accumulated."""
    model = nn.Sequential(*work.modules())
    optimizer = work.optimizer(list(model.parameters()))
    pieces = work.pieces()

    def step() -> None:
        optimizer.zero_grad()
        for x, y in pieces:
            work.loss(model(x), y).backward()
        optimizer.step()

    return step


def on_rank_0(step: Step | None) -> Step:
    """A contestant that is one process, while the others wait."""
    return step if step is not None and dist.get_rank() == 0 else lambda: None
