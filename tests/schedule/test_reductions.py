"""Where the gradients of a stage are added up over replicas."""

from typing import Any

import pytest

from pipetrain.errors import ScheduleError
from pipetrain.schedule import SCHEDULES, STALE, WEIGHT_GRADIENTS, Action, Kind, build, build_stale, timeline
from pipetrain.schedule.verify import verify_messages


def test_directly_behind_the_last_gradient_of_each_stage() -> None:
    rows = build("interleaved", 2, 2, recompute="never", reduces=True).compute().actions
    assert not any(action.kind is Kind.REDUCE for row in rows for action in row), "no compute"
    row = build("gpipe", 2, 2, recompute="never", reduces=True).actions[1]
    assert " ".join(map(str, row)).endswith("1B0 1SEND_B0 1B1 1REDUCE 1SEND_B1 1U")


@pytest.mark.parametrize("name", SCHEDULES)
def test_once_for_each_stage_of_every_schedule(name: str) -> None:
    schedule = build(name, 4, 8, recompute="never", reduces=True)
    reductions = [action for action in schedule if action.kind is Kind.REDUCE]
    assert sorted(reductions) == [Action(Kind.REDUCE, s) for s in range(schedule.num_stages)]
    assert timeline(schedule) == timeline(build(name, 4, 8, recompute="never"))


@pytest.mark.parametrize("name", STALE)
def test_once_for_each_stage_and_mini_batch_of_every_stale_schedule(name: str) -> None:
    number = 1 if name in ("ouroboros", "pipedream") else 4
    schedule = build_stale(STALE[name], 3, number, 5, recompute="never", reduces=True)
    count = sum(action.kind is Kind.REDUCE for action in schedule)
    assert count == schedule.num_stages * 5
    for row in schedule.actions:
        for s, step in {(action.stage, action.step) for action in row if action.kind is Kind.UPDATE}:
            mine = [a for a in row if (a.stage, a.step) == (s, step)]
            last = [a.kind for a in mine if a.kind in {*WEIGHT_GRADIENTS, Kind.REDUCE, Kind.UPDATE}][-3:]
            assert last == [Kind.BACKWARD, Kind.REDUCE, Kind.UPDATE]


def test_text_form() -> None:
    assert str(Action(Kind.REDUCE, 2)) == "2REDUCE"
    for action in (Action(Kind.REDUCE, 2), Action(Kind.REDUCE, 0, step=3)):
        assert Action.parse(str(action)) == action
    with pytest.raises(ScheduleError, match="is no action"):
        Action.parse("2REDUCE0")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda row: [a for a in row if a.kind is not Kind.REDUCE], "1REDUCE is missing"),
        (lambda row: [*row[:-1], row[-1], Action(Kind.REDUCE, 1)], "1REDUCE stands 2 times"),
        (lambda row: [Action(Kind.REDUCE, 1), *(a for a in row if a.kind is not Kind.REDUCE)], "must stand between 1B"),
        (lambda row: [*(a for a in row if a.kind is not Kind.REDUCE), Action(Kind.REDUCE, 1)], "must stand between 1B"),
    ],
)
def test_a_wrong_one_is_refused(change: Any, rule: str) -> None:
    schedule = build("gpipe", 2, 2, recompute="never", reduces=True)
    rows = list(schedule.actions)
    rows[1] = tuple(change(list(rows[1])))
    with pytest.raises(ScheduleError, match=rule):
        verify_messages(schedule.with_actions(tuple(rows)))
