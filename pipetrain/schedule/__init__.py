"""Schedules as data: generated, verified, simulated, drawn and executed from one object. No torch in this package."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pipetrain.errors import ScheduleError
from pipetrain.schedule.action import (
    COMMUNICATION,
    INPUT_GRADIENTS,
    MESSAGES,
    WEIGHT_GRADIENTS,
    Action,
    Kind,
    Schedule,
    Skips,
)
from pipetrain.schedule.csv_file import read_csv, write_csv
from pipetrain.schedule.dataflow import BATCH, Dataflow, Take
from pipetrain.schedule.messages import add_messages
from pipetrain.schedule.recompute import ALWAYS, EXCEPT_LAST, NEVER, POLICIES, SELECTIVE, add_recompute
from pipetrain.schedule.reductions import add_reductions
from pipetrain.schedule.show import grid
from pipetrain.schedule.stale import bounded, ouroboros, pipedream, pipedream_2bw
from pipetrain.schedule.staleness import joint_updates, staleness, versions
from pipetrain.schedule.synchronous import forward_only, gpipe, gpipe_lifo, interleaved, looped_bfs, one_f_one_b
from pipetrain.schedule.timeline import Span, bubble_fraction, timeline
from pipetrain.schedule.verify import peak_half_way, peak_in_flight, verify, verify_compute, verify_messages
from pipetrain.schedule.zero_bubble import zb_h1, zb_v


@dataclass(frozen=True)
class Family:
    """A schedule for every size.

    Attributes:
        generate: a function of (ranks, micro-batches, stages per rank).
        usual: stages per rank where nothing is said.
        fewest, most: stages per rank; None is any number.
    """

    generate: Callable[[int, int, int], Schedule]
    usual: int = 1
    fewest: int = 1
    most: int | None = 1

    def fits(self, num_stages: int, num_ranks: int) -> bool:
        """Whether so many stages can be on so many ranks."""
        each, left = divmod(num_stages, num_ranks)
        return left == 0 and each >= self.fewest and (self.most is None or each <= self.most)


# What `schedule=` can be, beside the path of a CSV file.
SCHEDULES = {
    "gpipe": Family(gpipe),
    "gpipe_lifo": Family(gpipe_lifo),
    "1f1b": Family(one_f_one_b),
    "interleaved": Family(interleaved, usual=2, fewest=2, most=None),
    "looped_bfs": Family(looped_bfs, usual=2, fewest=2, most=None),
    "zb_h1": Family(zb_h1, most=None),
    "zb_v": Family(zb_v, usual=2, fewest=2, most=2),
}


@dataclass(frozen=True)
class StaleFamily:
    """A stale schedule for every size.

    Attributes:
        generate: a function of (ranks, micro-batches, mini-batches).
        extra: stages more than ranks.
    """

    generate: Callable[[int, int, int], Schedule]
    extra: int = 0

    def num_stages(self, num_ranks: int) -> int:
        return num_ranks + self.extra


STALE = {
    "ouroboros": StaleFamily(ouroboros, extra=1),
    "pipedream": StaleFamily(pipedream),
    "pipedream_2bw": StaleFamily(pipedream_2bw),
    "bounded": StaleFamily(bounded),
}
LOCKED = StaleFamily(partial(ouroboros, locked=True), extra=1)  # schedule=ouroboros with stale.tied=locked
NO_SKIPS = Skips()


def stale_family(name: str, *, locked: bool) -> StaleFamily | None:
    """Of a stale schedule; None for the others."""
    return LOCKED if locked and name == "ouroboros" else STALE.get(name)


def is_file(name: str) -> bool:
    """Whether `schedule=name` names a file and not a family."""
    return name.endswith(".csv")


def generate(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    stages_per_rank: int,
    num_steps: int = 1,
    *,
    locked: bool = False,
) -> Schedule:
    """The compute of a schedule: a generator's, or a file's as it is.

    Args:
        num_steps: mini-batches of a stale schedule.
        locked: of ouroboros, see there.

    Raises:
        ScheduleError: if a file cannot be read, is not sound, or is for other numbers.
    """
    if family := stale_family(name, locked=locked):
        return family.generate(num_ranks, num_microbatches, num_steps)
    if not is_file(name):
        return SCHEDULES[name].generate(num_ranks, num_microbatches, stages_per_rank)
    schedule = verify_compute(read_file(name))
    found = schedule.num_ranks, schedule.num_microbatches
    if found != (num_ranks, num_microbatches):
        raise ScheduleError(
            f"schedule={name} is for {found[0]} ranks and {found[1]} micro-batches, not for {num_ranks} and "
            f"{num_microbatches}"
        )
    return schedule


def read_file(path: str) -> Schedule:
    """The compute of a CSV file.

    Raises:
        ScheduleError: if it cannot be read or holds no schedule.
    """
    try:
        return read_csv(path, Path(path).expanduser().read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError(
            f"schedule={path} cannot be read: {error}; give a file, or one of {', '.join(SCHEDULES)}"
        ) from error


def build(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    *,
    stages_per_rank: int | None = None,
    recompute: str | Sequence[str],
    skips: Skips = NO_SKIPS,
    reduces: bool = False,
) -> Schedule:
    """A training schedule with everything in it, verified.

    Args:
        stages_per_rank: None is what is usual for the schedule.
        recompute: a policy of `add_recompute` for all stages, or one for each.
        reduces: whether gradients are added up over replicas.

    Raises:
        ScheduleError: if the schedule is not sound.
    """
    usual = 1 if is_file(name) else SCHEDULES[name].usual
    compute = generate(name, num_ranks, num_microbatches, stages_per_rank or usual)
    return _complete(compute, recompute, skips, reduces=reduces)


def build_stale(
    family: StaleFamily,
    num_ranks: int,
    num_microbatches: int,
    num_steps: int,
    *,
    recompute: str | Sequence[str],
    skips: Skips = NO_SKIPS,
    reduces: bool = False,
) -> Schedule:
    """The schedule of a segment with everything in it, verified.

    Args:
        num_steps: mini-batches of the segment.
        reduces: whether gradients are added up over replicas.

    Raises:
        ScheduleError: if the schedule is not sound.
    """
    return _complete(family.generate(num_ranks, num_microbatches, num_steps), recompute, skips, reduces=reduces)


def _complete(compute: Schedule, recompute: str | Sequence[str], skips: Skips, *, reduces: bool) -> Schedule:
    compute = replace(compute, skips=skips)
    policies = [recompute] * compute.num_stages if isinstance(recompute, str) else recompute
    complete = add_messages(verify_compute(add_recompute(compute, policies)))
    return verify_messages(add_reductions(complete) if reduces else complete)


def build_forward_only(placement: tuple[int, ...], num_microbatches: int, skips: Skips = NO_SKIPS) -> Schedule:
    """The schedule of an evaluation batch, verified."""
    return verify(add_messages(replace(forward_only(placement, num_microbatches), skips=skips)))


def forward_only_like(schedule: Schedule, num_microbatches: int) -> Schedule:
    """The schedule of an evaluation batch on the stages of a training schedule."""
    return build_forward_only(schedule.placement, num_microbatches, schedule.skips)


__all__ = [
    "ALWAYS",
    "BATCH",
    "COMMUNICATION",
    "EXCEPT_LAST",
    "INPUT_GRADIENTS",
    "LOCKED",
    "MESSAGES",
    "NEVER",
    "POLICIES",
    "SCHEDULES",
    "SELECTIVE",
    "STALE",
    "WEIGHT_GRADIENTS",
    "Action",
    "Dataflow",
    "Family",
    "Kind",
    "Schedule",
    "Skips",
    "Span",
    "StaleFamily",
    "Take",
    "bubble_fraction",
    "build",
    "build_forward_only",
    "build_stale",
    "forward_only_like",
    "generate",
    "grid",
    "is_file",
    "joint_updates",
    "peak_half_way",
    "peak_in_flight",
    "read_csv",
    "read_file",
    "stale_family",
    "staleness",
    "timeline",
    "verify",
    "versions",
    "write_csv",
]
