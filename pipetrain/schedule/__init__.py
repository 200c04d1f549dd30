"""Schedules as data: generated, verified, simulated, drawn and executed from one object. No torch in this package."""

from dataclasses import replace

from pipetrain.schedule.action import MESSAGES, Action, Kind, Schedule, Skips
from pipetrain.schedule.dataflow import BATCH, Dataflow, Take
from pipetrain.schedule.messages import add_messages
from pipetrain.schedule.recompute import add_recompute
from pipetrain.schedule.show import grid
from pipetrain.schedule.synchronous import forward_only, gpipe
from pipetrain.schedule.timeline import Span, bubble_fraction, timeline
from pipetrain.schedule.verify import peak_in_flight, verify

# What `schedule=` can be: a function of (number of stages, number of micro-batches).
SCHEDULES = {"gpipe": gpipe}
NO_SKIPS = Skips()


def build(name: str, num_stages: int, num_microbatches: int, *, recompute: bool, skips: Skips = NO_SKIPS) -> Schedule:
    """Generates a training schedule, runs the passes over it and verifies the result."""
    schedule = replace(SCHEDULES[name](num_stages, num_microbatches), skips=skips)
    if recompute:
        schedule = add_recompute(schedule)
    return verify(add_messages(schedule))


def build_forward_only(num_stages: int, num_microbatches: int, skips: Skips = NO_SKIPS) -> Schedule:
    """The schedule of an evaluation batch, verified."""
    return verify(add_messages(replace(forward_only(num_stages, num_microbatches), skips=skips)))


__all__ = [
    "BATCH",
    "MESSAGES",
    "SCHEDULES",
    "Action",
    "Dataflow",
    "Kind",
    "Schedule",
    "Skips",
    "Span",
    "Take",
    "add_messages",
    "add_recompute",
    "bubble_fraction",
    "build",
    "build_forward_only",
    "forward_only",
    "gpipe",
    "grid",
    "peak_in_flight",
    "timeline",
    "verify",
]
