"""How many updates late the gradients of a schedule are, read off the schedule itself.

A stage's weights have as many versions as it has updates. A forward reads the newest one; the update of its mini-batch
makes a later one. What lies between is the staleness: 0 in a synchronous schedule.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

from pipetrain.schedule.action import COMMUNICATION, Action, Kind, Schedule


def versions(schedule: Schedule) -> dict[Action, int]:
    """For each compute action the updates that its stage has done before it."""
    found: dict[Action, int] = {}
    done = [0] * schedule.num_stages
    for action in schedule.compute():
        found[action] = done[action.stage]
        if action.kind is Kind.UPDATE:
            done[action.stage] += 1
    return found


def staleness(schedule: Schedule) -> list[list[int]]:
    """For each stage and mini-batch the most updates between a forward and its own update."""
    before = versions(schedule)
    return [
        [
            before[Action(Kind.UPDATE, s, step=step)]
            - min(before[Action(Kind.FORWARD, s, m, step)] for m in range(schedule.num_microbatches))
            for step in range(schedule.num_steps)
        ]
        for s in range(schedule.num_stages)
    ]


def joint_updates(actions: Sequence[Action]) -> Iterator[tuple[Action, ...]]:
    """The updates of one rank; those that stand next to each other are one step of its optimizer."""
    compute = (action for action in actions if action.kind not in COMMUNICATION)
    for is_update, some in groupby(compute, lambda action: action.kind is Kind.UPDATE):
        if is_update:
            yield tuple(some)
