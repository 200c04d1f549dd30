"""A whole module called micro-batch by micro-batch in plain PyTorch: what a pipeline must equal.

Imports nothing of pipetrain but the rule that says which seed is whose.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipetrain.seeds import derive_seed


class SeededCalls:
    """Seeds torch's generator before every call of a module that may draw, from its name and the number of the call."""

    def __init__(self, module: nn.Module, seed: int) -> None:
        self._seed, self._microbatch = seed, 0
        self._calls: dict[str, int] = {}
        for name, part in module.named_modules():
            if name and (next(part.children(), None) is None or isinstance(part, nn.MultiheadAttention)):
                part.register_forward_pre_hook(self._before(name))

    def start(self, microbatch: int) -> None:
        """The calls that follow are of this micro-batch."""
        self._microbatch = microbatch
        self._calls.clear()

    def _before(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            call = self._calls[name] = self._calls.get(name, 0) + 1
            torch.manual_seed(derive_seed(self._seed, 0, name if call == 1 else f"{name}@{call}", self._microbatch))

        return hook


def train_step(
    module: nn.Module,
    loss_sum: Callable[[Any, Tensor], Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    seed: int,
) -> tuple[float, dict[str, Tensor]]:
    """Forward and backward of one mini-batch.

    Args:
        inputs, targets: one of each for every micro-batch.

    Returns:
        The loss sum, and the gradients of the mean loss by parameter name.
    """
    seeded, total = SeededCalls(module, seed), sum(map(len, targets))
    module.train()
    loss = 0.0
    for microbatch, (x, y) in enumerate(zip(inputs, targets, strict=True)):
        seeded.start(microbatch)
        piece = loss_sum(module(x), y)
        (piece / total).backward()
        loss += piece.item()
    return loss, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
