"""The loss as one more layer behind the last one: it takes the model's output and gives the sum."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pipetrain.engine.structure import describe, kind_of
from pipetrain.errors import LayerError

Tensors = tuple[Tensor, ...]

# (output of the last layer, target tensors of the micro-batch) -> sum of the loss over its valid tokens or samples
LossSum = Callable[[Any, Tensors], Tensor]


class Loss(nn.Module):
    """Holds the targets of the micro-batch that is being run."""

    def __init__(self, loss_sum: LossSum, measures: Sequence[LossSum] = ()) -> None:
        """
        Args:
            measures: further sums over the samples, looked at in evaluation.
        """
        super().__init__()
        self._loss_sum = loss_sum
        self._measures = measures
        self.targets: Tensors = ()
        self.measured: list[Tensor] = []  # of the last micro-batch in evaluation

    def forward(self, output: Any) -> Tensor:
        """The loss sum, a scalar.

        Raises:
            LayerError: if it is none.
        """
        loss = self._loss_sum(output, self.targets)
        self.measured = [] if self.training else [measure(output, self.targets) for measure in self._measures]
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
            got = describe([kind_of(loss, False)])
            raise LayerError(
                "the loss must be one number, the sum over the valid samples of a micro-batch: a floating-point tensor "
                f"of shape [] (got {got}); end it with .sum()"
            )
        return loss
