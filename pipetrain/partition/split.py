"""The layers of one stage: which ones they are, and building just those."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from pipetrain.errors import ConfigError
from pipetrain.models.recipe import BATCH, LayerRecipe, Recipe
from pipetrain.schedule import Dataflow, Take
from pipetrain.seeds import derive_seed, seeded
from pipetrain.suggest import did_you_mean


def stage_of_each_layer(balance: Sequence[int]) -> list[int]:
    """For every layer its stage.

    >>> stage_of_each_layer((2, 1))
    [0, 0, 1]
    """
    return [stage for stage, num_layers in enumerate(balance) for _ in range(num_layers)]


class BuiltLayer(NamedTuple):
    """A layer of this process: its name, what stands before its parameters' names in the unsplit model, its module."""

    name: str
    prefix: str
    module: nn.Module


def take_stage(
    recipe: Recipe, balance: Sequence[int], stage: int, *, seed: int, device: torch.device
) -> list[BuiltLayer]:
    """Builds the layers of one stage, one by one, each initialised from (seed, its name).

    A tied parameter starts as its first use would: that layer is built once more where it lives on another stage. Each
    use is a parameter of its own, also on one stage.

    Returns:
        The layers in order, their modules on `device`.
    """
    first = sum(balance[:stage])
    built: list[BuiltLayer] = []
    owned: set[int] = set()
    for layer in recipe.layers[first : first + balance[stage]]:
        module = build_layer(layer, seed)
        if any(id(parameter) in owned for parameter in module.parameters()):
            module = copy.deepcopy(module)
        owned |= {id(parameter) for parameter in module.parameters()}
        for owner, *others in recipe.ties:
            for name, parameter in others:
                if name == layer.name:
                    _copy_initial(recipe, owner, module.get_parameter(parameter), seed)
        built.append(BuiltLayer(layer.name, layer.full_name(""), module.to(device)))
    recipe.release()
    return built


def build_layer(layer: LayerRecipe, seed: int) -> nn.Module:
    """One layer with the initial weights that (seed, name) gives it; the caller's generators are left alone."""
    with seeded(derive_seed(seed, "init", layer.name)):
        return layer.build()


def stages_of_ties(recipe: Recipe, balance: Sequence[int]) -> list[list[tuple[str, int]]]:
    """For every tie its uses as (full parameter name, stage)."""
    stages = stage_of_each_layer(balance)
    place = {layer.name: number for number, layer in enumerate(recipe.layers)}
    return [
        [(recipe.layers[place[layer]].full_name(parameter), stages[place[layer]]) for layer, parameter in tie]
        for tie in recipe.ties
    ]


def dataflow_of(recipe: Recipe, balance: Sequence[int]) -> Dataflow:
    """Who takes what from whom, by number and cut; the loss is one more layer, on the last stage.

    Raises:
        ConfigError: if a layer takes something of a layer that does not come before it.
    """
    number = {BATCH: -1} | {layer.name: place for place, layer in enumerate(recipe.layers)}
    takes: list[tuple[Take, ...]] = []
    for place, layer in enumerate(recipe.layers):
        for value in recipe.taken_by(place):
            if number.get(value.layer, place) >= place:
                raise ConfigError(
                    f"layer {layer.name} takes the output of {value.layer}, which is no layer before it."
                    f"{did_you_mean(value.layer, list(number)[: place + 1])}"
                )
        takes.append(tuple(Take(number[value.layer], value.element) for value in recipe.taken_by(place)))
    takes.append((Take(len(recipe.layers) - 1),))
    names = tuple(layer.name for layer in recipe.layers)
    return Dataflow(tuple(takes), (*stage_of_each_layer(balance), len(balance) - 1), (*names, "loss"))


def _copy_initial(recipe: Recipe, owner: tuple[str, str], parameter: nn.Parameter, seed: int) -> None:
    layer = next(layer for layer in recipe.layers if layer.name == owner[0])
    with torch.no_grad():
        parameter.copy_(build_layer(layer, seed).get_parameter(owner[1]))
