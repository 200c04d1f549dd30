"""Proves that a schedule can be run, or says which action is wrong.

Checked: every action is once on the rank of its stage; every micro-batch goes forward once through every stage and, in
a training schedule, back once; a recompute stands between its forward and its backward; backwards come in micro-batch
order (what makes weights independent of the schedule); each stage updates once, after its last backward; messages come
in pairs; and nothing ever waits for ever, even if every send and receive blocked until its partner is there.
"""

from collections import Counter

from pipetrain.errors import ScheduleError
from pipetrain.schedule.action import MESSAGES, Action, Kind, Schedule
from pipetrain.schedule.show import mark
from pipetrain.schedule.timeline import needs

_PARTNER = {
    Kind.SEND_FORWARD: Kind.RECEIVE_FORWARD,
    Kind.RECEIVE_FORWARD: Kind.SEND_FORWARD,
    Kind.SEND_BACKWARD: Kind.RECEIVE_BACKWARD,
    Kind.RECEIVE_BACKWARD: Kind.SEND_BACKWARD,
}
_PRODUCER = {Kind.SEND_FORWARD: Kind.FORWARD, Kind.SEND_BACKWARD: Kind.BACKWARD}
_RECEIVE = {Kind.FORWARD: Kind.RECEIVE_FORWARD, Kind.BACKWARD: Kind.RECEIVE_BACKWARD}


def verify(schedule: Schedule) -> Schedule:
    """Returns the schedule unchanged if it is sound.

    Raises:
        ScheduleError: with the rule that is broken and the rank's list with an arrow at the culprit.
    """
    _check_places(schedule)
    _check_once_each(schedule)
    _check_stage_order(schedule)
    _check_pairs(schedule)
    _check_progress(schedule)
    return schedule


def peak_in_flight(schedule: Schedule) -> tuple[int, ...]:
    """For each stage, the most micro-batches that have gone forward but not yet back: its saved inputs."""
    peaks, live = [0] * schedule.num_stages, [0] * schedule.num_stages
    for action in schedule:
        if action.kind is Kind.FORWARD:
            live[action.stage] += 1
            peaks[action.stage] = max(peaks[action.stage], live[action.stage])
        elif action.kind is Kind.BACKWARD:
            live[action.stage] -= 1
    return tuple(peaks)


def _fail(schedule: Schedule, rule: str, *culprits: Action) -> ScheduleError:
    return ScheduleError(f"schedule {schedule.name}: {rule}\n{mark(schedule, culprits)}")


def _check_places(schedule: Schedule) -> None:
    for rank, row in enumerate(schedule.actions):
        for action in row:
            if not 0 <= action.stage < schedule.num_stages or schedule.placement[action.stage] != rank:
                raise _fail(schedule, f"{action} stands on rank {rank}, where its stage does not live", action)
            if action.kind is not Kind.UPDATE and not 0 <= action.microbatch < schedule.num_microbatches:
                raise _fail(schedule, f"{action} names none of the {schedule.num_microbatches} micro-batches", action)


def _check_once_each(schedule: Schedule) -> None:
    count = Counter(schedule)
    for action, times in count.items():
        if times > 1:
            raise _fail(schedule, f"{action} stands {times} times", action)
    training = any(action.kind in (Kind.BACKWARD, Kind.UPDATE) for action in schedule)
    for s in range(schedule.num_stages):
        kinds = (Kind.FORWARD, Kind.BACKWARD) if training else (Kind.FORWARD,)
        wanted = [Action(kind, s, m) for kind in kinds for m in range(schedule.num_microbatches)]
        if training:
            wanted.append(Action(Kind.UPDATE, s))
        for action in wanted:
            if action not in count:
                raise _fail(schedule, f"{action} is missing", action)


def _check_stage_order(schedule: Schedule) -> None:
    for row in schedule.actions:
        seen: set[Action] = set()
        last_backward: dict[int, int] = {}
        for action in row:
            s, m = action.stage, action.microbatch
            if action.kind is Kind.RECOMPUTE and (
                Action(Kind.FORWARD, s, m) not in seen or Action(Kind.BACKWARD, s, m) in seen
            ):
                raise _fail(schedule, f"{action} must stand between its forward and its backward", action)
            if action.kind is Kind.BACKWARD:
                if Action(Kind.FORWARD, s, m) not in seen:
                    raise _fail(schedule, f"{action} stands before its forward", action)
                if m < last_backward.get(s, -1):
                    raise _fail(schedule, f"{action} is out of order: backwards run in micro-batch order", action)
                last_backward[s] = m
            if action.kind in (Kind.FORWARD, Kind.BACKWARD) and Action(Kind.UPDATE, s) in seen:
                raise _fail(schedule, f"{action} stands behind the update of its stage", action)
            seen.add(action)


def _check_pairs(schedule: Schedule) -> None:
    everything = set(schedule)
    for action in schedule:
        if action.kind in _PARTNER and _partner(action) not in everything:
            raise _fail(schedule, f"{action} has no partner {_partner(action)}", action)
        for receive in _receives_for(schedule, action):
            if receive not in everything:
                raise _fail(schedule, f"{action} needs {receive}, which is missing", action)


def _partner(action: Action) -> Action:
    return Action.message(_PARTNER[action.kind], action.peer, action.stage, action.microbatch, action.step)


def _producer(send: Action) -> Action:
    return Action(_PRODUCER[send.kind], send.stage, send.microbatch, send.step)


def _check_progress(schedule: Schedule) -> None:
    """Runs the lists with blocking messages: the strictest reading, which every transport is at least as free as."""
    everything = set(schedule)
    done: set[Action] = set()
    position = [0] * schedule.num_ranks

    def head(rank: int) -> Action | None:
        row = schedule.actions[rank]
        return row[position[rank]] if position[rank] < len(row) else None

    def can_run(action: Action) -> bool:
        if action.kind in MESSAGES:
            partner = _partner(action)
            produced = action.kind not in _PRODUCER or _producer(action) in done
            return produced and (partner in done or head(schedule.placement[partner.stage]) == partner)
        wanted = needs(schedule, action, everything.__contains__)
        return all(a in done for a in (*wanted, *_receives_for(schedule, action)))

    progress = True
    while progress:
        progress = False
        for rank in range(schedule.num_ranks):
            while (action := head(rank)) is not None and can_run(action):
                done.add(action)
                position[rank] += 1
                progress = True
    blocked = {rank: action for rank in range(schedule.num_ranks) if (action := head(rank)) is not None}
    if blocked:
        where = ", ".join(f"rank {rank} at {action}" for rank, action in blocked.items())
        raise _fail(schedule, f"deadlock, waiting for ever: {where}", *blocked.values())


def _receives_for(schedule: Schedule, action: Action) -> list[Action]:
    """The receives that bring a compute action its input from other ranks."""
    if action.kind not in _RECEIVE:
        return []
    s, m, step = action.stage, action.microbatch, action.step
    return [
        Action.message(_RECEIVE[action.kind], s, source, m, step)
        for source in schedule.sources(action.kind, s)
        if schedule.placement[source] != schedule.placement[s]
    ]
