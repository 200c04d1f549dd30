"""The simulator against closed forms, and the pure-Python promise."""

import itertools
import subprocess
import sys

import pytest

from pipetrain.costs import Link, StageCost
from pipetrain.schedule import Kind, build
from pipetrain.sim.balance import even
from pipetrain.sim.simulate import simulate

SIZES = list(itertools.product((1, 2, 4, 8), (1, 4, 32)))


@pytest.mark.parametrize(("s", "m"), SIZES)
def test_equal_stages_take_the_textbook_time(s: int, m: int) -> None:
    spans = simulate(build("gpipe", s, m, recompute="never"), [StageCost(0.01, 0.02)] * s)
    assert spans[-1].end_s == pytest.approx((m + s - 1) * 0.03)


@pytest.mark.parametrize(("s", "m"), SIZES)
def test_a_link_is_paid_once_for_each_border_and_direction(s: int, m: int) -> None:
    """Messages overlap with work, but for the first one that crosses each border and the last one that comes back."""
    spans = simulate(build("gpipe", s, m, recompute="never"), [StageCost(0.01, 0.02)] * s, link=Link(0.001))
    assert spans[-1].end_s == pytest.approx((m + s - 1) * 0.03 + 2 * (s - 1) * 0.001)


def test_the_slowest_stage_rules() -> None:
    costs = [StageCost(1, 2), StageCost(3, 5), StageCost(1, 2)]
    spans = simulate(build("gpipe", 3, 10, recompute="never"), costs)
    assert spans[-1].end_s == 1 + 10 * 3 + 1 + 2 + 10 * 5 + 2


def test_an_update_waits_for_all_stages() -> None:
    spans = simulate(build("gpipe", 3, 2, recompute="never"), [StageCost(1, 2, update_s=4)] * 3)
    updates = [span for span in spans if span.action.kind is Kind.UPDATE]
    assert {(span.start_s, span.end_s) for span in updates} == {(12, 16)}


def test_even_gives_the_rest_to_the_first_stages() -> None:
    assert even(8, 3) == (3, 3, 2)
    for layers, stages in itertools.product(range(1, 20), range(1, 8)):
        if stages <= layers:
            balance = even(layers, stages)
            assert sum(balance) == layers
            assert max(balance) - min(balance) <= 1


def test_schedules_and_predictions_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import pipetrain.schedule, pipetrain.sim.simulate, pipetrain.config"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
