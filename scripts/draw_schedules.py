"""Writes docs/schedules.md: every schedule, drawn from the object that runs."""

from pathlib import Path

from pipetrain.schedule import SCHEDULES, bubble_fraction, build, grid, peak_in_flight, timeline

STAGES, MICRO_BATCHES = 4, 6
PAGE = Path(__file__).parent.parent / "docs" / "schedules.md"

INTRODUCTION = f"""# Schedules

Drawn by `scripts/draw_schedules.py` from the schedule objects, {STAGES} stages and {MICRO_BATCHES} micro-batches. One
column is the time of a forward; a backward takes two. `F` forward, `R` recompute, `B` backward, `.` waiting.
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for name, generator in SCHEDULES.items():
        parts.append(f"## {name}\n\n{(generator.__doc__ or '').strip().splitlines()[0]}\n")
        for recompute in (False, True):
            schedule = build(name, STAGES, MICRO_BATCHES, recompute=recompute)
            bubble = bubble_fraction(timeline(schedule), schedule.num_ranks)
            parts.append(
                f"`recompute={'always' if recompute else 'never'}`: {bubble:.1%} bubble, "
                f"in flight {list(peak_in_flight(schedule))}\n\n```\n{grid(schedule)}\n```\n"
            )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
