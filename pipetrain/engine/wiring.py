"""Which values each layer of a stage takes, and what each message of the stage carries.

Made of the dataflow, which is known from the start, and of the structures of the outputs, which are learned for each
kind of micro-batch (`key`) from the first one.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pipetrain.engine.message import Layout, ValueId
from pipetrain.engine.structure import Structure, TensorSpec, structure_of
from pipetrain.errors import LayerError
from pipetrain.schedule import BATCH, Dataflow, Kind, Take


@dataclass(frozen=True)
class Inputs:
    """What one layer takes.

    Attributes:
        values: each value once.
        needs_grad: for each value.
        arguments: for each argument of the module its pytree and the places of its leaves among the values.
        last_used_here: the values that no later layer of the stage takes, nor another stage.
    """

    key: int
    values: tuple[ValueId, ...]
    needs_grad: tuple[bool, ...]
    arguments: tuple[tuple[TreeSpec, tuple[int, ...]], ...]
    last_used_here: tuple[ValueId, ...]
    wanting_gradients: tuple[ValueId, ...]

    def arrange(self, leaves: Sequence[Any]) -> list[Any]:
        """The module's positional arguments."""
        return [
            leaves[places[0]] if spec.is_leaf() else tree_unflatten([leaves[place] for place in places], spec)
            for spec, places in self.arguments
        ]


class Wiring:
    """The dataflow as one stage sees it."""

    def __init__(self, dataflow: Dataflow, stage: int) -> None:
        self.dataflow = dataflow
        self._stage = stage
        self._structures: dict[tuple[int, int], Structure] = {}
        self._inputs: dict[tuple[int, int], Inputs] = {}
        self._layouts: dict[tuple[Kind, int, int, int, bool], Layout] = {}

    # ---- structures ------------------------------------------------------------------------------------------

    def knows(self, key: int, layer: int) -> bool:
        """Whether a layer's output was seen for this kind of micro-batch."""
        return (key, layer) in self._structures

    def learn(self, key: int, structures: dict[int, Structure]) -> None:
        """Notes what outputs look like."""
        self._structures.update({(key, layer): structure for layer, structure in structures.items()})

    def learn_batch(self, key: int, inputs: tuple[Tensor, ...]) -> None:
        """Notes what the inputs of the mini-batch look like."""
        if not self.knows(key, BATCH):
            leaves, spec = tree_flatten(tuple(inputs))
            self.learn(key, {BATCH: structure_of(leaves, spec, [False] * len(leaves))})

    def name(self, layer: int) -> str:
        return "the mini-batch" if layer == BATCH else self.dataflow.names[layer]

    def structure(self, key: int, layer: int) -> Structure:
        return self._structures[key, layer]

    def told(self, key: int, to_stage: int) -> dict[int, Structure]:
        """What another stage must know before it can receive from this one."""
        return {layer: self._structures[key, layer] for layer in self.dataflow.sent(self._stage, to_stage)}

    # ---- layers ----------------------------------------------------------------------------------------------

    def inputs(self, key: int, layer: int) -> Inputs:
        """What a layer takes."""
        if (key, layer) not in self._inputs:
            self._inputs[key, layer] = self._make_inputs(key, layer)
        return self._inputs[key, layer]

    def _make_inputs(self, key: int, layer: int) -> Inputs:
        values: list[ValueId] = []
        arguments: list[tuple[TreeSpec, tuple[int, ...]]] = []
        for take in self._arguments(key, layer):
            try:
                spec, leaves = self._structures[key, take.layer].select(take.element)
            except KeyError:
                raise LayerError(
                    f"layer {self.name(layer)} takes element {take.element!r} of {self.name(take.layer)}, which is "
                    f"{self._structures[key, take.layer].spec}"
                ) from None
            values += [(take.layer, leaf) for leaf in leaves if (take.layer, leaf) not in values]
            arguments.append((spec, tuple(values.index((take.layer, leaf)) for leaf in leaves)))
        needs_grad = tuple(self.needs_grad(key, value) for value in values)
        return Inputs(
            key,
            tuple(values),
            needs_grad,
            tuple(arguments),
            last_used_here=tuple(value for value in values if self._is_last_use(key, value, layer)),
            wanting_gradients=tuple(v for v, need in zip(values, needs_grad, strict=True) if need),
        )

    def _arguments(self, key: int, layer: int) -> list[Take]:
        """`BATCH` without an element stands for all tensors of the mini-batch, one argument each."""
        takes: list[Take] = []
        for take in self.dataflow.takes[layer]:
            if take == Take(BATCH):
                takes += [Take(BATCH, place) for place in range(len(self._structures[key, BATCH].leaves))]
            else:
                takes.append(take)
        return takes

    def needs_grad(self, key: int, value: ValueId) -> bool:
        """Whether the gradient of a value is wanted."""
        kind = self._structures[key, value[0]].leaves[value[1]]
        return isinstance(kind, TensorSpec) and kind.needs_grad

    def _is_last_use(self, key: int, value: ValueId, layer: int) -> bool:
        is_sent = self.dataflow.home(value[0]) == self._stage and len(self._holders(key, value)) > 1
        stage_of = self.dataflow.stage_of
        later = [user for user in self.users(key, value) if user > layer and stage_of[user] == self._stage]
        return not later and not is_sent

    def users(self, key: int, value: ValueId) -> list[int]:
        """The layers that take a value, ascending."""
        return self.dataflow.users(value[0], self._element(key, value))

    def _holders(self, key: int, value: ValueId) -> list[int]:
        return self.dataflow.holders(value[0], self._element(key, value))

    def _element(self, key: int, value: ValueId) -> int | str | None:
        layer, leaf = value
        for element, spec, start in self._structures[key, layer].elements():
            if start <= leaf < start + spec.num_leaves:
                return element
        return None

    # ---- messages --------------------------------------------------------------------------------------------

    def layout(self, kind: Kind, key: int, from_stage: int, to_stage: int, *, narrow: bool = False) -> Layout:
        """What the message that follows a forward or backward of `from_stage` carries to `to_stage`."""
        wanted = (kind, key, from_stage, to_stage, narrow)
        if wanted not in self._layouts:
            find = self._forward_values if kind is Kind.FORWARD else self._backward_values
            values = find(key, from_stage, to_stage)
            parts = tuple((v, self._structures[key, v[0]].leaves[v[1]]) for v in values)
            self._layouts[wanted] = Layout(parts, narrow)
        return self._layouts[wanted]

    def _forward_values(self, key: int, from_stage: int, to_stage: int) -> list[ValueId]:
        return [
            value
            for layer in self.dataflow.sent(from_stage, to_stage)
            for value in self._leaves(key, layer)
            if to_stage in self._holders(key, value)
        ]

    def _backward_values(self, key: int, from_stage: int, to_stage: int) -> list[ValueId]:
        """The gradients whose chain leads from one stage to the other."""
        found: list[ValueId] = []
        for layer in range(len(self.dataflow.takes)):
            if not self.knows(key, layer) or self.dataflow.home(layer) > to_stage:
                continue
            for value in self._leaves(key, layer):
                holders = self._holders(key, value)
                if self.needs_grad(key, value) and (to_stage, from_stage) in itertools.pairwise(holders):
                    found.append(value)
        return found

    def _leaves(self, key: int, layer: int) -> list[ValueId]:
        return [(layer, leaf) for leaf in range(len(self._structures[key, layer].leaves))]
