"""Walks one rank's list of actions. This loop is the pipeline:

    for action in program.actions:
        self._do[action.kind](action)

A synchronous schedule is one mini-batch. Behind it stands the update, where the ranks meet once, for the loss, the norm
of the gradient and the measurements (`report`). A stale one is a segment of mini-batches: each rank updates by itself,
and they meet in the end. What travels in between is `exchange`'s; what goes to other replicas is `reduction`'s; which
weights an action sees is `versions`'.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from pipetrain.engine.clock import clock_for
from pipetrain.engine.exchange import Exchange
from pipetrain.engine.joint_update import JointUpdate, JointUpdates
from pipetrain.engine.loss import Tensors
from pipetrain.engine.minibatch import MiniBatch, MiniBatches
from pipetrain.engine.reduction import PendingSum
from pipetrain.engine.report import Reporter, SegmentReport, StepReport
from pipetrain.engine.stage import Stage
from pipetrain.engine.structure import key_of
from pipetrain.engine.tied import Tie, own_names, share_memory, sum_gradients
from pipetrain.engine.transport import Transport
from pipetrain.engine.versions import WeightVersions
from pipetrain.errors import StageFailed
from pipetrain.garbage import no_garbage_collection
from pipetrain.schedule import BATCH, WEIGHT_GRADIENTS, Action, Kind, Schedule, Span, joint_updates
from pipetrain.schedule.stale import STASH


@dataclass(frozen=True)
class Program:
    """One rank's part of a schedule that all ranks have agreed on."""

    actions: tuple[Action, ...]
    schedule: Schedule
    trains: bool
    recomputed: frozenset[Action]  # the forwards that will be run again
    joint: dict[Action, tuple[Action, ...]]  # where ranks update by themselves: the first of each, and all of them


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
        stale_weights: str = STASH,
    ) -> None:
        """
        Args:
            stages: the ones that live on this rank.
            num_stages: of the whole pipeline.
            ties: the parameters that several layers of the whole model share.
            memory_bytes: measures this process; its value goes into every report.
            narrow_messages: floating-point values travel between ranks as bfloat16.
            stale_weights: what the backwards of stale schedules see, see `versions`.
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
        owners = own_names(ties, self.parameters)
        # What this rank's optimizer steps. Two uses of a tied parameter on one rank share their memory: one of them.
        self.own_parameters = {name: p for name, p in self.parameters.items() if owners[name] == name}
        self._reporter = Reporter(stages, num_stages, ties, transport, device, memory_bytes)
        self._exchange = Exchange(self.stages, transport, device, narrow=narrow_messages)
        self._versions = WeightVersions(stages, self.parameters, owners, stale_weights)
        self._joint = JointUpdates(self.parameters, owners, self._versions)
        self._do: dict[Kind, Callable[[Action], None]] = {
            Kind.FORWARD: self._forward,
            Kind.RECOMPUTE: self._recompute,
            Kind.BACKWARD: self._backward,
            Kind.BACKWARD_INPUT: self._backward,
            Kind.BACKWARD_WEIGHT: self._backward_weight,
            Kind.REDUCE: self._reduce,
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
        actions = schedule.actions[self.transport.rank]
        return Program(
            actions=actions,
            schedule=schedule,
            trains=any(action.kind in WEIGHT_GRADIENTS for action in schedule),
            recomputed=frozenset(a._replace(kind=Kind.FORWARD) for a in actions if a.kind is Kind.RECOMPUTE),
            joint={} if schedule.waits else {joint[0]: joint for joint in joint_updates(actions)},
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
        """Runs one mini-batch, under a synchronous schedule.

        Args:
            step: random layers draw from it.
            inputs, targets, total: see `MiniBatch`.
            update: called once all gradients are there, with the report; it steps the optimizer.
            request: any number; the report holds the sum over all ranks.
            data_s: in which this rank got the mini-batch; for the report.
        """
        for parameter in self.parameters.values():
            parameter.grad = None
        self._begin(program, step, lambda _: MiniBatch(inputs, targets, total), training=True)
        self._request, self._data_s, self._on_update = request, data_s, update
        self._run(program)
        self._updates = [span for span in self.spans if span.action.kind is Kind.UPDATE]
        assert self._report is not None, "a training schedule ends with an update"
        return self._report

    def train_segment(
        self,
        program: Program,
        first_step: int,
        batch: Callable[[int], MiniBatch],
        *,
        update: Callable[[JointUpdate], None],
        request: float = 0.0,
    ) -> SegmentReport:
        """Runs the mini-batches of a stale schedule, one behind the other without a pause, and drains the pipeline.

        Args:
            first_step: the first mini-batch; random layers draw from its number and from those that follow.
            batch: gives a mini-batch by its number, when this rank comes to it.
            update: called for each update of this rank with the gradients in `.grad` of the parameters that have one;
                it steps the optimizer.
            request: any number; the report holds the sum over all ranks.
        """
        for parameter in self.parameters.values():
            parameter.grad = None
        self._begin(program, first_step, batch, training=True)
        self._on_joint_update = update
        self._made: list[JointUpdate] = []
        self._versions.begin()
        self._run(program)
        self._versions.end()
        losses = [(float(self._losses[step]), total) for step, total in self._minibatches.totals.items()]
        spans, data_s = self.spans, self._minibatches.seconds
        return self._reporter.reduce_segment(program.schedule, first_step, losses, self._made, request, spans, data_s)

    def evaluate_step(
        self, program: Program, inputs: Tensors | None, targets: Tensors | None, number: int = 0
    ) -> Tensor:
        """Runs the forwards of one batch.

        Args:
            number: of the batch in its split: with the first one memories start anew.

        Returns:
            float64 on the CPU: on the last stage's rank the sums of the loss and of each measure, elsewhere one zero.
        """
        self._begin(program, number, lambda _: MiniBatch(inputs, targets), training=False)
        self._run(program)
        measures = [torch.stack(each).double().sum() for each in zip(*self._measured, strict=True)]
        return torch.stack([self._losses[0], *measures]).cpu()

    def find_non_finite(
        self, program: Program, step: int, inputs: Tensors | None, targets: Tensors | None
    ) -> tuple[int, int, int] | None:
        """Repeats the forwards of a failed step, draw for draw, looking at the output of every layer.

        Returns:
            (stage, place of the layer in it, micro-batch) of the first NaN or infinite output, on every rank. The
            micro-batches of all replicas are counted through.
        """
        self._begin(program, step, lambda _: MiniBatch(inputs, targets), training=True)
        self._culprits: dict[int, tuple[int, int]] = {}
        self._looking = True
        self._run(program)
        found = torch.zeros(self._num_stages, 2, dtype=torch.float64)
        for stage, (place, microbatch) in self._culprits.items():
            found[stage] = torch.tensor([place + 1, microbatch])
        number = program.schedule.num_microbatches
        for replica, its in enumerate(self.transport.replicas.gather(self.transport.all_reduce(found))):
            for stage in range(self._num_stages):
                if its[stage, 0] > 0:
                    return stage, int(its[stage, 0]) - 1, replica * number + int(its[stage, 1])
        return None

    # ---- one step --------------------------------------------------------------------------------------------

    def _begin(self, program: Program, first_step: int, batch: Callable[[int], MiniBatch], *, training: bool) -> None:
        """
        Args:
            first_step: the mini-batch that the schedule calls 0.
            batch: gives a mini-batch by its number.
        """
        schedule = program.schedule
        self._program, self._first_step, self._training = program, first_step, training
        self._minibatches = MiniBatches(
            batch,
            schedule.num_microbatches,
            first_step=first_step,
            is_first=0 in self.stages,
            is_last=self._num_stages - 1 in self.stages,
            trains=program.trains,
        )
        self._losses = torch.zeros(schedule.num_steps, dtype=torch.float64, device=self.device)
        self._measured: list[list[Tensor]] = []
        self._looking = False
        self._pending: dict[tuple[int, int], PendingSum] = {}  # by stage and mini-batch
        self._report: StepReport | None = None
        for stage in self.stages.values():
            stage.train(training)
        self._clock.restart()
        self._exchange.begin(schedule)

    def _pieces(self, step: int) -> list[Tensors]:
        """The inputs of a mini-batch on the rank of the first stage, which tells the others what they are like."""
        for each in self._exchange.unsaid(step):
            pieces = self._minibatches.get(each).inputs
            self._exchange.say_keys(each, [key_of(piece, self._training) for piece in pieces])
        return self._minibatches.get(step).inputs

    def _stage(self, action: Action) -> Stage:
        stage = self.stages[action.stage]
        stage.step = self._first_step + action.step
        return stage

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
        s, m, step = action.stage, action.microbatch, action.step
        stage = self._stage(action)
        batch = self._pieces(step)[m] if s == 0 else ()
        targets = self._minibatches.get(step).targets[m] if stage.is_last else ()
        key, inputs = self._exchange.key(step, m), self._exchange.collect(action)
        if s == 0:
            stage.wiring.learn_batch(key, batch)
            inputs |= {(BATCH, place): tensor for place, tensor in enumerate(batch)}
        if self._program.joint:
            self._versions.forward(s, (step, m))
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
                keep_graph=action not in self._program.recomputed,
            )
        self._clock.record(action, start)  # type: ignore[arg-type]
        if stage.is_last:
            self._losses[step] += stage.loss_of(values)
            self._measured.append(stage.measured)
        self._exchange.make_ready(action, values)

    def _recompute(self, action: Action) -> None:
        s, m, step = action.stage, action.microbatch, action.step
        with self._versions.recompute(s, (step, m)) if self._program.joint else nullcontext():
            start = self._clock.now()
            self._stage(action).recompute(m)
            self._clock.record(action, start)  # type: ignore[arg-type]

    def _backward(self, action: Action) -> None:
        """B, or I where the schedule splits it."""
        s, m, step = action.stage, action.microbatch, action.step
        stage = self._stage(action)
        gradients = self._exchange.collect(action)
        if stage.is_last:
            gradients[stage.loss_id] = stage.gradient_of_loss(
                self._exchange.key(step, m), self._minibatches.totals[step]
            )
        self._exchange.retire(action)
        with self._versions.backward(s, (step, m)) if self._program.joint else nullcontext():
            start = self._clock.now()
            gradients = stage.backward(m, gradients, split=action.kind is Kind.BACKWARD_INPUT)
            self._clock.record(action, start)  # type: ignore[arg-type]
        self._exchange.make_ready(action, gradients)

    def _backward_weight(self, action: Action) -> None:
        start = self._clock.now()
        self._stage(action).backward_weight(action.microbatch)
        self._clock.record(action, start)  # type: ignore[arg-type]

    def _reduce(self, action: Action) -> None:
        """Sends the gradients of a stage on their way. They come back before its update."""
        s, step = action.stage, action.step
        layers = [
            {layer.full_name(name): p for name, p in layer.module.named_parameters() if p.requires_grad}
            for layer in self.stages[s].layers
        ]
        own = self._versions.gradients(s, step) if self._program.joint else self._take_gradients(s)
        self._pending[s, step] = PendingSum(layers, own, self.transport.replicas)

    def _take_gradients(self, stage: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, parameter in self.stages[stage].named_parameters():
            if parameter.grad is not None:
                found[name], parameter.grad = parameter.grad, None
        return found

    def _update(self, action: Action) -> None:
        """The first of a rank's stages to update does it for all: the optimizer has the parameters of all of them."""
        if self._program.joint:
            return self._update_alone(action)
        report, is_first = self._report, self._report is None
        if report is None:
            for pending in self._pending.values():
                for name, gradient in pending.wait().items():
                    self.parameters[name].grad = gradient
            sum_gradients(self._ties, self.parameters, self._program.schedule.placement, self.transport)
            measured = self._clock.spans(), self._updates, self._data_s
            loss_sum, count = float(self._losses[0]), self._minibatches.totals.get(0, 0)
            report = self._reporter.reduce(loss_sum, count, self._request, *measured)
            self._report = report
        start = self._clock.now()
        if is_first:
            self._on_update(report)
        if report.bad_stage is None:
            self.stages[action.stage].update_statistics(self.transport.replicas)
        self._clock.record(action, start)  # type: ignore[arg-type]

    def _update_alone(self, action: Action) -> None:
        """Of updates that stand next to each other the first one does it for all."""
        start = self._clock.now()
        if (actions := self._program.joint.get(action)) is not None:
            for a in actions:
                if pending := self._pending.pop((a.stage, a.step), None):
                    self._versions.gradients(a.stage, a.step).update(pending.wait())
            last = next((a.step for a in actions if a.stage == self._num_stages - 1), None)
            loss = None if last is None else float(self._losses[last]) / self._minibatches.totals[last]
            self._made.append(self._joint.make(actions, self._first_step, loss, self._on_joint_update))
        self._clock.record(action, start)  # type: ignore[arg-type]
        if action.stage == max(self.stages):
            self._minibatches.forget(action.step)

    # ---- agreements ------------------------------------------------------------------------------------------

    def _agree(self, schedule: Schedule) -> None:
        digest = int.from_bytes(hashlib.sha256(f"{schedule.digest} {torch.__version__}".encode()).digest()[:6], "big")
        digests = torch.zeros(self.transport.num_ranks, dtype=torch.float64)
        digests[self.transport.rank] = digest  # 48 bits: exact in float64
        digests = self.transport.all_reduce(digests)
        digests = torch.cat(self.transport.replicas.gather(digests))
        different = [rank for rank, other in enumerate(digests.tolist()) if other != digests[0]]
        if different:
            raise StageFailed(
                f"ranks {different} hold another schedule or another version of torch than rank 0: "
                "start all ranks with the same settings and the same environment"
            )
