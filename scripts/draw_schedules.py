"""Writes docs/schedules.md and its pictures: every schedule, drawn from the object that runs."""

from pathlib import Path

from pipetrain.schedule import (
    LOCKED,
    SCHEDULES,
    STALE,
    Schedule,
    bubble_fraction,
    build,
    build_stale,
    grid,
    peak_in_flight,
    staleness,
    timeline,
)
from pipetrain.schedule.picture import svg

RANKS, MICRO_BATCHES = 4, 8
STEPS = 10  # mini-batches of the segments that are drawn
PAGE = Path(__file__).parent.parent / "docs" / "schedules.md"
PICTURES = PAGE.parent / "schedules"

INTRODUCTION = f"""# Schedules

    pipetrain devices=4 schedule=1f1b
    pipetrain devices=4 schedule=interleaved partitions=8
    pipetrain devices=4 schedule=mine.csv

A schedule is data: for each rank the order of its work. The same object is verified before a run, simulated, executed,
and drawn; this page is drawn by `scripts/draw_schedules.py`, with {RANKS} ranks and {MICRO_BATCHES} micro-batches.

The numbers of a run do not depend on the schedule: all of them add up gradients in the order of the micro-batches, but
for `gpipe_lifo` and `looped_bfs`, which go back in reverse and agree with each other. Where a backward is split
(`zb_h1`, `zb_v`), the halves of some modules may round differently; those of Transformers do not.

| `schedule=` | stages on each rank | what it is |
| --- | --- | --- |
{{rows}}

`partitions=` is the number of stages, a multiple of the devices. Two more rules are the same for all:

* **Recompute.** With `recompute=always` a stage keeps the input of each micro-batch only, and runs its forward again
  before the backward: early, while it would wait for the gradient, which saves K - 1 recomputes a step. `except_last`
  leaves out a micro-batch whose backward follows its forward directly: under `1f1b` all of the last stage's, under
  `gpipe_lifo` each stage's last one. `selective` recomputes the layers that `recompute_layers` names
  (`recompute=selective 'recompute_layers=[blocks.*]'`). A list has a policy for each stage:
  `'recompute=[always,never]'`.
* **Update.** The optimizer waits for the gradients of all stages, because their norm is one number (clipping, and
  nothing is updated where one gradient is not finite). A zero-bubble schedule without that could start its next step
  while other ranks still end this one; below stands what the meeting costs.

## A schedule of your own

A CSV file with a line for each rank, in the text of torch.distributed.pipelining: `0F2` is the forward of micro-batch 2
on stage 0, `B` a backward, `I` and `W` its halves for input and weights, `R` a recompute. Messages are put in by
themselves; those in a file that torch has lowered already are left out. An `R` of the file stays where it is, and
`recompute=` adds those that it asks for besides.

    0F0,0F1,0B0,0B1
    1F0,1B0,1F1,1B1

It is refused before a worker starts if an action is missing, doubled or in an impossible place, if it would wait for
ever, or if stages add up their gradients in different orders; the lists are printed with an arrow at the culprit.
"""


STALE_INTRODUCTION = f"""# Stale schedules

    pipetrain devices=3 schedule=ouroboros
    pipetrain devices=4 schedule=pipedream_2bw stale.weights=replay

Here no rank waits for an update: a gradient is applied some updates after its weights were read
([ouroboros.md](ouroboros.md) says what that does to a training). They are drawn over {STEPS} mini-batches, from one
moment at which the pipeline is empty to the next (`stale.drain_every`); micro-batches are numbered through. How late
each stage is, is computed from the schedule.
"""


def drawn() -> dict[str, Schedule]:
    """The schedules of the page."""
    return {name: build(name, RANKS, MICRO_BATCHES, recompute="never") for name in SCHEDULES}


def drawn_stale() -> dict[str, Schedule]:
    """The stale ones."""
    families = {**STALE, "ouroboros_locked": LOCKED}
    numbers = {"pipedream_2bw": RANKS, "bounded": 2}
    return {
        name: build_stale(family, RANKS - family.extra, numbers.get(name, 1), STEPS, recompute="never")
        for name, family in families.items()
    }


def page() -> str:
    """The whole page."""
    rows = [
        f"| `{name}` | {_number(family.fewest, family.most)} | {_first_line(family.generate)} |"
        for name, family in SCHEDULES.items()
    ]
    parts = [INTRODUCTION.replace("{rows}", "\n".join(rows))]
    for name, schedule in drawn().items():
        early = build(name, RANKS, MICRO_BATCHES, recompute="always")
        parts.append(
            f"## {name}\n\n{_first_line(SCHEDULES[name].generate)} A bubble of {_bubble(schedule)}, with "
            f"recompute {_bubble(early)}; micro-batches in flight on each stage {list(peak_in_flight(schedule))}."
            f"{_meeting(schedule)}\n\n![{name}](schedules/{name}.svg)\n"
        )
    one = build("1f1b", RANKS, 4, recompute="always")
    parts.append(
        f"As text, `1f1b` with recompute and 4 micro-batches, a column for the time of a forward:\n\n```\n{grid(one)}"
        "\n```\n"
    )
    parts.append(STALE_INTRODUCTION)
    for name, schedule in drawn_stale().items():
        title = name if name in STALE else "ouroboros with stale.tied=locked"
        late = [max(of_stage) for of_stage in staleness(schedule)]
        what = (
            _first_line(STALE[name].generate) if name in STALE else "Each forward waits for the one before to return."
        )
        sizes = f"{schedule.num_stages} stages on {schedule.num_ranks} devices"
        parts.append(
            f"## {title}\n\n{what} {sizes}, {schedule.num_microbatches} micro-batch"
            f"{'es' if schedule.num_microbatches > 1 else ''} a step: {late} updates late.\n\n"
            f"![{title}](schedules/{name}.svg)\n"
        )
    return "\n".join(parts)


def _meeting(schedule: Schedule) -> str:
    """What it costs that all ranks wait for each other before the update, where a rank is done before others."""
    if not schedule.is_split:
        return ""
    spans = timeline(schedule)
    busy = [
        max(s.end_s for s in mine) - min(s.start_s for s in mine)
        for rank in range(schedule.num_ranks)
        if (mine := [s for s in spans if schedule.placement[s.action.stage] == rank and s.seconds])
    ]
    lost = 1 - max(busy) / spans[-1].end_s
    return f" The meeting before the update costs {lost:.1%} of the step." if lost > 0 else ""


def _bubble(schedule: Schedule) -> str:
    return f"{bubble_fraction(timeline(schedule), schedule.num_ranks):.1%}"


def _number(fewest: int, most: int | None) -> str:
    return str(fewest) if fewest == most else f"{fewest} or more"


def _first_line(function: object) -> str:
    return (function.__doc__ or "").strip().splitlines()[0]


def picture(schedule: Schedule) -> str:
    """The drawing of one schedule: a backward takes two forwards."""
    return svg({schedule.name: timeline(schedule)}, schedule.placement)


if __name__ == "__main__":
    PAGE.write_text(page())
    PICTURES.mkdir(exist_ok=True)
    for name, schedule in {**drawn(), **drawn_stale()}.items():
        (PICTURES / f"{name}.svg").write_text(picture(schedule))
