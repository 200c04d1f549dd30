"""A model's layers one by one, each run as a stage of its own: what is measured is what the engine will do."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pipetrain.costs import LayerCost, ModelCost, ValueCost
from pipetrain.engine.loss import Tensors
from pipetrain.engine.message import ValueId, Values
from pipetrain.engine.stage import Stage
from pipetrain.engine.structure import LeafKind, Structure, TensorSpec, key_of
from pipetrain.engine.wiring import Inputs, Wiring
from pipetrain.models import Recipe
from pipetrain.partition.split import dataflow_of
from pipetrain.profile.signature import signature
from pipetrain.schedule import BATCH
from pipetrain.seeds import seeded


class LayerOnBench:
    """One layer with the values that it takes, ready to run any number of times, `m` being the micro-batch."""

    def __init__(
        self,
        stage: Stage,
        number: int,
        wired: Inputs,
        values: Values,
        targets: Tensors,
    ) -> None:
        """
        Args:
            stage: has this layer only.
            values: that it takes.
        """
        self.stage, self.values = stage, values
        self.targets, self._number, self._wired = targets, number, wired

    @property
    def module(self) -> nn.Module:
        return self.stage.layers[0].module

    def forward(self, m: int = 0, *, keep_graph: bool) -> Values:
        """Begins a micro-batch; returns what the layer makes."""
        self.stage.train(True)
        values = self.stage.forward(
            m,
            self.values,
            targets=self.targets if self.stage.is_last else (),
            key=self._wired.key,
            for_backward=True,
            keep_graph=keep_graph,
        )
        return {value: x for value, x in values.items() if value[0] >= self._number}

    def recompute(self, m: int = 0) -> None:
        self.stage.recompute(m)

    def gradients(self) -> Values:
        """For a backward to start from."""
        if self.stage.is_last:
            return {self.stage.loss_id: self.stage.gradient_of_loss(self._wired.key, 1.0)}
        return {
            value: torch.full(kind.shape, 1e-3, dtype=kind.dtype, device=self.stage.random.device).as_strided(
                kind.shape, kind.stride
            )
            for value, kind in self.made()
            if isinstance(kind, TensorSpec) and kind.needs_grad
        }

    def backward(self, gradients: Values, m: int = 0, *, split: bool = False) -> None:
        self.stage.backward(m, gradients, split=split)

    def backward_weight(self, m: int = 0) -> None:
        self.stage.backward_weight(m)

    def made(self) -> list[tuple[ValueId, LeafKind]]:
        """What it makes; known once it has run."""
        leaves = self.stage.wiring.structure(self._wired.key, self._number).leaves
        return [((self._number, leaf), kind) for leaf, kind in enumerate(leaves)]


@dataclass(frozen=True)
class Observed:
    """What was found out about a layer.

    Attributes:
        keeps: for each value that it takes, in order, and then for each leaf that it makes, whether its graph keeps it.
    """

    cost: LayerCost
    keeps: tuple[bool, ...]


@dataclass(frozen=True)
class _Known:
    """A layer that stands for all that are like it."""

    observed: Observed
    structure: Structure
    outputs: list[Any]


@dataclass(frozen=True)
class Conditions:
    """How layers are run.

    Attributes:
        observe: looks at one layer.
        announce: is told the name of the layer that is looked at next.
    """

    device: torch.device
    seed: int
    dtype: torch.dtype | None
    autocast_dtype: torch.dtype | None
    observe: Callable[[LayerOnBench], Observed]
    announce: Callable[[str], object] = lambda layer: None


def signatures_of(recipe: Recipe) -> list[str]:
    """One for each layer; the layers are built without their memory."""
    found = []
    for layer in recipe.layers:
        with torch.device("meta"):
            found.append(signature(layer.build()))
    recipe.release()
    return found


class Bench:
    """Goes through the layers of a model with one micro-batch, and has each that is not like an earlier one observed.

    No more than one layer is built at a time, and values live until they were last taken: the model need not fit.
    """

    def __init__(self, recipe: Recipe, signatures: Sequence[str], conditions: Conditions) -> None:
        self._recipe, self._signatures, self._conditions = recipe, signatures, conditions
        self._dataflow = dataflow_of(recipe, (1,) * len(recipe.layers))

    def run(self, inputs: Tensors, targets: Tensors) -> ModelCost:
        """
        Args:
            inputs, targets: one micro-batch, on the device.
        """
        last_user = self._last_users()
        key, wiring = key_of(inputs, True), Wiring(self._dataflow, 0)
        wiring.learn_batch(key, inputs)
        values: Values = {(BATCH, place): tensor for place, tensor in enumerate(inputs)}
        known: dict[object, _Known] = {}
        found: list[Observed] = []
        for place, layer in enumerate(self._recipe.layers):
            wired = wiring.inputs(key, place)
            like = self._signatures[place], _description(wiring, wired), place == len(self._recipe.layers) - 1
            if like not in known:
                self._conditions.announce(layer.name)
                known[like] = self._observe(place, wiring, wired, values, targets)
            its = known[like]
            found.append(replace(its.observed, cost=replace(its.observed.cost, name=layer.name)))
            wiring.learn(key, {place: its.structure})
            values |= {(place, leaf): value for leaf, value in enumerate(its.outputs)}
            for value in [v for v in values if last_user.get(v[0], v[0]) <= place]:
                del values[value]
        self._recipe.release()
        layers = tuple(each.cost for each in found)
        return ModelCost(len(inputs[0]), layers, _values(wiring, key, [each.keeps for each in found]))

    def _observe(self, place: int, wiring: Wiring, wired: Inputs, values: Values, targets: Tensors) -> _Known:
        conditions, recipe = self._conditions, self._recipe
        is_last = place == len(recipe.layers) - 1
        layer = recipe.layers[place]
        without_memory = conditions.device.type == "meta"
        with seeded(conditions.seed), torch.device("meta") if without_memory else nullcontext():
            module = layer.build().to(conditions.device, conditions.dtype)
        stage = Stage(
            place,
            [(layer.name, layer.full_name(""), module)],
            self._dataflow,
            device=conditions.device,
            seed=conditions.seed,
            loss_sum=recipe.loss_sum if is_last else None,
            autocast_dtype=conditions.autocast_dtype,
        )
        taken = {value[0] for value in wired.values}
        stage.wiring.learn(wired.key, {number: wiring.structure(wired.key, number) for number in taken})
        bench = LayerOnBench(stage, place, wired, {value: values[value] for value in wired.values}, targets)
        observed = conditions.observe(bench)
        structure = stage.wiring.structure(wired.key, place)
        outputs = [] if is_last else list(bench.forward(keep_graph=False).values())
        return _Known(observed, structure, outputs)

    def _last_users(self) -> dict[int, int]:
        """For each layer, and the mini-batch, the last one that takes something of it."""
        return {take.layer: user for user, takes in enumerate(self._dataflow.takes) for take in takes}


def _description(wiring: Wiring, wired: Inputs) -> object:
    """What a layer takes, but for whom it takes it from."""
    kinds = tuple(wiring.structure(wired.key, layer).leaves[leaf] for layer, leaf in wired.values)
    return kinds, tuple((str(spec), places) for spec, places in wired.arguments)


def _values(wiring: Wiring, key: int, keeps: Sequence[tuple[bool, ...]]) -> tuple[ValueCost, ...]:
    """Everything that goes from layer to layer."""
    users: dict[ValueId, list[int]] = {}
    keepers: dict[ValueId, list[int]] = {}
    for place, kept in enumerate(keeps):
        taken = wiring.inputs(key, place).values
        made = [(place, leaf) for leaf in range(len(wiring.structure(key, place).leaves))]
        for value, is_kept in zip((*taken, *made), kept, strict=True):
            if is_kept:
                keepers.setdefault(value, []).append(place)
        for value in made:
            users.setdefault(value, [])
        for value in taken:
            users.setdefault(value, []).append(place)
    found = []
    for value, theirs in users.items():
        kind = wiring.structure(key, value[0]).leaves[value[1]]
        if isinstance(kind, TensorSpec):
            keeping = tuple(sorted(keepers.get(value, ())))
            found.append(ValueCost(value[0], kind.num_bytes, tuple(theirs), keeping, kind.needs_grad))
    return tuple(found)
