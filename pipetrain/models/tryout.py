"""One micro-batch through a model before any worker starts: mistakes in its shapes are found here, with the layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pipetrain.errors import ConfigError
from pipetrain.models.imports import shown
from pipetrain.models.recipe import BATCH, Recipe, Tensors, Value
from pipetrain.models.whole import WithoutMemory
from pipetrain.seeds import seeded

_LARGEST_COMPARED = 1 << 26  # elements
LARGEST_TRIED = 1 << 28  # parameters: a gigabyte


class DoesNotFit(ConfigError):
    """A layer cannot take what the data, or the layers before it, give."""


class _Failed(Exception):
    """What went wrong, in words; the cause is the exception of the model."""

    def __init__(self, message: str, kind: type[ConfigError] = ConfigError) -> None:
        super().__init__(message)
        self.kind = kind


def try_out(recipe: Recipe, inputs: Tensors, targets: Tensors) -> None:
    """Runs the layers and the loss on one micro-batch.

    The layers on tensors without values, which takes neither memory nor time. What fails there is tried again with
    values, and only believed if that fails, too: a model may look at values. A model too large for that is let pass if
    it is only the want of values that it fails for.

    Raises:
        DoesNotFit: naming the first layer that fails.
        ConfigError: naming the loss that fails, or the layer behind which no gradient is left.
    """
    layers: list[nn.Module] = []
    try:
        with seeded(0), WithoutMemory():
            layers = _built(recipe, "meta")
        with torch.device("meta"):
            output, ends_at = _run(recipe, layers, tuple(tensor.to("meta") for tensor in inputs))
        _run_loss(recipe, tree_map(_with_values, output), targets, ends_at)
    except Exception as error:
        if sum(p.numel() for layer in layers for p in layer.parameters()) > LARGEST_TRIED:
            cause = error.__cause__ or error
            if isinstance(cause, NotImplementedError) or "meta" in str(cause).lower():
                return
            if isinstance(error, _Failed):
                raise error.kind(str(error)) from error.__cause__
            raise
    else:
        return
    try:
        with seeded(0):
            output, ends_at = _run(recipe, _built(recipe, "cpu"), tuple(tensor.clone() for tensor in inputs))
            _run_loss(recipe, output, targets, ends_at)
    except _Failed as error:
        raise error.kind(str(error)) from error.__cause__


def _with_values(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.zeros(value.shape, dtype=value.dtype, requires_grad=value.requires_grad).clone()


def _built(recipe: Recipe, device: str) -> list[nn.Module]:
    try:
        return [layer.build().to(device) for layer in recipe.layers]
    finally:
        recipe.release()


def _run(recipe: Recipe, layers: list[nn.Module], inputs: Tensors) -> tuple[Any, str]:
    """The model's output, and what is to be said if no gradient comes with it: the layer that ends it."""
    outputs: dict[str, Any] = {BATCH: inputs}

    def value(taken: Value) -> tuple[Any, ...]:
        whole = outputs[taken.layer]
        if taken.element is not None:
            return (whole[taken.element],)
        return whole if taken.layer == BATCH else (whole,)

    ends_at = ""
    for place, (layer, module) in enumerate(zip(recipe.layers, layers, strict=True)):
        arguments = [argument for taken in recipe.taken_by(place) for argument in value(taken)]
        taken_now = [(x, x._version) for x in tree_leaves(arguments) if isinstance(x, Tensor)]
        try:
            output = outputs[layer.name] = module(*arguments)
        except Exception as error:
            sizes = ", ".join(_shown(argument) for argument in arguments)
            others = [taken for taken in recipe.taken_by(place) if taken.layer != BATCH]
            origin = " from " + ", ".join(dict.fromkeys(taken.layer for taken in others)) if others else ""
            # Where a layer gives a word or whole numbers to another, no other size of the data would help.
            made = [x for taken in others for x in tree_leaves(value(taken))]
            is_size = all(isinstance(x, Tensor) and x.is_floating_point() for x in made)
            raise _Failed(
                f"layer {layer.name} fails on {sizes}{origin}: {shown(error)}",
                DoesNotFit if is_size else ConfigError,
            ) from error
        for tensor in (x for x, version in taken_now if x._version != version):
            _check_nobody_else_has(tensor, place, recipe, outputs, value)
        if not ends_at and any(p.requires_grad for p in module.parameters()) and not _has_gradient(output):
            ends_at = layer.name
    ends_at = ends_at or recipe.layers[-1].name
    return output, f"layer {ends_at} gives nothing that a gradient can flow through ({_shown(outputs[ends_at])})"


def _run_loss(recipe: Recipe, output: Any, targets: Tensors, ends_at: str) -> None:
    try:
        loss = recipe.loss_sum(output, targets)
    except ConfigError as error:
        raise _Failed(str(error)) from error
    except Exception as error:
        sizes = f"{_shown(output)} and targets {', '.join(map(_shown, targets))}"
        raise _Failed(f"the loss fails on the model's output {sizes}: {shown(error)}") from error
    if not loss.requires_grad:
        why = "the loss does not depend on the model's output" if _has_gradient(output) else ends_at
        raise _Failed(f"{why}, so nothing is trained; let it return floating tensors that depend on the parameters")


def _check_nobody_else_has(
    changed: Tensor, place: int, recipe: Recipe, outputs: dict[str, Any], value: Callable[[Value], tuple[Any, ...]]
) -> None:
    """A layer changes copies of what it takes; in the whole module all that share its memory would see the change."""
    made = {BATCH, *(layer.name for layer in recipe.layers[:place])}
    for later in range(place + 1, len(recipe.layers)):
        for taken in recipe.taken_by(later):
            tensors = [x for x in tree_leaves(value(taken)) if isinstance(x, Tensor)] if taken.layer in made else []
            if any(_overlap(changed, tensor) for tensor in tensors):
                this, other = recipe.layers[place].name, recipe.layers[later].name
                raise _Failed(
                    f"layer {this} changes a tensor in place that layer {other} also gets, from {taken.layer}; let it "
                    "compute a new tensor (x = x + 1 in place of x += 1)"
                )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share elements of one memory; exact for all but very large ones."""
    one_memory = bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
    if not one_memory or a.dtype != b.dtype:
        return one_memory
    size = a.untyped_storage().nbytes() // a.dtype.itemsize
    if size > _LARGEST_COMPARED:
        return True
    covered = torch.zeros(size, dtype=torch.bool, device="cpu")
    covered.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(covered.as_strided(b.shape, b.stride(), b.storage_offset()).any())


def _has_gradient(output: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output))


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(_shown, value)) + ")"
    return repr(value)[:60]
