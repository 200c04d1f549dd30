"""What is said before a plan is started that may not be what one wants."""

import math
from dataclasses import replace
from typing import Any

import pytest

from pipetrain.costs import Device, LayerCost, Link, ModelCost
from pipetrain.planning.warnings import warnings_of
from pipetrain.sim.forecast import Choice, Forecast, Setting, forecast

NAMES = ["embedding", "block", "head"]


def setting_of(seconds: list[float], num_ranks: int, m: int = 16, memory_bytes: float = math.inf) -> Setting:
    layers = [LayerCost(str(n), s, 2 * s, s, s, 0.0, 10, 40, 80, 10, 0, 10, 10) for n, s in enumerate(seconds)]
    return Setting(
        model=lambda rows: ModelCost(rows, tuple(layers), ()),
        batch_size=m,
        devices=(Device("a", memory_bytes),) * num_ranks,
        link=Link(),
        selected=(False,) * len(seconds),
    )


def plan_of(seconds: list[float], balance: tuple[int, ...], **changes: Any) -> Forecast:
    setting = setting_of(seconds, len(balance), **changes)
    return forecast(setting, Choice("1f1b", 1, setting.batch_size, "never"), balance)


def warnings(seconds: list[float], balance: tuple[int, ...], **changes: Any) -> list[str]:
    plan = plan_of(seconds, balance, **changes)
    return warnings_of(setting_of(seconds, len(balance), **changes), plan, NAMES)


def test_even_stages_and_many_micro_batches_are_fine() -> None:
    assert warnings([1.0, 1.0, 1.1], (1, 1, 1)) == []


def test_a_stage_that_dominates_is_named_with_its_longest_layer() -> None:
    said = "stage 1 works 3.00 times as long as the others on average"
    assert warnings([1.0, 1.0, 2.0], (1, 2)) == [f"{said}; its longest layer is head"]
    assert warnings([0.5, 0.5, 3.0], (2, 1)) == [f"{said}, and it is one layer: head"]


def test_waiting_for_long_asks_for_more_micro_batches() -> None:
    (said,) = warnings([1.0, 1.0, 1.0], (1, 1, 1), m=2)
    assert said.startswith(
        "devices wait 50% of the time, with 2 micro-batches for 3 stages; where they are not open yet"
    )


@pytest.mark.parametrize(
    ("share", "said"), [(0.95, ["device 0 will be 95% full; recompute=always or more"]), (0.85, [])]
)
def test_a_device_that_is_nearly_full_is_named(share: float, said: list[str]) -> None:
    need = max(plan_of([1.0, 1.0], (1, 1)).rank_bytes)
    found = warnings([1.0, 1.0], (1, 1), memory_bytes=need / share)
    assert [line[: len(said[0])] for line in found] == said


def test_one_stage_waits_for_nobody() -> None:
    setting = replace(setting_of([1.0, 1.0], 1), engine_s=10.0)
    plan = forecast(setting, Choice("1f1b", 1, 16, "never"), (2,))
    assert plan.bubble_fraction > 0.5
    assert warnings_of(setting, plan, NAMES) == []


def test_stages_of_one_device_are_taken_together() -> None:
    """Stages of 1, 3, 3 and 1 seconds on two devices in turns are even work."""
    for seconds, said in (([1.0, 3.0, 3.0, 1.0], 0), ([1.0, 3.0, 1.0, 3.0], 1)):
        setting = setting_of(seconds, 2)
        found = warnings_of(
            setting, forecast(setting, Choice("interleaved", 2, 16, "never"), (1, 1, 1, 1)), list("abcd")
        )
        assert len(found) == said
        assert (
            not said or found[0] == "device 1 works 3.00 times as long as the others on average; its longest layer is b"
        )
