"""Schedules as text: the grid over time, and one rank's list with an arrow at an action."""

from collections.abc import Sequence

from pipetrain.schedule.action import Action, Kind, Schedule
from pipetrain.schedule.timeline import Span, numbers, timeline


def grid(schedule: Schedule) -> str:
    """Draws who does what when, one row for each rank, one column for the time of one forward.

    A backward takes two columns; a dot is a column in which the rank waits. Micro-batches are numbered through.
    """
    return draw(timeline(schedule), schedule.placement)


def draw(spans: Sequence[Span], placement: Sequence[int], column_s: float = 1.0) -> str:
    """Draws spans as text, `column_s` seconds a column. Updates are left out: they have no length here."""
    shown = [span for span in spans if span.action.kind is not Kind.UPDATE]
    several = len(set(placement)) < len(placement)
    labels = {a: f"{a.stage if several else ''}{a.kind.value}{number}" for a, number in numbers(shown).items()}
    width = max(map(len, labels.values()), default=1) + 1
    columns = max((round(span.end_s / column_s) for span in shown), default=0)
    rows = [["."] * columns for _ in range(max(placement) + 1)]
    for span in shown:
        start, end = round(span.start_s / column_s), round(span.end_s / column_s)
        for column in range(start, end):
            rows[placement[span.action.stage]][column] = labels[span.action] if column == start else "-"
    name = "rank" if several else "stage"
    return "\n".join(
        f"{name} {rank} | " + "".join(cell.ljust(width) for cell in row).rstrip() for rank, row in enumerate(rows)
    )


def mark(schedule: Schedule, culprits: Sequence[Action]) -> str:
    """Prints every rank's list, eight actions around the first culprit in it, with an arrow at each culprit."""
    lines = []
    for rank, row in enumerate(schedule.actions):
        at = next((i for i, action in enumerate(row) if action in culprits), 8)
        shown = [f"-->{a}<--" if a in culprits else str(a) for a in row[max(0, at - 8) : at + 9]]
        lines.append(f"rank {rank} | {' '.join(shown)}{' ...' if at + 9 < len(row) else ''}")
    return "\n".join(lines)
