"""Every way of breaking a schedule is found and named."""

from collections.abc import Callable

import pytest

from pipetrain.errors import ScheduleError
from pipetrain.schedule import Action, Schedule, build, timeline, verify

Rows = list[list[Action]]


def broken(change: Callable[[Rows], None], recompute: str = "always") -> Schedule:
    schedule = build("gpipe", 3, 3, recompute=recompute)
    rows = [list(row) for row in schedule.actions]
    change(rows)
    return schedule.with_actions(tuple(map(tuple, rows)))


def a(text: str) -> Action:
    return Action.parse(text)


def swap(rank: int, x: str, y: str) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        row = rows[rank]
        i, j = row.index(a(x)), row.index(a(y))
        row[i], row[j] = row[j], row[i]

    return change


def remove_messages_of_micro_batch_1(rows: Rows) -> None:
    for row in rows:
        row[:] = [action for action in row if "_" not in str(action) or action.microbatch != 1]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda rows: rows[1].remove(a("1B2")), "1B2 is missing"),
        (lambda rows: rows[1].remove(a("1F0")), "1F0 is missing"),
        (lambda rows: rows[2].remove(a("2U")), "2U is missing"),
        (lambda rows: rows[1].append(a("1F1")), "1F1 stands 2 times"),
        (lambda rows: rows[1].append(a("0R1")), "0R1 stands on rank 1, where its stage does not live"),
        (lambda rows: rows[1].append(a("1F3")), "1F3 names none of the 3 micro-batches"),
        (lambda rows: rows[0].insert(0, rows[0].pop(rows[0].index(a("0R2")))), "0R2 must stand between"),
        (swap(0, "0R1", "0B1"), "0R1 must stand between its forward and its backward"),
        (swap(2, "2U", "2B2"), "2B2 stands behind the update of its stage"),
        (lambda rows: rows[1].remove(a("1RECV_F1")), "0SEND_F1 has no partner 1RECV_F1"),
        (lambda rows: rows[2].remove(a("2SEND_B0")), "1RECV_B0 has no partner 2SEND_B0"),
        (swap(0, "0SEND_F0", "0SEND_F1"), "deadlock"),
        (swap(0, "0SEND_F0", "0F0"), "deadlock"),
        (swap(1, "1SEND_B0", "1B0"), "deadlock"),
        (remove_messages_of_micro_batch_1, "0B1 needs 0RECV_B1, which is missing"),
        (swap(1, "1RECV_F0", "1SEND_F2"), "deadlock"),
        (
            swap(2, "2RECV_F1", "2F1"),
            "deadlock, waiting for ever: rank 0 at 0RECV_B0, rank 1 at 1SEND_F1, rank 2 at 2F1",
        ),
    ],
)
def test_a_broken_schedule_is_refused(change: Callable[[Rows], None], rule: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        verify(broken(change))
    assert rule in str(caught.value)


def test_the_culprit_has_an_arrow() -> None:
    with pytest.raises(ScheduleError, match=r"rank 2 \| .*-->2B2<--"):
        verify(broken(swap(2, "2U", "2B2")))


def test_gradients_in_another_order_than_on_the_first_stage_are_refused() -> None:
    with pytest.raises(ScheduleError, match="2B1 is out of order: stage 0 has the gradients of 0B0 next"):
        verify(broken(swap(2, "2B0", "2B1"), recompute="never"))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda rows: rows[1].remove(a("1W2")), "1W2 is missing"),
        (lambda rows: rows[1].remove(a("1I2")), "1I2 is missing"),
        (lambda rows: rows[1].append(a("1B2")), "1I2 is a half of 1B2, which stands there too"),
        (swap(0, "0I1", "0W1"), "0W1 stands before 0I1"),
        (swap(1, "1W2", "1U"), "1W2 stands behind the update of its stage"),
        (swap(2, "2F0", "2I0"), "2I0 stands before its forward"),
        (lambda rows: rows[0].append(rows[0].pop(rows[0].index(a("0R0")))), "0R0 must stand between"),
        (swap(1, "1SEND_B0", "1I0"), "deadlock"),
        (swap(1, "1W0", "1W1"), "1W1 is out of order"),
    ],
)
def test_broken_halves_are_refused(change: Callable[[Rows], None], rule: str) -> None:
    schedule = build("zb_h1", 3, 3, recompute="always")
    rows = [list(row) for row in schedule.actions]
    change(rows)
    with pytest.raises(ScheduleError) as caught:
        verify(schedule.with_actions(tuple(map(tuple, rows))))
    assert rule in str(caught.value)


def test_a_backward_before_its_forward_is_refused() -> None:
    with pytest.raises(ScheduleError, match="2B0 stands before its forward"):
        verify(broken(swap(2, "2F0", "2B0"), recompute="never"))


def test_the_timeline_says_what_an_action_waits_for() -> None:
    with pytest.raises(ScheduleError, match="can never start: it waits for 0F0"):
        timeline(broken(lambda rows: rows[0].remove(a("0F0"))))
