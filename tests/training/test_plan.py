"""What is said of a plan."""

from typing import Any

from pipetrain.training.plan import Plan, Prediction, StagePlan, StagePrediction, Weighed


def weighed(step_s: float, *, fits: bool = True, **changes: Any) -> Weighed:
    settings = {"schedule": "1f1b", "partitions": 2, "micro_batches": 8, "recompute": "never", "balance": [1, 3]}
    return Weighed(settings | changes, step_s, 0.125, device_bytes=3 * 2**20, fits=fits)


def prediction(*plans: Weighed, chosen: tuple[str, ...] = ("schedule", "micro_batches", "balance")) -> Prediction:
    return Prediction(1.0, 0.1, [], 0, [], {}, 8.0, None, [], list(chosen), list(plans))


def test_the_best_with_each_other_value_is_compared() -> None:
    said = prediction(
        weighed(1.0),
        weighed(1.05, balance=[2, 2]),
        weighed(1.1, micro_batches=16),
        weighed(1.2, schedule="gpipe", micro_batches=16),
        weighed(1.3, schedule="gpipe"),
        weighed(0.5, schedule="zb_v", fits=False),
    ).reasons()
    assert said == [
        "what other choices would cost, with all else as good as it can be then:",
        "  schedule       gpipe 1.20x, zb_v needs 3.0 MiB",
        "  micro_batches  16 1.10x",
    ]


def test_nothing_is_said_where_there_was_no_choice() -> None:
    assert prediction(weighed(1.0), chosen=("balance",)).reasons() == []
    assert prediction(weighed(1.0), chosen=("balance",)).next_best() == []


def test_the_next_best_are_told_by_what_differs() -> None:
    said = prediction(
        weighed(1.0), weighed(1.1, micro_batches=16), weighed(1.25, balance=[2, 2]), weighed(1.3, fits=False)
    ).next_best()
    assert said == [
        "the next best:",
        "  1.10x  waiting 12.5%  3.0 MiB on the fullest device  micro_batches=16 balance=[1,3]",
        "  1.25x  waiting 12.5%  3.0 MiB on the fullest device  micro_batches=8 balance=[2,2]",
    ]


def plan_of(num_stages: int) -> Plan:
    memory = {"weights": 2**20, "versions": 0, "in_flight": 2**21}
    stages = [StagePrediction(0.001, 0.002, 0.5, memory) for _ in range(num_stages)]
    said = Prediction(2.0, 0.25, stages, 2**27, [], {}, 8.0, 1024.0, ["look out"], [], [weighed(2.0)])
    return Plan([StagePlan(s, s, "cpu", ["layer"], 7) for s in range(num_stages)], "1f1b", 8, "never", 0.3, said)


def test_throughput_and_warnings_are_told() -> None:
    *_, speed, warning = plan_of(2).table()
    assert speed == "predicted: 2 s a step, 1,024 tokens a second; a device waits 25.0% of the time"
    assert warning == "warning: look out"


def test_memory_is_told_by_the_kinds_that_there_are() -> None:
    assert plan_of(2).memory_table() == [
        "stage  weights  in flight  memory",
        "0      1.0 MiB  2.0 MiB    3.0 MiB",
        "1      1.0 MiB  2.0 MiB    3.0 MiB",
        "beside that each process takes 128 MiB",
    ]


def test_of_many_stages_the_first_and_last_are_shown() -> None:
    for lines in (plan_of(128).table()[:34], plan_of(128).memory_table()[:-1]):
        assert len(lines) == 34
        assert [line.split()[0] for line in (lines[16], lines[17], lines[18])] == ["15", "...", "112"]
