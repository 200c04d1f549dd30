"""What a captured model is trained for: the sum of a loss over the samples, and how many there are."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pipetrain.errors import ConfigError
from pipetrain.models.imports import import_object
from pipetrain.models.recipe import Tensors
from pipetrain.suggest import one_of

IGNORED_TARGET = -100  # targets with this value are padding: no loss, not counted
AUXILIARY_WEIGHT = 0.3  # of the loss of an auxiliary head. Source: Szegedy et al. 2015, section 5

LossSum = Callable[[Any, Tensors], Tensor]
Count = Callable[[Tensors], int]


def find_loss(name: str) -> tuple[LossSum, Count]:
    """The loss by its name in the settings: cross_entropy, mse, or package.module:function.

    Raises:
        ConfigError: if there is no such loss.
    """
    if ":" in name:
        function = import_object("model.loss", name)
        return _Own(name, function), num_samples
    known: dict[str, tuple[LossSum, Count]] = {
        "cross_entropy": (cross_entropy_sum, count_targets),
        "mse": (squared_error_sum, num_samples),
    }
    if name not in known:
        raise ConfigError(
            f"model.loss={name}: no such loss. {one_of(name, tuple(known))}; or package.module:function, "
            "which takes the output and the targets and returns the sum of the loss over the samples"
        )
    return known[name]


def cross_entropy_sum(output: Any, targets: Tensors) -> Tensor:
    """Sum of -log p(target) over the targets that are not padding.

    Args:
        output: logits [..., C]; of a tuple the first ones count fully and the others that are tensors, which come from
            auxiliary heads, by 0.3.
        targets: (class numbers [...],).
    """
    main, *auxiliary = output if isinstance(output, tuple | list) else (output,)
    loss = _cross_entropy_sum(main, targets)
    for logits in auxiliary:
        if logits is not None:
            loss = loss + AUXILIARY_WEIGHT * _cross_entropy_sum(logits, targets)
    return loss


def _cross_entropy_sum(logits: Any, targets: Tensors) -> Tensor:
    (target,) = targets
    if not isinstance(logits, Tensor) or logits.shape[:-1] != target.shape:
        shown = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ConfigError(
            f"model.loss=cross_entropy needs logits of shape {[*target.shape, 'classes']} for targets of shape "
            f"{list(target.shape)}, but the model returns {shown}; give a loss of your own as package.module:function"
        )
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")


def count_targets(targets: Tensors) -> int:
    """Targets that are not padding."""
    return int((targets[0] != IGNORED_TARGET).sum())


def among_the_best(output: Any, targets: Tensors, *, best: int) -> Tensor:
    """How many targets that are not padding are among the classes with the largest logits.

    Args:
        output: logits [..., C], or a tuple that begins with them.
        targets: (class numbers [...],).
    """
    logits = output[0] if isinstance(output, tuple | list) else output
    (target,) = targets
    chosen = logits.topk(min(best, logits.shape[-1]), dim=-1).indices
    found: Tensor = (chosen == target[..., None]).any(-1)
    return found.sum()


ACCURACY = {"accuracy": partial(among_the_best, best=1), "top5": partial(among_the_best, best=5)}


def squared_error_sum(output: Any, targets: Tensors) -> Tensor:
    """Sum over the samples of the mean squared error of each."""
    (target,) = targets
    if not isinstance(output, Tensor) or output.shape != target.shape:
        shown = list(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ConfigError(
            f"model.loss=mse needs an output of the targets' shape {list(target.shape)}, but the model returns {shown}"
        )
    return F.mse_loss(output, target.to(output.dtype), reduction="sum") / max(1, target[0].numel())


def num_samples(targets: Tensors) -> int:
    """Samples in a micro-batch or mini-batch."""
    return len(targets[0])


class _Own:
    """A user's loss."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name, self._function = name, function

    def __call__(self, output: Any, targets: Tensors) -> Tensor:
        loss = self._function(output, *targets)
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            shown = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ConfigError(
                f"model.loss={self._name} returns {shown}; it must return one number, the sum of the loss over the "
                "samples, such as F.cross_entropy(output, target, reduction='sum')"
            )
        trained = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output))
        if torch.is_grad_enabled() and trained and not loss.requires_grad:
            raise ConfigError(
                f"model.loss={self._name} returns a number that no gradient flows back from, so nothing would be "
                "trained; compute it from the output by differentiable operations, without .detach(), .item(), argmax "
                "or torch.no_grad()"
            )
        return loss
