"""Synchronous schedules: every micro-batch of a step uses the same weights, one update at the end.

Each generator is a pure function of the ranks K, the micro-batches M and, where several stages live on a rank, how many
V those are. It emits compute actions only.
"""

import itertools
from collections.abc import Iterator

from pipetrain.schedule.action import Action, Kind, Schedule
from pipetrain.schedule.placement import looped

F, B, I, W, U = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT, Kind.UPDATE


def gpipe(num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> Schedule:
    """All forwards, then all backwards, in micro-batch order.

    Source: Huang et al. 2019, section 2.2 and figure 2. The paper runs the backwards in reverse (`gpipe_lifo`); here
    they run in micro-batch order, so that gradients are added in the order of every other schedule but `looped_bfs`,
    and the weights after a step are the same bits under all of them. The makespan is the same.

        stage 0 | F0 F1 F2             B0    B1    B2
        stage 1 |    F0 F1 F2    B0    B1    B2
        stage 2 |       F0 F1 F2 B0 B1 B2          (a backward takes twice as long as a forward)
    """
    return _breadth_first("gpipe", num_ranks, num_microbatches, stages_per_rank, range(num_microbatches))


def gpipe_lifo(num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> Schedule:
    """GPipe as published: the last micro-batch goes back first, so it needs no recompute on any stage."""
    order = reversed(range(num_microbatches))
    return _breadth_first("gpipe_lifo", num_ranks, num_microbatches, stages_per_rank, tuple(order))


def looped_bfs(num_ranks: int, num_microbatches: int, stages_per_rank: int) -> Schedule:
    """All micro-batches through one stage of a rank before its next one, and back in reverse.

    Source: Lamy-Poirier 2023, breadth-first pipeline parallelism. A bubble of (K - 1) / V stages' time.
    """
    order = reversed(range(num_microbatches))
    return _breadth_first("looped_bfs", num_ranks, num_microbatches, stages_per_rank, tuple(order))


def one_f_one_b(num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> Schedule:
    """As soon as a stage can go back, it does: at most K - s micro-batches are in flight on stage s.

    Source: Narayanan et al. 2019 (PipeDream), with a flush. The makespan is GPipe's.

        stage 0 | F0 F1 F2             B0    B1    B2
        stage 1 |    F0 F1       B0 -  F2 B1 -     B2
        stage 2 |       F0 B0 -  F1 B1 -  F2 B2 -
    """
    return depth_first("1f1b", num_ranks, num_microbatches, stages_per_rank, hop=1)


def interleaved(num_ranks: int, num_microbatches: int, stages_per_rank: int) -> Schedule:
    """1F1B with several stages on each rank: a bubble V times as small for V times the messages.

    Source: Narayanan et al. 2021, section 2.2, depth first. They need M to be a multiple of K. Here the micro-batches
    go in rounds of about K, and the rounds may differ by one micro-batch.
    """
    return depth_first("interleaved", num_ranks, num_microbatches, stages_per_rank, hop=2)


def forward_only(placement: tuple[int, ...], num_microbatches: int) -> Schedule:
    """The forwards alone: evaluation. A rank with several stages takes them one after the other."""
    rows = tuple(
        tuple(Action(F, s, m) for s, home in enumerate(placement) if home == rank for m in range(num_microbatches))
        for rank in range(max(placement) + 1)
    )
    return Schedule("forward_only", num_microbatches, placement, rows)


def depth_first(
    name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int, *, hop: int, split: bool = False
) -> Schedule:
    """Warm-up, one forward and one backward in turns, cool-down.

    Micro-batches go in rounds: one round through all stages of a rank before the next one starts.

    Args:
        hop: how many more forwards a rank does first for each rank that stands behind it.
        split: backwards are I, and W follows: rank r's first one behind its r-th next I, so that no rank keeps more
            than the first one does. What is left fills the cool-down.
    """
    rounds = _rounds(num_microbatches, num_ranks)

    def rank_actions(rank: int) -> Iterator[Action]:
        stages = range(rank, num_ranks * stages_per_rank, num_ranks)
        forwards = [(s, m) for some in rounds for s in stages for m in some]
        backwards = [(s, m) for some in rounds for s in reversed(stages) for m in some]
        ahead = min((stages_per_rank - 1) * len(rounds[0]) + hop * (num_ranks - 1 - rank), len(forwards))
        yield from (Action(F, s, m) for s, m in forwards[:ahead])
        for number, (s, m) in enumerate(backwards):
            if ahead + number < len(forwards):
                yield Action(F, *forwards[ahead + number])
            yield Action(I if split else B, s, m)
            if split and number >= rank:
                yield Action(W, *backwards[number - rank])
        if split:
            yield from (Action(W, s, m) for s, m in backwards[max(0, len(backwards) - rank) :])
        yield from (Action(U, s) for s in stages)

    rows = tuple(tuple(rank_actions(rank)) for rank in range(num_ranks))
    return Schedule(name, num_microbatches, looped(num_ranks, stages_per_rank), rows)


def _rounds(num_microbatches: int, num_ranks: int) -> list[range]:
    """The micro-batches in rounds of about as many as there are ranks; larger rounds first."""
    number = max(1, num_microbatches // num_ranks)
    each, left = divmod(num_microbatches, number)
    starts = [i * each + min(i, left) for i in range(number + 1)]
    return [range(start, end) for start, end in itertools.pairwise(starts)]


def _breadth_first(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    stages_per_rank: int,
    backward_order: tuple[int, ...] | range,
) -> Schedule:
    """All forwards of a rank stage by stage, then all its backwards, last stage first."""

    def rank_actions(rank: int) -> Iterator[Action]:
        stages = range(rank, num_ranks * stages_per_rank, num_ranks)
        yield from (Action(F, s, m) for s in stages for m in range(num_microbatches))
        yield from (Action(B, s, m) for s in reversed(stages) for m in backward_order)
        yield from (Action(U, s) for s in stages)

    rows = tuple(tuple(rank_actions(rank)) for rank in range(num_ranks))
    return Schedule(name, num_microbatches, looped(num_ranks, stages_per_rank), rows)
