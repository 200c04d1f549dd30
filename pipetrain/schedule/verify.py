"""Proves that a schedule can be run, or says which action is wrong.

Checked: every action is once on the rank of its stage; every micro-batch goes forward once through every stage and, in
a training schedule, back once, whole or in two halves; a recompute stands between its forward and its backward; all
stages add up their gradients in one order of micro-batches (so weights do not depend on the cut); each stage updates
once for each mini-batch, in their order and after its last gradient; where gradients are reduced, each stage's are,
once, between those two; messages come in pairs; and nothing ever waits for ever, even if every send and receive blocked
until its partner is there.
"""

import itertools
from collections import Counter

from pipetrain.errors import ScheduleError
from pipetrain.schedule.action import (
    INPUT_GRADIENTS,
    MESSAGES,
    OF_MINI_BATCH,
    WEIGHT_GRADIENTS,
    Action,
    Kind,
    Schedule,
)
from pipetrain.schedule.show import mark
from pipetrain.schedule.timeline import Dependencies

_PARTNER = {
    Kind.SEND_FORWARD: Kind.RECEIVE_FORWARD,
    Kind.RECEIVE_FORWARD: Kind.SEND_FORWARD,
    Kind.SEND_BACKWARD: Kind.RECEIVE_BACKWARD,
    Kind.RECEIVE_BACKWARD: Kind.SEND_BACKWARD,
}
_PRODUCERS = {Kind.SEND_FORWARD: (Kind.FORWARD,), Kind.SEND_BACKWARD: tuple(INPUT_GRADIENTS)}
_RECEIVE = {
    Kind.FORWARD: Kind.RECEIVE_FORWARD,
    Kind.BACKWARD: Kind.RECEIVE_BACKWARD,
    Kind.BACKWARD_INPUT: Kind.RECEIVE_BACKWARD,
}


def verify(schedule: Schedule) -> Schedule:
    """Returns the schedule unchanged if it is sound.

    Raises:
        ScheduleError: with the rule that is broken and the ranks' lists with an arrow at the culprit.
    """
    return verify_messages(verify_compute(schedule))


def verify_messages(schedule: Schedule) -> Schedule:
    """As `verify`, for a schedule whose compute is known to be sound."""
    _check_pairs(schedule)
    _check_reductions(schedule)
    _check_progress(schedule, with_messages=True)
    return schedule


def verify_compute(schedule: Schedule) -> Schedule:
    """As `verify`, for a schedule that has no messages yet."""
    _check_places(schedule)
    _check_once_each(schedule)
    _check_stage_order(schedule)
    _check_gradient_order(schedule)
    _check_progress(schedule, with_messages=False)
    return schedule


def peak_in_flight(schedule: Schedule) -> tuple[int, ...]:
    """For each stage, the most micro-batches that have gone forward but whose gradients are not all there yet."""
    peaks, live = [0] * schedule.num_stages, [0] * schedule.num_stages
    for action in schedule:
        if action.kind is Kind.FORWARD:
            live[action.stage] += 1
            peaks[action.stage] = max(peaks[action.stage], live[action.stage])
        elif action.kind in WEIGHT_GRADIENTS:
            live[action.stage] -= 1
    return tuple(peaks)


def peak_half_way(schedule: Schedule) -> tuple[int, ...]:
    """For each stage, the most micro-batches of which it has begun the backward and not ended it: one, or more where
    weight gradients wait for their turn."""
    peaks, live = [1] * schedule.num_stages, [0] * schedule.num_stages
    for action in schedule:
        if action.kind is Kind.BACKWARD_INPUT:
            live[action.stage] += 1
            peaks[action.stage] = max(peaks[action.stage], live[action.stage])
        elif action.kind is Kind.BACKWARD_WEIGHT:
            live[action.stage] -= 1
    return tuple(peaks)


def _fail(schedule: Schedule, rule: str, *culprits: Action) -> ScheduleError:
    return ScheduleError(f"schedule {schedule.name}: {rule}\n{mark(schedule, culprits)}")


def _check_places(schedule: Schedule) -> None:
    for rank, row in enumerate(schedule.actions):
        for action in row:
            if not 0 <= action.stage < schedule.num_stages or schedule.placement[action.stage] != rank:
                raise _fail(schedule, f"{action} stands on rank {rank}, where its stage does not live", action)
            if action.kind not in OF_MINI_BATCH and not 0 <= action.microbatch < schedule.num_microbatches:
                raise _fail(schedule, f"{action} names none of the {schedule.num_microbatches} micro-batches", action)
            if not 0 <= action.step < schedule.num_steps:
                raise _fail(schedule, f"{action} names none of the {schedule.num_steps} mini-batches", action)


def _check_once_each(schedule: Schedule) -> None:
    count = Counter(schedule)
    for action, times in count.items():
        if times > 1:
            raise _fail(schedule, f"{action} stands {times} times", action)
    training = any(action.kind in WEIGHT_GRADIENTS or action.kind is Kind.UPDATE for action in schedule)
    for s, step in itertools.product(range(schedule.num_stages), range(schedule.num_steps)):
        wanted = [Action(Kind.UPDATE, s, step=step)] * training
        for m in range(schedule.num_microbatches):
            wanted += [Action(Kind.FORWARD, s, m, step)] + _backwards(count, s, m, step) * training
        for action in wanted:
            if action not in count:
                raise _fail(schedule, f"{action} is missing", action)
    for action in count:
        whole = action._replace(kind=Kind.BACKWARD)
        if action.kind in (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT) and whole in count:
            raise _fail(schedule, f"{action} is a half of {whole}, which stands there too", action, whole)


def _backwards(count: Counter[Action], s: int, m: int, step: int) -> list[Action]:
    """The whole backward, or both halves if there is one of them."""
    halves = [Action(Kind.BACKWARD_INPUT, s, m, step), Action(Kind.BACKWARD_WEIGHT, s, m, step)]
    return halves if any(half in count for half in halves) else [Action(Kind.BACKWARD, s, m, step)]


def _check_stage_order(schedule: Schedule) -> None:
    for row in schedule.actions:
        seen: set[Action] = set()
        for action in row:
            kind, update = action.kind, Action(Kind.UPDATE, action.stage, step=action.step)

            def is_behind(other: Kind, action: Action = action, seen: set[Action] = seen) -> bool:
                return action._replace(kind=other) in seen

            if kind is Kind.RECOMPUTE and (
                not is_behind(Kind.FORWARD) or is_behind(Kind.BACKWARD) or is_behind(Kind.BACKWARD_INPUT)
            ):
                raise _fail(schedule, f"{action} must stand between its forward and its backward", action)
            if kind in INPUT_GRADIENTS and not is_behind(Kind.FORWARD):
                raise _fail(schedule, f"{action} stands before its forward", action)
            if kind is Kind.BACKWARD_WEIGHT and not is_behind(Kind.BACKWARD_INPUT):
                raise _fail(schedule, f"{action} stands before {action._replace(kind=Kind.BACKWARD_INPUT)}", action)
            if (kind is Kind.FORWARD or kind in WEIGHT_GRADIENTS) and update in seen:
                raise _fail(schedule, f"{action} stands behind the update of its stage", action)
            if kind is Kind.UPDATE and action.step > 0 and action._replace(step=action.step - 1) not in seen:
                raise _fail(schedule, f"{action} stands before the update of the mini-batch before it", action)
            seen.add(action)


def _check_gradient_order(schedule: Schedule) -> None:
    orders: dict[int, list[Action]] = {}
    for action in schedule:
        if action.kind in WEIGHT_GRADIENTS:
            orders.setdefault(action.stage, []).append(action)
    for stage in sorted(orders):
        for action, first in zip(orders[stage], orders[0], strict=True):
            if (action.step, action.microbatch) != (first.step, first.microbatch):
                raise _fail(
                    schedule,
                    f"{action} is out of order: stage 0 has the gradients of {first} next, and all stages must add "
                    "them up in the same order",
                    action,
                )


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


def _check_reductions(schedule: Schedule) -> None:
    if not any(action.kind is Kind.REDUCE for action in schedule):
        return
    for row in schedule.actions:
        place = {action: number for number, action in enumerate(row)}
        if len(place) < len(row):
            twice = next(action for action in row if row.count(action) > 1)
            raise _fail(schedule, f"{twice} stands {row.count(twice)} times", twice)
        updates = [action for action in row if action.kind is Kind.UPDATE]
        for gradient in (action for action in row if action.kind in WEIGHT_GRADIENTS):
            reduction = Action(Kind.REDUCE, gradient.stage, step=gradient.step)
            if reduction not in place:
                raise _fail(schedule, f"{reduction} is missing", gradient)
            # The first of a rank's stages to update does it for all where ranks wait for each other.
            update = updates[0] if schedule.waits else reduction._replace(kind=Kind.UPDATE)
            if not place[gradient] < place[reduction] < place[update]:
                raise _fail(schedule, f"{reduction} must stand between {gradient} and {update}", reduction)


def _check_progress(schedule: Schedule, *, with_messages: bool) -> None:
    """Runs the lists with blocking messages: the strictest reading, which every transport is at least as free as."""
    rows = schedule.actions if with_messages else schedule.compute().actions
    dependencies = Dependencies(schedule)
    done: set[Action] = set()
    position = [0] * len(rows)

    def head(rank: int) -> Action | None:
        return rows[rank][position[rank]] if position[rank] < len(rows[rank]) else None

    def can_run(action: Action) -> bool:
        if action.kind in MESSAGES:
            partner = _partner(action)
            is_met = partner in done or head(schedule.placement[partner.stage]) == partner
            return is_met and _is_produced(action, done)
        if action.kind is Kind.REDUCE:  # with other replicas, which are as far as this one
            return True
        if not done.issuperset(dependencies.of(action)):
            return False
        return not with_messages or done.issuperset(_receives_for(schedule, action))

    progress = True
    while progress:
        progress = False
        for rank in range(len(rows)):
            while (action := head(rank)) is not None and can_run(action):
                done.add(action)
                position[rank] += 1
                progress = True
    blocked = {rank: action for rank in range(len(rows)) if (action := head(rank)) is not None}
    if blocked:
        where = ", ".join(f"rank {rank} at {action}" for rank, action in blocked.items())
        raise _fail(schedule, f"deadlock, waiting for ever: {where}", *blocked.values())


def _is_produced(message: Action, done: set[Action]) -> bool:
    """Whether what a send carries has been computed; a receive carries nothing yet."""
    producers = _PRODUCERS.get(message.kind)
    return producers is None or any(message._replace(kind=kind, skips_to=None) in done for kind in producers)


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
