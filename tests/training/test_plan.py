"""What is said of a plan."""

from typing import Any

from pipetrain.training.plan import Prediction, Weighed


def weighed(step_s: float, *, fits: bool = True, **changes: Any) -> Weighed:
    settings = {"schedule": "1f1b", "partitions": 2, "micro_batches": 8, "recompute": "never", "balance": [1, 3]}
    return Weighed(settings | changes, step_s, 0.125, device_bytes=3 * 2**20, fits=fits)


def prediction(*plans: Weighed, chosen: tuple[str, ...] = ("schedule", "micro_batches", "balance")) -> Prediction:
    return Prediction(1.0, 0.1, [], list(chosen), list(plans))


def test_the_best_with_each_other_value_is_compared() -> None:
    said = prediction(
        weighed(1.0),
        weighed(1.1, micro_batches=16),
        weighed(1.2, schedule="gpipe", micro_batches=16),
        weighed(1.3, schedule="gpipe"),
        weighed(0.5, schedule="zb_v", fits=False),
    ).reasons()
    assert said == [
        "what other choices would cost, with all else as good as it can be then:",
        "  schedule       gpipe 1.20x, zb_v needs 3 MiB",
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
        "  1.10x  bubble 12.5%  3 MiB  micro_batches=16 balance=[1,3]",
        "  1.25x  bubble 12.5%  3 MiB  micro_batches=8 balance=[2,2]",
    ]
