"""The pipeline for people with a training loop of their own.

    pipe = Pipeline(model, loss="cross_entropy", num_microbatches=8)
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-3)
    for inputs, targets in batches:
        result = pipe.train_step(inputs, targets)     # the gradients are there
        pipe.clip_gradients(1.0)
        optimizer.step()

Run it with `torchrun --nproc-per-node=4 train.py`: four stages, one in each process. Run with plain `python`, it is one
stage, and gives the same numbers.
"""

import datetime
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipetrain.engine.connect import connect
from pipetrain.engine.loss import LossSum
from pipetrain.engine.report import StepReport
from pipetrain.engine.runtime import Program, Runtime
from pipetrain.engine.stage import Stage
from pipetrain.engine.tied import Tie
from pipetrain.engine.transport import Transport
from pipetrain.errors import ConfigError
from pipetrain.models import Recipe
from pipetrain.models.capture import capture
from pipetrain.models.losses import find_loss, num_samples
from pipetrain.models.recipe import unsplit
from pipetrain.partition.split import dataflow_of, stages_of_ties, take_stage
from pipetrain.schedule import ALWAYS, EXCEPT_LAST, NEVER, SCHEDULES, build, build_forward_only
from pipetrain.sim.balance import even
from pipetrain.suggest import one_of
from pipetrain.training.optim import clip_gradients

_POLICIES = (ALWAYS, EXCEPT_LAST, NEVER)  # of recompute
_TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class StepResult:
    """What every rank knows after a step.

    Attributes:
        loss: mean over the valid samples of the mini-batch.
        grad_norm: of all gradients of the model, on whatever stage.
    """

    loss: float
    grad_norm: float


class Pipeline:
    """A module cut into stages, of which this process has one, or several where the schedule wants that."""

    def __init__(
        self,
        module: nn.Module,
        loss: str | LossSum,
        *,
        num_microbatches: int = 8,
        balance: Sequence[int] | None = None,
        schedule: str = "gpipe",
        partitions: int | None = None,
        recompute: str | Sequence[str] = ALWAYS,
        seed: int = 0,
        num_inputs: int = 1,
        count: Callable[[tuple[Tensor, ...]], int] = num_samples,
        device: torch.device | str | None = None,
        transport: Transport | None = None,
    ) -> None:
        """
        Args:
            module: the whole model, with the same weights in every process; only this process's part of it is kept.
                An `nn.Sequential` is cut between its children, everything else is captured by torch.fx.
            loss: cross_entropy, mse, or a function (output, targets) -> sum of the loss over a micro-batch.
            num_microbatches: pieces of a mini-batch; a mini-batch of fewer samples has one for each.
            schedule: order of the pipeline's work.
            partitions: number of stages; None is as many on each process as the schedule usually has.
            balance: layers of each stage; None spreads them evenly.
            recompute: run each forward again before its backward, to save memory: a policy for all stages or one each.
            seed: dropout and its like draw from (seed, step, module, micro-batch).
            num_inputs: tensors of a mini-batch that the module takes.
            count: targets -> number of valid samples, for a loss function of your own.
            device: of this process; None is GPU `LOCAL_RANK` where there are GPUs, else the CPU.
            transport: the network; None joins torchrun's processes, or is one process alone.

        Raises:
            ConfigError: if the module cannot be captured, or cannot be cut as asked.
        """
        _check_names(schedule, recompute)
        self.device = torch.device(device) if device is not None else _own_device()
        self._transport = transport or _join(self.device)
        self._loss_sum, self._count = find_loss(loss) if isinstance(loss, str) else (loss, count)
        layers, ties = capture(module, lambda: module, num_inputs)
        recipe = Recipe(tuple(layers), self._loss_sum, self._count, ties=tuple(ties))
        num_ranks = self._transport.num_ranks
        num_stages = partitions or num_ranks * SCHEDULES[schedule].usual
        _check_fit(schedule, num_stages, num_ranks)
        self._balance = _checked(balance, len(layers), num_stages)
        self._dataflow = dataflow_of(recipe, self._balance)
        self._num_microbatches = num_microbatches
        self._build = partial(
            build,
            schedule,
            num_ranks,
            stages_per_rank=num_stages // num_ranks,
            recompute=recompute,
            skips=self._dataflow.skips(),
        )
        self._placement = self._build(num_microbatches).placement
        self._runtime = self._build_runtime(recipe, seed)
        self._programs: dict[tuple[bool, int], Program] = {}
        self._report: StepReport | None = None
        self.step = 0

    def _build_runtime(self, recipe: Recipe, seed: int) -> Runtime:
        stages = [
            Stage(
                stage,
                take_stage(recipe, self._balance, stage, seed=seed, device=self.device),
                self._dataflow,
                device=self.device,
                seed=seed,
                loss_sum=self._loss_sum if stage == self.num_stages - 1 else None,
            )
            for stage, home in enumerate(self._placement)
            if home == self.rank
        ]
        tied = [Tie(tuple(uses)) for uses in stages_of_ties(recipe, self._balance)]
        return Runtime(stages, self.num_stages, self._transport, self.device, ties=tied)

    @property
    def rank(self) -> int:
        """Which process this is; of a schedule with one stage on each, its stage."""
        return self._transport.rank

    @property
    def num_stages(self) -> int:
        return len(self._balance)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This stage's parameters under their names in the whole model, for an optimizer."""
        yield from self._runtime.own_parameters.items()

    def parameters(self) -> Iterator[nn.Parameter]:
        """This stage's parameters, for an optimizer."""
        yield from self._runtime.own_parameters.values()

    def state_dict(self) -> dict[str, Tensor]:
        """This stage's parameters and buffers under their names in the whole model."""
        tensors: dict[str, Tensor] = dict(self._runtime.own_parameters)
        for stage in self._runtime.stages.values():
            tensors |= dict(stage.named_buffers())
        return {unsplit(name): tensor.detach() for name, tensor in tensors.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes this stage's part of the whole model's state.

        Raises:
            KeyError: if something of it is missing.
        """
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])

    def train_step(self, inputs: Tensor | tuple[Tensor, ...], targets: Tensor | tuple[Tensor, ...]) -> StepResult:
        """Forward and backward of one mini-batch; leaves the gradients of its mean loss in `.grad`.

        Args:
            inputs: [batch, ...] each; every process gives the same batch, the first stage uses it.
            targets: [batch, ...] each; the last stage uses them.
        """
        xs, ys = self._placed(inputs), self._placed(targets)
        report = self._runtime.train_step(
            self._program(True, len(xs[0])), self.step, xs, ys, total=self._count(ys), update=lambda report: None
        )
        self._report = report
        self.step += 1
        return StepResult(report.loss_sum / report.count, report.grad_norm)

    def evaluate(self, inputs: Tensor | tuple[Tensor, ...], targets: Tensor | tuple[Tensor, ...]) -> float:
        """Mean loss of one batch, without gradients and in evaluation mode; the same on every rank."""
        xs, ys = self._placed(inputs), self._placed(targets)
        sums = self._runtime.evaluate_step(self._program(False, len(xs[0])), xs, ys)
        total = self._transport.all_reduce(sums)
        return float(total[0]) / self._count(ys)

    def clip_gradients(self, max_norm: float) -> None:
        """Scales the gradients of the last step so that their norm over all stages is at most `max_norm`."""
        if self._report is not None:
            clip_gradients(self.parameters(), self._report.grad_norm, max_norm)

    def _placed(self, tensors: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(t.to(self.device) for t in (tensors if isinstance(tensors, tuple) else (tensors,)))

    def _program(self, trains: bool, num_rows: int) -> Program:
        """Every rank meets the sizes in the same order, so they agree on each schedule once, together."""
        num = min(self._num_microbatches, num_rows)
        if (trains, num) not in self._programs:
            skips = self._dataflow.skips()
            plan = self._build(num) if trains else build_forward_only(self._placement, num, skips)
            self._programs[trains, num] = self._runtime.prepare(plan)
        return self._programs[trains, num]


def _check_names(schedule: str, recompute: str | Sequence[str]) -> None:
    if schedule not in SCHEDULES:
        raise ConfigError(f"schedule={schedule}: no such schedule. {one_of(schedule, tuple(SCHEDULES))}")
    for policy in [recompute] if isinstance(recompute, str) else recompute:
        if policy not in _POLICIES:
            raise ConfigError(f"recompute={recompute}: no such policy. {one_of(policy, _POLICIES)}")


def _check_fit(schedule: str, num_stages: int, num_ranks: int) -> None:
    if not SCHEDULES[schedule].fits(num_stages, num_ranks):
        raise ConfigError(
            f"partitions={num_stages}: schedule={schedule} cannot have so many on {num_ranks} processes; use "
            f"{num_ranks * SCHEDULES[schedule].usual} or leave it out"
        )


def _checked(balance: Sequence[int] | None, num_layers: int, num_stages: int) -> tuple[int, ...]:
    if num_stages > num_layers:
        raise ConfigError(f"{num_stages} stages are more than the {num_layers} layers of the module; use fewer")
    if balance is None:
        return even(num_layers, num_stages)
    if len(balance) != num_stages or sum(balance) != num_layers or min(balance) < 1:
        raise ConfigError(
            f"balance={list(balance)} must have {num_stages} numbers of at least 1, one for each stage, that sum to "
            f"the module's {num_layers} layers; or leave it out"
        )
    return tuple(balance)


def _own_device() -> torch.device:
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )


def _join(device: torch.device) -> Transport:
    """The process group that is there, else torchrun's, else one of this process alone."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=_TIMEOUT)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return connect(device, _TIMEOUT)
