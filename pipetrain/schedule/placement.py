"""On which rank each stage lives, where a rank has several."""


def looped(num_ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """Round and round: stage K is on rank 0 again.

    >>> looped(2, 2)
    (0, 1, 0, 1)
    """
    return tuple(range(num_ranks)) * stages_per_rank


def v_shaped(num_ranks: int) -> tuple[int, ...]:
    """There and back: the first and the last stage are on rank 0.

    >>> v_shaped(3)
    (0, 1, 2, 2, 1, 0)
    """
    return (*range(num_ranks), *reversed(range(num_ranks)))
