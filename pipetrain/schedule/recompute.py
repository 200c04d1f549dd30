"""The recompute pass: where a forward is run a second time.

R is an action of its own, placed before its backward. It needs nothing from the next stage, so a rank that waits for a
gradient recomputes meanwhile: "early recompute" is not a trick but a consequence. Against waiting first it saves (S -
1) recomputes a step where stages are equal (Huang et al. 2019, section 2.3, hide the recompute in the bubble
likewise).
"""

from pipetrain.schedule.action import Action, Kind, Schedule


def add_recompute(schedule: Schedule) -> Schedule:
    """Inserts an R directly before every B."""

    def row(actions: tuple[Action, ...]) -> tuple[Action, ...]:
        out: list[Action] = []
        for action in actions:
            if action.kind is Kind.BACKWARD:
                out.append(Action(Kind.RECOMPUTE, action.stage, action.microbatch, action.step))
            out.append(action)
        return tuple(out)

    return schedule.with_actions(tuple(row(actions) for actions in schedule.actions))
