"""The loss as one more layer behind the last one: it takes the model's output and gives the sum."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pipetrain.engine.structure import describe, kind_of
from pipetrain.errors import LayerError

Tensors = tuple[Tensor, ...]

# (output of the last layer, target tensors of the micro-batch) -> sum of the loss over its valid tokens or samples
LossSum = Callable[[Any, Tensors], Tensor]


class Loss(nn.Module):
    """Holds the targets of the micro-batch that is being run."""

    def __init__(self, loss_sum: LossSum) -> None:
        super().__init__()
        self._loss_sum = loss_sum
        self.targets: Tensors = ()

    def forward(self, output: Any) -> Tensor:
        """The loss sum, a scalar.

        Raises:
            LayerError: if it is none.
        """
        loss = self._loss_sum(output, self.targets)
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
            got = describe([kind_of(loss, False)])
            raise LayerError(
                "the loss must be one number, the sum over the valid samples of a micro-batch: a floating-point tensor "
                f"of shape [] (got {got}); end it with .sum()"
            )
        return loss
