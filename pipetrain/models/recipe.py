"""A model as a list of layers that are not built yet.

A rank builds the layers of its own stage one by one and never holds the rest: what a recipe holds is how to make a
layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class LayerRecipe:
    """One layer: its name in the unsplit model, and the function that makes it.

    The module takes the tensors that the layer before it gave and returns a tensor or a tuple of tensors. `build`
    draws its initial weights from torch's default generator, which the caller seeds for each layer.
    """

    name: str
    build: Callable[[], nn.Module]


@dataclass(frozen=True)
class Recipe:
    """A whole model and what it is trained for.

    Attributes:
        layers: in the order of the forward.
        ties: groups of (layer, parameter) that are one parameter; layers ascend, the first one's initial value counts.
        loss_sum: (outputs of the last layer, targets) -> sum of the loss over the valid tokens or samples.
        count: targets -> number of valid tokens or samples: what the sum is divided by.
    """

    layers: tuple[LayerRecipe, ...]
    loss_sum: Callable[[Tensors, Tensors], Tensor]
    count: Callable[[Tensors], int]
    ties: tuple[tuple[tuple[str, str], ...], ...] = ()
