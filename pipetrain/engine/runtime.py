"""Walks one rank's list of actions. This loop is the pipeline:

    for action in program.actions:
        self._do[action.kind](action)

Before it, the ranks agree on what kinds of micro-batches the step has (`_agree_on_keys`). Behind it stands the update,
where they meet once, for the loss, the norm of the gradient and the measurements (`report`).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pipetrain.engine.clock import clock_for
from pipetrain.engine.layer import Tensors
from pipetrain.engine.microbatch import split
from pipetrain.engine.report import Reporter, StepReport
from pipetrain.engine.signature import Signature, decode, encode, key_of
from pipetrain.engine.stage import Stage
from pipetrain.engine.tied import Tie, followers, share_memory, sum_gradients
from pipetrain.engine.transport import TENSORS_PER_MESSAGE, Posted, Sent, Transport
from pipetrain.errors import StageFailed
from pipetrain.schedule import Action, Kind, Schedule, Span

_KEY_TAG, _SIGNATURE_TAG = 1 << 20, 1 << 21
_SIGNATURE_BYTES = 4096


@dataclass(frozen=True)
class Program:
    """One rank's part of a schedule that all ranks have agreed on."""

    actions: tuple[Action, ...]
    placement: tuple[int, ...]
    num_microbatches: int
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
        self._told: set[tuple[int, int]] = set()
        self._arriving: dict[tuple[int, int], Signature] = {}
        self._do: dict[Kind, Callable[[Action], None]] = {
            Kind.FORWARD: self._forward,
            Kind.RECOMPUTE: self._recompute,
            Kind.BACKWARD: self._backward,
            Kind.UPDATE: self._update,
            Kind.SEND_FORWARD: self._send_forward,
            Kind.RECEIVE_FORWARD: self._receive_forward,
            Kind.SEND_BACKWARD: self._send_backward,
            Kind.RECEIVE_BACKWARD: self._receive_backward,
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
            placement=schedule.placement,
            num_microbatches=schedule.num_microbatches,
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
        self._total, self._request, self._on_update = total if last else 0, request, update
        self._run(program)
        assert self._report is not None, "a training schedule ends with an update"
        return self._report

    def evaluate_step(self, program: Program, inputs: Tensors | None, targets: Tensors | None) -> float:
        """Runs the forwards of one batch. Returns the loss sum on the last stage's rank, 0 elsewhere."""
        self._begin(program, 0, inputs, targets, training=False)
        self._run(program)
        return float(self._loss)

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
        self._inputs = split(inputs, program.num_microbatches) if 0 in self.stages and inputs is not None else []
        last = self._num_stages - 1
        self._targets = split(targets, program.num_microbatches) if last in self.stages and targets is not None else []
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self._looking = False
        self._report: StepReport | None = None
        self._outputs: dict[tuple[int, int], Tensors] = {}
        self._input_gradients: dict[tuple[int, int], Tensors] = {}
        self._posted: dict[tuple[Kind, int, int], Posted] = {}
        self._sent: dict[tuple[Kind, int, int], Sent] = {}
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
        inputs, needs_grad = self._take_inputs(s, m)
        start = self._clock.now()
        if self._looking:
            outputs, place = stage.first_non_finite(m, inputs, targets)
            if place is not None:
                self._culprits.setdefault(s, (place, m))
        else:
            outputs = stage.forward(
                m,
                inputs,
                needs_grad=needs_grad,
                targets=targets,
                key=key,
                for_backward=self._program.trains,
                keep_graph=(s, m) not in self._program.recomputed,
            )
        self._clock.record(action, start)  # type: ignore[arg-type]
        if stage.is_last:
            self._loss += outputs[0].detach()
        else:
            self._outputs[s, m] = outputs

    def _take_inputs(self, s: int, m: int) -> tuple[Tensors, tuple[bool, ...]]:
        if s == 0:
            return self._inputs[m], (False,) * len(self._inputs[m])
        if s - 1 in self.stages:
            signature = self.stages[s - 1].signature(self._keys[m])
            inputs = self._outputs.pop((s - 1, m))
        else:
            signature = self._arriving[s, self._keys[m]]
            inputs = self._posted.pop((Kind.RECEIVE_FORWARD, s, m)).wait()
        return inputs, tuple(spec.needs_grad for spec in signature)

    def _recompute(self, action: Action) -> None:
        start = self._clock.now()
        self.stages[action.stage].recompute(action.microbatch)
        self._clock.record(action, start)  # type: ignore[arg-type]

    def _backward(self, action: Action) -> None:
        s, m = action.stage, action.microbatch
        stage = self.stages[s]
        if stage.is_last:
            (loss,) = stage.signature(self._keys[m])
            gradients: Tensors = (torch.full(loss.shape, 1 / self._total, dtype=loss.dtype, device=self.device),)
        elif s + 1 in self.stages:
            gradients = self._input_gradients.pop((s + 1, m))
        else:
            gradients = self._posted.pop((Kind.RECEIVE_BACKWARD, s, m)).wait()
            # Its gradient is here, so the output has arrived: this does not block.
            self._sent.pop((Kind.SEND_FORWARD, s, m)).wait()
        start = self._clock.now()
        input_gradients = stage.backward(m, gradients)
        self._clock.record(action, start)  # type: ignore[arg-type]
        if s > 0:
            self._input_gradients[s, m] = input_gradients

    def _update(self, action: Action) -> None:
        sum_gradients(self._ties, self.parameters, self._program.placement, self.transport)
        self._report = self._reporter.reduce(float(self._loss), self._total, self._request, self._clock.spans())
        start = self._clock.now()
        self._on_update(self._report)
        self._clock.record(action, start)  # type: ignore[arg-type]

    # ---- messages --------------------------------------------------------------------------------------------

    def _send_forward(self, action: Action) -> None:
        s, m = action.stage, action.microbatch
        key, to_rank = self._keys[m], self._program.placement[s + 1]
        tensors, signature = self._outputs.pop((s, m)), self.stages[s].signature(key)
        if any(t.shape != spec.shape or t.dtype != spec.dtype for t, spec in zip(tensors, signature, strict=True)):
            raise RuntimeError(
                f"the output of stage {s} is {[tuple(t.shape) for t in tensors]}, but it was "
                f"{[spec.shape for spec in signature]} for the same input shapes before: a shape must follow from them"
            )
        if (s, key) not in self._told:
            self._told.add((s, key))
            text = encode(signature)
            if len(tensors) > TENSORS_PER_MESSAGE or len(text) > _SIGNATURE_BYTES:
                raise RuntimeError(
                    f"stage {s} sends {len(tensors)} tensors at once, at most {TENSORS_PER_MESSAGE} are possible"
                )
            data = torch.nn.functional.pad(text, (0, _SIGNATURE_BYTES - len(text)), value=ord(" "))
            self._told_now.append(self.transport.tell(data, to_rank, _SIGNATURE_TAG + s))
        self._sent[action.kind, s, m] = self.transport.send(tensors, to_rank, self._tag(s + 1, m, backward=False))

    def _receive_forward(self, action: Action) -> None:
        s, m = action.stage, action.microbatch
        key, from_rank = self._keys[m], self._program.placement[s - 1]
        if (s, key) not in self._arriving:
            data = torch.empty(_SIGNATURE_BYTES, dtype=torch.uint8)
            self._arriving[s, key] = decode(self.transport.hear(data, from_rank, _SIGNATURE_TAG + s - 1))
        tag = self._tag(s, m, backward=False)
        self._posted[action.kind, s, m] = self.transport.post(self._arriving[s, key], from_rank, tag)

    def _send_backward(self, action: Action) -> None:
        s, m = action.stage, action.microbatch
        gradients = self._input_gradients.pop((s, m))
        to_rank = self._program.placement[s - 1]
        self._sent[action.kind, s, m] = self.transport.send(gradients, to_rank, self._tag(s, m, backward=True))

    def _receive_backward(self, action: Action) -> None:
        s, m = action.stage, action.microbatch
        expected, from_rank = self.stages[s].gradients_expected(m), self._program.placement[s + 1]
        tag = self._tag(s + 1, m, backward=True)
        self._posted[action.kind, s, m] = self.transport.post(expected, from_rank, tag)

    def _tag(self, border: int, m: int, *, backward: bool) -> int:
        """A number of its own for each message of a step; `border` is the stage behind it."""
        return (border * self._program.num_microbatches + m) * 2 + backward

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
        keys = torch.zeros(program.num_microbatches, dtype=torch.int64)
        if rank == 0:
            keys = torch.tensor([key_of(inputs, training) for inputs in self._inputs])
        else:
            keys = self.transport.hear(keys, rank - 1, _KEY_TAG)
        if rank + 1 < self.transport.num_ranks:
            self._told_now.append(self.transport.tell(keys, rank + 1, _KEY_TAG))
        return [int(key) for key in keys]
