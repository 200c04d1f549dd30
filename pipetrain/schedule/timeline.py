"""When each compute action of a schedule starts and ends, for given durations.

The one place that knows what an action must wait for. `messages` orders the sends and receives by it, `show` draws
with it, and `sim` predicts with it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pipetrain.errors import ScheduleError
from pipetrain.schedule.action import INPUT_GRADIENTS, WEIGHT_GRADIENTS, Action, Kind, Schedule


@dataclass(frozen=True, slots=True)
class Span:
    """An action and the time that it took, in seconds since the start of its step."""

    action: Action
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


# A backward is taken to cost two forwards, each of its halves one, an update nothing: good enough to order messages and
# to draw.
_NOMINAL = {
    Kind.FORWARD: 1.0,
    Kind.RECOMPUTE: 1.0,
    Kind.BACKWARD: 2.0,
    Kind.BACKWARD_INPUT: 1.0,
    Kind.BACKWARD_WEIGHT: 1.0,
    Kind.UPDATE: 0.0,
}


def nominal_duration(action: Action) -> float:
    """The duration of an action in units of one forward."""
    return _NOMINAL[action.kind]


class Dependencies:
    """What every compute action of a schedule waits for."""

    def __init__(self, schedule: Schedule) -> None:
        self._last_stage = schedule.num_stages - 1
        self._everything = set(schedule)
        self._waits = schedule.waits
        self._last_gradient = {(a.stage, a.step): a for a in schedule if a.kind in WEIGHT_GRADIENTS}
        self._last_gradients = list(self._last_gradient.values())

    def of(self, action: Action) -> list[Action]:
        """The compute actions, of whichever rank, that must have ended before `action` can start."""
        s, m, step = action.stage, action.microbatch, action.step
        if action.kind is Kind.FORWARD:
            return [Action(Kind.FORWARD, s - 1, m, step)] if s > 0 else []
        if action.kind is Kind.RECOMPUTE:
            return [Action(Kind.FORWARD, s, m, step)]
        if action.kind in INPUT_GRADIENTS:
            recompute = Action(Kind.RECOMPUTE, s, m, step)
            own = recompute if recompute in self._everything else Action(Kind.FORWARD, s, m, step)
            return [own, self._input_gradient(s + 1, m, step)] if s < self._last_stage else [own]
        if action.kind is Kind.BACKWARD_WEIGHT:
            return [Action(Kind.BACKWARD_INPUT, s, m, step)]
        # A synchronous update waits for all gradients, since their norm is global; another for its own.
        return self._last_gradients if self._waits else [self._last_gradient[s, step]]

    def _input_gradient(self, s: int, m: int, step: int) -> Action:
        half = Action(Kind.BACKWARD_INPUT, s, m, step)
        return half if half in self._everything else Action(Kind.BACKWARD, s, m, step)


def timeline(
    schedule: Schedule,
    duration: Callable[[Action], float] = nominal_duration,
    delay: Callable[[Action, Action], float] = lambda producer, consumer: 0.0,
) -> list[Span]:
    """Runs the compute actions of a schedule on paper, every rank as early as it can.

    Args:
        schedule: with or without messages; only its compute actions count.
        duration: seconds (or any unit) of an action.
        delay: seconds between the end of a producer and the moment at which its consumer has the result, where these
            are on two stages or the consumer is an update.

    Returns:
        One span for each compute action, sorted by end, then start; actions of one rank stay in their order.

    Raises:
        ScheduleError: if some action can never start.
    """
    rows = schedule.compute().actions
    dependencies = Dependencies(schedule)
    ended: dict[Action, float] = {}
    spans: list[Span] = []
    position = [0] * len(rows)
    clock = [0.0] * len(rows)
    progress = True
    while progress:
        progress = False
        for rank, row in enumerate(rows):
            while position[rank] < len(row):
                action = row[position[rank]]
                ready = _ready_at(dependencies.of(action), action, ended, delay)
                if ready is None:
                    break
                start = max(clock[rank], ready)
                clock[rank] = ended[action] = start + duration(action)
                spans.append(Span(action, start, clock[rank]))
                position[rank] += 1
                progress = True
    blocked = [row[position[rank]] for rank, row in enumerate(rows) if position[rank] < len(row)]
    if blocked:
        missing = [a for a in dependencies.of(blocked[0]) if a not in ended]
        raise ScheduleError(f"{blocked[0]} can never start: it waits for {', '.join(map(str, missing))}")
    return sorted(spans, key=lambda span: (span.end_s, span.start_s))


def _ready_at(
    producers: Iterable[Action],
    consumer: Action,
    ended: dict[Action, float],
    delay: Callable[[Action, Action], float],
) -> float | None:
    ready = 0.0
    for producer in producers:
        if producer not in ended:
            return None
        is_immediate = producer.stage == consumer.stage and consumer.kind is not Kind.UPDATE
        ready = max(ready, ended[producer] + (0.0 if is_immediate else delay(producer, consumer)))
    return ready


def numbers(spans: Iterable[Span]) -> dict[Action, int]:
    """The micro-batch of each action as drawings number it: through all mini-batches."""
    actions = [span.action for span in spans]
    num_microbatches = max((action.microbatch for action in actions), default=0) + 1
    return {action: action.step * num_microbatches + action.microbatch for action in actions}


def bubble_fraction(spans: Sequence[Span], num_ranks: int) -> float:
    """Idle time / (ranks x makespan). Updates count as busy."""
    if not spans:
        return 0.0
    makespan = max(span.end_s for span in spans) - min(span.start_s for span in spans)
    return 1.0 - sum(span.seconds for span in spans) / (num_ranks * makespan) if makespan > 0 else 0.0
