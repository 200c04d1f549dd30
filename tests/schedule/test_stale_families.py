"""Stale schedules: sound for all sizes, as late as their papers say, and without a pause."""

import itertools
import math

import pytest

from pipetrain.errors import ScheduleError
from pipetrain.schedule import (
    LOCKED,
    STALE,
    Action,
    Kind,
    Schedule,
    Span,
    StaleFamily,
    build_stale,
    grid,
    joint_updates,
    staleness,
    timeline,
    versions,
)

FAMILIES = {**STALE, "locked": LOCKED}
SIZES = [
    (name, ranks, number, steps)
    for name, ranks, steps in itertools.product(FAMILIES, range(1, 7), (1, 2, 5, 13))
    for number in {"bounded": (1, 3, 8), "pipedream_2bw": (ranks, ranks + 3)}.get(name, (1,))
]


@pytest.mark.parametrize(("name", "ranks", "number", "steps"), SIZES)
def test_every_size_is_sound(name: str, ranks: int, number: int, steps: int) -> None:
    """`build_stale` verifies; what is left is that text and actions are one thing."""
    schedule = build_stale(FAMILIES[name], ranks, number, steps, recompute="always")
    assert all(Action.parse(str(action)) == action for action in schedule)
    assert schedule.num_steps == steps
    assert schedule.num_stages == FAMILIES[name].num_stages(ranks)


def late(schedule: Schedule) -> list[int]:
    return [max(of_stage) for of_stage in staleness(schedule)]


@pytest.mark.parametrize("stages", range(1, 9))
def test_module_k_of_pipedream_and_ouroboros_is_K_minus_k_updates_late(stages: int) -> None:
    for family in (STALE["pipedream"], STALE["ouroboros"], LOCKED)[: None if stages > 1 else 1]:
        schedule = build_stale(family, stages - family.extra, 1, 12, recompute="never")
        for s, row in enumerate(staleness(schedule)):
            assert row == [min(step, stages - 1 - s) for step in range(12)]


@pytest.mark.parametrize(("stages", "number"), list(itertools.product(range(1, 7), (1, 2, 4, 8))))
def test_bounded_is_a_fraction_as_late(stages: int, number: int) -> None:
    schedule = build_stale(STALE["bounded"], stages, number, 12, recompute="never")
    assert late(schedule) == [math.ceil((stages - 1 - s) / number) for s in range(stages)]


@pytest.mark.parametrize(("stages", "number"), [(1, 1), (2, 2), (4, 4), (4, 7), (6, 8)])
def test_2bw_reads_the_version_that_its_paper_says(stages: int, number: int) -> None:
    """Micro-batch k, from 1: version max(floor((k - 1) / m) - 1, 0) on every stage (section 3.1)."""
    schedule = build_stale(STALE["pipedream_2bw"], stages, number, 6, recompute="never")
    before = versions(schedule)
    for s, k in itertools.product(range(stages), range(1, 6 * number + 1)):
        step, m = divmod(k - 1, number)
        assert before[Action(Kind.FORWARD, s, m, step)] == max((k - 1) // number - 1, 0)


def test_one_mini_batch_is_a_synchronous_step() -> None:
    for name, family in STALE.items():
        assert late(build_stale(family, 4, 4 if name in ("bounded", "pipedream_2bw") else 1, 1, recompute="never")) == (
            [0] * family.num_stages(4)
        )


def test_ouroboros_updates_its_two_outer_modules_together() -> None:
    schedule = build_stale(STALE["ouroboros"], 3, 1, 5, recompute="never")
    assert [[str(a) for a in joint] for joint in joint_updates(schedule.actions[0])] == [
        ["3U"],
        ["3U@1"],
        ["0U", "3U@2"],
        ["0U@1", "3U@3"],
        ["0U@2", "3U@4"],
        ["0U@3"],
        ["0U@4"],
    ]


def test_the_drawing_numbers_micro_batches_through() -> None:
    drawn = grid(build_stale(STALE["pipedream"], 2, 1, 4, recompute="never")).splitlines()
    assert drawn == [
        "stage 0 | F0 F1 .  .  B0 -  F2 B1 -  F3 B2 -  .  B3 -",
        "stage 1 | .  F0 B0 -  F1 B1 -  F2 B2 -  F3 B3 -  .  .",
    ]


def period(spans: list[Span], stage: int) -> float:
    """Seconds between two updates, in the middle of the segment."""
    ends = sorted(span.end_s for span in spans if span.action.kind is Kind.UPDATE and span.action.stage == stage)
    return (ends[-20] - ends[20]) / (len(ends) - 40)


@pytest.mark.parametrize("ratio", [2.0, 3.0])
@pytest.mark.parametrize("stages", range(3, 9))
def test_no_rank_of_a_ring_waits_where_its_outer_modules_are_half_as_heavy(stages: int, ratio: float) -> None:
    """Then K - 1 devices are K - 1 times as fast as one; a backward is two forwards, three with its recompute."""
    schedule = build_stale(STALE["ouroboros"], stages - 1, 1, 60, recompute="never")

    def seconds(action: Action) -> float:
        size = 0.5 if action.stage in (0, stages - 1) else 1.0
        return {Kind.FORWARD: size, Kind.BACKWARD: ratio * size}.get(action.kind, 0.0)

    assert period(timeline(schedule, seconds), 1) == pytest.approx(1 + ratio)


@pytest.mark.parametrize(("stages", "speedup"), [(3, 1.5), (4, 1.8), (5, 2.0)])
def test_a_locked_forward_bounds_the_speed(stages: int, speedup: float) -> None:
    """All forwards of a mini-batch, and the backward of the last module, stand between two updates of the matrix."""
    schedule = build_stale(LOCKED, stages - 1, 1, 60, recompute="never")
    one_device = 3.0 * stages
    assert one_device / period(timeline(schedule), 1) == pytest.approx(speedup, rel=0.25)


def test_sizes_that_a_schedule_does_not_have_are_refused() -> None:
    for name, ranks, number, text in (
        ("pipedream", 2, 4, "which is one micro-batch there"),
        ("ouroboros", 2, 2, "which is one micro-batch there"),
        ("pipedream_2bw", 4, 2, "at least as many micro-batches as devices"),
    ):
        with pytest.raises(ScheduleError, match=text):
            build_stale(STALE[name], ranks, number, 3, recompute="never")


def broken(family: StaleFamily, change: dict[Action, Action]) -> Schedule:
    schedule = family.generate(2, 1, 3)
    return schedule.with_actions(tuple(tuple(change.get(a, a) for a in row) for row in schedule.actions))


def test_an_update_that_stands_before_its_gradient_or_out_of_order_is_refused() -> None:
    first, second, gradient = Action(Kind.UPDATE, 0), Action(Kind.UPDATE, 0, step=1), Action(Kind.BACKWARD, 0, 0, 0)
    for change, text in (
        ({first: second, second: first}, "before the update of the mini-batch before it|behind the update"),
        ({first: gradient, gradient: first}, "behind the update of its stage"),
    ):
        family = StaleFamily(lambda *sizes, change=change: broken(STALE["pipedream"], change))  # type: ignore[misc]
        with pytest.raises(ScheduleError, match=text):
            build_stale(family, 2, 1, 3, recompute="never")
