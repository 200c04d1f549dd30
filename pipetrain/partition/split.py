"""The layers of one stage: which ones they are, and building just those."""

from collections.abc import Sequence

import torch
from torch import nn

from pipetrain.models.recipe import LayerRecipe, Recipe
from pipetrain.seeds import derive_seed


def stage_of_each_layer(balance: Sequence[int]) -> list[int]:
    """For every layer its stage.

    >>> stage_of_each_layer((2, 1))
    [0, 0, 1]
    """
    return [stage for stage, num_layers in enumerate(balance) for _ in range(num_layers)]


def take_stage(
    recipe: Recipe, balance: Sequence[int], stage: int, *, seed: int, device: torch.device
) -> list[tuple[str, nn.Module]]:
    """Builds the layers of one stage, one by one, each initialised from (seed, its name).

    A tied parameter starts as its first use would: that layer is built once more where it lives on another stage.

    Returns:
        (name, module on `device`) in order.
    """
    first = sum(balance[:stage])
    chosen = recipe.layers[first : first + balance[stage]]
    built: list[tuple[str, nn.Module]] = []
    for layer in chosen:
        module = build_layer(layer, seed)
        for owner, *others in recipe.ties:
            for name, parameter in others:
                if name == layer.name:
                    _copy_initial(recipe, owner, module.get_parameter(parameter), seed)
        built.append((layer.name, module.to(device)))
    return built


def build_layer(layer: LayerRecipe, seed: int) -> nn.Module:
    """One layer with the initial weights that (seed, name) gives it; the caller's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "init", layer.name))
        return layer.build()


def stages_of_ties(recipe: Recipe, balance: Sequence[int]) -> list[list[tuple[str, int]]]:
    """For every tie its uses as (full parameter name, stage)."""
    stages = dict(zip((layer.name for layer in recipe.layers), stage_of_each_layer(balance), strict=True))
    return [[(f"{layer}.{parameter}", stages[layer]) for layer, parameter in tie] for tie in recipe.ties]


def _copy_initial(recipe: Recipe, owner: tuple[str, str], parameter: nn.Parameter, seed: int) -> None:
    layer = next(layer for layer in recipe.layers if layer.name == owner[0])
    with torch.no_grad():
        parameter.copy_(build_layer(layer, seed).get_parameter(owner[1]))
