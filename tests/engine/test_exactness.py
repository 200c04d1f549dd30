"""Guarantees 1, 2, 3 and 5: numbers do not depend on the partitioning, and they are plain PyTorch's."""

import itertools
from typing import Any

import pytest
import torch
from pipeline import train
from reference import microbatch_loss, plain_gradients, plain_model
from torch import Tensor, nn

from pipetrain.models import LayerRecipe, Recipe, build
from pipetrain.models.transformer import IGNORED_TARGET

V, T = 50, 12


def transformer(**changes: Any) -> Recipe:
    settings = {
        "layers": 4,
        "d_model": 32,
        "d_ff": 64,
        "heads": 2,
        "dropout": 0.1,
        "tied": False,
        "positions": "learned",
        "init_scale": "none",
        "vocab_size": V,
        "seq_len": T,
    }
    return build("transformer", **(settings | changes))


def batches(steps: int, rows: int = 7) -> list[tuple[Tensor, Tensor]]:
    """Batches of an odd number of rows, some targets masked, so that no micro-batch counts like another."""
    out = []
    for _ in range(steps):
        inputs, targets = torch.randint(0, V, (rows, T)), torch.randint(0, V, (rows, T))
        targets[0, 3:] = IGNORED_TARGET
        targets[3] = IGNORED_TARGET
        out.append((inputs, targets))
    return out


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_losses_and_weights_are_the_same_bits_for_every_cut_and_recompute(
    tied: bool, autocast_dtype: torch.dtype | None
) -> None:
    recipe, data = transformer(tied=tied, logit_clip=1.0), batches(3)
    options = {"num_microbatches": 4, "autocast_dtype": autocast_dtype}
    expected = train(recipe, (6,), data, recompute=False, **options)
    cuts = [(6,), (3, 3), (1, 5), (5, 1), (2, 1, 3), (2, 2, 1, 1), (1,) * 6]
    for balance, recompute in itertools.product(cuts, (True, False)):
        got = train(recipe, balance, data, recompute=recompute, **options)
        case = f"balance {balance}, recompute {recompute}"
        assert [r.loss_sum for r in got.reports] == [r.loss_sum for r in expected.reports], case
        assert [r.grad_norm for r in got.reports] == [r.grad_norm for r in expected.reports], case
        for name, value in expected.parameters.items():
            assert torch.equal(got.parameters[name], value), f"{case}: {name}"


def test_dropout_is_really_on_in_the_comparison_above() -> None:
    data = batches(1)
    with_dropout = train(transformer(), (6,), data, num_microbatches=4)
    without = train(transformer(dropout=0.0), (6,), data, num_microbatches=4)
    assert with_dropout.reports[0].loss_sum != without.reports[0].loss_sum


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("balance", [(6,), (2, 4), (3, 1, 1, 1)])
@pytest.mark.parametrize("num_microbatches", [1, 3, 7])
def test_gradients_equal_plain_pytorch_in_float64(tied: bool, balance: tuple[int, ...], num_microbatches: int) -> None:
    recipe, data = transformer(tied=tied, dropout=0.0), batches(1)
    got = train(recipe, balance, data, num_microbatches=num_microbatches, dtype=torch.float64)
    model = plain_model(recipe, seed=0).double()
    loss = plain_gradients(recipe, model, *data[0])
    (report,) = got.reports
    assert report.loss_sum / report.count == pytest.approx(float(loss), rel=1e-12)
    norm = nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    assert report.grad_norm == pytest.approx(float(norm), rel=1e-10)
    expected = {
        name.replace("blocks_", "blocks."): p.grad for name, p in model.named_parameters(remove_duplicate=False)
    }
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    assert got.gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None
        assert float((got.gradients[name] - gradient).abs().max()) <= 1e-10 * largest, name


def test_dropout_masks_are_those_that_the_seeds_promise() -> None:
    """A loop in plain PyTorch, seeding each layer as documented, gives the same loss and the same gradients."""
    recipe, ((inputs, targets),) = transformer(), batches(1)
    got = train(recipe, (2, 2, 2), [(inputs, targets)], num_microbatches=3, seed=5, dtype=torch.float64)
    model = plain_model(recipe, seed=5).double()
    pieces = list(zip(inputs.tensor_split(3), targets.tensor_split(3), strict=True))
    loss_sum = microbatch_loss(recipe, model, pieces, seed=5, step=0)
    assert got.reports[0].loss_sum == pytest.approx(loss_sum, rel=1e-12)
    for name, parameter in model.named_parameters():
        assert torch.allclose(got.gradients[name.replace("blocks_", "blocks.")], parameter.grad, rtol=0, atol=1e-13), (
            name
        )


def test_tied_copies_stay_equal_to_the_last_bit_and_count_once_in_the_norm() -> None:
    recipe = transformer(tied=True)
    got = train(recipe, (2, 2, 2), batches(3), num_microbatches=3)
    assert torch.equal(got.parameters["embedding.token.weight"], got.parameters["head.output.weight"])
    squares = {
        name: float(g.double().square().sum()) for name, g in got.gradients.items() if name != "head.output.weight"
    }
    assert got.reports[-1].grad_norm == pytest.approx(sum(squares.values()) ** 0.5, rel=1e-6)


class Transposed(nn.Module):
    """Returns a tensor whose memory is not in order, takes gelu and a sum of its input: other bits at other strides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return ((nn.functional.gelu(x) + x.sum(-1, keepdim=True)) @ self.weight).transpose(1, 2)


def test_a_layer_with_strange_strides_gives_the_same_bits_at_every_cut() -> None:
    recipe = Recipe(
        layers=tuple(LayerRecipe(f"layer{i}", Transposed) for i in range(4)),
        loss_sum=lambda output, targets: (output - targets[0]).square().sum(),
        count=lambda targets: targets[0].numel(),
    )
    data = [(torch.randn(5, 16, 16), torch.randn(5, 16, 16)) for _ in range(2)]
    expected = train(recipe, (4,), data, num_microbatches=2)
    for balance in [(1, 3), (2, 2), (1, 1, 1, 1)]:
        got = train(recipe, balance, data, num_microbatches=2)
        for name, value in expected.parameters.items():
            assert torch.equal(got.parameters[name], value), (balance, name)


class TwoValues(nn.Module):
    """Passes on a float tensor and an integer one: a message of two tensors, of which one wants a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.linear = nn.Linear(8, 8)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, ids = pair
        return torch.tanh(self.linear(x)) + self.table(ids), (ids + 1) % 9


class Start(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.arange(len(x)) % 9


def test_messages_of_several_tensors_and_integers() -> None:
    recipe = Recipe(
        layers=(LayerRecipe("start", Start), *(LayerRecipe(f"layer{i}", TwoValues) for i in range(3))),
        loss_sum=lambda output, targets: (output[0] - targets[0]).square().sum() + 0 * output[1].sum(),
        count=lambda targets: len(targets[0]),
    )
    data = [(torch.randn(6, 8), torch.randn(6, 8)) for _ in range(3)]
    expected = train(recipe, (4,), data, num_microbatches=4, recompute=False)
    for balance in [(1, 3), (2, 2), (1, 1, 1, 1)]:
        got = train(recipe, balance, data, num_microbatches=4)
        assert [r.loss_sum for r in got.reports] == [r.loss_sum for r in expected.reports]
        for name, value in expected.parameters.items():
            assert torch.equal(got.parameters[name], value), (balance, name)


def test_a_new_batch_shape_needs_no_restart() -> None:
    recipe = transformer(dropout=0.0)
    rows_and_tokens = [(4, 12), (6, 12), (4, 5), (4, 12), (9, 7)]
    data = [(torch.randint(0, V, shape), torch.randint(0, V, shape)) for shape in rows_and_tokens]
    expected = train(recipe, (6,), data, num_microbatches=4)
    got = train(recipe, (2, 2, 2), data, num_microbatches=4)
    assert [r.loss_sum for r in got.reports] == [r.loss_sum for r in expected.reports]
