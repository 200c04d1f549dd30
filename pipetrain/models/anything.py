"""Any PyTorch module as a pipeline: captured, cut into layers, trained for a loss by name."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from pipetrain.errors import ConfigError
from pipetrain.models.capture import capture
from pipetrain.models.imports import import_object, shown
from pipetrain.models.losses import ACCURACY, find_loss
from pipetrain.models.recipe import Recipe
from pipetrain.models.whole import Whole, WithoutMemory
from pipetrain.seeds import seeded
from pipetrain.suggest import did_you_mean
from pipetrain.vision import import_torchvision


def anything(*, factory: str, arguments: Mapping[str, Any], loss: str, seed: int, num_inputs: int = 1) -> Recipe:
    """The recipe of a module that knows nothing of pipelines.

    Args:
        factory: 'package.module:function' (or a class), or the name of a classification model of torchvision; gives an
            `nn.Module`, or a list of modules that follow each other.
        arguments: keyword arguments of the factory.
        loss: see `find_loss`.
        seed: torch's generator is seeded with it before the factory is called.
        num_inputs: tensors of a mini-batch that are given to the module.

    Raises:
        ConfigError: if the factory is missing, raises or gives no module, if the module cannot be captured, or if
            there is no such loss.
    """
    loss_sum, count = find_loss(loss)
    make = partial(_make, _find(factory), dict(arguments))
    whole = Whole(make, seed)
    try:
        layers, ties = capture(_without_memory(make, seed), whole.module, num_inputs)
    except ConfigError as error:
        raise ConfigError(f"model.factory={factory}: {error}") from error
    return Recipe(
        tuple(layers),
        loss_sum=loss_sum,
        count=count,
        ties=tuple(ties),
        release=whole.release,
        whole=whole.module,
        measures=ACCURACY if loss == "cross_entropy" else {},
    )


def _find(name: str) -> Callable[..., Any]:
    if ":" in name:
        return import_object("model.factory", name)
    import_torchvision()
    models = importlib.import_module("torchvision.models")
    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(
            f"model.factory={name} is no classification model of torchvision.{did_you_mean(name, known)} "
            f"There are {', '.join(known[:3])} and {len(known) - 3} more; your own: model.factory=my_models:build"
        )
    return partial(models.get_model, name, weights=None)


def _make(factory: Callable[..., Any], arguments: dict[str, Any]) -> nn.Module:
    """Calls the factory.

    Raises:
        ConfigError: if it raises, or gives something else than modules.
    """
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    _check_arguments(factory, arguments, given)
    try:
        made = factory(**arguments)
    except Exception as error:
        raise ConfigError(f"calling it with ({given}) raised {shown(error)}") from error
    blocks = list(made) if isinstance(made, list | tuple) else [made]
    wrong = [block for block in blocks if not isinstance(block, nn.Module)]
    if wrong or not blocks:
        what = f"{wrong[0]!r:.60}, a {type(wrong[0]).__name__}" if wrong else "an empty list"
        raise ConfigError(f"it gives {what}; it must give an nn.Module or a list of them")
    module = nn.Sequential(*blocks) if isinstance(made, list | tuple) else made
    return module.train()  # as every training loop does; a module may keep some of its parts in evaluation


def _check_arguments(factory: Callable[..., Any], arguments: dict[str, Any], given: str) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some of what is written in C has none
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"it cannot be called with ({given}): {error}; it takes {signature}, and model.arguments are what it gets"
        ) from error


def _without_memory(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The module to look at. A factory that reads its own parameters makes it with memory."""
    with seeded(seed):
        try:
            with WithoutMemory():
                return make()
        except ConfigError:
            return make()
