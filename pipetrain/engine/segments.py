"""The memories of a stage's layers (`SegmentMemory`): one for each micro-batch, carried from mini-batch to mini-batch.

Micro-batch m of every mini-batch has the same rows, and these go on in their text, so its memory is that of micro-batch
m before. A recompute sees what its forward saw and leaves no trace; so does a forward that is repeated. Evaluation has
memories of its own, which start anew with its first batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pipetrain.engine.layer import Layer
from pipetrain.segment_memory import SegmentMemory

MicroBatch = tuple[int, int]  # its mini-batch, and its number there


@dataclass(frozen=True)
class _Carried:
    """Before and after the forward of one micro-batch."""

    step: int
    before: Tensor | None
    after: Tensor | None


class Segments:
    """Puts memories in before a layer runs, and takes them out behind it.

    Attributes:
        steps_of_epoch: mini-batches after which the text starts over; None is never.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._of_layer = [
            [
                (layer.full_name(name), part)
                for name, part in layer.module.named_modules()
                if isinstance(part, SegmentMemory)
            ]
            for layer in layers
        ]
        self._carried: dict[bool, dict[tuple[str, int], _Carried]] = {True: {}, False: {}}
        self._seen: dict[tuple[str, MicroBatch], Tensor | None] = {}
        self._training = True
        self.steps_of_epoch: int | None = None

    def train(self, mode: bool) -> None:
        """Whose memories the next forwards have: those of training or those of evaluation."""
        self._training = mode

    def are_in(self, place: int) -> bool:
        """Whether the layer at a place of the stage has memories; the loss, behind the last one, has none."""
        return place < len(self._of_layer) and bool(self._of_layer[place])

    @contextmanager
    def forward(self, place: int, which: MicroBatch, *, keep: bool) -> Iterator[None]:
        """Around a forward of the layer at a place of the stage.

        Args:
            keep: whether a recompute of it will follow.
        """
        carried, (step, microbatch) = self._carried[self._training], which
        for name, part in self._of_layer[place]:
            part.state = self._before(carried.get((name, microbatch)), step)
            if keep:
                self._seen[name, which] = part.state
        before = [part.state for _, part in self._of_layer[place]]
        yield
        for (name, part), state in zip(self._of_layer[place], before, strict=True):
            carried[name, microbatch] = _Carried(step, state, part.state)
            part.state = None

    @contextmanager
    def recompute(self, place: int, which: MicroBatch) -> Iterator[None]:
        """Around a recompute of it."""
        for name, part in self._of_layer[place]:
            part.state = self._seen.pop((name, which))
        yield
        for _, part in self._of_layer[place]:
            part.state = None

    def _before(self, carried: _Carried | None, step: int) -> Tensor | None:
        starts_anew = step == 0 or (
            self._training and self.steps_of_epoch is not None and step % self.steps_of_epoch == 0
        )
        if starts_anew or carried is None:
            return None
        return carried.before if carried.step == step else carried.after

    def saved(self) -> dict[str, Tensor]:
        """The memories of training by full name, of all micro-batches one behind the other: [batch, length, width]."""
        carried = self._carried[True]
        numbers = sorted({m for _, m in carried})
        names = [name for memories in self._of_layer for name, _ in memories]
        found = {name: [carried[name, m].after for m in numbers if (name, m) in carried] for name in names}
        return {
            name: torch.cat([state for state in states if state is not None])
            for name, states in found.items()
            if states and states[0] is not None
        }

    def restore(self, name: str, states: Sequence[Tensor], step: int) -> None:
        """Goes on from a memory that was saved after `step` mini-batches: that of each micro-batch."""
        for m, state in enumerate(states):
            self._carried[True][name, m] = _Carried(step - 1, None, state.clone())

    @property
    def names(self) -> list[str]:
        """Of all memories in the stage."""
        return [name for memories in self._of_layer for name, _ in memories]
