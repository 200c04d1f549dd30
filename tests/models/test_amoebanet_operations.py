"""The operations of AmoebaNet's cells against formulas written out pixel by pixel."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pipetrain.models.amoebanet.droppath import DropPath, DropPathSchedule, KeepProbability
from pipetrain.models.amoebanet.operations import OPERATIONS, Conv, FactorizedReduction, init_convolution

SIZES = [1, 2, 4, 5, 27, 28]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def window(x: Tensor, stride: int, reach: tuple[range, range], reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """For every `stride`-th pixel what `reduce` makes of the pixels [B, C, n] around it that are in the picture."""
    height, width = x.shape[2:]
    rows = []
    for y in range(0, height, stride):
        row = []
        for z in range(0, width, stride):
            seen = [
                x[:, :, y + i, z + j] for i in reach[0] for j in reach[1] if 0 <= y + i < height and 0 <= z + j < width
            ]
            row.append(reduce(torch.stack(seen, dim=-1)))
        rows.append(torch.stack(row, dim=-1))
    return torch.stack(rows, dim=-2)


def convolved(x: Tensor, weight: Tensor, stride: tuple[int, int] = (1, 1), dilation: int = 1) -> Tensor:
    """A convolution [F, C, i, j] centred on every `stride`-th pixel, zeros around the picture, one pixel at a time."""
    num_filters, _, high, wide = weight.shape
    height, width = x.shape[2:]
    out = torch.zeros(len(x), num_filters, -(-height // stride[0]), -(-width // stride[1]))
    for y in range(out.shape[2]):
        for z in range(out.shape[3]):
            for i in range(high):
                for j in range(wide):
                    row = y * stride[0] + (i - high // 2) * dilation
                    column = z * stride[1] + (j - wide // 2) * dilation
                    if 0 <= row < height and 0 <= column < width:
                        out[:, :, y, z] += x[:, :, row, column] @ weight[:, :, i, j].T
    return out


def normalised(x: Tensor) -> Tensor:
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-5).sqrt()


def near(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and torch.allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("stride", [1, 2])
def test_all_operations_agree_on_sizes_odd_ones_too(name: str, stride: int) -> None:
    operation = OPERATIONS[name](8, stride, nn.BatchNorm2d)
    for height in SIZES:
        for width in SIZES:
            x = torch.randn(2, 8, height, width)
            assert operation(x).shape == (2, 8, -(-height // stride), -(-width // stride)), (height, width)


@pytest.mark.parametrize("size", SIZES)
def test_factorized_reduction_agrees_with_them(size: int) -> None:
    half = -(-size // 2)
    assert FactorizedReduction(3, 8, nn.BatchNorm2d)(torch.randn(2, 3, size, size)).shape == (2, 8, half, half)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(5, 5), (6, 4), (27, 3)])
def test_poolings(stride: int, size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size) - 5  # all below zero: padding with zeros would win every maximum
    pools = {name: OPERATIONS[name](3, stride, nn.BatchNorm2d)(x) for name in OPERATIONS if "pool" in name}
    around, onward = range(-1, 2), range(2)

    def largest(seen: Tensor) -> Tensor:
        return seen.amax(-1)

    assert torch.equal(pools.pop("max_pool_3x3"), window(x, stride, (around, around), largest))
    assert torch.equal(pools.pop("max_pool_2x2"), window(x, stride, (onward, onward), largest))
    assert near(pools.pop("avg_pool_3x3"), window(x, stride, (around, around), lambda seen: seen.mean(-1)))
    assert not pools


def test_none_is_the_state_itself_and_with_a_stride_a_convolution() -> None:
    x = torch.randn(2, 4, 5, 5)
    assert OPERATIONS["none"](4, 1, nn.BatchNorm2d)(x) is x
    strided = OPERATIONS["none"](4, 2, nn.BatchNorm2d)
    assert isinstance(strided, Conv)
    assert near(strided(x), normalised(convolved(x.relu(), strided.conv.weight, (2, 2))))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("name", "kernels"),
    [("1x1", [(1, 1)]), ("3x3", [(1, 1), (3, 3), (1, 1)]), ("1x7_7x1", [(1, 1), (1, 7), (7, 1), (1, 1)])],
)
def test_convolutions(name: str, kernels: list[tuple[int, int]], stride: int) -> None:
    """Each a ReLU, a convolution and a BatchNorm; what is not 1x1 has a quarter of the filters and the stride."""
    operation = OPERATIONS[name](8, stride, nn.BatchNorm2d)
    convs = [part for part in operation.modules() if isinstance(part, nn.Conv2d)]
    assert [conv.kernel_size for conv in convs] == kernels
    assert [conv.out_channels for conv in convs] == [8] if name == "1x1" else [2] * (len(convs) - 1) + [8]
    x = expected = torch.randn(2, 8, 9, 6)
    strides = {(1, 1): (1, 1), (3, 3): (stride, stride), (1, 7): (1, stride), (7, 1): (stride, 1)}
    if name == "1x1":
        strides[1, 1] = (stride, stride)
    for conv in convs:
        expected = normalised(convolved(expected.relu(), conv.weight, strides[conv.kernel_size]))
    assert near(operation(x), expected)


def test_a_bottleneck_keeps_one_filter() -> None:
    assert OPERATIONS["3x3"](2, 1, nn.BatchNorm2d)(torch.randn(2, 2, 3, 3)).shape == (2, 2, 3, 3)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("name", "size", "dilation"), [("separable_3x3_2", 3, 1), ("dilated_2_separable_5x5_2", 5, 2)])
def test_separable_convolutions(name: str, size: int, dilation: int, stride: int) -> None:
    """Twice ReLU, one filter for each channel, a 1x1 convolution, BatchNorm; the stride comes first."""
    operation = OPERATIONS[name](4, stride, nn.BatchNorm2d)
    each, mix, each_again, mix_again = (part.weight for part in operation.modules() if isinstance(part, nn.Conv2d))
    assert each.shape == each_again.shape == (4, 1, size, size)

    def separable(x: Tensor, each: Tensor, mix: Tensor, stride: int) -> Tensor:
        alone = [
            convolved(x[:, c : c + 1].relu(), each[c : c + 1], (stride, stride), dilation) for c in range(x.shape[1])
        ]
        return normalised(convolved(torch.cat(alone, dim=1), mix))

    x = torch.randn(2, 4, 7, 6)
    assert near(operation(x), separable(separable(x, each, mix, stride), each_again, mix_again, 1))


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_factorized_reduction_sees_even_and_odd_pixels(size: tuple[int, int]) -> None:
    reduction = FactorizedReduction(3, 4, nn.BatchNorm2d)
    x = torch.randn(2, 3, *size)
    rows, columns = -(-size[0] // 2), -(-size[1] // 2)
    odd = torch.zeros(2, 3, rows, columns)
    for y in range(size[0] // 2):
        for z in range(size[1] // 2):
            odd[:, :, y, z] = x[:, :, 2 * y + 1, 2 * z + 1]
    parts = [convolved(x[:, :, ::2, ::2].relu(), reduction.even.weight), convolved(odd.relu(), reduction.odd.weight)]
    assert near(reduction(x), normalised(torch.cat(parts, dim=1)))


@pytest.mark.parametrize(
    ("conv", "fan_out"),
    [(nn.Conv2d(16, 64, 3), 64 * 9), (nn.Conv2d(64, 32, (1, 7)), 32 * 7), (nn.Conv2d(512, 512, 5, groups=512), 25)],
)
def test_initial_variance_is_two_by_the_fan_out(conv: nn.Conv2d, fan_out: int) -> None:
    init_convolution(conv)
    assert float(conv.weight.detach().var()) == pytest.approx(2 / fan_out, rel=0.05)
    assert float(conv.weight.detach().abs().max()) <= 2 * math.sqrt(1.3 * 2 / fan_out)


def test_every_convolution_is_initialised_so() -> None:
    for name in OPERATIONS:
        for part in OPERATIONS[name](64, 1, nn.BatchNorm2d).modules():
            if isinstance(part, nn.Conv2d):
                fan_out = part.out_channels // part.groups * part.kernel_size[0] * part.kernel_size[1]
                assert float(part.weight.detach().std()) == pytest.approx(math.sqrt(2 / fan_out), rel=0.15), name
                assert part.bias is None


def test_drop_path_drops_samples_as_a_whole_and_keeps_the_mean() -> None:
    out = DropPath()(torch.ones(10_000, 2, 3, 3), 0.8)
    assert sorted(out.unique().tolist()) == [0.0, 1.25]
    assert torch.equal(out.amin((1, 2, 3)), out.amax((1, 2, 3)))
    assert float((out > 0).float().mean()) == pytest.approx(0.8, abs=0.02)


def test_the_steps_go_on_where_a_run_goes_on_with_other_micro_batches() -> None:
    four, two = (KeepProbability(DropPathSchedule(rate=1.0, steps=10, forwards_per_step=n)) for n in (4, 2))
    for _ in range(4 * 4):
        four()
    two.load_state_dict(four.state_dict())
    assert [round(1 - float(two()), 4) for _ in range(4)] == [0.4, 0.4, 0.5, 0.5]


def test_paths_are_dropped_more_often_in_later_cells_and_in_later_steps() -> None:
    """v1 of the source is the part of the steps, v2 that of the depth, v3 their product."""
    whole = DropPathSchedule(rate=0.3, steps=4, forwards_per_step=2)
    middle = KeepProbability(whole.scaled(0.5))
    assert [round(float(middle()), 4) for _ in range(12)] == [
        *(1.0, 1.0, 0.9625, 0.9625, 0.925, 0.925, 0.8875, 0.8875),
        *(0.85, 0.85, 0.85, 0.85),
    ]
    thirds = KeepProbability(DropPathSchedule(rate=1.0, steps=1000, forwards_per_step=3))
    assert [round(1000 * (1 - float(thirds()))) for _ in range(3000)] == [
        step for step in range(1000) for _ in range(3)
    ]
    assert KeepProbability(DropPathSchedule(0.3, 0, 2))() == 0.7
    assert not list(KeepProbability(DropPathSchedule(0.3, 0, 2)).buffers())
