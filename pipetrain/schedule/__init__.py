"""Schedules as data: generated, verified, simulated, drawn and executed from one object. No torch in this package."""

from pipetrain.schedule.action import MESSAGES, Action, Kind, Schedule
from pipetrain.schedule.messages import add_messages
from pipetrain.schedule.recompute import add_recompute
from pipetrain.schedule.show import grid
from pipetrain.schedule.synchronous import forward_only, gpipe
from pipetrain.schedule.timeline import Span, bubble_fraction, timeline
from pipetrain.schedule.verify import peak_in_flight, verify

# What `schedule=` can be: a function of (number of stages, number of micro-batches).
SCHEDULES = {"gpipe": gpipe}


def build(name: str, num_stages: int, num_microbatches: int, *, recompute: bool) -> Schedule:
    """Generates a training schedule, runs the passes over it and verifies the result."""
    schedule = SCHEDULES[name](num_stages, num_microbatches)
    if recompute:
        schedule = add_recompute(schedule)
    return verify(add_messages(schedule))


def build_forward_only(num_stages: int, num_microbatches: int) -> Schedule:
    """The schedule of an evaluation batch, verified."""
    return verify(add_messages(forward_only(num_stages, num_microbatches)))


__all__ = [
    "MESSAGES",
    "SCHEDULES",
    "Action",
    "Kind",
    "Schedule",
    "Span",
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
