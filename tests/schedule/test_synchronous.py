"""The expected value is the picture."""

import itertools

import pytest

from pipetrain.schedule import bubble_fraction, build, build_forward_only, grid, peak_in_flight, timeline, verify
from pipetrain.schedule.messages import add_messages
from pipetrain.schedule.recompute import add_recompute
from pipetrain.schedule.synchronous import gpipe

ALL_SIZES = list(itertools.product(range(1, 7), range(1, 13)))


def test_gpipe_without_recompute() -> None:
    assert grid(build("gpipe", 3, 3, recompute="never")).splitlines() == [
        "stage 0 | F0 F1 F2 .  .  .  .  .  .  B0 -  B1 -  B2 -",
        "stage 1 | .  F0 F1 F2 .  .  .  B0 -  B1 -  B2 -  .  .",
        "stage 2 | .  .  F0 F1 F2 B0 -  B1 -  B2 -  .  .  .  .",
    ]


def test_gpipe_recomputes_while_it_waits_for_the_gradient() -> None:
    assert grid(build("gpipe", 3, 2, recompute="always")).splitlines() == [
        "stage 0 | F0 F1 R0 .  .  .  .  .  .  B0 -  R1 B1 -",
        "stage 1 | .  F0 F1 R0 .  .  .  B0 -  R1 B1 -  .  .",
        "stage 2 | .  .  F0 F1 R0 B0 -  R1 B1 -  .  .  .  .",
    ]


def test_forward_only() -> None:
    assert grid(build_forward_only(tuple(range(3)), 4)).splitlines() == [
        "stage 0 | F0 F1 F2 F3 .  .",
        "stage 1 | .  F0 F1 F2 F3 .",
        "stage 2 | .  .  F0 F1 F2 F3",
    ]


@pytest.mark.parametrize("recompute", ["never", "always"])
def test_every_small_schedule_verifies(recompute: str) -> None:
    for num_stages, num_microbatches in ALL_SIZES:
        verify(build("gpipe", num_stages, num_microbatches, recompute=recompute))
        verify(build_forward_only(tuple(range(num_stages)), num_microbatches))


def test_bubble_is_the_papers_formula() -> None:
    """(S - 1) / (M + S - 1): Huang et al. 2019, section 2.3."""
    for s, m in ALL_SIZES:
        schedule = build("gpipe", s, m, recompute="never")
        assert bubble_fraction(timeline(schedule), s) == pytest.approx((s - 1) / (m + s - 1))


def test_early_recompute_saves_one_recompute_for_every_stage_but_one() -> None:
    """Late recompute takes (M + S - 1)(F + R + B); early (M + S - 1)F + M(R + B) + (S - 1)B."""
    for s, m in ALL_SIZES:
        makespan = timeline(build("gpipe", s, m, recompute="always"))[-1].end_s
        late = (m + s - 1) * (1 + 1 + 2)
        assert makespan == (m + s - 1) * 1 + m * (1 + 2) + (s - 1) * 2
        assert late - makespan == (s - 1) * 1


def test_gpipe_keeps_every_micro_batch_in_flight() -> None:
    assert peak_in_flight(build("gpipe", 3, 5, recompute="always")) == (5, 5, 5)


def test_generators_emit_compute_only() -> None:
    schedule = gpipe(2, 2)
    assert schedule.compute() == schedule
    recomputed = add_recompute(schedule, ["always"] * 2)
    assert add_messages(recomputed).compute() == recomputed
