"""Walks one rank's list of actions. This loop is the pipeline:

    for action in program.actions:
        self._do[action.kind](action)

Before it, the ranks agree on what kinds of micro-batches the step has (`_agree_on_keys`). Behind it stands the update,
where they meet once, for the loss, the norm of the gradient and the measurements (`report`).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pipetrain.engine.clock import clock_for
from pipetrain.engine.loss import Tensors
from pipetrain.engine.message import Layout, Values
from pipetrain.engine.microbatch import split
from pipetrain.engine.report import Reporter, StepReport
from pipetrain.engine.stage import Stage
from pipetrain.engine.structure import decode, encode, key_of
from pipetrain.engine.tied import Tie, followers, share_memory, sum_gradients
from pipetrain.engine.transport import Posted, Sent, Transport
from pipetrain.errors import LayerError, StageFailed
from pipetrain.schedule import BATCH, Action, Kind, Schedule, Span

_KEY_TAG, _STRUCTURE_TAG, _MISSING_TAG = 1 << 20, 1 << 21, 1 << 22
# A forward or backward of (stage, peer, micro-batch), seen from the stage.
_Message = tuple[Kind, int, int, int]


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
    ) -> None:
        """
        Args:
            stages: the ones that live on this rank.
            num_stages: of the whole pipeline.
            ties: the parameters that several layers of the whole model share.
            memory_bytes: measures this process; its value goes into every report.
        """
        self.transport = transport
        self.stages = {stage.index: stage for stage in stages}
        self.parameters = {name: p for stage in stages for name, p in stage.named_parameters()}
        self.current: Action | None = None
        self.spans: list[Span] = []
        self._num_stages = num_stages
        self.device = device
        self._ties = ties
        self._clock = clock_for(device)
        share_memory(ties, self.parameters)
        follow = followers(ties, self.parameters)
        # What this rank's optimizer steps. Two uses of a tied parameter on one rank share their memory: one of them.
        self.own_parameters = {name: p for name, p in self.parameters.items() if name not in follow}
        self._reporter = Reporter(stages, num_stages, ties, transport, device, memory_bytes)
        self._told: set[tuple[int, int, int]] = set()
        self._heard: set[tuple[int, int, int]] = set()
        self._missing: dict[tuple[int, int, int], frozenset[int]] = {}  # see `_without_missing`
        self._told_missing: set[tuple[int, int, int]] = set()
        self._do: dict[Kind, Callable[[Action], None]] = {
            Kind.FORWARD: self._forward,
            Kind.RECOMPUTE: self._recompute,
            Kind.BACKWARD: self._backward,
            Kind.UPDATE: self._update,
            Kind.SEND_FORWARD: self._send_forward,
            Kind.RECEIVE_FORWARD: self._receive_forward,
            Kind.SEND_BACKWARD: self._send_backward,
            Kind.RECEIVE_BACKWARD: partial(self._receive, Kind.BACKWARD),
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
            trains=any(action.kind is Kind.BACKWARD for action in schedule),
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
        """
        for parameter in self.parameters.values():
            parameter.grad = None
        self._begin(program, step, inputs, targets, training=True)
        last = self._num_stages - 1 in self.stages
        if last and total < 1:
            raise StageFailed("the mini-batch has no valid target: the mean of its loss is not defined")
        self._total, self._request, self._on_update = total if last else 0, request, update
        self._run(program)
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
        self._ready: dict[_Message, Tensor | None] = {}
        self._posted: dict[_Message, Posted] = {}
        self._sent: dict[_Message, Sent] = {}
        self._told_now: list[Sent] = []
        for stage in self.stages.values():
            stage.step = step
            stage.train(training)
        self._clock.restart()
        self._keys = self._agree_on_keys(training)

    def _run(self, program: Program) -> None:
        with next(iter(self.stages.values())).random.preserved():
            for action in program.actions:
                self.current = action
                self._do[action.kind](action)
        for message in (*self._sent.values(), *self._told_now):
            message.wait()
        self.current = None
        self.spans = self._clock.spans()

    # ---- compute ---------------------------------------------------------------------------------------------

    def _forward(self, action: Action) -> None:
        s, m = action.stage, action.microbatch
        stage, key = self.stages[s], self._keys[m]
        targets = self._targets[m] if stage.is_last else ()
        inputs = self._collect(Kind.FORWARD, s, m, key)
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
        self._make_ready(Kind.FORWARD, s, m, key, values)

    def _recompute(self, action: Action) -> None:
        start = self._clock.now()
        self.stages[action.stage].recompute(action.microbatch)
        self._clock.record(action, start)  # type: ignore[arg-type]

    def _backward(self, action: Action) -> None:
        s, m = action.stage, action.microbatch
        stage, key = self.stages[s], self._keys[m]
        gradients = self._collect(Kind.BACKWARD, s, m, key)
        if stage.is_last:
            gradients[stage.loss_id] = stage.gradient_of_loss(key, self._total)
        for to in self._program.schedule.destinations(Kind.FORWARD, s):
            # Their gradients are here, so the values have arrived: this does not block.
            if (sent := self._sent.pop((Kind.FORWARD, s, to, m), None)) is not None:
                sent.wait()
        start = self._clock.now()
        gradients = stage.backward(m, gradients)
        self._clock.record(action, start)  # type: ignore[arg-type]
        self._make_ready(Kind.BACKWARD, s, m, key, gradients)

    def _update(self, action: Action) -> None:
        sum_gradients(self._ties, self.parameters, self._program.schedule.placement, self.transport)
        report = self._reporter.reduce(float(self._loss), self._total, self._request, self._clock.spans())
        self._report = report
        start = self._clock.now()
        self._on_update(report)
        if report.bad_stage is None:
            self.stages[action.stage].update_statistics()
        self._clock.record(action, start)  # type: ignore[arg-type]

    # ---- messages --------------------------------------------------------------------------------------------

    def _make_ready(self, kind: Kind, s: int, m: int, key: int, values: Values) -> None:
        """Packs what a forward or backward has made for other stages."""
        for to in self._program.schedule.destinations(kind, s):
            layout = self.stages[s].wiring.layout(kind, key, s, to)
            if kind is Kind.BACKWARD:
                self._note_missing(s, to, key, layout, values)
            self._ready[kind, s, to, m] = layout.pack(values, self.device)

    def _collect(self, kind: Kind, s: int, m: int, key: int) -> Values:
        """Unpacks what other stages have made for a forward or backward; waits for what is on its way."""
        wiring, values = self.stages[s].wiring, Values()
        for source in self._program.schedule.sources(kind, s):
            if source in self.stages:
                message = self._ready.pop((kind, source, s, m))
                if kind is Kind.FORWARD:
                    wiring.learn(key, self.stages[source].wiring.told(key, s))
            else:
                posted = self._posted.pop((kind, s, source, m), None)
                message = None if posted is None else posted.wait()
            layout = wiring.layout(kind, key, source, s)
            found = layout.unpack(message, self.device)
            values |= found if kind is Kind.FORWARD else self._without_missing(source, s, key, layout, found)
        return values

    def _send(self, kind: Kind, action: Action) -> None:
        s, m, to = action.stage, action.microbatch, action.peer
        message = self._ready.pop((kind, s, to, m))
        if message is not None:
            tag = self._tag(kind, s, to, m)
            self._sent[kind, s, to, m] = self.transport.send(message, self._rank_of(to), tag)

    def _receive(self, kind: Kind, action: Action) -> None:
        s, m, source = action.stage, action.microbatch, action.peer
        wire = self.stages[s].wiring.layout(kind, self._keys[m], source, s).wire
        if wire is not None:
            tag = self._tag(kind, source, s, m)
            self._posted[kind, s, source, m] = self.transport.post(wire, self._rank_of(source), tag)

    def _send_forward(self, action: Action) -> None:
        """Before the first message of a kind goes what its receiver must know of it."""
        s, to, key = action.stage, action.peer, self._keys[action.microbatch]
        if (s, to, key) not in self._told:
            self._told.add((s, to, key))
            data = encode(self.stages[s].wiring.told(key, to))
            for part in (torch.tensor([len(data)]), data):
                self._told_now.append(self.transport.tell(part, self._rank_of(to), _STRUCTURE_TAG + s))
        self._send(Kind.FORWARD, action)

    def _receive_forward(self, action: Action) -> None:
        s, source, key = action.stage, action.peer, self._keys[action.microbatch]
        if (source, s, key) not in self._heard:
            self._heard.add((source, s, key))
            rank, tag = self._rank_of(source), _STRUCTURE_TAG + source
            size = int(self.transport.hear(torch.zeros(1, dtype=torch.int64), rank, tag))
            data = self.transport.hear(torch.empty(size, dtype=torch.uint8), rank, tag)
            self.stages[s].wiring.learn(key, decode(data))
        self._receive(Kind.FORWARD, action)

    def _send_backward(self, action: Action) -> None:
        """With the first message of a kind goes which of its gradients do not exist."""
        s, to, key = action.stage, action.peer, self._keys[action.microbatch]
        layout = self.stages[s].wiring.layout(Kind.BACKWARD, key, s, to)
        if (s, to, key) not in self._told_missing and layout.parts:
            self._told_missing.add((s, to, key))
            missing = torch.tensor([place in self._missing[s, to, key] for place in range(len(layout.parts))])
            self._told_now.append(self.transport.tell(missing.to(torch.uint8), self._rank_of(to), _MISSING_TAG + s))
        self._send(Kind.BACKWARD, action)

    def _note_missing(self, s: int, to: int, key: int, layout: Layout, values: Values) -> None:
        missing = layout.missing(values)
        if first := self._missing.setdefault((s, to, key), missing) - missing:
            name = self.stages[s].wiring.name(layout.parts[min(first)][0][0])
            raise LayerError(
                f"the loss depends on the output of layer {name} now, but did not in the first micro-batch of this "
                "shape; let a gradient pass there always or never"
            )

    def _without_missing(self, source: int, s: int, key: int, layout: Layout, values: Values) -> Values:
        """Only gradients that exist. The others travel as zeros: sizes must not differ between micro-batches."""
        if (source, s, key) not in self._missing and layout.parts:
            like = torch.zeros(len(layout.parts), dtype=torch.uint8)
            told = self.transport.hear(like, self._rank_of(source), _MISSING_TAG + source)
            self._missing[source, s, key] = frozenset(place for place, is_missing in enumerate(told) if is_missing)
        for place in self._missing.get((source, s, key), ()):
            del values[layout.parts[place][0]]
        return values

    def _rank_of(self, stage: int) -> int:
        return self._program.schedule.placement[stage]

    def _tag(self, kind: Kind, from_stage: int, to_stage: int, m: int) -> int:
        """A number of its own for each message of a step."""
        schedule = self._program.schedule
        pair = from_stage * schedule.num_stages + to_stage
        return (pair * schedule.num_microbatches + m) * 2 + (kind is Kind.BACKWARD)

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

    def _agree_on_keys(self, training: bool) -> list[int]:
        """What kind each micro-batch of this step is; the first rank says it, each passes it on."""
        rank, program = self.transport.rank, self._program
        keys = torch.zeros(program.schedule.num_microbatches, dtype=torch.int64)
        if rank == 0:
            keys = torch.tensor([key_of(inputs, training) for inputs in self._inputs])
        else:
            keys = self.transport.hear(keys, rank - 1, _KEY_TAG)
        if rank + 1 < self.transport.num_ranks:
            self._told_now.append(self.transport.tell(keys, rank + 1, _KEY_TAG))
        return [int(key) for key in keys]
