"""Stale schedules: no rank ever waits for an update, so a gradient is applied some updates after its weights were read.

They are 1F1B unrolled over the mini-batches of a *segment*, behind which the pipeline drains. They differ only in where
U sits. How stale each gradient is follows from that (see `staleness`) and is written down nowhere else.

N is the number of mini-batches of the segment; the other letters are those of `action`. With N = 1 each of them is
synchronous: it drains after every mini-batch.
"""

from collections.abc import Iterator

from pipetrain.errors import ScheduleError
from pipetrain.schedule.action import Action, Kind, Schedule

# What a backward sees (`stale.weights`), and how ouroboros' two ends share a matrix (`stale.tied`).
STASH, REPLAY, CURRENT = "stash", "replay", "current"
WEIGHTS = (STASH, REPLAY, CURRENT)
FREE, LOCKED = "free", "locked"
TIED = (FREE, LOCKED)

F, B, U = Kind.FORWARD, Kind.BACKWARD, Kind.UPDATE


def pipedream(num_ranks: int, num_microbatches: int, num_steps: int) -> Schedule:
    """One update after each backward; a mini-batch is one micro-batch. Stage s is K - 1 - s updates late.

    Source: Narayanan et al. 2019 (PipeDream) without vertical sync.

        stage 0 | F0 F1 F2             B0    F3 B1    F4 B2
        stage 1 |    F0 F1       B0 -  F2 B1 -  F3 B2 -
        stage 2 |       F0 B0 -  F1 B1 -  F2 B2 -
    """
    if num_microbatches != 1:
        raise ScheduleError(
            f"pipedream updates after every mini-batch, which is one micro-batch there (got {num_microbatches}); "
            "bounded takes several"
        )
    return _without_flush("pipedream", num_ranks, 1, num_steps)


def bounded(num_ranks: int, num_microbatches: int, num_steps: int) -> Schedule:
    """One update after every M backwards: at most ceil((K - 1 - s) / M) updates late.

    Source: PACI, where M is called a. It keeps one version of the weights (`stale.weights=current` or `replay`).
    """
    return _without_flush("bounded", num_ranks, num_microbatches, num_steps)


def pipedream_2bw(num_ranks: int, num_microbatches: int, num_steps: int) -> Schedule:
    """One update late on every stage, at any depth: it waits until all forwards of the next mini-batch are under way.

    So a mini-batch sees one version of the weights, W(t - 1), on all stages and in all its micro-batches, and two
    versions are alive. Source: Narayanan et al. 2021 (PipeDream-2BW), section 3.1; M must be at least K.
    """
    if num_microbatches < num_ranks:
        raise ScheduleError(
            f"pipedream_2bw needs at least as many micro-batches as devices (got {num_microbatches} for {num_ranks}): "
            f"with fewer a forward would come before the update that it must see; use {num_ranks} or more"
        )
    return _without_flush("pipedream_2bw", num_ranks, num_microbatches, num_steps, late=True)


def ouroboros(num_ranks: int, num_microbatches: int, num_steps: int, *, locked: bool = False) -> Schedule:
    """K modules on K - 1 ranks: the first and the last one share rank 0, and so can share a matrix.

    Source: Yang et al. 2019 (Ouroboros): module k (from 1) is K - k updates late. In a cycle of rank 0 stand the
    forward of one mini-batch in the first module, the turn of an earlier one in the last module, and the backward of
    the one of K - 1 cycles ago in the first. Both modules update together at its end.

    Args:
        locked: the turn is that of the same mini-batch, as the paper's formula for the shared matrix has it: no other
            forward is under way then. Otherwise it is that of the mini-batch which has just come round: a forward
            takes a third of a cycle in each module between, so that is ceil((K - 2) / 3) cycles later, and no rank
            waits if the two outer modules together are as heavy as one of the others.
    """
    if num_microbatches != 1:
        raise ScheduleError(
            f"ouroboros updates after every mini-batch, which is one micro-batch there (got {num_microbatches})"
        )
    last = num_ranks
    comes_round = 0 if locked else -(-(num_ranks - 1) // 3)

    def outer() -> Iterator[Action]:
        for cycle in range(num_steps + last):
            turning, returning = cycle - comes_round, cycle - last
            turns, returns = 0 <= turning < num_steps, returning >= 0
            if cycle < num_steps:
                yield Action(F, 0, 0, cycle)
            if turns:
                yield Action(F, last, 0, turning)
                yield Action(B, last, 0, turning)
            if returns:
                yield Action(B, 0, 0, returning)
                yield Action(U, 0, step=returning)
            if turns and num_steps > 1:
                yield Action(U, last, step=turning)
        if num_steps == 1:  # a synchronous step updates what the two modules share once, by both gradients
            yield Action(U, last)

    middle = (tuple(_one_f_one_b(stage, last - stage, 1, num_steps)) for stage in range(1, last))
    return Schedule("ouroboros", 1, (*range(num_ranks), 0), (tuple(outer()), *middle), num_steps=num_steps, waits=False)


def _without_flush(name: str, num_ranks: int, num_microbatches: int, num_steps: int, *, late: bool = False) -> Schedule:
    """1F1B over all micro-batches of the segment."""
    rows = tuple(
        tuple(_one_f_one_b(stage, num_ranks - 1 - stage, num_microbatches, num_steps, late=late))
        for stage in range(num_ranks)
    )
    return Schedule(name, num_microbatches, tuple(range(num_ranks)), rows, num_steps=num_steps, waits=False)


def _one_f_one_b(
    stage: int, ahead: int, num_microbatches: int, num_steps: int, *, late: bool = False
) -> Iterator[Action]:
    """
    Args:
        ahead: forwards before the first backward, beside its own.
        late: an update stands behind the last forward of the next mini-batch instead of the last backward of its own.
    """
    total, last = num_microbatches * num_steps, num_microbatches - 1
    for number in range(total + ahead):
        if number < total:
            step, m = divmod(number, num_microbatches)
            yield Action(F, stage, m, step)
            if late and m == last and step > 0:
                yield Action(U, stage, step=step - 1)
        if number >= ahead:
            step, m = divmod(number - ahead, num_microbatches)
            yield Action(B, stage, m, step)
            if m == last and (not late or step == num_steps - 1):
                yield Action(U, stage, step=step)
