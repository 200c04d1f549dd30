"""The recompute pass: where a forward is run a second time.

R is an action of its own, placed before its backward. It needs nothing from the next stage, so a rank that waits for a
gradient recomputes meanwhile: "early recompute" is not a trick but a consequence. Against waiting first it saves (K -
1) recomputes a step where stages are equal (Huang et al. 2019, section 2.3, hide the recompute in the bubble
likewise). Where a backward is split, its halves share one recompute.
"""

from collections.abc import Sequence

from pipetrain.schedule.action import INPUT_GRADIENTS, Action, Kind, Schedule

ALWAYS, EXCEPT_LAST, NEVER, SELECTIVE = "always", "except_last", "never", "selective"
POLICIES = (ALWAYS, EXCEPT_LAST, NEVER, SELECTIVE)


def add_recompute(schedule: Schedule, policies: Sequence[str]) -> Schedule:
    """Inserts an R directly before each B or I that needs one and has none yet.

    Args:
        policies: one for each stage. `always`; `never`; `except_last`: always, but for a micro-batch that turns round
            on its stage, whose backward directly follows its forward there; `selective` is as `always`, for a stage
            that has layers to recompute.
    """

    there = {action for action in schedule if action.kind is Kind.RECOMPUTE}

    def row(actions: tuple[Action, ...]) -> tuple[Action, ...]:
        out: list[Action] = []
        for action in actions:
            policy, last = policies[action.stage], out[-1] if out else None
            turns = last is not None and last == action._replace(kind=Kind.FORWARD)
            recompute = action._replace(kind=Kind.RECOMPUTE)
            wanted = policy != NEVER and not (policy == EXCEPT_LAST and turns)
            if action.kind in INPUT_GRADIENTS and wanted and recompute not in there:
                out.append(recompute)
            out.append(action)
        return tuple(out)

    return schedule.with_actions(tuple(row(actions) for actions in schedule.actions))
