"""The one meeting of all ranks in a step, or in a segment of a stale schedule: loss, gradient norm and measurements,
added up in a single vector.

Every entry is filled by one rank and zero on the others, so the sum is exact. Replicas add up their losses and
requests; their gradients are the same by then, and the measurements are each replica's own. The norm of a synchronous
step is then added up on every rank in the same order over the same numbers, one for each parameter of the unsplit
model: it does not depend on the partitioning.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor, nn

from pipetrain.engine.joint_update import JointUpdate
from pipetrain.engine.stage import Stage
from pipetrain.engine.tied import Tie
from pipetrain.engine.transport import Transport
from pipetrain.schedule import Kind, Schedule, Span


@dataclass(frozen=True)
class StageMeasures:
    """What one stage measured in one step.

    Attributes:
        backward_s: whole backwards, and first halves.
        backward_weight_s: second halves.
        update_s: of the step before: this one's is still to come when ranks tell each other what they measured.
        data_s: in which its rank got the mini-batch.
        elapsed_s: from the step's begin to the end of its rank's last action.
        memory_bytes: of its rank.
    """

    forward_s: float
    recompute_s: float
    backward_s: float
    backward_weight_s: float
    update_s: float
    data_s: float
    elapsed_s: float
    memory_bytes: float

    @property
    def busy_s(self) -> float:
        return self.forward_s + self.recompute_s + self.backward_s + self.backward_weight_s


@dataclass(frozen=True)
class StepReport:
    """What every rank knows after a step.

    Attributes:
        loss_sum: over all micro-batches.
        count: valid tokens or samples of the mini-batch, what the last stage divided by.
        grad_norm: global, over all stages, before clipping.
        requests: the sum of what the ranks asked for, see `Runtime.train_step`.
        stages: the measurements of every stage.
        bad_stage: the first stage with a NaN or infinite gradient, or None.
    """

    loss_sum: float
    count: float
    grad_norm: float
    requests: float
    stages: tuple[StageMeasures, ...]
    bad_stage: int | None


@dataclass(frozen=True)
class SegmentReport:
    """What every rank knows after a segment of a stale schedule.

    Attributes:
        loss_sums, counts: of each mini-batch, as in `StepReport`.
        squared_norms: [stage][mini-batch], of the gradients before clipping.
        staleness: [stage][mini-batch], in updates.
        stages: the measurements of every stage, over the whole segment.
    """

    loss_sums: tuple[float, ...]
    counts: tuple[float, ...]
    squared_norms: tuple[tuple[float, ...], ...]
    staleness: tuple[tuple[int, ...], ...]
    requests: float
    stages: tuple[StageMeasures, ...]

    def step(self, number: int) -> StepReport:
        """As the report of one mini-batch."""
        norm = math.sqrt(sum(of_stage[number] for of_stage in self.squared_norms))
        return StepReport(self.loss_sums[number], self.counts[number], norm, self.requests, self.stages, None)


class Reporter:
    """Knows where each stage's numbers stand in the vector."""

    def __init__(
        self,
        stages: Sequence[Stage],
        num_stages: int,
        ties: Sequence[Tie],
        transport: Transport,
        device: torch.device,
        memory_bytes: Callable[[], float],
    ) -> None:
        self._num_stages = num_stages
        self._transport = transport
        self._device = device
        self._memory_bytes = memory_bytes
        # A tied parameter counts once in the norm: its first use.
        later_uses = {name for tie in ties for name, _ in tie.uses[1:]}
        self._counted: dict[int, list[nn.Parameter]] = {
            stage.index: [p for name, p in stage.named_parameters() if name not in later_uses and p.requires_grad]
            for stage in stages
        }
        counts = torch.zeros(num_stages, dtype=torch.float64)
        for index, parameters in self._counted.items():
            counts[index] = len(parameters)
        self._offsets = [0, *(int(n) for n in transport.all_reduce(counts).cumsum(0))]

    def reduce(
        self,
        loss_sum: float,
        count: float,
        request: float,
        spans: Sequence[Span],
        before: Sequence[Span],
        data_s: float,
    ) -> StepReport:
        """Adds up this rank's numbers with those of all others; every rank must call it.

        Args:
            spans: of this step.
            before: of the updates of the last one.
        """
        measures = torch.zeros(self._num_stages, len(fields(StageMeasures)), dtype=torch.float64)
        norms = torch.zeros(self._offsets[-1], dtype=torch.float64)
        for index, parameters in self._counted.items():
            measured = astuple(self._measure(index, spans, before, data_s))
            measures[index] = torch.tensor(measured, dtype=torch.float64)
            if parameters:
                norms[self._offsets[index] : self._offsets[index + 1]] = self._squared_norms(parameters)
        scalars = torch.tensor([loss_sum, count, request], dtype=torch.float64)
        reduced = self._transport.all_reduce(torch.cat([scalars, measures.flatten(), norms]))
        scalars, flat, norms = torch.split(reduced, [len(scalars), measures.numel(), len(norms)])
        loss_sum, request = self._transport.replicas.sum(scalars[[0, 2]]).tolist()
        bounds = list(zip(self._offsets, self._offsets[1:], strict=False))
        bad = [stage for stage, (start, end) in enumerate(bounds) if not norms[start:end].isfinite().all()]
        return StepReport(
            loss_sum=loss_sum,
            count=float(scalars[1]),
            grad_norm=float(norms.sum().sqrt()),
            requests=request,
            stages=tuple(StageMeasures(*row) for row in flat.reshape(measures.shape).tolist()),
            bad_stage=bad[0] if bad else None,
        )

    def reduce_segment(
        self,
        schedule: Schedule,
        first_step: int,
        losses: Sequence[tuple[float, int]],
        updates: Sequence[JointUpdate],
        request: float,
        spans: Sequence[Span],
        data_s: float,
    ) -> SegmentReport:
        """The same for a segment.

        Args:
            losses: loss sum and count of each mini-batch, on the rank of the last stage.
            updates: that this rank made.
        """
        measures = torch.zeros(self._num_stages, len(fields(StageMeasures)), dtype=torch.float64)
        for index in self._counted:
            measured = astuple(self._measure(index, spans, spans, data_s))
            measures[index] = torch.tensor(measured, dtype=torch.float64)
        of_steps = torch.zeros(2 + 2 * self._num_stages, schedule.num_steps, dtype=torch.float64)
        of_losses, norms, late = torch.split(of_steps, [2, self._num_stages, self._num_stages])
        if losses:
            of_losses[:] = torch.tensor(losses, dtype=torch.float64).T
        for update in updates:
            for stage, step in update.steps.items():
                norms[stage, step - first_step] = update.squared_norms[stage]
                late[stage, step - first_step] = update.staleness[stage]
        scalar = torch.tensor([request], dtype=torch.float64)
        reduced = self._transport.all_reduce(torch.cat([scalar, measures.flatten(), of_steps.flatten()]))
        scalar, flat, flat_steps = torch.split(reduced, [1, measures.numel(), of_steps.numel()])
        rows = flat_steps.reshape(of_steps.shape).tolist()
        of_losses = flat_steps[: schedule.num_steps]
        *loss_sums, request = self._transport.replicas.sum(torch.cat([of_losses, scalar])).tolist()
        return SegmentReport(
            loss_sums=tuple(loss_sums),
            counts=tuple(rows[1]),
            squared_norms=tuple(map(tuple, rows[2 : 2 + self._num_stages])),
            staleness=tuple(tuple(map(int, row)) for row in rows[2 + self._num_stages :]),
            requests=request,
            stages=tuple(StageMeasures(*row) for row in flat.reshape(measures.shape).tolist()),
        )

    def _squared_norms(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        squares = [
            zero if p.grad is None else torch.linalg.vector_norm(p.grad, dtype=torch.float64).square()
            for p in parameters
        ]
        return torch.stack(squares).cpu()

    def _measure(self, index: int, spans: Sequence[Span], before: Sequence[Span], data_s: float) -> StageMeasures:
        seconds = dict.fromkeys(Kind, 0.0)
        elapsed_s = 0.0
        for span in spans:
            elapsed_s = max(elapsed_s, span.end_s)
            if span.action.stage == index:
                seconds[span.action.kind] += span.seconds
        return StageMeasures(
            forward_s=seconds[Kind.FORWARD],
            recompute_s=seconds[Kind.RECOMPUTE],
            backward_s=seconds[Kind.BACKWARD] + seconds[Kind.BACKWARD_INPUT],
            backward_weight_s=seconds[Kind.BACKWARD_WEIGHT],
            update_s=sum(span.seconds for span in before if span.action.stage == index),
            data_s=data_s,
            elapsed_s=elapsed_s,
            memory_bytes=self._memory_bytes(),
        )
