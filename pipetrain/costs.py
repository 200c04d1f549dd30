"""What a stage costs: seconds and bytes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StageCost:
    """Seconds of each kind of action on one stage.

    Attributes:
        backward_s: of a whole backward, or of its first half (I) where the schedule splits it.
        backward_weight_s: of the second half (W).
    """

    forward_s: float
    backward_s: float
    backward_weight_s: float = 0.0
    recompute_s: float = 0.0
    update_s: float = 0.0
