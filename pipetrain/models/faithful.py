"""Do the layers of a captured module compute what the module itself computes? Asked before a worker starts.

A trace follows tensors, and Python is more than that: what a forward keeps in attributes, asks of types or does by
hooks can be lost without a word. So the module and its layers both train on the same micro-batch, twice, since state
shows the second time only, and every number must come out the same.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pipetrain.errors import ConfigError
from pipetrain.models.imports import shown
from pipetrain.models.recipe import BATCH, Recipe, Tensors, Value, unsplit
from pipetrain.models.trace import WAYS_OUT
from pipetrain.models.tryout import LARGEST_TRIED
from pipetrain.models.whole import WithoutMemory
from pipetrain.seeds import seeded

_ROUNDS, _ROWS = 2, 2
# In float64, and for modules that insist on float32, in that. Shares of the largest value that may differ.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


def check_layers(recipe: Recipe, inputs: Tensors, targets: Tensors) -> None:
    """Compares losses, gradients and buffers, with the same draws for both.

    Args:
        inputs, targets: a micro-batch; its first rows are enough. A module too large for this is believed.

    Raises:
        ConfigError: with the first number that differs, or a parameter that forward changes although it is tied.
    """
    if recipe.whole is None or _num_parameters(recipe) > LARGEST_TRIED:
        return
    inputs, targets = (tuple(t[:_ROWS] for t in tensors) for tensors in (inputs, targets))
    failure = Exception()
    for dtype, tolerance in _TOLERANCE.items():
        try:
            expected = _train(*_whole(recipe, dtype), recipe, inputs, targets, dtype)
        except Exception as error:
            failure = error
            continue  # perhaps in another precision
        try:
            got = _train(*_layers(recipe, dtype), recipe, inputs, targets, dtype)
        except Exception as error:
            raise ConfigError(
                f"the module runs, but not the layers it was cut into: {shown(error)}. {WAYS_OUT}"
            ) from error
        difference = _difference(got, expected, tolerance)
        if difference is not None:
            raise ConfigError(
                f"the layers that the module was cut into do not compute what it computes itself: {difference}. "
                "What the trace of a forward cannot see: attributes that it changes, isinstance(x, Tensor), hooks, "
                f"values that __init__ drew at random for Python code. {WAYS_OUT}"
            )
        tied = {unsplit(layer.full_name(name)) for layer, name in _uses_of_ties(recipe)}
        if changed := sorted(expected.changed & tied):
            raise ConfigError(
                f"forward changes the parameter {changed[0]}, which several layers use: they would not see the change "
                "at the same time; change it in one module only, or between the steps"
            )
        return
    raise ConfigError(f"the module itself fails: {shown(failure)}") from failure


def _num_parameters(recipe: Recipe) -> int:
    assert recipe.whole is not None
    with WithoutMemory():
        number = sum(parameter.numel() for parameter in recipe.whole().parameters())
    recipe.release()
    return number


@dataclass
class _Numbers:
    losses: list[float]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    changed: set[str]  # parameters that the forward itself changed


_Model = tuple[list[tuple[str, nn.Module]], Callable[[Tensors], Any]]  # modules with the prefix of their names; forward


def _whole(recipe: Recipe, dtype: torch.dtype) -> _Model:
    assert recipe.whole is not None
    module = recipe.whole().to(dtype)
    recipe.release()
    return [("", module)], lambda inputs: module(*inputs)


def _layers(recipe: Recipe, dtype: torch.dtype) -> _Model:
    modules = [layer.build() for layer in recipe.layers]
    recipe.release()
    by_name = {layer.name: module for layer, module in zip(recipe.layers, modules, strict=True)}
    for (owner, owned), *others in recipe.ties:
        shared = by_name[owner].get_parameter(owned)
        for name, tied in others:
            path, _, last = tied.rpartition(".")
            by_name[name].get_submodule(path)._parameters[last] = shared
    for module in modules:
        module.to(dtype)

    def forward(inputs: Tensors) -> Any:
        outputs: dict[str, Any] = {BATCH: inputs}
        for place, layer in enumerate(recipe.layers):
            # Copies, as in the pipeline: what one layer changes in place no other sees.
            taken = tree_map_only(
                Tensor, Tensor.clone, [x for v in recipe.taken_by(place) for x in _resolve(v, outputs)]
            )
            outputs[layer.name] = by_name[layer.name](*taken)
        return outputs[recipe.layers[-1].name]

    return [(layer.full_name(""), module) for layer, module in zip(recipe.layers, modules, strict=True)], forward


def _resolve(value: Value, outputs: dict[str, Any]) -> tuple[Any, ...]:
    whole = outputs[value.layer]
    if value.element is not None:
        return (whole[value.element],)
    return tuple(whole) if value.layer == BATCH else (whole,)


def _train(
    modules: list[tuple[str, nn.Module]],
    forward: Callable[[Tensors], Any],
    recipe: Recipe,
    inputs: Tensors,
    targets: Tensors,
    dtype: torch.dtype,
) -> _Numbers:
    parameters = {
        unsplit(prefix + name): parameter
        for prefix, module in reversed(modules)
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    losses = []
    with seeded(0), _SameDraws(), torch.enable_grad():
        for _ in range(_ROUNDS):
            loss = recipe.loss_sum(forward(_copied(inputs, dtype)), _copied(targets, dtype))
            loss.backward()
            losses.append(loss.item())
    return _Numbers(
        losses,
        {name: parameter.grad for name, parameter in parameters.items()},
        {p + name: b for p, module in modules for name, b in module.named_buffers() if "@" not in p + name},
        {name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])},
    )


def _copied(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return tuple(t.to(dtype, copy=True) if t.is_floating_point() else t.clone() for t in tensors)


class _SameDraws(TorchDispatchMode):
    """What is drawn at random depends on the operation and its sizes alone, not on what was drawn before."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            sizes = [list(x.shape) if isinstance(x, Tensor) else x for x in tree_leaves(args)]
            digest = hashlib.blake2b(f"{func} {sizes}".encode(), digest_size=7).digest()
            torch.default_generator.manual_seed(int.from_bytes(digest, "little"))
        return func(*args, **(kwargs or {}))


def _difference(got: _Numbers, expected: _Numbers, tolerance: float) -> str | None:
    for i, (a, b) in enumerate(zip(got.losses, expected.losses, strict=True)):
        if not _close(torch.tensor(a), torch.tensor(b), tolerance, abs(b)):
            return f"the loss of the {('first', 'second')[i]} micro-batch is {a:.6g}, not {b:.6g}"
    gradients = [g.abs().max() for g in expected.gradients.values() if g is not None and g.numel()]
    largest = float(torch.stack(gradients).max()) if gradients else 0.0
    for name, gradient in got.gradients.items():
        other = expected.gradients.get(name)
        if (gradient is None) != (other is None):
            return f"{name} has {'no' if gradient is None else 'a'} gradient"
        if gradient is not None and other is not None and not _close(gradient, other, tolerance, largest):
            return f"the gradient of {name} differs by {float((gradient - other).abs().max()):.2g}"
    for name, buffer in got.buffers.items():
        if name in expected.buffers and not _close(buffer, expected.buffers[name], tolerance, 1.0):
            return f"the buffer {name} differs after {_ROUNDS} micro-batches"
    return None


def _close(a: Tensor, b: Tensor, tolerance: float, scale: float) -> bool:
    if a.shape != b.shape:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    return torch.allclose(a, b.to(a.dtype), rtol=tolerance, atol=tolerance * max(scale, 1e-30), equal_nan=True)


def _uses_of_ties(recipe: Recipe) -> list[tuple[Any, str]]:
    layers = {layer.name: layer for layer in recipe.layers}
    return [(layers[layer], parameter) for tie in recipe.ties for layer, parameter in tie]
