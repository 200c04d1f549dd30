"""The reduction pass: where the gradients of a stage go to the other replicas of the pipeline.

Directly behind the last gradient of a stage in a mini-batch, so that the sum is made while the rank computes for its
other stages, or waits. All replicas run the same lists, so a rank and its counterparts come to their reductions in one
order.
"""

from pipetrain.schedule.action import WEIGHT_GRADIENTS, Action, Kind, Schedule


def add_reductions(schedule: Schedule) -> Schedule:
    """Inserts a REDUCE for each stage and mini-batch."""
    last = {(a.stage, a.step): a for a in schedule if a.kind in WEIGHT_GRADIENTS}
    rows: list[list[Action]] = []
    for row in schedule.actions:
        rows.append([])
        for action in row:
            rows[-1].append(action)
            if last.get((action.stage, action.step)) == action:
                rows[-1].append(Action(Kind.REDUCE, action.stage, step=action.step))
    return schedule.with_actions(tuple(map(tuple, rows)))
