"""What is said after a run about what was said before it."""

from pipetrain.engine.report import StageMeasures
from pipetrain.schedule import build
from pipetrain.training.hindsight import Hindsight
from pipetrain.training.plan import Prediction, StagePrediction

SCHEDULE = build("1f1b", 2, 4, recompute="never")
PREDICTION = Prediction(
    1.5, 0.2, [StagePrediction(0.1, 0.2, 0.3, {}), StagePrediction(0.1, 0.2, 0.3, {})], 8.0, None, [], [], []
)


def measured(forward_s: float = 0.4, backward_s: float = 0.8) -> StageMeasures:
    """Of all four micro-batches."""
    return StageMeasures(forward_s, 0.0, backward_s / 2, backward_s / 2, elapsed_s=1.5, memory_bytes=0.0)


def after(step_s: float, *stages: StageMeasures, steps: int = 3) -> list[str]:
    hindsight = Hindsight(PREDICTION, SCHEDULE)
    hindsight.note(9.0, 0.9, [measured(9.0), measured(9.0)])  # the first step is like no other
    for _ in range(steps):
        hindsight.note(step_s, 0.25, stages)
    return hindsight.lines()


def test_a_slow_stage_is_named() -> None:
    assert after(1.9, measured(), measured(backward_s=1.2)) == [
        "a step took 1.9 s, predicted 1.5 s (1.27 times as long); bubble 25.0%, predicted 20.0%",
        "the largest surprise: stage 1's backward took 300 ms a micro-batch where 200 ms were predicted (1.50 times)",
    ]


def test_a_fast_stage_is_a_surprise_too() -> None:
    _, surprise = after(1.4, measured(forward_s=0.2), measured())
    assert surprise == (
        "the largest surprise: stage 0's forward took 50 ms a micro-batch where 100 ms were predicted (0.50 times)"
    )


def test_what_no_layer_explains_is_between_them() -> None:
    _, surprise = after(2.0, measured(), measured(forward_s=0.44))
    assert surprise == (
        "the largest surprise: 460 ms a step more than predicted "
        "between the layers: data, messages, waiting, the update"
    )


def test_a_few_steps_say_nothing() -> None:
    assert after(2.0, measured(), measured(), steps=2) == []
