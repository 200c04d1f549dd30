"""Schedules from a file, in the text that torch.distributed.pipelining writes: a line for each rank.

    0F0,0F1,0B0,0B1
    1F0,1B0,1F1,1B1

Only compute counts: messages and updates are put in by the passes, recomputes where `recompute=` asks for more of them.
So a schedule that torch has lowered already can be read as well; its sends and receives, and what it does for sharded
parameters, are left out.
"""

import csv
import io
import re

from pipetrain.errors import ScheduleError
from pipetrain.schedule.action import COMMUNICATION, WEIGHT_GRADIENTS, Action, Kind, Schedule

_OF_TORCH = re.compile(r"\d+(UNSHARD|RESHARD|REDUCE_GRAD)")
_PASSED_OVER = COMMUNICATION | {Kind.UPDATE}


def read_csv(name: str, text: str) -> Schedule:
    """The schedule of a file's text. Where stages live is where their actions stand.

    Raises:
        ScheduleError: for text that is no action, and for stages that are missing or on two ranks.
    """
    rows = [
        [_action(name, rank, place, cell) for place, cell in enumerate(row, 1) if cell.strip()]
        for rank, row in enumerate(csv.reader(io.StringIO(text)))
    ]
    while rows and not rows[-1]:
        rows.pop()
    compute = [[a for a in row if a is not None and a.kind not in _PASSED_OVER] for row in rows]
    home: dict[int, int] = {}
    for rank, row in enumerate(compute):
        for action in row:
            if home.setdefault(action.stage, rank) != rank:
                raise ScheduleError(
                    f"schedule {name}: {action} stands on line {rank + 1}, but stage {action.stage} is on line "
                    f"{home[action.stage] + 1}; a stage lives on one rank"
                )
    if not home or sorted(home) != list(range(len(home))) or not all(compute):
        raise ScheduleError(
            f"schedule {name}: stages must be numbered from 0 without a gap, and every line must have one (got stages "
            f"{sorted(home)} on {len(compute)} lines)"
        )
    trained = {a.stage for row in compute for a in row if a.kind in WEIGHT_GRADIENTS}
    updates = [[Action(Kind.UPDATE, s) for s in sorted(trained) if home[s] == rank] for rank in range(len(compute))]
    return Schedule(
        name,
        num_microbatches=1 + max(a.microbatch for row in compute for a in row),
        placement=tuple(home[s] for s in range(len(home))),
        actions=tuple(tuple(row + ends) for row, ends in zip(compute, updates, strict=True)),
    )


def write_csv(schedule: Schedule) -> str:
    """The compute of a schedule as such a text; updates are not part of it."""
    rows = ([str(a) for a in row if a.kind not in _PASSED_OVER] for row in schedule.actions)
    return "".join(",".join(row) + "\n" for row in rows)


def _action(name: str, rank: int, place: int, cell: str) -> Action | None:
    if _OF_TORCH.fullmatch(cell.strip()):
        return None
    try:
        return Action.parse(cell)
    except ScheduleError as error:
        raise ScheduleError(f"schedule {name}, line {rank + 1}, place {place}: {error}") from None
