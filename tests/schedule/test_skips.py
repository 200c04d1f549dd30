"""Values that skip stages: which messages a wiring needs, and schedules that hold them."""

import itertools

import pytest

from pipetrain.errors import ScheduleError
from pipetrain.schedule import BATCH, Action, Dataflow, Kind, Skips, Take, build, build_forward_only, verify


def flow(*takes: tuple[Take, ...], stage_of: tuple[int, ...]) -> Dataflow:
    return Dataflow(takes, stage_of, tuple(f"layer{i}" for i in range(len(takes))))


U_NET = (
    (Take(BATCH),),
    (Take(0),),
    (Take(1),),
    (Take(2), Take(1)),
    (Take(3), Take(0)),
)


def test_a_u_net_sends_values_straight_and_gradients_down_the_chain_of_users() -> None:
    wired = flow(*U_NET, stage_of=(0, 1, 2, 3, 4))
    assert wired.users(0, None) == [1, 4]
    assert wired.holders(0, None) == [0, 1, 4]
    assert wired.skips() == Skips(forward=((0, 4), (1, 3)), backward=((4, 1),)), "3 to 2 to 1 are neighbours"
    assert wired.sent(0, 4) == [0]
    assert wired.sent(1, 3) == [1]


def test_a_skip_within_two_stages_needs_no_message_of_its_own() -> None:
    assert flow(*U_NET, stage_of=(0, 0, 0, 1, 1)).skips() == Skips()


def test_elements_have_users_of_their_own() -> None:
    takes = (Take(BATCH, 0),), (Take(0, 0),), (Take(1), Take(0, 1)), (Take(2), Take(0), Take(BATCH, 1))
    wired = flow(*takes, stage_of=(0, 1, 2, 3))
    assert wired.users(0, 0) == [1, 3]
    assert wired.users(0, 1) == [2, 3]
    assert wired.users(0, None) == [3], "what nobody takes by its place"
    assert wired.skips() == Skips(forward=((0, 2), (0, 3)), backward=((2, 0), (3, 0), (3, 1)))


@pytest.mark.parametrize("text", ["0>2SEND_F0", "2<0RECV_F0", "3>1SEND_B12", "1<3RECV_B12", "1SEND_B0"])
def test_messages_have_a_text_form(text: str) -> None:
    assert str(Action.parse(text)) == text


@pytest.mark.parametrize("text", ["0>2F0", "0>SEND_F0", "2>0U"])
def test_only_messages_have_another_end(text: str) -> None:
    with pytest.raises(ScheduleError, match="is no action"):
        Action.parse(text)


def test_a_neighbour_is_never_called_a_skip() -> None:
    assert Action.message(Kind.SEND_FORWARD, 0, 1, 3) == Action.parse("0SEND_F3")
    assert Action.message(Kind.SEND_FORWARD, 0, 2, 3) == Action.parse("0>2SEND_F3")
    assert Action.parse("2<0RECV_F3").peer == 0


@pytest.mark.parametrize("recompute", ["always", "never"])
def test_every_set_of_skips_gives_a_sound_schedule(recompute: str) -> None:
    """All subsets of the possible skips of four stages, forward; the backward ones as they come."""
    pairs = [(a, b) for a in range(4) for b in range(a + 2, 4)]
    for size in range(len(pairs) + 1):
        for forward in itertools.combinations(pairs, size):
            skips = Skips(forward, tuple(sorted((b, a) for a, b in forward)))
            schedule = build("gpipe", 4, 3, recompute=recompute, skips=skips)
            messages = [a for a in schedule if a.kind is Kind.SEND_FORWARD and a.skips_to is not None]
            assert {(a.stage, a.peer) for a in messages} == set(forward)
            assert len(messages) == 3 * len(forward)
            verify(build_forward_only(tuple(range(4)), 3, skips))


def test_a_missing_skip_is_named() -> None:
    schedule = build("gpipe", 3, 2, recompute="never", skips=Skips(forward=((0, 2),)))
    rows = [list(row) for row in schedule.actions]
    rows[0].remove(Action.parse("0>2SEND_F1"))
    with pytest.raises(ScheduleError, match="2<0RECV_F1 has no partner 0>2SEND_F1"):
        verify(schedule.with_actions(tuple(map(tuple, rows))))
    rows[2].remove(Action.parse("2<0RECV_F1"))
    with pytest.raises(ScheduleError, match="2F1 needs 2<0RECV_F1, which is missing"):
        verify(schedule.with_actions(tuple(map(tuple, rows))))


def test_ranks_with_other_skips_hold_another_schedule() -> None:
    plain, skipping = (build("gpipe", 3, 2, recompute="never", skips=s) for s in (Skips(), Skips(forward=((0, 2),))))
    assert plain.digest != skipping.digest
