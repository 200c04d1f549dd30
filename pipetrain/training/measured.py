"""What the measurements of one step say: costs of the stages, the bubble, and where the seconds went."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace

from pipetrain.costs import StageCost
from pipetrain.engine.report import StageMeasures
from pipetrain.schedule import INPUT_GRADIENTS, Kind, Schedule, bubble_fraction
from pipetrain.sim.accounts import Accounts, account
from pipetrain.sim.simulate import simulate


def measured_costs(stages: Sequence[StageMeasures], schedule: Schedule) -> list[StageCost]:
    """Seconds of one action of each kind, on average, and of the updates of a step.

    Args:
        stages: measured over all steps of the schedule.
    """
    counts = Counter((action.stage, action.kind) for action in schedule)

    def each(seconds: float, stage: int, *kinds: Kind) -> float:
        return seconds / max(1, sum(counts[stage, kind] for kind in kinds))

    return [
        StageCost(
            forward_s=each(measured.forward_s, s, Kind.FORWARD),
            backward_s=each(measured.backward_s, s, *INPUT_GRADIENTS),
            backward_weight_s=each(measured.backward_weight_s, s, Kind.BACKWARD_WEIGHT),
            recompute_s=each(measured.recompute_s, s, Kind.RECOMPUTE),
            update_s=measured.update_s / schedule.num_steps,
        )
        for s, measured in enumerate(stages)
    ]


def measured_accounts(stages: Sequence[StageMeasures], schedule: Schedule, step_s: float) -> Accounts:
    """Where the seconds of a step went, on average over those of the schedule."""
    data_s = max(stage.data_s for stage in stages) / schedule.num_steps
    return account(schedule, measured_costs(stages, schedule), step_s, data_s=data_s)


def pipeline_values(stages: Sequence[StageMeasures], schedule: Schedule, step_s: float) -> dict[str, float]:
    """By name: seconds of each stage, the accounts of the step, its bubble and the one that the simulator gives for
    stages that cost as measured."""
    makespan_s, busy_s = _times(stages, schedule)
    costs = [replace(cost, update_s=0.0) for cost in measured_costs(stages, schedule)]  # the makespan ends before it
    values = {
        "pipeline/bubble_measured": bubble_measured(stages, schedule),
        "pipeline/bubble_predicted": bubble_fraction(simulate(schedule, costs), schedule.num_ranks),
    }
    values |= {f"time/{name}": s for name, s in asdict(measured_accounts(stages, schedule, step_s)).items()}
    for index, stage in enumerate(stages):
        values[f"stage_{index}/forward_s"] = stage.forward_s / schedule.num_steps
        values[f"stage_{index}/recompute_s"] = stage.recompute_s / schedule.num_steps
        values[f"stage_{index}/backward_s"] = (stage.backward_s + stage.backward_weight_s) / schedule.num_steps
        values[f"stage_{index}/wait_s"] = (makespan_s - busy_s[schedule.placement[index]]) / schedule.num_steps
        values[f"stage_{index}/memory_bytes"] = stage.memory_bytes
    return values


def bubble_measured(stages: Sequence[StageMeasures], schedule: Schedule) -> float:
    """The share of a step in which the ranks did not compute, on average."""
    makespan_s, busy_s = _times(stages, schedule)
    return 1 - sum(busy_s) / (schedule.num_ranks * makespan_s)


def _times(stages: Sequence[StageMeasures], schedule: Schedule) -> tuple[float, list[float]]:
    """Seconds of all steps of the schedule, and in which each rank computed."""
    busy_s = [sum(stages[s].busy_s for s in schedule.stages_of(rank)) for rank in range(schedule.num_ranks)]
    return max(stage.elapsed_s for stage in stages), busy_s
