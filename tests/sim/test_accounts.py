"""Where the seconds of a step go, on schedules whose accounts are known by hand."""

import random

import pytest

from pipetrain.costs import Link, StageCost
from pipetrain.schedule import POLICIES, SCHEDULES, SELECTIVE, STALE, build
from pipetrain.sim.accounts import account
from pipetrain.sim.simulate import simulate


def test_equal_stages_have_a_bubble_and_no_imbalance() -> None:
    """GPipe, K = 4, M = 8: ranks wait K - 1 = 3 of M + K - 1 = 11 turns; a turn is a forward and a backward."""
    costs = [StageCost(1.0, 2.0, update_s=0.25)] * 4
    found = account(build("gpipe", 4, 8, recompute="never"), costs, step_s=35.0, data_s=0.5)
    assert (found.forward_s, found.backward_s, found.recompute_s) == (8.0, 16.0, 0.0)
    assert found.bubble_s == pytest.approx(9.0)
    assert found.imbalance_s == pytest.approx(0.0)
    assert (found.update_s, found.data_s) == (0.25, 0.5)
    assert found.communication_s == pytest.approx(35.0 - 33.0 - 0.75)


def test_a_slow_stage_is_imbalance() -> None:
    """Two stages, the first three times as slow, which works all the time: 4 turns of 9 seconds. Equal ones would take
    M + 1 = 5 turns of 6."""
    costs = [StageCost(3.0, 6.0), StageCost(1.0, 2.0)]
    found = account(build("1f1b", 2, 4, recompute="never"), costs, step_s=40.0)
    assert found.forward_s == 4 * (3.0 + 1.0) / 2
    assert found.backward_s == 4 * (6.0 + 2.0) / 2
    assert found.bubble_s == pytest.approx((4 + 1) * (2.0 + 4.0) - 4 * (2.0 + 4.0))
    assert found.imbalance_s == pytest.approx(4 * 9.0 - 30.0)
    assert found.communication_s == pytest.approx(4.0)


def test_what_links_cost_is_communication() -> None:
    plan = build("1f1b", 2, 4, recompute="always")
    costs = [StageCost(1.0, 2.0, recompute_s=1.0, output_bytes=100)] * 2
    step_s = simulate(plan, costs, Link(0.5, 100.0))[-1].end_s
    without_s = simulate(plan, costs)[-1].end_s
    assert step_s > without_s
    assert account(plan, costs, step_s).communication_s == pytest.approx(step_s - without_s)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != SELECTIVE])
def test_accounts_add_up(name: str, policy: str) -> None:
    draw = random.Random(name + policy)
    plan = build(name, 3, 5, recompute=policy)
    costs = [StageCost(*(draw.uniform(0.5, 2.0) for _ in range(5))) for _ in range(plan.num_stages)]
    spans = simulate(plan, costs)
    step_s = spans[-1].end_s
    found = account(plan, costs, step_s)
    assert found.step_s == pytest.approx(step_s)
    assert found.communication_s == pytest.approx(0.0, abs=1e-9)
    busy_s = sum(span.seconds for span in spans if span.action.kind.name != "UPDATE") / 3
    assert found.forward_s + found.recompute_s + found.backward_s == pytest.approx(busy_s)
    assert found.bubble_s > 0


@pytest.mark.parametrize("name", STALE)
def test_accounts_of_a_stale_schedule_are_those_of_one_of_its_steps(name: str) -> None:
    schedule = STALE[name].generate(3, 1 if name in ("ouroboros", "pipedream") else 4, 20)
    costs = [StageCost(1.0, 2.0, 0.0)] * schedule.num_stages
    step_s = simulate(schedule, costs)[-1].end_s / 20
    found = account(schedule, costs, step_s)
    assert found.step_s == pytest.approx(step_s)
    assert found.forward_s == pytest.approx(schedule.num_microbatches * schedule.num_stages / 3)
    assert found.backward_s == pytest.approx(2 * found.forward_s)
    assert (found.communication_s, found.imbalance_s) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    assert found.bubble_s > 0
