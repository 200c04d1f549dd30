"""What a stage costs: seconds and bytes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StageCost:
    """Seconds of each kind of action on one stage."""

    forward_s: float
    backward_s: float
    recompute_s: float = 0.0
    update_s: float = 0.0
