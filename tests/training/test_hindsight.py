"""What is said after a run about what was said before it."""

import dataclasses

import pytest

from pipetrain.engine.report import StageMeasures
from pipetrain.schedule import build
from pipetrain.sim.accounts import account
from pipetrain.training.hindsight import Hindsight
from pipetrain.training.measured import measured_costs, pipeline_values
from pipetrain.training.plan import Prediction, StagePrediction

SCHEDULE = build("1f1b", 2, 4, recompute="never")
MIB = 2**20


def measured(forward_s: float = 0.4, backward_s: float = 0.8, **changes: float) -> StageMeasures:
    """Of all four micro-batches."""
    others = {"update_s": 0.01, "data_s": 0.0, "elapsed_s": 1.5, "memory_bytes": 5.0 * MIB} | changes
    return StageMeasures(forward_s, 0.0, backward_s, 0.0, **others)


PREDICTION = Prediction(
    step_s=1.51,
    bubble_fraction=0.2,
    stages=[StagePrediction(0.1, 0.2, 0.3, {}), StagePrediction(0.1, 0.2, 0.3, {})],
    process_bytes=0,
    device_bytes=[4 * MIB, 5 * MIB],
    accounts=dataclasses.asdict(account(SCHEDULE, measured_costs([measured()] * 2, SCHEDULE), 1.51)),
    samples_per_s=8.0,
    tokens_per_s=None,
    warnings=[],
    chosen=[],
    weighed=[],
)


def after(step_s: float, *stages: StageMeasures, steps: int = 3) -> list[str]:
    hindsight = Hindsight(PREDICTION, SCHEDULE)
    hindsight.note(9.0, [measured(9.0), measured(9.0)], SCHEDULE)  # the first step is like no other
    for _ in range(steps):
        hindsight.note(step_s, stages, SCHEDULE)
    return hindsight.lines()


def test_all_is_told_beside_what_was_predicted() -> None:
    assert after(1.9, measured(), measured(backward_s=1.2)) == [
        "a step took 1.9 s, predicted 1.51 s (1.26 times as long); devices waited 25.8% of it, predicted 19.9%",
        "seconds of a step  forward  recompute  backward  imbalance  bubble  communication  update  data   step",
        "measured           0.400    0.000      1.000     0.150      0.350   -0.010         0.010   0.000  1.900",
        "predicted          0.400    0.000      0.800     0.000      0.300   0.000          0.010   0.000  1.510",
        "memory 5.0 MiB, 5.0 MiB, predicted 4.0 MiB, 5.0 MiB",
        "the largest surprise: stage 1's backward took 300 ms a micro-batch where 200 ms were predicted (1.50 times)",
    ]


def test_a_fast_stage_is_a_surprise_too() -> None:
    assert after(1.4, measured(forward_s=0.2), measured())[-1] == (
        "the largest surprise: stage 0's forward took 50 ms a micro-batch where 100 ms were predicted (0.50 times)"
    )


@pytest.mark.parametrize(
    ("step_s", "changes", "said"),
    [
        (2.51, {}, "communication took 960 ms of a step where 0 ms were predicted"),
        (2.51, {"data_s": 1.0}, "data took 1 s of a step where 0 ms were predicted"),
        (2.51, {"update_s": 1.01}, "update took 1.01 s of a step where 10 ms were predicted"),
    ],
)
def test_what_no_stage_explains_is_named(step_s: float, changes: dict[str, float], said: str) -> None:
    assert after(step_s, measured(**changes), measured(forward_s=0.44))[-1] == f"the largest surprise: {said}"


def test_a_few_steps_say_nothing() -> None:
    assert after(2.0, measured(), measured(), steps=2) == []


def test_recomputes_count_once_each() -> None:
    """Where the last micro-batch goes back first, except_last recomputes three of four, on the last stage."""
    plan = build("gpipe_lifo", 2, 4, recompute=["always", "except_last"])
    stages = [dataclasses.replace(measured(), recompute_s=seconds) for seconds in (0.4, 0.6)]
    first, last = measured_costs(stages, plan)
    assert first.recompute_s == pytest.approx(0.1)
    assert last.recompute_s == pytest.approx(0.2)
    values = pipeline_values(stages, plan, 2.0)
    assert values["time/recompute_s"] == pytest.approx(0.5)
    assert sum(value for name, value in values.items() if name.startswith("time/")) == pytest.approx(2.0)
