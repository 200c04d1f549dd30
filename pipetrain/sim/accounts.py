"""Where the seconds of a step go: the accounts of GPipe's supplement (Huang et al. 2019), which add up to the step."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from pipetrain.costs import StageCost
from pipetrain.schedule import INPUT_GRADIENTS, Kind, Schedule
from pipetrain.sim.simulate import simulate


@dataclass(frozen=True)
class Accounts:
    """Seconds of one step; compute is the mean of all ranks, which then wait for the rest of it.

    Attributes:
        imbalance_s: what the step would be shorter if all stages took as long as the mean of them.
        bubble_s: what ranks would wait in that step even so, with messages that take no time.
        update_s: of the optimizer, on the rank on which it takes longest.
        data_s: until the mini-batch is there, likewise.
        communication_s: what is left: messages, gradients on their way to other replicas, the meeting before the
            update, and whatever else keeps ranks waiting.
    """

    forward_s: float
    recompute_s: float
    backward_s: float
    imbalance_s: float
    bubble_s: float
    communication_s: float
    update_s: float
    data_s: float

    @property
    def step_s(self) -> float:
        return float(sum(astuple(self)))


def account(schedule: Schedule, costs: Sequence[StageCost], step_s: float, data_s: float = 0.0) -> Accounts:
    """
    Args:
        costs: of each stage, measured or predicted.
        step_s: of the whole step, data and update among it; of a stale schedule on average.
    """
    counts = Counter((action.stage, action.kind) for action in schedule)
    stages, per_step = range(schedule.num_stages), 1 / schedule.num_steps

    def total(kind: Kind, seconds: Sequence[float]) -> float:
        return per_step * sum(counts[stage, kind] * seconds[stage] for stage in stages)

    forward_s = total(Kind.FORWARD, [cost.forward_s for cost in costs])
    recompute_s = total(Kind.RECOMPUTE, [cost.recompute_s for cost in costs])
    input_s = sum(total(kind, [cost.backward_s for cost in costs]) for kind in INPUT_GRADIENTS)
    weight_s = total(Kind.BACKWARD_WEIGHT, [cost.backward_weight_s for cost in costs])
    number = {kind: per_step * count for kind, count in Counter(action.kind for action in schedule).items()}
    equal = StageCost(
        forward_s=forward_s / number[Kind.FORWARD],
        backward_s=input_s / sum(number.get(kind, 0) for kind in INPUT_GRADIENTS),
        backward_weight_s=weight_s / number.get(Kind.BACKWARD_WEIGHT, 1),
        recompute_s=recompute_s / number.get(Kind.RECOMPUTE, 1),
    )
    own_s = _makespan_s(schedule, [replace(cost, update_s=0.0, reduce_s=0.0) for cost in costs])
    equal_s = _makespan_s(schedule, [equal] * schedule.num_stages)
    update_s = max(sum(costs[stage].update_s for stage in schedule.stages_of(r)) for r in range(schedule.num_ranks))
    ranks = schedule.num_ranks
    return Accounts(
        forward_s=forward_s / ranks,
        recompute_s=recompute_s / ranks,
        backward_s=(input_s + weight_s) / ranks,
        imbalance_s=own_s - equal_s,
        bubble_s=equal_s - (forward_s + recompute_s + input_s + weight_s) / ranks,
        communication_s=step_s - own_s - update_s - data_s,
        update_s=update_s,
        data_s=data_s,
    )


def _makespan_s(schedule: Schedule, costs: Sequence[StageCost]) -> float:
    return simulate(schedule, costs)[-1].end_s / schedule.num_steps
