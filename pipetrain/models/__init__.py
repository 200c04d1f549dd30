"""The models: each is a function that returns a `Recipe`, a list of layers that are not built yet."""

from typing import Any

from pipetrain.models.recipe import BATCH, LayerRecipe, Recipe, Value
from pipetrain.models.transformer import transformer

MODELS = {"transformer": transformer}


def build(name: str, **settings: Any) -> Recipe:
    """The recipe of a model by its name; see the model's function for its settings."""
    return MODELS[name](**settings)


__all__ = ["BATCH", "MODELS", "LayerRecipe", "Recipe", "Value", "build"]
