"""A model as a list of layers that are not built yet.

A rank builds the layers of its own stage one by one and never holds the rest: what a recipe holds is how to make a
layer. Layers form a chain unless `takes` says otherwise, so skips, masks and several inputs are written down as data:
who takes what from whom is known before anything is built.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Tensors = tuple[Tensor, ...]

BATCH = "batch"  # stands for the inputs of the mini-batch where a layer's name is asked for


@dataclass(frozen=True)
class Value:
    """What one layer gives to others: its whole output, or one element of it.

    Attributes:
        layer: the layer that gives it, or `BATCH` for the inputs of the mini-batch.
        element: a place in a tuple or list, a key of a dict; None is the whole output (of `BATCH`: all tensors, one
            argument each).
    """

    layer: str
    element: int | str | None = None


def unsplit(name: str) -> str:
    """The name in the unsplit model of a part that is listed once for each layer that uses it.

    >>> unsplit("encoder.drop@3.weight")
    'encoder.drop.weight'
    """
    return re.sub(r"@\d+", "", name)


@dataclass(frozen=True)
class LayerRecipe:
    """One layer: its name in the unsplit model, the function that makes it, and what it takes.

    Attributes:
        name: names its part of the model in messages, seeds and, see `prefix`, in checkpoints.
        build: makes the module. It draws its initial weights from torch's default generator, which the caller seeds
            for each layer.
        takes: one positional argument of the module for each value, all of earlier layers. None: the output of the
            layer before as one argument, as in `nn.Sequential`; for the first layer the tensors of the mini-batch.
        prefix: what stands before the module's own parameter names in the unsplit model; None is the name and a dot.

    A module may return any pytree of tensors, numbers and other plain values.
    """

    name: str
    build: Callable[[], nn.Module]
    takes: tuple[Value, ...] | None = None
    prefix: str | None = None

    def full_name(self, local: str) -> str:
        """The name in the unsplit model of a parameter, buffer or module of this layer, see also `unsplit`."""
        return (f"{self.name}." if self.prefix is None else self.prefix) + local


@dataclass(frozen=True)
class Generation:
    """How a model makes text: of each token of its last input from those before it.

    Each layer that depends on that input treats its tokens one by one, or remembers those before them (`past`,
    `SegmentMemory`).

    Attributes:
        log_probs: output of the last layer -> log p of each word, [rows, tokens, vocabulary].
        context: the most tokens that it can see; None is any number.
    """

    log_probs: Callable[[Any], Tensor]
    context: int | None


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Recipe:
    """A whole model and what it is trained for.

    Attributes:
        layers: in the order of the forward.
        ties: groups of (layer, parameter) that are one parameter; layers ascend, the first one's initial value counts.
        loss_sum: (output of the last layer, targets) -> sum of the loss over the valid tokens or samples.
        count: targets -> number of valid tokens or samples: what the sum is divided by.
        measures: what else is evaluated, such as accuracy: each like `loss_sum`, a sum over the same samples.
        release: forgets what `build` shares between layers; called once the layers that are wanted are built.
        whole: makes the module that the layers are parts of, with the same initial values, where there is one.
        generation: None where it makes no text.
    """

    layers: tuple[LayerRecipe, ...]
    loss_sum: Callable[[Any, Tensors], Tensor]
    count: Callable[[Tensors], int]
    ties: tuple[tuple[tuple[str, str], ...], ...] = ()
    release: Callable[[], None] = _nothing
    whole: Callable[[], nn.Module] | None = None
    measures: Mapping[str, Callable[[Any, Tensors], Tensor]] = field(default_factory=dict)
    generation: Generation | None = None

    def taken_by(self, layer: int) -> tuple[Value, ...]:
        """What a layer takes, spelled out."""
        takes = self.layers[layer].takes
        if takes is not None:
            return takes
        return (Value(BATCH),) if layer == 0 else (Value(self.layers[layer - 1].name),)
