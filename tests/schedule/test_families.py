"""All schedules: every small size verifies; pictures, makespans and memory are those of their papers."""

import itertools

import pytest

from pipetrain.schedule import (
    SCHEDULES,
    Kind,
    Schedule,
    bubble_fraction,
    build,
    grid,
    peak_half_way,
    peak_in_flight,
    timeline,
)
from pipetrain.schedule.action import WEIGHT_GRADIENTS

MOST_STAGES_PER_RANK = 3
SIZES = list(itertools.product(range(1, 7), range(1, 13)))
ALL = [
    (name, stages)
    for name, family in SCHEDULES.items()
    for stages in range(family.fewest, (family.most or MOST_STAGES_PER_RANK) + 1)
]
BACKWARDS = ("gpipe_lifo", "looped_bfs")  # the last micro-batch first


def makespan(schedule: Schedule) -> float:
    return timeline(schedule)[-1].end_s


@pytest.mark.parametrize("recompute", ["always", "except_last", "never"])
@pytest.mark.parametrize(("name", "stages_per_rank"), ALL)
def test_every_small_schedule_verifies(name: str, stages_per_rank: int, recompute: str) -> None:
    # Fewer recomputes leave out actions of a schedule that was verified: a look at some sizes is enough.
    for num_ranks, num_microbatches in SIZES if recompute == "always" else SIZES[::7]:
        schedule = build(name, num_ranks, num_microbatches, stages_per_rank=stages_per_rank, recompute=recompute)
        assert schedule.num_stages == num_ranks * stages_per_rank
        assert schedule.num_ranks == num_ranks
        order = [a.microbatch for a in schedule if a.stage == 0 and a.kind in WEIGHT_GRADIENTS]
        assert order == sorted(order, reverse=name in BACKWARDS)


def test_one_f_one_b() -> None:
    assert grid(build("1f1b", 3, 4, recompute="never")).splitlines() == [
        "stage 0 | F0 F1 F2 .  .  .  .  B0 -  F3 B1 -  .  B2 -  .  B3 -",
        "stage 1 | .  F0 F1 .  .  B0 -  F2 B1 -  F3 B2 -  .  B3 -  .  .",
        "stage 2 | .  .  F0 B0 -  F1 B1 -  F2 B2 -  F3 B3 -  .  .  .  .",
    ]


def test_gpipe_as_published() -> None:
    assert grid(build("gpipe_lifo", 2, 3, recompute="except_last")).splitlines() == [
        "stage 0 | F0 F1 F2 .  .  .  B2 -  R1 B1 -  R0 B0 -",
        "stage 1 | .  F0 F1 F2 B2 -  R1 B1 -  R0 B0 -  .  .",
    ]


def test_interleaved() -> None:
    first, last = (" ".join(row.split()) for row in grid(build("interleaved", 2, 4, recompute="never")).splitlines())
    assert first == "rank 0 | 0F0 0F1 2F0 2F1 0F2 . 2B0 - 0F3 2B1 - 2F2 0B0 - 2F3 0B1 - . 2B2 - . 2B3 - 0B2 - 0B3 -"
    assert last == "rank 1 | . 1F0 1F1 3F0 3B0 - 3F1 3B1 - 1F2 1B0 - 1F3 1B1 - 3F2 3B2 - 3F3 3B3 - 1B2 - 1B3 - . ."


def test_zb_h1() -> None:
    """Figure 3 of Qi et al. 2023."""
    assert grid(build("zb_h1", 4, 8, recompute="never")).splitlines() == [
        "stage 0 | F0 F1 F2 F3 .  .  .  I0 W0 F4 I1 W1 F5 I2 W2 F6 I3 W3 F7 I4 W4 I5 W5 I6 W6 I7 W7",
        "stage 1 | .  F0 F1 F2 .  .  I0 F3 I1 W0 F4 I2 W1 F5 I3 W2 F6 I4 W3 F7 I5 W4 I6 W5 I7 W6 W7",
        "stage 2 | .  .  F0 F1 .  I0 F2 I1 F3 I2 W0 F4 I3 W1 F5 I4 W2 F6 I5 W3 F7 I6 W4 I7 W5 W6 W7",
        "stage 3 | .  .  .  F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 F6 I6 W3 F7 I7 W4 W5 W6 W7",
    ]


def test_zb_v_has_no_bubble_once_all_ranks_work() -> None:
    for num_ranks in range(1, 7):
        schedule = build("zb_v", num_ranks, 12, recompute="never")
        assert makespan(schedule) == 2 * 12 * 3 + num_ranks - 1


@pytest.mark.parametrize("name", ["gpipe", "gpipe_lifo", "1f1b"])
def test_the_bubble_is_the_papers_formula(name: str) -> None:
    """(K - 1) / (M + K - 1): Huang et al. 2019, section 2.3."""
    for k, m in SIZES:
        schedule = build(name, k, m, recompute="never")
        assert bubble_fraction(timeline(schedule), k) == pytest.approx((k - 1) / (m + k - 1))


def test_looping_makes_the_bubble_smaller_by_the_stages_of_a_rank() -> None:
    """(K - 1) / V of a rank's work: Narayanan et al. 2021, section 2.2; M a multiple of K."""
    for name, k, v in itertools.product(("interleaved", "looped_bfs"), range(1, 7), (2, 3)):
        for m in (k, 2 * k):
            assert makespan(build(name, k, m, stages_per_rank=v, recompute="never")) == 3 * (v * m + k - 1)


def test_a_zero_bubble_schedule_waits_a_third_as_long() -> None:
    """(K - 1)(F + I - W) instead of (K - 1)(F + I + W): Qi et al. 2023, table 1."""
    for k in range(1, 7):
        for m in range(2 * k, 13):
            assert makespan(build("zb_h1", k, m, recompute="never")) == 3 * m + (k - 1)


def test_what_is_in_flight() -> None:
    """GPipe keeps all micro-batches, 1F1B as many as ranks stand behind, H1 never more than 1F1B's first stage."""
    assert peak_in_flight(build("gpipe", 4, 8, recompute="never")) == (8, 8, 8, 8)
    assert peak_in_flight(build("1f1b", 4, 8, recompute="never")) == (4, 3, 2, 1)
    assert peak_in_flight(build("zb_h1", 4, 8, recompute="never")) == (4, 4, 4, 4)
    assert peak_half_way(build("1f1b", 4, 8, recompute="never")) == (1, 1, 1, 1)
    assert peak_half_way(build("zb_h1", 4, 8, recompute="always")) == (1, 2, 3, 4)  # W waits
    assert most_on_each_rank(build("zb_v", 4, 12, recompute="never")) == [8, 8, 8, 8], "half as large as 1F1B's 4"


def most_on_each_rank(schedule: Schedule) -> list[int]:
    changes = [[(a.kind is Kind.FORWARD) - (a.kind in WEIGHT_GRADIENTS) for a in row] for row in schedule.actions]
    return [max(itertools.accumulate(row)) for row in changes]


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_early_recompute_saves_one_recompute_for_every_stage_but_one(name: str) -> None:
    """Late recompute takes (M + K - 1)(F + R + B)."""
    for k, m in SIZES:
        late = (m + k - 1) * (1 + 1 + 2)
        assert late - makespan(build(name, k, m, recompute="always")) == k - 1


def test_both_halves_share_one_recompute() -> None:
    schedule = build("zb_h1", 4, 8, recompute="always")
    for s, m in itertools.product(range(4), range(8)):
        kinds = [a.kind for a in schedule if (a.stage, a.microbatch) == (s, m) and a.kind.value in "FRBIW"]
        assert kinds == [Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT]


def recomputed(schedule: Schedule) -> list[list[int]]:
    rows = [[a.microbatch for a in schedule if a.stage == s and a.kind is Kind.RECOMPUTE] for s in range(3)]
    return [sorted(row) for row in rows]


def test_except_last_leaves_out_what_turns_round_on_its_stage() -> None:
    assert recomputed(build("gpipe_lifo", 3, 4, recompute="except_last")) == [[0, 1, 2]] * 3
    assert recomputed(build("gpipe", 3, 4, recompute="except_last")) == [[0, 1, 2, 3]] * 3
    assert recomputed(build("1f1b", 3, 4, recompute="except_last")) == [[0, 1, 2, 3], [0, 1, 2, 3], []]
    assert recomputed(build("zb_h1", 3, 4, recompute="except_last")) == [[0, 1, 2, 3], [0, 1, 2, 3], []]


def test_each_stage_may_have_its_own_policy() -> None:
    schedule = build("1f1b", 3, 2, recompute=["always", "never", "except_last"])
    assert recomputed(schedule) == [[0, 1], [], []]
