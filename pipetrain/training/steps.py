"""What the loop does again and again: one synchronous step, or one segment of a stale schedule (`stale`)."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from pipetrain.engine.minibatch import MiniBatch
from pipetrain.engine.report import StepReport
from pipetrain.engine.runtime import Runtime
from pipetrain.errors import NonFiniteError
from pipetrain.models import Recipe
from pipetrain.schedule import Schedule, forward_only_like
from pipetrain.training import checkpoint
from pipetrain.training.ema import WeightAverage
from pipetrain.training.job import Job
from pipetrain.training.optim import clip_gradients, learning_rate, set_learning_rate
from pipetrain.training.record import Recorder
from pipetrain.training.trace import gather_spans, start_together, write_trace


@dataclass(frozen=True)
class Pieces:
    """One rank's.

    Attributes:
        schedule: that of `steps`, see there.
        fetch: gives this rank's part of a mini-batch by its number.
        recorder: writes down every step, where somebody wants that.
    """

    job: Job
    recipe: Recipe
    balance: tuple[int, ...]
    schedule: Schedule
    runtime: Runtime
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    fetch: Callable[[int], MiniBatch]
    recorder: Recorder | None


class Advance(NamedTuple):
    """How far training has come.

    Attributes:
        reports: one for each step.
        seconds: of all of them.
        schedule: that they ran through.
        staleness: [stage][step], in updates.
    """

    reports: list[StepReport]
    seconds: float
    schedule: Schedule
    staleness: Sequence[Sequence[int]]


class Steps(Protocol):
    def advance(self, step: int, request: float) -> Advance:
        """Trains on from `step` steps done; the sum of the ranks' requests comes back in the last report.

        Raises:
            NonFiniteError: if the loss or a gradient became NaN or infinite.
        """


class SynchronousSteps:
    """One step at a time, all ranks together."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces, self._cfg = pieces, pieces.job.cfg
        self._program = pieces.runtime.prepare(pieces.schedule)
        self._step, self._finite = 0, True

    def advance(self, step: int, request: float) -> Advance:
        pieces, transport = self._pieces, self._pieces.runtime.transport
        self._step, self._finite = step, True
        started = time.perf_counter()
        batch = pieces.fetch(step)
        data_s = time.perf_counter() - started
        is_traced = self._cfg.trace_every > 0 and (step + 1) % self._cfg.trace_every == 0
        if is_traced:
            start_together(transport)
        report = pieces.runtime.train_step(
            self._program,
            step,
            batch.inputs,
            batch.targets,
            total=batch.total,
            update=self._update,
            request=request,
            data_s=data_s,
        )
        if not self._finite:
            self._explain_non_finite(report, batch)
        if is_traced:
            spans = gather_spans(pieces.schedule, pieces.runtime.spans, transport)
            if transport.rank == 0 and transport.replicas.number == 0:
                write_trace(pieces.job.run, step + 1, pieces.schedule, spans)
        fresh = [[0]] * pieces.schedule.num_stages
        return Advance([report], time.perf_counter() - started, pieces.schedule, fresh)

    def _update(self, report: StepReport) -> None:
        """Called by the runtime once the gradients of all stages are there."""
        pieces, cfg = self._pieces, self._cfg
        self._finite = math.isfinite(report.loss_sum) and math.isfinite(report.grad_norm)
        if not self._finite:
            return
        if pieces.recorder is not None:
            pieces.recorder.before_clipping(pieces.runtime.parameters)
        clip_gradients(pieces.runtime.own_parameters.values(), report.grad_norm, cfg.grad_clip)
        if pieces.recorder is not None:
            pieces.recorder.after_clipping(pieces.runtime.parameters)
        set_learning_rate(pieces.optimizer, learning_rate(cfg.optimizer.lr, cfg.lr_rule, self._step))
        pieces.optimizer.step()
        if pieces.average is not None:
            pieces.average.update(self._step + 1)

    def _explain_non_finite(self, report: StepReport, batch: MiniBatch) -> None:
        """Repeats the forwards of the failed step, which gives the same numbers, and looks where it began."""
        pieces = self._pieces
        program = pieces.runtime.prepare(forward_only_like(pieces.schedule, pieces.schedule.num_microbatches))
        found = pieces.runtime.find_non_finite(program, self._step, batch.inputs, batch.targets)
        if found is not None:
            stage, place, microbatch = found
            names = [layer.name for layer in pieces.recipe.layers] + ["loss"]
            layer = names[sum(pieces.balance[:stage]) + place]
            where = f"the output of layer {layer}, stage {stage}, micro-batch {microbatch}"
        else:
            where = f"a gradient on stage {report.bad_stage}, while all forward values are finite"
        raise non_finite(
            pieces.job, f"step {self._step + 1}: NaN or infinity first appears in {where}. The weights were not updated"
        )


def non_finite(job: Job, what: str) -> NonFiniteError:
    """The error, with what to do about it."""
    cfg, kept = job.cfg, checkpoint.newest(job.run.checkpoints)
    return NonFiniteError(
        f"{what}; "
        + (f"the checkpoint of step {kept[0]} is kept. " if kept else "there is no checkpoint yet. ")
        + f"Try a lower optimizer.lr (now {cfg.optimizer.lr:g}), a longer lr_rule.warmup_steps "
        f"(now {cfg.lr_rule.warmup_steps}), logit_clip=20, "
        + ("precision=fp32, " if cfg.precision == "bf16" else "")
        + f"or a smaller grad_clip (now {cfg.grad_clip})"
    )
