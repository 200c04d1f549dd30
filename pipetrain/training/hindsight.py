"""After a run: what was predicted of a step beside what was measured, and the largest surprise in words."""

from collections.abc import Sequence
from statistics import median

from pipetrain.engine.report import StageMeasures
from pipetrain.schedule import Schedule
from pipetrain.training.plan import Prediction, short

_FEWEST = 3  # steps, without the first one, which is never like the others


class Hindsight:
    """Collects what steps took."""

    def __init__(self, prediction: Prediction, schedule: Schedule) -> None:
        self._prediction, self._schedule = prediction, schedule
        self._steps: list[float] = []
        self._bubbles: list[float] = []
        self._parts: dict[str, list[float]] = {}
        self._is_first = True

    def note(self, step_s: float, bubble_fraction: float, stages: Sequence[StageMeasures]) -> None:
        """Takes one step."""
        if self._is_first:
            self._is_first = False
            return
        self._steps.append(step_s)
        self._bubbles.append(bubble_fraction)
        each = self._schedule.num_microbatches
        for number, stage in enumerate(stages):
            self._parts.setdefault(f"stage {number}'s forward", []).append(stage.forward_s / each)
            backward_s = stage.backward_s + stage.backward_weight_s
            self._parts.setdefault(f"stage {number}'s backward", []).append(backward_s / each)

    def lines(self) -> list[str]:
        """For the console; none after too few steps."""
        if len(self._steps) < _FEWEST:
            return []
        step_s, bubble = median(self._steps), median(self._bubbles)
        said = self._prediction
        return [
            f"a step took {short(step_s)}, predicted {short(said.step_s)} ({step_s / said.step_s:.2f} times as long); "
            f"bubble {bubble:.1%}, predicted {said.bubble_fraction:.1%}",
            f"the largest surprise: {self._surprise(step_s)}",
        ]

    def _surprise(self, step_s: float) -> str:
        predicted: dict[str, float] = {}
        for number, stage in enumerate(self._prediction.stages):
            predicted[f"stage {number}'s forward"] = stage.forward_s
            predicted[f"stage {number}'s backward"] = stage.backward_s
        measured = {what: median(values) for what, values in self._parts.items()}
        # By what it means for the step: all micro-batches of a stage go through it one after the other.
        most = max(measured, key=lambda what: abs(measured[what] - predicted[what]))
        off_s = self._schedule.num_microbatches * (measured[most] - predicted[most])
        between_s = step_s - self._prediction.step_s - off_s
        if abs(between_s) > abs(off_s):
            kind = "more" if between_s > 0 else "less"
            where = "between the layers: data, messages, waiting, the update"
            return f"{short(abs(between_s))} a step {kind} than predicted {where}"
        return (
            f"{most} took {short(measured[most])} a micro-batch where {short(predicted[most])} were predicted "
            f"({measured[most] / predicted[most]:.2f} times)"
        )
