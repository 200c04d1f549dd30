"""The operations of a cell, each from [B, F, h, w] to [B, F, ceil(h / stride), ceil(w / stride)], for odd sizes, too.

Every convolution is ReLU, convolution without bias, BatchNorm. Windows of odd size are centred on every `stride`-th
pixel from the first; one of 2x2 begins there. What hangs over the edge is zero for a convolution and is not there for a
pooling: an average is over the pixels in the picture. Source: the authors' TensorFlow code, network_utils.py; where a
stride of 2 meets an even size, its windows lie one pixel further.

torchgpipe's port makes `max_pool_3x3` an average (its benchmarks/models/amoebanet/operations.py); here it is a maximum.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]  # channels -> BatchNorm, with its settings

BOTTLENECK = 4  # a 3x3 or 1x7_7x1 convolution works on a quarter of the filters


class Conv(nn.Module):
    """ReLU, convolution, BatchNorm: [B, C, h, w] -> [B, F, h', w'].

    Args:
        relu: False for a stem, whose input is an image: half of a normalised image is below zero.
        separable: convolve each channel for itself, then all pixels by a 1x1 convolution.
    """

    def __init__(
        self,
        channels: int,
        filters: int,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        norm: Norm,
        *,
        relu: bool = True,
        separable: bool = False,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2 * dilation, kernel[1] // 2 * dilation)
        between, groups = (channels, channels) if separable else (filters, 1)
        conv = nn.Conv2d(channels, between, kernel, stride, padding, dilation, groups, bias=False)
        self.relu = nn.ReLU() if relu else nn.Identity()
        self.conv = nn.Sequential(conv, nn.Conv2d(channels, filters, 1, bias=False)) if separable else conv
        self.norm = norm(filters)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                init_convolution(part)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.relu(x)))  # type: ignore[no-any-return]


def init_convolution(conv: nn.Conv2d) -> None:
    """A normal distribution of variance 2 / fan-out, cut off at two standard deviations.

    Source: TensorFlow's `variance_scaling_initializer(mode="FAN_OUT")`, which multiplies the variance by 1.3 because
    cutting off makes it smaller. A filter that sees one channel only feeds one.
    """
    fan_out = conv.out_channels // conv.groups * math.prod(conv.kernel_size)
    std = math.sqrt(1.3 * 2 / fan_out)
    nn.init.trunc_normal_(conv.weight, std=std, a=-2 * std, b=2 * std)


def conv_1x1(channels: int, filters: int, norm: Norm, stride: int = 1) -> Conv:
    """A 1x1 convolution: of every `stride`-th pixel."""
    return Conv(channels, filters, (1, 1), (stride, stride), norm)


class FactorizedReduction(nn.Module):
    """Halves the picture and sees more than every fourth pixel: [B, C, h, w] -> [B, F, ceil(h / 2), ceil(w / 2)].

    Half of the filters see the pixels at even places, the others those at odd places, one further right and down.
    """

    def __init__(self, channels: int, filters: int, norm: Norm) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.even = nn.Conv2d(channels, filters // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(channels, filters - filters // 2, 1, stride=2, bias=False)
        self.norm = norm(filters)
        init_convolution(self.even)
        init_convolution(self.odd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        # One column and row cut off in front and, so that odd sizes come out alike, one of zeros added behind.
        shifted = F.pad(x, (-1, 1, -1, 1))
        return self.norm(cat_channels(self.even(x), self.odd(shifted)))  # type: ignore[no-any-return]


def cat_channels(*parts: Tensor) -> Tensor:
    """[B, F1, h, w], [B, F2, h, w], ... -> [B, F1 + F2 + ..., h, w]."""
    return torch.cat(parts, dim=1)


def _none(filters: int, stride: int, norm: Norm) -> nn.Module:
    """The state itself. With a stride, which neither AmoebaNet-B nor D asks for, the source puts a 1x1 convolution."""
    return nn.Identity() if stride == 1 else conv_1x1(filters, filters, norm, stride)


def _conv_3x3(filters: int, stride: int, norm: Norm) -> nn.Module:
    few = max(1, filters // BOTTLENECK)
    return nn.Sequential(
        conv_1x1(filters, few, norm),
        Conv(few, few, (3, 3), (stride, stride), norm),
        conv_1x1(few, filters, norm),
    )


def _conv_1x7_7x1(filters: int, stride: int, norm: Norm) -> nn.Module:
    few = max(1, filters // BOTTLENECK)
    return nn.Sequential(
        conv_1x1(filters, few, norm),
        Conv(few, few, (1, 7), (1, stride), norm),
        Conv(few, few, (7, 1), (stride, 1), norm),
        conv_1x1(few, filters, norm),
    )


def _separable(filters: int, stride: int, norm: Norm, kernel: int, dilation: int = 1) -> nn.Module:
    """Twice, the first time with the stride."""
    size = (kernel, kernel)
    return nn.Sequential(
        Conv(filters, filters, size, (stride, stride), norm, separable=True, dilation=dilation),
        Conv(filters, filters, size, (1, 1), norm, separable=True, dilation=dilation),
    )


def _max_pool_2x2(stride: int) -> nn.Module:
    return nn.Sequential(nn.ConstantPad2d((0, 1, 0, 1), -math.inf), nn.MaxPool2d(2, stride))


# By the names of the genotypes. (filters, stride, norm) -> a module.
OPERATIONS: dict[str, Callable[[int, int, Norm], nn.Module]] = {
    "none": _none,
    "1x1": lambda filters, stride, norm: conv_1x1(filters, filters, norm, stride),
    "3x3": _conv_3x3,
    "1x7_7x1": _conv_1x7_7x1,
    "separable_3x3_2": lambda filters, stride, norm: _separable(filters, stride, norm, 3),
    # The name says that pixels are two apart. The source's code makes a plain 5x5 of it, with the same parameters.
    "dilated_2_separable_5x5_2": lambda filters, stride, norm: _separable(filters, stride, norm, 5, dilation=2),
    "avg_pool_3x3": lambda filters, stride, norm: nn.AvgPool2d(3, stride, padding=1, count_include_pad=False),
    "max_pool_3x3": lambda filters, stride, norm: nn.MaxPool2d(3, stride, padding=1),
    "max_pool_2x2": lambda filters, stride, norm: _max_pool_2x2(stride),
}
