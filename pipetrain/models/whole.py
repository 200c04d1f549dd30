"""The module that a factory makes: its parts are taken from it, then it is dropped."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pipetrain.seeds import seeded

Factory = Callable[[], Any]


class Whole:
    """The whole module, made when a part of it is asked for and forgotten at `release`.

    Made again it has the same initial values: they come from the seed. The caller's generators are left as they were.
    """

    def __init__(self, factory: Callable[[], nn.Module], seed: int) -> None:
        self._factory, self._seed = factory, seed
        self._module: nn.Module | None = None

    def module(self) -> nn.Module:
        """The module; the same object until it is released."""
        if self._module is None:
            with seeded(self._seed):
                self._module = self._factory()
        return self._module

    def release(self) -> None:
        """Forgets the module; the parts that were taken from it live on."""
        self._module = None


class WithoutMemory(TorchFunctionMode):
    """Makes `torch.empty`, and with it the parameters of torch's layers, take no memory: enough to trace a module.

    Everything else is real, so factories may compute with small tensors.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
