"""After a run: what was predicted of a step beside what was measured, and the largest surprise in words."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median

from pipetrain.engine.report import StageMeasures
from pipetrain.schedule import Schedule
from pipetrain.training.measured import measured_accounts, measured_costs
from pipetrain.training.plan import Prediction, aligned, mib, short

_FEWEST = 3  # steps, without the first one, which is never like the others
_WORK = ("forward_s", "recompute_s", "backward_s", "update_s")
# The accounts that are no matter of the stages' costs, which are compared by themselves.
_BETWEEN = ("communication_s", "update_s", "data_s")


class Hindsight:
    """Collects what steps took."""

    def __init__(self, prediction: Prediction, schedule: Schedule) -> None:
        self._prediction, self._num_microbatches = prediction, schedule.num_microbatches
        self._seen: dict[str, list[float]] = {}
        self._memory_bytes = [0.0] * schedule.num_ranks
        self._steps = 0

    def note(self, step_s: float, stages: Sequence[StageMeasures], schedule: Schedule) -> None:
        """Takes one step.

        Args:
            stages: measured over all steps of the schedule that the step was one of.
        """
        self._steps += 1
        for stage, rank in zip(stages, schedule.placement, strict=True):
            self._memory_bytes[rank] = stage.memory_bytes
        if self._steps == 1:
            return
        found = {"step_s": step_s, **asdict(measured_accounts(stages, schedule, step_s))}
        for number, cost in enumerate(measured_costs(stages, schedule)):
            found[f"stage {number}'s forward"] = cost.forward_s
            found[f"stage {number}'s backward"] = cost.backward_s + cost.backward_weight_s
        for what, value in found.items():
            self._seen.setdefault(what, []).append(value)

    def lines(self) -> list[str]:
        """For the console; none after too few steps."""
        if self._steps <= _FEWEST:
            return []
        measured = {what: median(values) for what, values in self._seen.items()}
        said, step_s = self._prediction, measured["step_s"]
        names = list(said.accounts)
        table = [
            ("seconds of a step", *(name.removesuffix("_s") for name in names), "step"),
            ("measured", *(_thousandths(measured[name]) for name in names), _thousandths(step_s)),
            ("predicted", *(_thousandths(said.accounts[name]) for name in names), _thousandths(said.step_s)),
        ]
        return [
            f"a step took {short(step_s)}, predicted {short(said.step_s)} ({step_s / said.step_s:.2f} times as long); "
            f"devices waited {_waited(measured):.1%} of it, predicted {_waited(said.accounts):.1%}",
            *aligned(table),
            f"memory {_listed(self._memory_bytes)}, predicted {_listed(said.device_bytes)}",
            f"the largest surprise: {self._surprise(measured)}",
        ]

    def _surprise(self, measured: Mapping[str, float]) -> str:
        """By what it means for the step: all micro-batches of a stage go through it one after the other."""
        said, number_of_turns = self._prediction, self._num_microbatches
        predicted = {name: said.accounts[name] for name in _BETWEEN}
        for number, stage in enumerate(said.stages):
            predicted[f"stage {number}'s forward"] = stage.forward_s
            predicted[f"stage {number}'s backward"] = stage.backward_s

        def weight(what: str) -> float:
            return abs(measured[what] - predicted[what]) * (1 if what in _BETWEEN else number_of_turns)

        most = max(predicted, key=weight)
        if most in _BETWEEN:
            took, were = (round(each[most], 6) + 0.0 for each in (measured, predicted))
            return f"{most.removesuffix('_s')} took {short(took)} of a step where {short(were)} were predicted"
        return (
            f"{most} took {short(measured[most])} a micro-batch where {short(predicted[most])} were predicted "
            f"({measured[most] / predicted[most]:.2f} times)"
        )


def _waited(accounts: Mapping[str, float]) -> float:
    """The share of a step in which nothing was computed or updated."""
    waiting_s = sum(accounts[name] for name in ("imbalance_s", "bubble_s", "communication_s", "data_s"))
    return waiting_s / (waiting_s + sum(accounts[name] for name in _WORK))


def _thousandths(seconds: float) -> str:
    return f"{round(seconds, 3) + 0.0:.3f}"  # never -0.000


def _listed(sizes: Sequence[float]) -> str:
    return ", ".join(mib(size) for size in sizes)
