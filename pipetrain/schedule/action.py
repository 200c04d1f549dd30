"""What a schedule is made of: `Action`, and `Schedule` = one ordered list of actions for each rank.

Letters used here and in every module of this package: s = stage, m = micro-batch, S = number of stages,
M = number of micro-batches. Stages, micro-batches, ranks and steps count from 0.

    kind     does                                              text form (stage 2, micro-batch 0)
    F        forward of one micro-batch through one stage      2F0
    R        the same forward again, to have its graph         2R0
    B        backward                                          2B0
    I        the half of B that gives the input's gradient     2I0
    W        the half of B that gives the weights' gradients   2W0
    U        optimizer update of one stage                     2U
    REDUCE   add up its gradients over all replicas            2REDUCE
    SEND_F   hand the output of F to the next stage            2SEND_F0
    RECV_F   post the receive of the previous stage's output   2RECV_F0
    SEND_B   hand the gradient of B or I to the previous stage 2SEND_B0
    RECV_B   post the receive of the next stage's gradient     2RECV_B0

A message between stages that are not neighbours (a skip) names the other one: 0>2SEND_F0 and 2<0RECV_F0. Where a
schedule has several mini-batches, all but the first one are named: 2F0@1, 2U@1.

A generator (`synchronous`, `zero_bubble`) or a file (`csv_file`) gives compute actions only; the passes in `recompute`,
`messages` and `reductions` add the rest. The same object is then verified, simulated, drawn and executed: an order is
never written down twice.
"""

import functools
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from pipetrain.errors import ScheduleError


class Kind(Enum):
    """What an action does; the value is its text form."""

    FORWARD = "F"
    RECOMPUTE = "R"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    UPDATE = "U"
    REDUCE = "REDUCE"
    SEND_FORWARD = "SEND_F"
    RECEIVE_FORWARD = "RECV_F"
    SEND_BACKWARD = "SEND_B"
    RECEIVE_BACKWARD = "RECV_B"

    # Members are singletons, so identity hashing is enough; Enum's own hash costs a call into Python each time.
    __hash__ = object.__hash__


# Where the other end of a message between neighbours is.
_NEIGHBOUR = {Kind.SEND_FORWARD: +1, Kind.RECEIVE_FORWARD: -1, Kind.SEND_BACKWARD: -1, Kind.RECEIVE_BACKWARD: +1}
MESSAGES = frozenset(_NEIGHBOUR)
SENDS = frozenset({Kind.SEND_FORWARD, Kind.SEND_BACKWARD})
COMMUNICATION = MESSAGES | {Kind.REDUCE}
OF_MINI_BATCH = frozenset({Kind.UPDATE, Kind.REDUCE})  # of no micro-batch by itself

# What a stage hands its input's gradient on with, and what adds to its weights' gradients: a B is both.
INPUT_GRADIENTS = frozenset({Kind.BACKWARD, Kind.BACKWARD_INPUT})
WEIGHT_GRADIENTS = frozenset({Kind.BACKWARD, Kind.BACKWARD_WEIGHT})

_TEXT = re.compile(r"(\d+)(?:[<>](\d+))?(SEND_F|RECV_F|SEND_B|RECV_B|REDUCE|F|R|B|I|W|U)(\d*)(?:@(\d+))?")


class Action(NamedTuple):
    """One piece of work of one stage. (A named tuple: schedules have many, and sets of them must be quick.)

    `microbatch` is -1 for an update or a reduction, which belong to the whole mini-batch. `step` counts the
    mini-batches inside one schedule: always 0 where a step ends with a flush. `skips_to` is the stage at the other end
    of a message, None where that is the neighbour; `message` sets it.
    """

    kind: Kind
    stage: int
    microbatch: int = -1
    step: int = 0
    skips_to: int | None = None

    @staticmethod
    def message(kind: Kind, stage: int, peer: int, microbatch: int, step: int = 0) -> "Action":
        """One end of a message: `stage` sends to or receives from `peer`."""
        return Action(kind, stage, microbatch, step, None if peer == stage + _NEIGHBOUR[kind] else peer)

    @property
    def peer(self) -> int:
        """The stage at the other end of a message."""
        return self.stage + _NEIGHBOUR[self.kind] if self.skips_to is None else self.skips_to

    def __str__(self) -> str:
        arrow = "" if self.skips_to is None else f"{'>' if self.kind in SENDS else '<'}{self.skips_to}"
        number = "" if self.microbatch < 0 else str(self.microbatch)
        return f"{self.stage}{arrow}{self.kind.value}{number}" + (f"@{self.step}" if self.step else "")

    @staticmethod
    def parse(text: str) -> "Action":
        """The inverse of `str`.

        Raises:
            ScheduleError: if the text is no action.
        """
        match = _TEXT.fullmatch(text.strip())
        is_wrong = match is None or (Kind(match[3]) in OF_MINI_BATCH) != (match[4] == "")
        if match is None or is_wrong or (match[2] and "_" not in match[3]):
            raise ScheduleError(
                f"{text!r} is no action; expected <stage><kind><micro-batch>, such as 2F0, 1SEND_F3 or 2U"
            )
        skips_to = int(match[2]) if match[2] else None
        return Action(Kind(match[3]), int(match[1]), int(match[4] or -1), int(match[5] or 0), skips_to)


@dataclass(frozen=True)
class Skips:
    """The messages between stages that are not neighbours: (from, to) pairs, sorted.

    Neighbours always exchange messages. A value that skips stages goes straight from the stage that makes it to those
    that use it; its gradient goes from each of them to the one before it, and from the first to the stage that made it.
    """

    forward: tuple[tuple[int, int], ...] = ()
    backward: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Schedule:
    """The ordered work of every rank, and the rank on which each stage lives.

    Attributes:
        num_microbatches: of each mini-batch.
        num_steps: mini-batches.
        waits: whether all ranks meet before an update, as a synchronous schedule wants it: for the norm of the whole
            gradient, and for the weights that stages on several ranks share.
    """

    name: str
    num_microbatches: int
    placement: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]
    skips: Skips = Skips()
    num_steps: int = 1
    waits: bool = True

    @property
    def num_stages(self) -> int:
        return len(self.placement)

    @property
    def num_ranks(self) -> int:
        return len(self.actions)

    @functools.cached_property
    def is_split(self) -> bool:
        """Whether backwards come in two halves."""
        return any(action.kind is Kind.BACKWARD_WEIGHT for action in self)

    def stages_of(self, rank: int) -> list[int]:
        """The stages that live on a rank, ascending."""
        return [stage for stage, home in enumerate(self.placement) if home == rank]

    def __iter__(self) -> Iterator[Action]:
        """All actions, rank by rank."""
        for actions in self.actions:
            yield from actions

    def with_actions(self, actions: tuple[tuple[Action, ...], ...]) -> "Schedule":
        """The same schedule with another list for each rank: what a pass returns."""
        return replace(self, actions=actions)

    def compute(self) -> "Schedule":
        """The schedule without its communication."""
        return self.with_actions(tuple(tuple(a for a in row if a.kind not in COMMUNICATION) for row in self.actions))

    def sources(self, kind: Kind, stage: int) -> list[int]:
        """The stages that a forward or backward of `stage` gets messages from, neighbour first."""
        if kind is Kind.FORWARD:
            return [stage - 1] * (stage > 0) + [source for source, to in self.skips.forward if to == stage]
        last = stage == self.num_stages - 1
        return [stage + 1] * (not last) + [source for source, to in self.skips.backward if to == stage]

    def destinations(self, kind: Kind, stage: int) -> list[int]:
        """The stages that a forward or backward of `stage` sends messages to, neighbour first."""
        if kind is Kind.FORWARD:
            last = stage == self.num_stages - 1
            return [stage + 1] * (not last) + [to for source, to in self.skips.forward if source == stage]
        return [stage - 1] * (stage > 0) + [to for source, to in self.skips.backward if source == stage]

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical text; ranks that are to run together must agree on it."""
        rows = [" ".join(map(str, row)) for row in self.actions]
        head = self.num_microbatches, self.num_steps, self.waits, self.placement, self.skips
        text = "\n".join([self.name, *map(str, head), *rows])
        return hashlib.sha256(text.encode()).hexdigest()
