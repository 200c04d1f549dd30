"""Where a network begins and ends: stem, auxiliary head, classifier, and the loss of both heads."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipetrain.models.amoebanet.cell import States
from pipetrain.models.amoebanet.operations import Conv, Norm, init_convolution
from pipetrain.models.losses import IGNORED_TARGET
from pipetrain.models.recipe import Tensors

# Of the auxiliary head. Source: the authors' TensorFlow code, 128 and 768 filters times a scale of 0.4, rounded down.
AUX_FILTERS = (51, 307)
AUX_WINDOW, AUX_STRIDE = 5, 3


class Stem(nn.Module):
    """A 3x3 convolution of the image: [B, C, H, W] -> the first state, twice, as there is none before it.

    All states lie in memory with the channels last, because this one does: on a CPU, maxima of windows then take a
    fraction of the time (docs/benchmarks.md); it is also what a GPU's tensor cores want.
    """

    def __init__(self, channels: int, filters: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv = Conv(channels, filters, (3, 3), (stride, stride), norm, relu=False)

    def forward(self, image: Tensor) -> States:
        state = self.conv(image).contiguous(memory_format=torch.channels_last)
        return state, state


class AuxiliaryHead(nn.Module):
    """A second classifier, in the middle of the network: [B, C, h, w] -> logits [B, classes]; in evaluation None.

    As published it averages windows of 5x5 at a stride of 3. Where a state is smaller than a window, the window is as
    large as the state. The convolution that follows has one window: all that is left.

    Args:
        size: (h, w) of the state.
    """

    def __init__(self, channels: int, size: tuple[int, int], num_classes: int, norm: Norm) -> None:
        super().__init__()
        few, many = AUX_FILTERS
        window = (min(AUX_WINDOW, size[0]), min(AUX_WINDOW, size[1]))
        left = ((size[0] - window[0]) // AUX_STRIDE + 1, (size[1] - window[1]) // AUX_STRIDE + 1)
        self.pool = nn.AvgPool2d(window, AUX_STRIDE)
        self.narrow = nn.Conv2d(channels, few, 1, bias=False)
        self.narrow_norm = norm(few)
        self.reduce = nn.Conv2d(few, many, left, bias=False)
        self.reduce_norm = norm(many)
        self.output = output_layer(many, num_classes)
        init_convolution(self.narrow)
        init_convolution(self.reduce)

    def forward(self, state: Tensor) -> Tensor | None:
        if not self.training:
            return None
        x = self.pool(F.relu(state))
        x = F.relu(self.narrow_norm(self.narrow(x)))
        x = F.relu(self.reduce_norm(self.reduce(x)))
        return self.output(x.flatten(1))  # type: ignore[no-any-return]


class Classifier(nn.Module):
    """State [B, C, h, w] -> logits [B, classes]; with the auxiliary head's logits, where there are any, a pair."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.output = output_layer(channels, num_classes)

    def forward(self, state: Tensor, auxiliary: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        logits = self.output(self.dropout(F.relu(state).mean((2, 3))))
        return logits if auxiliary is None else (logits, auxiliary)


def output_layer(num_in: int, num_classes: int) -> nn.Linear:
    """A linear layer whose logits start as large as its inputs, whatever the number of classes.

    The source's fan-out rule is made for a thousand classes; with ten the first logits would be far from zero.
    """
    layer = nn.Linear(num_in, num_classes)
    nn.init.normal_(layer.weight, std=num_in**-0.5)
    nn.init.zeros_(layer.bias)
    return layer


def loss_sum(output: Any, targets: Tensors, *, label_smoothing: float, aux_weight: float) -> Tensor:
    """Sum of the smoothed cross entropy over the samples, plus `aux_weight` times that of the auxiliary head.

    Args:
        output: logits [B, classes]; in training with an auxiliary head the two heads' logits.
        targets: (class numbers [B],).
    """
    (target,) = targets

    def of(logits: Tensor) -> Tensor:
        return F.cross_entropy(
            logits, target, ignore_index=IGNORED_TARGET, label_smoothing=label_smoothing, reduction="sum"
        )

    if isinstance(output, tuple):
        logits, auxiliary = output
        return of(logits) + aux_weight * of(auxiliary)
    return of(output)
