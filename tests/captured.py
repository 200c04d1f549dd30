"""Captures a module and runs its layers one after the other, each with values of its own, as stages have them."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pipetrain.models.capture import Tie, capture
from pipetrain.models.recipe import BATCH, LayerRecipe, unsplit
from pipetrain.models.whole import Whole, WithoutMemory


@dataclass
class Captured:
    """A module in float64, and the same as layers."""

    plain: nn.Module
    layers: Sequence[LayerRecipe]
    modules: Sequence[nn.Module]
    ties: Sequence[Tie]

    @property
    def names(self) -> list[str]:
        return [layer.name for layer in self.layers]

    def train(self, mode: bool) -> None:
        for module in (self.plain, *self.modules):
            module.train(mode)

    def run(self, *inputs: Tensor) -> Any:
        """All layers. What is handed on is a copy, as from another stage: a change in place reaches nobody else."""
        given: dict[str, Any] = {BATCH: inputs}
        output = None
        for place, (layer, module) in enumerate(zip(self.layers, self.modules, strict=True)):
            if layer.takes is None:
                taken = [given[self.layers[place - 1].name]] if place else list(inputs)
            else:
                taken = [given[v.layer] if v.element is None else given[v.layer][v.element] for v in layer.takes]
            output = given[layer.name] = module(*(tree_map(_copy, value) for value in taken))
        return output

    def state_names(self) -> set[str]:
        return {
            layer.full_name(name)
            for layer, module in zip(self.layers, self.modules, strict=True)
            for name in module.state_dict()
        }

    def gradients(self) -> dict[str, Tensor]:
        return {
            unsplit(layer.full_name(name)): parameter.grad
            for layer, module in zip(self.layers, self.modules, strict=True)
            for name, parameter in module.named_parameters()
            if parameter.grad is not None
        }


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def captured(factory: Callable[[], nn.Module], num_inputs: int = 1) -> Captured:
    whole = Whole(factory, seed=3)
    with WithoutMemory():
        look = factory()
    layers, ties = capture(look, whole.module, num_inputs)
    plain = copy.deepcopy(whole.module()).double()
    modules = [layer.build().double() for layer in layers]
    whole.release()
    return Captured(plain, layers, modules, ties)


def assert_equal_to_plain(model: Captured, *inputs: Tensor, mode: bool) -> None:
    """Same outputs, gradients and buffers, to the last bits of float64; random operations draw in the same order."""
    model.train(mode)
    results = []
    for forward in (model.plain, model.run):
        torch.manual_seed(5)
        leaves = [leaf for leaf in tree_leaves(forward(*inputs)) if isinstance(leaf, Tensor)]
        sum(leaf.square().mean() for leaf in leaves).backward()  # type: ignore[union-attr]
        results.append(leaves)
    for plain, layered in zip(*results, strict=True):
        torch.testing.assert_close(layered, plain, rtol=1e-10, atol=1e-12)
    gradients = model.gradients()
    expected = {name: model.plain.get_parameter(name).grad for name in gradients}
    assert {id(g) for g in expected.values()} == {id(p.grad) for p in model.plain.parameters() if p.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-10 * largest, msg=lambda m, n=name: n + m)
    state = dict(model.plain.named_buffers())
    for layer, module in zip(model.layers, model.modules, strict=True):
        for name, buffer in module.named_buffers():
            if (full := unsplit(layer.full_name(name))) in state:
                torch.testing.assert_close(buffer, state[full], rtol=1e-10, atol=1e-12)
