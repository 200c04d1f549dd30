"""Runs a schedule on paper: given seconds for each stage and link, when does every action start and end?

It walks the same `Schedule` that the runtime executes and returns the same `Span`s that the runtime measures.
"""

from collections.abc import Sequence
from itertools import pairwise

from pipetrain.costs import Link, StageCost
from pipetrain.schedule import Action, Kind, Schedule, Span, timeline

_NO_WAY = Link()


def simulate(schedule: Schedule, costs: Sequence[StageCost], link: Link = _NO_WAY) -> list[Span]:
    """Predicts one step.

    Args:
        schedule: any schedule, with or without messages.
        costs: one for each stage.
        link: what is between the ranks.

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

    # From each stage to the next one, and back.
    between = [
        link.seconds(cost.output_bytes) if here != there else 0.0
        for cost, (here, there) in zip(costs, pairwise(schedule.placement), strict=False)
    ]

    def duration(action: Action) -> float:
        return seconds[action.stage][action.kind]

    def delay(producer: Action, consumer: Action) -> float:
        if consumer.kind is Kind.UPDATE:
            return costs[producer.stage].reduce_s
        return between[min(producer.stage, consumer.stage)]

    return timeline(schedule, duration, delay)
