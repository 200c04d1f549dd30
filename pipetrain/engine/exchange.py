"""What stages hand to each other: values and gradients, and, before the first of a kind, what they look like.

A stage learns the structure of its outputs from its first micro-batch of a kind and tells the stages that take them;
with the first gradients of a kind goes which of them do not exist. Everything after that has a known size, so receives
can be posted before the message is sent.
"""

from collections import deque

import torch
from torch import Tensor

from pipetrain.engine.message import Layout, Values
from pipetrain.engine.stage import Stage
from pipetrain.engine.structure import decode, encode
from pipetrain.engine.transport import Posted, Sent, Transport
from pipetrain.errors import LayerError
from pipetrain.schedule import Action, Kind, Schedule

_KEY_TAG, _STRUCTURE_TAG, _MISSING_TAG = 1 << 20, 1 << 21, 1 << 22
# Gradients on their way to one rank before the oldest is waited for. The schedule was proven to run even if each send
# blocked, so waiting is safe; and by then it has long left.
_MOST_UNDER_WAY = 2
# A forward or backward of (stage, peer, mini-batch, micro-batch), seen from the stage.
_Message = tuple[Kind, int, int, int, int]


class Exchange:
    """The messages of one rank's stages."""

    def __init__(self, stages: dict[int, Stage], transport: Transport, device: torch.device, *, narrow: bool) -> None:
        """
        Args:
            narrow: floating-point values travel between ranks as bfloat16.
        """
        self._stages, self._transport, self._device, self._narrow = stages, transport, device, narrow
        self._told: set[tuple[int, int, int]] = set()
        self._heard: set[tuple[int, int, int]] = set()
        self._missing: dict[tuple[int, int, int], frozenset[int]] = {}  # see `_without_missing`
        self._told_missing: set[tuple[int, int, int]] = set()

    def begin(self, schedule: Schedule) -> None:
        """Starts to run a schedule."""
        self._schedule = schedule
        self._keys: dict[int, list[int]] = {}  # by mini-batch, without a gap
        first = schedule.placement[0]
        # In the order in which keys are told.
        self._ranks = [first, *(rank for rank in range(self._transport.num_ranks) if rank != first)]
        self._place = self._ranks.index(self._transport.rank)
        self._ready: dict[_Message, Tensor | None] = {}
        self._posted: dict[_Message, Posted] = {}
        self._values_sent: dict[_Message, Sent] = {}
        self._gradients_sent: deque[Sent] = deque()
        self._told_now: list[Sent] = []

    def unsaid(self, step: int) -> range:
        """The mini-batches whose keys are to be said or heard when a rank comes to one.

        Each rank is some ahead, and one more than the rank that hears from it. So a receive, which must know its key
        and stands some way before the action that needs it, never waits for what its neighbour does in that very step.
        """
        ahead = self._transport.num_ranks - self._place
        return range(len(self._keys), min(step + ahead, self._schedule.num_steps - 1) + 1)

    def say_keys(self, step: int, own: list[int]) -> None:
        """On the rank of the first stage: says of what kind each micro-batch is. The others pass it on."""
        self._pass_on(step, torch.tensor(own))

    def key(self, step: int, m: int) -> int:
        """The kind of a micro-batch."""
        for each in self.unsaid(step):
            room = torch.zeros(self._schedule.num_microbatches, dtype=torch.int64)
            self._pass_on(each, self._transport.hear(room, self._ranks[self._place - 1], _KEY_TAG))
        return self._keys[step][m]

    def _pass_on(self, step: int, keys: Tensor) -> None:
        if self._place + 1 < len(self._ranks):
            self._told_now.append(self._transport.tell(keys, self._ranks[self._place + 1], _KEY_TAG))
        self._keys[step] = [int(key) for key in keys]

    def finish(self) -> None:
        """Waits until everything has left."""
        for message in (*self._values_sent.values(), *self._gradients_sent, *self._told_now):
            message.wait()

    # ---- around compute --------------------------------------------------------------------------------------

    def make_ready(self, action: Action, values: Values) -> None:
        """Packs what a forward or backward has made for other stages."""
        kind, (s, m, step) = _direction(action), _of(action)
        for to in self._schedule.destinations(kind, s):
            layout = self._layout(kind, action, s, to)
            if kind is Kind.BACKWARD:
                self._note_missing(s, to, self.key(step, m), layout, values)
            self._ready[kind, s, to, step, m] = layout.pack(values, self._device)

    def collect(self, action: Action) -> Values:
        """Unpacks what other stages have made for a forward or backward; waits for what is on its way."""
        kind, (s, m, step) = _direction(action), _of(action)
        wiring, values, key = self._stages[s].wiring, Values(), self.key(step, m)
        for source in self._schedule.sources(kind, s):
            if source in self._stages:
                message = self._ready.pop((kind, source, s, step, m))
                if kind is Kind.FORWARD:
                    wiring.learn(key, self._stages[source].wiring.told(key, s))
            else:
                posted = self._posted.pop((kind, s, source, step, m), None)
                message = None if posted is None else posted.wait()
            layout = self._layout(kind, action, source, s)
            found = layout.unpack(message, self._device)
            values |= found if kind is Kind.FORWARD else self._without_missing(source, s, key, layout, found)
        return values

    def retire(self, action: Action) -> None:
        """Lets go of the values of a micro-batch whose gradients have come: they have arrived, so nothing blocks."""
        s, m, step = _of(action)
        for to in self._schedule.destinations(Kind.FORWARD, s):
            if (sent := self._values_sent.pop((Kind.FORWARD, s, to, step, m), None)) is not None:
                sent.wait()

    # ---- actions ---------------------------------------------------------------------------------------------

    def send_forward(self, action: Action) -> None:
        """Before the first message of a kind goes what its receiver must know of it."""
        s, to, key = action.stage, action.peer, self.key(action.step, action.microbatch)
        if (s, to, key) not in self._told:
            self._told.add((s, to, key))
            data = encode(self._stages[s].wiring.told(key, to))
            for part in (torch.tensor([len(data)]), data):
                self._told_now.append(self._transport.tell(part, self._rank_of(to), _STRUCTURE_TAG + s))
        if (sent := self._send(Kind.FORWARD, action)) is not None:
            self._values_sent[Kind.FORWARD, s, to, action.step, action.microbatch] = sent

    def receive_forward(self, action: Action) -> None:
        """Makes room for values; for the first of a kind their stage says first what they look like."""
        s, source, key = action.stage, action.peer, self.key(action.step, action.microbatch)
        if (source, s, key) not in self._heard:
            self._heard.add((source, s, key))
            rank, tag = self._rank_of(source), _STRUCTURE_TAG + source
            size = int(self._transport.hear(torch.zeros(1, dtype=torch.int64), rank, tag))
            data = self._transport.hear(torch.empty(size, dtype=torch.uint8), rank, tag)
            self._stages[s].wiring.learn(key, decode(data))
        self._receive(Kind.FORWARD, action)

    def send_backward(self, action: Action) -> None:
        """With the first message of a kind goes which of its gradients do not exist."""
        s, to, key = action.stage, action.peer, self.key(action.step, action.microbatch)
        layout = self._layout(Kind.BACKWARD, action, s, to)
        if (s, to, key) not in self._told_missing and layout.parts:
            self._told_missing.add((s, to, key))
            missing = torch.tensor([place in self._missing[s, to, key] for place in range(len(layout.parts))])
            self._told_now.append(self._transport.tell(missing.to(torch.uint8), self._rank_of(to), _MISSING_TAG + s))
        if (sent := self._send(Kind.BACKWARD, action)) is not None:
            self._gradients_sent.append(sent)
            if len(self._gradients_sent) > _MOST_UNDER_WAY:
                self._gradients_sent.popleft().wait()

    def receive_backward(self, action: Action) -> None:
        """Makes room for gradients."""
        self._receive(Kind.BACKWARD, action)

    def _layout(self, kind: Kind, action: Action, from_stage: int, to_stage: int) -> Layout:
        """What a message carries, as the stage of the action knows it."""
        narrow = self._narrow and self._rank_of(from_stage) != self._rank_of(to_stage)
        key = self.key(action.step, action.microbatch)
        return self._stages[action.stage].wiring.layout(kind, key, from_stage, to_stage, narrow=narrow)

    def _send(self, kind: Kind, action: Action) -> Sent | None:
        (s, m, step), to = _of(action), action.peer
        message = self._ready.pop((kind, s, to, step, m))
        if message is None:
            return None
        return self._transport.send(message, self._rank_of(to), self._tag(kind, s, to, action))

    def _receive(self, kind: Kind, action: Action) -> None:
        (s, m, step), source = _of(action), action.peer
        wire = self._layout(kind, action, source, s).wire
        if wire is not None:
            tag = self._tag(kind, source, s, action)
            self._posted[kind, s, source, step, m] = self._transport.post(wire, self._rank_of(source), tag)

    # ---- gradients that do not exist -------------------------------------------------------------------------

    def _note_missing(self, s: int, to: int, key: int, layout: Layout, values: Values) -> None:
        missing = layout.missing(values)
        if first := self._missing.setdefault((s, to, key), missing) - missing:
            name = self._stages[s].wiring.name(layout.parts[min(first)][0][0])
            raise LayerError(
                f"the loss depends on the output of layer {name} now, but did not in the first micro-batch of this "
                "shape; let a gradient pass there always or never"
            )

    def _without_missing(self, source: int, s: int, key: int, layout: Layout, values: Values) -> Values:
        """Only gradients that exist. The others travel as zeros: sizes must not differ between micro-batches."""
        if (source, s, key) not in self._missing and layout.parts:
            like = torch.zeros(len(layout.parts), dtype=torch.uint8)
            told = self._transport.hear(like, self._rank_of(source), _MISSING_TAG + source)
            self._missing[source, s, key] = frozenset(place for place, is_missing in enumerate(told) if is_missing)
        for place in self._missing.get((source, s, key), ()):
            del values[layout.parts[place][0]]
        return values

    def _rank_of(self, stage: int) -> int:
        return self._schedule.placement[stage]

    def _tag(self, kind: Kind, from_stage: int, to_stage: int, action: Action) -> int:
        """A number of its own for each message that can be under way."""
        pair = from_stage * self._schedule.num_stages + to_stage
        turn = action.step % (2 * self._schedule.num_stages)  # no more mini-batches are in flight
        place = (pair * 2 * self._schedule.num_stages + turn) * self._schedule.num_microbatches + action.microbatch
        return place * 2 + (kind is Kind.BACKWARD)


def _of(action: Action) -> tuple[int, int, int]:
    return action.stage, action.microbatch, action.step


def _direction(action: Action) -> Kind:
    return Kind.FORWARD if action.kind is Kind.FORWARD else Kind.BACKWARD
