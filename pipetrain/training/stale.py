"""Training under a stale schedule: segments of mini-batches, between which the pipeline is empty.

Every rank updates by itself, so nothing may be asked of the others then: the gradient is clipped by what the rank has,
and the learning rate follows from the mini-batch.
"""

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from pipetrain.config import Config
from pipetrain.engine.joint_update import JointUpdate
from pipetrain.engine.runtime import Program
from pipetrain.errors import StageFailed
from pipetrain.schedule import Schedule, staleness
from pipetrain.training.correctors import build_correctors
from pipetrain.training.optim import clip_gradients, learning_rate
from pipetrain.training.steps import Advance, Pieces, non_finite
from pipetrain.training.trace import gather_spans, start_together, write_trace


def steps_of_segment(cfg: Config, step: int, last_step: int) -> int:
    """Mini-batches from `step` to the next drain: one while warming up, then up to the next multiple of drain_every."""
    if step < cfg.stale.warmup_steps:
        return 1
    return min(cfg.stale.drain_every - step % cfg.stale.drain_every, last_step - step)


class StaleSteps:
    """One segment at a time."""

    def __init__(self, pieces: Pieces, build: Callable[[int], Schedule], last_step: int) -> None:
        """
        Args:
            build: gives the schedule of a segment of so many mini-batches.
            last_step: of the training.
        """
        self._pieces, self._cfg, self._build, self._last_step = pieces, pieces.job.cfg, build, last_step
        self._rule = UpdateRule(pieces.job.cfg, pieces.optimizer, pieces.runtime.own_parameters, len(pieces.balance))
        self._programs: dict[int, tuple[Program, list[list[int]]]] = {}

    def advance(self, step: int, request: float) -> Advance:
        pieces, transport = self._pieces, self._pieces.runtime.transport
        started = time.perf_counter()
        number = steps_of_segment(self._cfg, step, self._last_step)
        program, late = self._program(number)
        every = self._cfg.trace_every
        is_traced = every > 0 and (step + number) // every > step // every
        if is_traced:
            start_together(transport)
        report = pieces.runtime.train_segment(program, step, pieces.fetch, update=self._update, request=request)
        if [list(row) for row in report.staleness] != late:
            raise StageFailed(
                f"steps {step + 1} to {step + number}: gradients were {report.staleness} updates late, but the "
                f"schedule says {late}"
            )
        if is_traced:
            spans = gather_spans(program.schedule, pieces.runtime.spans, transport)
            if transport.rank == 0 and transport.replicas.number == 0:
                write_trace(pieces.job.run, step + number, program.schedule, spans)
        reports = [report.step(i) for i in range(number)]
        return Advance(reports, time.perf_counter() - started, program.schedule, report.staleness)

    def _program(self, number: int) -> tuple[Program, list[list[int]]]:
        """Every rank meets the lengths in the same order, so they agree on each schedule once, together."""
        if number not in self._programs:
            schedule = self._build(number)
            self._programs[number] = self._pieces.runtime.prepare(schedule), staleness(schedule)
        return self._programs[number]

    def _update(self, joint: JointUpdate) -> None:
        """Called by the runtime for each update of this rank."""
        if not math.isfinite(joint.norm) or not (joint.loss is None or math.isfinite(joint.loss)):
            stage, step = next(iter(joint.steps.items()))
            raise non_finite(
                self._pieces.job,
                f"stage {stage}, step {step + 1}: the gradient or the loss is NaN or infinite. This stage was not "
                "updated, others may have been",
            )
        self._rule.apply(joint)


class UpdateRule:
    """What one rank does with the gradients of a joint update."""

    def __init__(
        self,
        cfg: Config,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        num_stages: int,
    ) -> None:
        """
        Args:
            optimizer: its groups know their "stage".
            parameters: by the names that a joint update has for them.
            num_stages: of the whole model.
        """
        self._cfg, self._optimizer, self._parameters, self._num_stages = cfg, optimizer, parameters, num_stages
        self._corrector = build_correctors(cfg.stale)

    def apply(self, joint: JointUpdate) -> None:
        """Clips the gradients, sets the learning rates, and steps the optimizer."""
        parameters = {name: self._parameters[name] for name in joint.stage_of}
        clip_gradients(parameters.values(), joint.norm, self._limit(joint))
        newest, latest = max(joint.steps.values()), max(joint.staleness.values())
        for group in self._optimizer.param_groups:
            step, late = joint.steps.get(group["stage"], newest), joint.staleness.get(group["stage"], latest)
            lr = learning_rate(self._cfg.optimizer.lr, self._cfg.lr_rule, step)
            group["lr"] = self._corrector.learning_rate(lr, late, step)
        late_of = {parameters[name]: joint.staleness[stage] for name, stage in joint.stage_of.items()}
        with self._corrector.update(self._optimizer, late_of):
            self._optimizer.step()

    def _limit(self, joint: JointUpdate) -> float | None:
        """The updating stages' share of the global limit: all of them together are never above it."""
        if self._cfg.grad_clip is None:
            return None
        return self._cfg.grad_clip * math.sqrt(len(joint.steps) / self._num_stages)
