"""The models: each is a function that returns a `Recipe`, a list of layers that are not built yet."""

from collections.abc import Callable
from typing import Any

from pipetrain.models.amoebanet import amoebanet
from pipetrain.models.anything import anything
from pipetrain.models.faithful import check_layers
from pipetrain.models.recipe import BATCH, LayerRecipe, Recipe, Value
from pipetrain.models.seq2seq import seq2seq
from pipetrain.models.transformer import transformer
from pipetrain.models.transformer_xl import transformer_xl
from pipetrain.models.tryout import DoesNotFit, try_out

MODELS: dict[str, Callable[..., Recipe]] = {
    "amoebanet": amoebanet,
    "anything": anything,
    "seq2seq": seq2seq,
    "transformer": transformer,
    "transformer_xl": transformer_xl,
}


def build(name: str, **settings: Any) -> Recipe:
    """The recipe of a model by its name; see the model's function for its settings."""
    return MODELS[name](**settings)


__all__ = ["BATCH", "MODELS", "DoesNotFit", "LayerRecipe", "Recipe", "Value", "build", "check_layers", "try_out"]
