import itertools

from pipetrain.schedule import Action, Kind, build, build_forward_only, timeline
from pipetrain.schedule.action import MESSAGES


def test_the_middle_rank_of_a_small_pipeline() -> None:
    """Receives stand before the action that runs while the message travels."""
    row = build("gpipe", 3, 2, recompute="always").actions[1]
    assert " ".join(map(str, row)) == (
        "1RECV_F0 1RECV_F1 1F0 1SEND_F0 1F1 1SEND_F1 1R0 1RECV_B0 1B0 1SEND_B0 1RECV_B1 1R1 1B1 1SEND_B1 1U"
    )


def test_a_single_stage_has_no_messages() -> None:
    assert not [a for a in build("gpipe", 1, 4, recompute="always") if a.kind in MESSAGES]


def test_each_result_is_sent_right_behind_its_action() -> None:
    for rank, row in enumerate(build("gpipe", 4, 8, recompute="always").actions):
        for before, action in itertools.pairwise(row):
            if action.kind is Kind.SEND_FORWARD:
                assert before in (Action(Kind.FORWARD, rank, action.microbatch),) or before.kind in MESSAGES


def test_every_receive_is_posted_before_the_previous_compute_of_its_rank_where_the_timeline_allows_it() -> None:
    """All forwards but the first arrive while the rank computes something else."""
    schedule = build("gpipe", 2, 6, recompute="never")
    row = schedule.actions[1]
    for m in range(1, 6):
        assert row.index(Action(Kind.RECEIVE_FORWARD, 1, m)) < row.index(Action(Kind.FORWARD, 1, m - 1))


def test_messages_change_nothing_on_the_timeline() -> None:
    schedule = build_forward_only(tuple(range(4)), 5)
    assert timeline(schedule) == timeline(schedule.compute())
