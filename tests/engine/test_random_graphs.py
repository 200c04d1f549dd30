"""Random small models, cut at random: the pipeline equals itself on one stage to the last bit, and plain PyTorch.

The models have skips, values that several later layers take, elements of tuples, ties, BatchNorm, dropout, in-place
layers, layers that turn their output's memory around, frozen ones; batches are uneven, micro-batches of any number.
"""

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import train
from reference import plain_step
from test_any_module import assert_same
from torch import Tensor, nn

from pipetrain.models import BATCH, LayerRecipe, Recipe, Value

D = 4


class Mix(nn.Module):
    """A linear layer of the sum of everything it gets. (Ends with a layer whose output may be changed in place.)"""

    def __init__(self, trained: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D).requires_grad_(trained)

    def forward(self, *values: Tensor) -> Tensor:
        return self.linear(torch.tanh(sum(values[1:], values[0])))  # type: ignore[no-any-return]


class Pair(nn.Module):
    """Two tensors and a number that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, *values: Tensor) -> tuple[Tensor, Tensor, float]:
        x = sum(values[1:], values[0])
        return self.linear(x), x * 2, float(x.detach().max())


class Multiply(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor, float], *values: Tensor) -> Tensor:
        return sum(values, pair[0] * 0.1 * pair[2] + pair[1])


class Turn(nn.Module):
    """Its output's memory is not in order."""

    def forward(self, *values: Tensor) -> Tensor:
        return (sum(values[1:], values[0]) * 0.5).t().contiguous().t()


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D)

    def forward(self, *values: Tensor) -> Tensor:
        return self.norm(sum(values[1:], values[0]))  # type: ignore[no-any-return]


class InPlace(nn.Module):
    """Changes its input where it takes one, and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, *values: Tensor) -> Tensor:
        x = values[0].mul_(0.9) if len(values) == 1 else values[0] + values[1]
        return self.drop(x) + self.drop(x)  # type: ignore[no-any-return]


KINDS = {
    "mix": Mix,
    "frozen": partial(Mix, trained=False),
    "turn": Turn,
    "norm": Norm,
    "in_place": InPlace,
    "pair": Pair,
}


@dataclass(frozen=True)
class Case:
    recipe: Recipe
    balance: tuple[int, ...]
    rows: tuple[int, ...]
    num_microbatches: int
    recompute: bool


@st.composite
def cases(draw: Any) -> Case:
    num_layers = draw(st.integers(2, 7))
    layers: list[LayerRecipe] = [LayerRecipe("mix0", Mix)]
    tied: list[tuple[str, str]] = [("mix0", "linear.weight")]
    for number in range(1, num_layers):
        kind = draw(st.sampled_from(list(KINDS)))
        before = layers[-1].name
        skips = [name for name in (layer.name for layer in layers[:-1]) if not name.startswith("pair")]
        taken = draw(st.lists(st.sampled_from([*skips, BATCH]), max_size=2, unique=True)) if skips else []
        extra = tuple(Value(name, 0 if name == BATCH else None) for name in taken)
        if before.startswith("pair"):
            whole = draw(st.booleans())
            build: Any = Multiply if whole else KINDS["mix"]
            first = (Value(before),) if whole else (Value(before, 1), Value(before, 0))
            name = f"multiply{number}" if whole else f"mix{number}"
        else:
            build, first, name = KINDS[kind], (Value(before),), f"{kind}{number}"
        if name.startswith("in_place") and _taken_again(layers, before):
            build, name = Turn, f"turn{number}"
        if name.startswith(("mix", "pair")) and draw(st.booleans()):
            tied.append((name, "linear.weight"))
        layers.append(LayerRecipe(name, build, takes=(*first, *extra)))
    if layers[-1].name.startswith("pair"):
        layers.append(LayerRecipe("last", Multiply))
    layers = _without_changed_skips(layers)
    borders = draw(st.sets(st.integers(1, len(layers) - 1), max_size=3))
    edges = [0, *sorted(borders), len(layers)]
    num_microbatches = draw(st.integers(1, 4))
    rows = tuple(draw(st.lists(st.integers(2 * num_microbatches, 11), min_size=1, max_size=3)))
    ties = (tuple(tied),) if len(tied) > 1 else ()
    return Case(
        Recipe(tuple(layers), _squares, lambda targets: targets[0].numel(), ties=ties),
        tuple(b - a for a, b in itertools.pairwise(edges)),
        rows,
        num_microbatches,
        draw(st.booleans()),
    )


def _taken_again(layers: list[LayerRecipe], name: str) -> bool:
    return any(value.layer == name for layer in layers for value in layer.takes or ())


def _without_changed_skips(layers: list[LayerRecipe]) -> list[LayerRecipe]:
    """What a layer changes in place nobody may take after it; such a layer computes a new tensor instead."""
    out = []
    for place, layer in enumerate(layers):
        values = layer.takes or ()
        later = {value.layer for other in layers[place + 1 :] for value in other.takes or ()}
        changes = layer.name.startswith("in_place") and len(values) == 1 and values[0].layer in later
        out.append(LayerRecipe(layer.name, Turn, layer.takes) if changes else layer)
    return out


def _squares(output: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
    return (output - targets[0]).square().sum()


def _batches(rows: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, D, generator=generator), torch.randn(n, D, generator=generator)) for n in rows]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_a_random_model_at_a_random_cut(case: Case) -> None:
    _check(case)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(cases())
def test_many_random_models_at_random_cuts(case: Case) -> None:
    _check(case)


def _check(case: Case) -> None:
    recipe, batches, options = case.recipe, _batches(case.rows), {"num_microbatches": case.num_microbatches}
    one = train(recipe, (len(recipe.layers),), batches, recompute=not case.recompute, **options)
    cut = train(recipe, case.balance, batches, recompute=case.recompute, **options)
    assert_same(cut, one, case)
    exact = train(recipe, case.balance, batches[:1], recompute=case.recompute, dtype=torch.float64, **options)
    loss_sum, gradients, buffers = plain_step(recipe, *batches[0], **options)
    assert exact.reports[0].loss_sum == pytest.approx(loss_sum, rel=1e-11)
    largest = max((float(g.abs().max()) for g in gradients.values()), default=1.0)
    for name, gradient in exact.gradients.items():
        difference = gradient - gradients[name]
        assert float(difference.abs().max()) <= 1e-10 * largest, name
    for name, buffer in buffers.items():
        assert torch.allclose(exact.buffers[name], buffer, rtol=1e-10, atol=1e-12), name
