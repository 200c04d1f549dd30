"""Zero-bubble schedules: a backward in two halves, of which only one is waited for by other stages.

I gives the gradient of a stage's input, W those of its weights, later, where the rank would wait otherwise.
Source: Qi et al. 2023 (H1) and Qi et al. 2024 (V).
"""

from collections.abc import Iterator
from itertools import count

from pipetrain.schedule.action import Action, Kind, Schedule
from pipetrain.schedule.placement import v_shaped
from pipetrain.schedule.synchronous import depth_first

F, I, W, U = Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT, Kind.UPDATE


def zb_h1(num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> Schedule:
    """1F1B with the weights' gradients in the gaps: its memory, and a third of its bubble where F = I = W."""
    return depth_first("zb_h1", num_ranks, num_microbatches, stages_per_rank, hop=1, split=True)


def zb_v(num_ranks: int, num_microbatches: int, stages_per_rank: int = 2) -> Schedule:
    """Two stages on each rank, there and back: no bubble but the first K - 1 forwards where F = I = W.

    With fewer than 2 K - 1 micro-batches it is the schedule of so many, without those that are not there.
    """
    enough = max(num_microbatches, 2 * num_ranks - 1)
    rows = tuple(
        tuple(a for a in _v_actions(rank, num_ranks, enough) if a.microbatch < num_microbatches)
        for rank in range(num_ranks)
    )
    return Schedule("zb_v", num_microbatches, v_shaped(num_ranks), rows)


def _v_actions(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    there, back = rank, 2 * num_ranks - 1 - rank
    behind = num_ranks - rank  # ranks from this one to the turning point
    next_of = {(kind, s): count() for kind in (F, I, W) for s in (there, back)}

    def act(*work: tuple[Kind, int]) -> Iterator[Action]:
        return (Action(kind, s, next(next_of[kind, s])) for kind, s in work)

    # Warm-up: as many go down as have room until the first one has come back up.
    yield from act(*[(F, there)] * (2 * behind - 1))
    yield from act(*[(F, back), (F, there)] * rank)
    yield from act(*[(F, back), (I, back), (W, back)] * behind)
    # Steady: as long as there are forwards.
    to_start = num_microbatches - (2 * num_ranks - 1 - rank)
    for number in range(num_microbatches - num_ranks):
        yield from act(*[(F, there)] * (number < to_start), (I, there), (W, there), (F, back), (I, back), (W, back))
    # Cool-down: what other ranks wait for first.
    yield from act(*[(I, there), (I, back)] * rank)
    yield from act(*[(I, there), (W, there)] * behind)
    yield from act(*[(W, back)] * rank, *[(W, there)] * rank)
    yield from (Action(U, there), Action(U, back))
