"""Keeps all numbers of every step in files: what `action=check` compares. The reference writes the same files.

A file holds `loss` and `norm` (of the gradient, before clipping) and, by names of the unsplit model, `gradient/NAME`
before clipping, `clip/NAME` (the factor that clipping applied to it), `weight/NAME` and `buffer/NAME` after the step
and `optimizer/NAME/KEY`. Its metadata holds the digests of what random modules drew.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipetrain.models.recipe import unsplit

DRAWS = "draws"  # module name -> sorted digests, as JSON


class Recorder:
    """Records the steps of one rank."""

    def __init__(self, path: Callable[[int], Path], modules: Iterable[tuple[str, nn.Module]]) -> None:
        """
        Args:
            path: of the file for a step; steps count from 1.
            modules: all modules, by full name; the random ones among them are listened to.
        """
        self._path = path
        self._gradients: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}
        self._draws: dict[str, set[str]] = {}
        for name, module in modules:
            if _is_random(module):
                module.register_forward_hook(partial(self._listen, unsplit(name)))

    def before_clipping(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Keeps the gradients as they are now."""
        self._gradients = {name: _copy(p.grad) for name, p in parameters.items() if p.grad is not None}

    def after_clipping(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Notes what each gradient has been multiplied by."""
        self._factors = {name: _factor(parameters[name].grad, before) for name, before in self._gradients.items()}

    def write(
        self,
        step: int,
        *,
        loss: float,
        norm: float,
        parameters: Mapping[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
    ) -> None:
        """Writes the file of a step that is done."""
        tensors = {
            "loss": torch.tensor(loss, dtype=torch.float64),
            "norm": torch.tensor(norm, dtype=torch.float64),
            **{f"gradient/{name}": gradient for name, gradient in self._gradients.items()},
            **{f"clip/{name}": factor for name, factor in self._factors.items()},
            **{f"weight/{name}": _copy(parameter) for name, parameter in parameters.items()},
            **{f"buffer/{name}": _copy(buffer) for name, buffer in buffers.items()},
            **{f"optimizer/{name}": _copy(value) for name, value in optimizer.items()},
        }
        draws = {name: sorted(digests) for name, digests in self._draws.items()}
        self._draws.clear()
        path = self._path(step)
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path, metadata={DRAWS: json.dumps(draws)})

    def _listen(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Notes which elements were dropped. A set: a recompute must draw the same once more."""
        if isinstance(output, Tensor) and module.training:
            zeros = (output == 0).cpu().numpy()
            self._draws.setdefault(name, set()).add(hashlib.sha256(zeros.tobytes()).hexdigest()[:16])


def _is_random(module: nn.Module) -> bool:
    """Dropout and its like, torchvision's StochasticDepth too: a module without children that drops with chance `p`."""
    chance = getattr(module, "p", None)
    return isinstance(chance, float) and chance > 0 and next(module.children(), None) is None


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _factor(after: Tensor | None, before: Tensor) -> Tensor:
    """What a gradient was multiplied by, as one float64 number."""
    before_norm: Tensor = torch.linalg.vector_norm(before, dtype=torch.float64)
    if after is None or before_norm == 0:
        return torch.ones((), dtype=torch.float64)
    after_norm: Tensor = torch.linalg.vector_norm(after.detach().cpu(), dtype=torch.float64)
    return after_norm / before_norm
