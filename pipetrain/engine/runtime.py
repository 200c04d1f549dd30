"""Walks one rank's list of actions. This loop is the pipeline:

    for action in program.actions:
        self._do[action.kind](action)

Before it, the ranks agree on what kinds of micro-batches the step has. Behind it stands the update, where they meet
once, for the loss, the norm of the gradient and the measurements (`report`). What travels in between is `exchange`'s.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipetrain.engine.clock import clock_for
from pipetrain.engine.exchange import Exchange
from pipetrain.engine.loss import Tensors
from pipetrain.engine.microbatch import split
from pipetrain.engine.report import Reporter, StepReport
from pipetrain.engine.stage import Stage
from pipetrain.engine.structure import key_of
from pipetrain.engine.tied import Tie, followers, share_memory, sum_gradients
from pipetrain.engine.transport import Transport
from pipetrain.errors import StageFailed
from pipetrain.garbage import no_garbage_collection
from pipetrain.schedule import BATCH, WEIGHT_GRADIENTS, Action, Kind, Schedule, Span


@dataclass(frozen=True)
class Program:
    """One rank's part of a schedule that all ranks have agreed on."""

    actions: tuple[Action, ...]
    schedule: Schedule
    trains: bool
    recomputed: frozenset[tuple[int, int]]


class Runtime:
    """One rank of a pipeline: its stages, its transport, and a handler for each kind of action."""

    def __init__(
        self,
        stages: Sequence[Stage],
        num_stages: int,
        transport: Transport,
        device: torch.device,
        *,
        ties: Sequence[Tie] = (),
        memory_bytes: Callable[[], float] = lambda: 0.0,
        narrow_messages: bool = False,
    ) -> None:
        """
        Args:
            stages: the ones that live on this rank.
            num_stages: of the whole pipeline.
            ties: the parameters that several layers of the whole model share.
            memory_bytes: measures this process; its value goes into every report.
            narrow_messages: floating-point values travel between ranks as bfloat16.
        """
        self.transport = transport
        self.stages = {stage.index: stage for stage in stages}
        self.parameters = {name: p for stage in stages for name, p in stage.named_parameters()}
        self.current: Action | None = None
        self.spans: list[Span] = []
        self._updates: list[Span] = []  # of the last training step
        self._num_stages = num_stages
        self.device = device
        self._ties = ties
        self._clock = clock_for(device)
        share_memory(ties, self.parameters)
        follow = followers(ties, self.parameters)
        # What this rank's optimizer steps. Two uses of a tied parameter on one rank share their memory: one of them.
        self.own_parameters = {name: p for name, p in self.parameters.items() if name not in follow}
        self._reporter = Reporter(stages, num_stages, ties, transport, device, memory_bytes)
        self._exchange = Exchange(self.stages, transport, device, narrow=narrow_messages)
        self._do: dict[Kind, Callable[[Action], None]] = {
            Kind.FORWARD: self._forward,
            Kind.RECOMPUTE: self._recompute,
            Kind.BACKWARD: self._backward,
            Kind.BACKWARD_INPUT: self._backward,
            Kind.BACKWARD_WEIGHT: self._backward_weight,
            Kind.UPDATE: self._update,
            Kind.SEND_FORWARD: self._exchange.send_forward,
            Kind.RECEIVE_FORWARD: self._exchange.receive_forward,
            Kind.SEND_BACKWARD: self._exchange.send_backward,
            Kind.RECEIVE_BACKWARD: self._exchange.receive_backward,
        }

    # ---- the public face -------------------------------------------------------------------------------------

    def prepare(self, schedule: Schedule) -> Program:
        """Takes this rank's part of a schedule, once all ranks hold the same one.

        Raises:
            StageFailed: if they do not.
        """
        self._agree(schedule)
        return Program(
            actions=schedule.actions[self.transport.rank],
            schedule=schedule,
            trains=any(action.kind in WEIGHT_GRADIENTS for action in schedule),
            recomputed=frozenset((a.stage, a.microbatch) for a in schedule if a.kind is Kind.RECOMPUTE),
        )

    def train_step(
        self,
        program: Program,
        step: int,
        inputs: Tensors | None,
        targets: Tensors | None,
        *,
        total: int = 0,
        update: Callable[[StepReport], None],
        request: float = 0.0,
        data_s: float = 0.0,
    ) -> StepReport:
        """Runs one mini-batch.

        Args:
            step: random layers draw from it.
            inputs: the mini-batch, [batch, ...] each; needed on the first stage's rank only.
            targets: what the loss compares with, [batch, ...] each; needed on the last stage's rank only.
            total: valid tokens or samples of the whole mini-batch: the gradient is that of loss sum / total. Counts on
                the last stage's rank only, leave it 0 elsewhere.
            update: called once all gradients are there, with the report; it steps the optimizer.
            request: any number; the report holds the sum over all ranks.
            data_s: in which this rank got the mini-batch; for the report.
        """
        for parameter in self.parameters.values():
            parameter.grad = None
        self._begin(program, step, inputs, targets, training=True)
        last = self._num_stages - 1 in self.stages
        if last and total < 1:
            raise StageFailed("the mini-batch has no valid target: the mean of its loss is not defined")
        self._total, self._request, self._data_s, self._on_update = total if last else 0, request, data_s, update
        self._run(program)
        self._updates = [span for span in self.spans if span.action.kind is Kind.UPDATE]
        assert self._report is not None, "a training schedule ends with an update"
        return self._report

    def evaluate_step(self, program: Program, inputs: Tensors | None, targets: Tensors | None) -> Tensor:
        """Runs the forwards of one batch.

        Returns:
            float64 on the CPU: on the last stage's rank the sums of the loss and of each measure, elsewhere one zero.
        """
        self._begin(program, 0, inputs, targets, training=False)
        self._run(program)
        measures = [torch.stack(each).double().sum() for each in zip(*self._measured, strict=True)]
        return torch.stack([self._loss, *measures]).cpu()

    def find_non_finite(
        self, program: Program, step: int, inputs: Tensors | None, targets: Tensors | None
    ) -> tuple[int, int, int] | None:
        """Repeats the forwards of a failed step, draw for draw, looking at the output of every layer.

        Returns:
            (stage, place of the layer in it, micro-batch) of the first NaN or infinite output, on every rank.
        """
        self._begin(program, step, inputs, targets, training=True)
        self._culprits: dict[int, tuple[int, int]] = {}
        self._looking = True
        self._run(program)
        found = torch.zeros(self._num_stages, 2, dtype=torch.float64)
        for stage, (place, microbatch) in self._culprits.items():
            found[stage] = torch.tensor([place + 1, microbatch])
        found = self.transport.all_reduce(found)
        for stage in range(self._num_stages):
            if found[stage, 0] > 0:
                return stage, int(found[stage, 0]) - 1, int(found[stage, 1])
        return None

    # ---- one step --------------------------------------------------------------------------------------------

    def _begin(
        self, program: Program, step: int, inputs: Tensors | None, targets: Tensors | None, *, training: bool
    ) -> None:
        self._program = program
        last, num_microbatches = self._num_stages - 1, program.schedule.num_microbatches
        self._inputs = split(inputs, num_microbatches) if 0 in self.stages and inputs is not None else []
        self._targets = split(targets, num_microbatches) if last in self.stages and targets is not None else []
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self._measured: list[list[Tensor]] = []
        self._looking = False
        self._report: StepReport | None = None
        for stage in self.stages.values():
            stage.step = step
            stage.train(training)
        self._clock.restart()
        self._exchange.begin(program.schedule)
        keys = [key_of(piece, training) for piece in self._inputs] if 0 in self.stages else None
        self._keys = self._exchange.agree_on_keys(keys)

    def _run(self, program: Program) -> None:
        with next(iter(self.stages.values())).random.preserved(), no_garbage_collection():
            for action in program.actions:
                self.current = action
                self._do[action.kind](action)
        self._exchange.finish()
        self.current = None
        self.spans = self._clock.spans()

    # ---- compute ---------------------------------------------------------------------------------------------

    def _forward(self, action: Action) -> None:
        s, m = action.stage, action.microbatch
        stage, key = self.stages[s], self._keys[m]
        targets = self._targets[m] if stage.is_last else ()
        inputs = self._exchange.collect(Kind.FORWARD, s, m)
        if s == 0:
            stage.wiring.learn_batch(key, self._inputs[m])
            inputs |= {(BATCH, place): tensor for place, tensor in enumerate(self._inputs[m])}
        start = self._clock.now()
        if self._looking:
            values, place = stage.first_non_finite(m, inputs, targets, key)
            if place is not None:
                self._culprits.setdefault(s, (place, m))
        else:
            values = stage.forward(
                m,
                inputs,
                targets=targets,
                key=key,
                for_backward=self._program.trains,
                keep_graph=(s, m) not in self._program.recomputed,
            )
        self._clock.record(action, start)  # type: ignore[arg-type]
        if stage.is_last:
            self._loss += stage.loss_of(values)
            self._measured.append(stage.measured)
        self._exchange.make_ready(Kind.FORWARD, s, m, values)

    def _recompute(self, action: Action) -> None:
        start = self._clock.now()
        self.stages[action.stage].recompute(action.microbatch)
        self._clock.record(action, start)  # type: ignore[arg-type]

    def _backward(self, action: Action) -> None:
        """B, or I where the schedule splits it."""
        s, m = action.stage, action.microbatch
        stage = self.stages[s]
        gradients = self._exchange.collect(Kind.BACKWARD, s, m)
        if stage.is_last:
            gradients[stage.loss_id] = stage.gradient_of_loss(self._keys[m], self._total)
        self._exchange.retire(s, m)
        start = self._clock.now()
        gradients = stage.backward(m, gradients, split=action.kind is Kind.BACKWARD_INPUT)
        self._clock.record(action, start)  # type: ignore[arg-type]
        self._exchange.make_ready(Kind.BACKWARD, s, m, gradients)

    def _backward_weight(self, action: Action) -> None:
        start = self._clock.now()
        self.stages[action.stage].backward_weight(action.microbatch)
        self._clock.record(action, start)  # type: ignore[arg-type]

    def _update(self, action: Action) -> None:
        """The first of a rank's stages to update does it for all: the optimizer has the parameters of all of them."""
        report, is_first = self._report, self._report is None
        if report is None:
            sum_gradients(self._ties, self.parameters, self._program.schedule.placement, self.transport)
            measured = self._clock.spans(), self._updates, self._data_s
            report = self._reporter.reduce(float(self._loss), self._total, self._request, *measured)
            self._report = report
        start = self._clock.now()
        if is_first:
            self._on_update(report)
        if report.bad_stage is None:
            self.stages[action.stage].update_statistics()
        self._clock.record(action, start)  # type: ignore[arg-type]

    # ---- agreements ------------------------------------------------------------------------------------------

    def _agree(self, schedule: Schedule) -> None:
        digest = int.from_bytes(hashlib.sha256(f"{schedule.digest} {torch.__version__}".encode()).digest()[:6], "big")
        digests = torch.zeros(self.transport.num_ranks, dtype=torch.float64)
        digests[self.transport.rank] = digest  # 48 bits: exact in float64
        digests = self.transport.all_reduce(digests)
        different = [rank for rank, other in enumerate(digests.tolist()) if other != digests[0]]
        if different:
            raise StageFailed(
                f"ranks {different} hold another schedule or another version of torch than rank 0: "
                "start all ranks with the same settings and the same environment"
            )
