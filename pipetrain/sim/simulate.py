"""Runs a schedule on paper: given seconds for each stage and link, when does every action start and end?

It walks the same `Schedule` that the runtime executes and returns the same `Span`s that the runtime measures.
"""

from collections.abc import Sequence

from pipetrain.costs import StageCost
from pipetrain.schedule import Action, Kind, Schedule, Span, timeline


def simulate(schedule: Schedule, costs: Sequence[StageCost], link_s: float = 0.0) -> list[Span]:
    """Predicts one step.

    Args:
        schedule: any schedule, with or without messages.
        costs: one for each stage.
        link_s: seconds between the end of an action and the moment at which another rank has its result.

    Returns:
        One span for each compute action, sorted by end. The makespan is the last one's end.
    """

    seconds = [
        {
            Kind.FORWARD: cost.forward_s,
            Kind.RECOMPUTE: cost.recompute_s,
            Kind.BACKWARD: cost.backward_s,
            Kind.BACKWARD_INPUT: cost.backward_s,
            Kind.BACKWARD_WEIGHT: cost.backward_weight_s,
            Kind.UPDATE: cost.update_s,
        }
        for cost in costs
    ]

    def duration(action: Action) -> float:
        return seconds[action.stage][action.kind]

    def delay(producer: Action, consumer: Action) -> float:
        return link_s if schedule.placement[producer.stage] != schedule.placement[consumer.stage] else 0.0

    return timeline(schedule, duration, delay)
