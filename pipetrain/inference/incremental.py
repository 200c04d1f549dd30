"""A model that is given a text a piece at a time, and remembers what it was given."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pipetrain.models import BATCH, Recipe, Value
from pipetrain.models.past import Kept, Past, Place
from pipetrain.segment_memory import SegmentMemory


class Incremental:
    """Of a model whose last input is a text and whose others, if it has any, are what the text is made of.

    Attributes:
        context: the most tokens that a text may have; None is any number.
        piece: the most tokens that it should be given at a time; None is any number.
    """

    def __init__(
        self,
        recipe: Recipe,
        modules: Sequence[nn.Module],
        segment: int = 1,
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """
        Args:
            modules: the layers of the recipe, in evaluation mode.
            segment: tokens of a sample in training. What has a memory of earlier segments then sees as many tokens
                before each one as the last one of a sample did.
            precision: around each computation.
        """
        assert recipe.generation is not None
        self.context = recipe.generation.context
        self._recipe, self._modules, self._precision = recipe, modules, precision
        self._late = _dependent(recipe)
        late = [part for place in self._late for part in modules[place].modules()]
        self._growing = [part for part in late if isinstance(part, Past | Place)]
        self._kept = [part for part in late if isinstance(part, Kept)]
        self._memories = [part for part in late if isinstance(part, SegmentMemory)]
        self.piece = segment if self._memories else None
        self._reach = [memory.length_in_evaluation + segment - 1 for memory in self._memories]
        self._usual = [memory.length_in_evaluation for memory in self._memories]
        self._inputs: tuple[Tensor, ...] = ()
        self._values: dict[str, Any] = {}

    @torch.inference_mode()
    def begin(self, *sources: Tensor) -> None:
        """Starts new texts.

        Args:
            sources: all inputs but the last one, [rows, ...] each.
        """
        for part in (*self._growing, *self._kept):
            part.begin()
        for memory, reach in zip(self._memories, self._reach, strict=True):
            memory.state, memory.length_in_evaluation = None, reach
        self._inputs, self._values = sources, {}
        with self._precision():
            for place in sorted(set(range(len(self._modules))) - self._late):
                self._values[self._recipe.layers[place].name] = self._run(place)

    def end(self) -> None:
        """Leaves the model as it was."""
        for part in (*self._growing, *self._kept):
            part.end()
        for memory, usual in zip(self._memories, self._usual, strict=True):
            memory.state, memory.length_in_evaluation = None, usual
        self._inputs, self._values = (), {}

    @torch.inference_mode()
    def extend(self, ids: Tensor) -> Tensor:
        """log p of the token behind the next piece of each text: [rows, vocabulary].

        Args:
            ids: the piece, [rows, tokens]. The rows are those of the sources, or as many times more, one behind the
                other.
        """
        generation, sources, values = self._recipe.generation, self._inputs, dict(self._values)
        assert generation is not None
        self._inputs = (*sources, ids)
        with self._precision():
            for place in sorted(self._late):
                self._values[self._recipe.layers[place].name] = self._run(place)
            log_probs = generation.log_probs(self._values[self._recipe.layers[-1].name])[:, -1]
        self._inputs, self._values = sources, values
        return log_probs

    @torch.inference_mode()
    def select(self, rows: Tensor, sources: Tensor | None = None) -> None:
        """Goes on with some of the texts, any number of times each.

        Args:
            sources: likewise of what they are made of; None is all of it.
        """
        for part in self._growing:
            part.select(rows)
        for memory in self._memories:
            memory.state = None if memory.state is None else memory.state[rows]
        if sources is None:
            return
        for kept in self._kept:
            kept.select(sources)
        self._inputs = tuple(tensor[sources] for tensor in self._inputs)
        for name, value in self._values.items():
            is_dict = isinstance(value, dict)
            self._values[name] = {k: v[sources] for k, v in value.items()} if is_dict else value[sources]

    def _run(self, place: int) -> Any:
        return self._modules[place](*(self._taken(value) for value in self._recipe.taken_by(place)))

    def _taken(self, value: Value) -> Any:
        if value.layer == BATCH:
            return self._inputs[value.element or 0]  # type: ignore[index]
        whole = self._values[value.layer]
        return whole if value.element is None else whole[value.element]


def _dependent(recipe: Recipe) -> set[int]:
    """The layers whose output depends on the last input."""
    taken = [value for place in range(len(recipe.layers)) for value in recipe.taken_by(place) if value.layer == BATCH]
    last = max(int(value.element or 0) for value in taken)
    late: set[int] = set()
    names: set[str] = set()
    for place, layer in enumerate(recipe.layers):
        if any(
            value.layer in names or (value.layer == BATCH and int(value.element or 0) == last)
            for value in recipe.taken_by(place)
        ):
            late.add(place)
            names.add(layer.name)
    return late
