"""What a schedule holds in memory: every rank's actions are walked through, and its fullest moment is what counts."""

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import astuple, dataclass

from pipetrain.schedule import COMMUNICATION, INPUT_GRADIENTS, WEIGHT_GRADIENTS, Action, Kind, Schedule
from pipetrain.sim.cut import StageBytes


@dataclass(frozen=True)
class Memory:
    """Bytes by kind.

    Attributes:
        versions: copies of weights that a stale schedule needs beside the newest ones.
        in_flight: kept of micro-batches from their forward to their backward, or to their recompute.
        recomputed: graphs that a recompute has made.
        messages: on their way, or come and not taken yet.
        working: what the action that runs needs by itself, and what lives between the halves of backwards.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    versions: int = 0
    in_flight: int = 0
    recomputed: int = 0
    messages: int = 0
    working: int = 0

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def memory(schedule: Schedule, stages: Sequence[StageBytes], *, stashes: bool = True) -> list[Memory]:
    """What each stage holds in the fullest moment of its rank.

    Args:
        schedule: with or without messages: what a forward sends to another rank is held until gradients come back, and
            room for what comes next is made one action ahead.
        stashes: whether the weights of a forward are kept for its backward.
    """
    found = [Memory()] * schedule.num_stages
    recomputed = {action._replace(kind=Kind.FORWARD) for action in schedule if action.kind is Kind.RECOMPUTE}
    for rank in range(schedule.num_ranks):
        own = {
            s: _StageNow(stages[s], recomputed, stashes, *_has_others(schedule, s)) for s in schedule.stages_of(rank)
        }
        fullest = -1
        for action in schedule.actions[rank]:
            if action.kind in COMMUNICATION:
                continue
            own[action.stage].begin(action)
            total = 0
            for stage in own.values():
                total += stage.total()
            if total > fullest:
                fullest = total
                for s, stage in own.items():
                    found[s] = stage.now()
            own[action.stage].end(action)
    return found


def _has_others(schedule: Schedule, stage: int) -> tuple[bool, bool]:
    """Whether the stages before and behind one are on other ranks."""
    home, around = schedule.placement[stage], (stage - 1, stage + 1)
    return tuple(0 <= s < schedule.num_stages and schedule.placement[s] != home for s in around)  # type: ignore[return-value]


class _StageNow:
    """What one stage holds while its rank's actions are walked through."""

    def __init__(self, stage: StageBytes, recomputed: Set[Action], stashes: bool, receives: bool, sends: bool) -> None:
        """
        Args:
            recomputed: the forwards that are run again.
            stashes: whether the weights of a forward are kept for its backward.
            receives, sends: whether the stages before and behind it are on other ranks.
        """
        self._stage, self._recomputed, self._stashes = stage, recomputed, stashes
        self._posted, self._sends = stage.inputs * receives, sends
        self._has_gradients = False
        self._held: dict[tuple[int, int], tuple[int, int]] = {}  # by each of them: in flight, recomputed
        self._between = self._gradients = self._in_flight = self._graphs = self._sent = self._working = 0
        self._updates = 0
        self._users: Counter[int] = Counter()  # of each version of the weights, the micro-batches in flight
        self._version_of: dict[tuple[int, int], int] = {}

    def total(self) -> int:
        stage = self._stage
        held = self._in_flight + self._graphs + self._posted + self._sent + self._working + self._between
        return stage.parameters + self._gradients + stage.optimizer + self._versions() + held

    def now(self) -> Memory:
        return Memory(
            weights=self._stage.parameters,
            gradients=self._gradients,
            optimizer=self._stage.optimizer,
            versions=self._versions(),
            in_flight=self._in_flight,
            recomputed=self._graphs,
            messages=self._posted + self._sent,
            working=self._working + self._between,
        )

    def _versions(self) -> int:
        """Of the versions that micro-batches in flight have seen, all but the newest are copies."""
        return self._stashes * self._stage.parameters * (len(self._users) - (self._updates in self._users))

    def begin(self, action: Action) -> None:
        """The moment in the middle of an action."""
        stage, kind = self._stage, action.kind
        if kind is Kind.FORWARD:
            self._version_of[action.step, action.microbatch] = self._updates
            self._users[self._updates] += 1
            is_recomputed = action in self._recomputed
            self._in_flight += stage.inputs if is_recomputed else max(stage.graph, stage.inputs)
            self._working = stage.forward if is_recomputed else stage.building
        elif kind is Kind.RECOMPUTE:
            self._in_flight -= stage.inputs + stage.kept
            self._graphs += max(stage.graph, stage.inputs)
            self._working = stage.building
        elif kind in INPUT_GRADIENTS:
            self._sent -= stage.outputs * self._sends  # who sends gradients has got the values
            self._working, self._gradients = stage.backward, stage.parameters
        elif kind is Kind.BACKWARD_WEIGHT:
            self._working = stage.backward

    def end(self, action: Action) -> None:
        """The moment behind it."""
        stage, kind = self._stage, action.kind
        self._working = 0
        if kind is Kind.BACKWARD_INPUT:
            self._between += stage.between
        elif kind is Kind.FORWARD:
            self._in_flight += stage.kept * (action in self._recomputed)
            self._sent += stage.outputs * self._sends
        elif kind in WEIGHT_GRADIENTS:
            which = (action.step, action.microbatch)
            self._between -= stage.between * (kind is Kind.BACKWARD_WEIGHT)
            if Action(Kind.FORWARD, action.stage, action.microbatch, action.step) in self._recomputed:
                self._graphs -= max(stage.graph, stage.inputs)
            else:
                self._in_flight -= max(stage.graph, stage.inputs)
            version = self._version_of.pop(which)
            self._users[version] -= 1
            if not self._users[version]:
                del self._users[version]
        elif kind is Kind.UPDATE:
            self._updates += 1
