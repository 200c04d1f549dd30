"""Who takes what from whom in the whole model, and so which stages exchange messages.

Layers are numbered in the order of the forward; `BATCH` (-1) stands for the inputs of the mini-batch, which the first
stage has. A value that several later stages use goes straight to each of them. Its gradient is one chain of additions
in descending layer order: the last user's stage sends its share to the stage of the user before it, which adds its own,
and so on down to the stage that made the value. So the sum does not depend on where the model is cut.
"""

import functools
import itertools
from dataclasses import dataclass

from pipetrain.schedule.action import Skips

BATCH = -1


@dataclass(frozen=True, slots=True)
class Take:
    """What a layer takes: the whole output of an earlier one, or one element of it (a place or a key)."""

    layer: int
    element: int | str | None = None


@dataclass(frozen=True)
class Dataflow:
    """The model's wiring and its cut.

    Attributes:
        takes: for each layer, one entry for each argument. The loss is one more layer behind the last one.
        stage_of: for each layer its stage, ascending.
        names: of the layers, for messages.
    """

    takes: tuple[tuple[Take, ...], ...]
    stage_of: tuple[int, ...]
    names: tuple[str, ...]

    def home(self, layer: int) -> int:
        """The stage that makes a layer's output."""
        return 0 if layer == BATCH else self.stage_of[layer]

    def users(self, layer: int, element: int | str | None) -> list[int]:
        """The layers, ascending, that take one element of a layer's output, or all of it.

        An `element` of None stands for whatever nobody takes by its place or key.
        """
        return sorted({user for user, taken in self._takers.get(layer, ()) if taken in (None, element)})

    @functools.cached_property
    def _takers(self) -> dict[int, list[tuple[int, int | str | None]]]:
        """For each layer, who takes which element of it."""
        found: dict[int, list[tuple[int, int | str | None]]] = {}
        for user, takes in enumerate(self.takes):
            for take in takes:
                found.setdefault(take.layer, []).append((user, take.element))
        return found

    def holders(self, layer: int, element: int | str | None) -> list[int]:
        """The stages that ever hold such a value, ascending: its home, then those of its users."""
        stages = {self.stage_of[user] for user in self.users(layer, element)}
        return sorted(stages | {self.home(layer)})

    def sent(self, from_stage: int, to_stage: int) -> list[int]:
        """The layers of one stage of which another takes something, ascending."""
        return sorted(
            {
                take.layer
                for user, takes in enumerate(self.takes)
                for take in takes
                if self.stage_of[user] == to_stage and self.home(take.layer) == from_stage != to_stage
            }
        )

    def skips(self) -> Skips:
        """The messages between stages that are not neighbours."""
        forward, backward = set(), set()
        for layer, element in {(take.layer, take.element) for takes in self.takes for take in takes}:
            holders = self.holders(layer, element)
            forward |= {(holders[0], user) for user in holders[1:] if user > holders[0] + 1}
            if layer != BATCH:
                backward |= {(user, before) for before, user in itertools.pairwise(holders) if user > before + 1}
        return Skips(tuple(sorted(forward)), tuple(sorted(backward)))
