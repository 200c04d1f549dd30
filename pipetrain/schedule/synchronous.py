"""Synchronous schedules: every micro-batch of a step uses the same weights, one update at the end.

Each generator is a pure function of (S, M) that emits compute actions only.
"""

from pipetrain.schedule.action import Action, Kind, Schedule


def gpipe(num_stages: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards, in micro-batch order.

    Source: Huang et al. 2019, section 2.2 and figure 2. The paper runs the backwards in reverse; here they run
    in micro-batch order, so that gradients are added in the order of every other synchronous schedule and the
    weights after a step are the same bits under all of them. The makespan is the same.

        stage 0 | F0 F1 F2             B0    B1    B2
        stage 1 |    F0 F1 F2    B0    B1    B2
        stage 2 |       F0 F1 F2 B0 B1 B2          (a backward takes twice as long as a forward)
    """
    return _one_stage_per_rank(
        "gpipe",
        num_microbatches,
        tuple(
            (
                *(Action(Kind.FORWARD, s, m) for m in range(num_microbatches)),
                *(Action(Kind.BACKWARD, s, m) for m in range(num_microbatches)),
                Action(Kind.UPDATE, s),
            )
            for s in range(num_stages)
        ),
    )


def forward_only(num_stages: int, num_microbatches: int) -> Schedule:
    """The forwards alone: evaluation."""
    return _one_stage_per_rank(
        "forward_only",
        num_microbatches,
        tuple(tuple(Action(Kind.FORWARD, s, m) for m in range(num_microbatches)) for s in range(num_stages)),
    )


def _one_stage_per_rank(name: str, num_microbatches: int, actions: tuple[tuple[Action, ...], ...]) -> Schedule:
    return Schedule(name, num_microbatches, placement=tuple(range(len(actions))), actions=actions)
