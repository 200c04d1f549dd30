"""Layers on the bench: what is counted is what can be counted by hand, with and without memory."""

import time
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pipetrain.costs import ModelCost, ValueCost
from pipetrain.models import LayerRecipe, Recipe, Value
from pipetrain.profile.bench import Bench, Conditions, signatures_of
from pipetrain.profile.observe import count, measure
from pipetrain.profile.signature import signature

ROWS, D = 4, 8
FLOAT = 4  # bytes
VALUE = ROWS * D * FLOAT


def adam(parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters.values(), fused=False)


def loss_sum(output: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
    return (output - targets[0]).square().sum()


def recipe_of(*layers: LayerRecipe) -> Recipe:
    return Recipe(layers, loss_sum, lambda targets: targets[0].numel())


def chain(*builds: object) -> Recipe:
    return recipe_of(*(LayerRecipe(f"layer{i}", build) for i, build in enumerate(builds)))  # type: ignore[arg-type]


def looked_at(recipe: Recipe, device: str = "meta", seen: list[str] | None = None) -> ModelCost:
    announce = (seen if seen is not None else []).append
    observe = partial(count, make_optimizer=adam)
    conditions = Conditions(torch.device(device), 0, None, None, observe, announce)
    x = torch.zeros(ROWS, D, device=device)
    return Bench(recipe, signatures_of(recipe), conditions).run((x,), (x,))


class TwoWays(nn.Module):
    """Gives a pair."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x * 2


class Plus(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Sleeper(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return self.linear(x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bytes_of_a_chain(device: str) -> None:
    model = looked_at(chain(partial(nn.Linear, D, D, bias=False), nn.Sigmoid, partial(nn.Linear, D, D)), device)
    first, sigmoid, last = model.layers
    assert (first.parameters, first.parameter_bytes, first.optimizer_bytes) == (D * D, D * D * FLOAT, 2 * D * D * FLOAT)
    assert (sigmoid.parameters, sigmoid.optimizer_bytes, sigmoid.graph_bytes) == (0, 0, 0)
    assert first.forward_bytes == VALUE
    # A product keeps what goes in, a sigmoid what comes out; the first one's output is kept by nobody.
    assert model.values[:3] == (
        ValueCost(0, VALUE, (1,), (), has_gradient=True),
        ValueCost(-1, VALUE, (0,), (0,), has_gradient=False),
        ValueCost(1, VALUE, (2,), (1, 2), has_gradient=True),
    )
    assert last.parameters == D * D + D


def test_without_memory_the_same_is_counted() -> None:
    recipe = chain(
        partial(nn.Linear, D, D), nn.GELU, partial(nn.LayerNorm, D), partial(nn.Dropout, 0.5), partial(nn.Linear, D, D)
    )
    assert looked_at(recipe, "meta") == looked_at(recipe, "cpu")


def test_values_that_skip_layers() -> None:
    recipe = recipe_of(
        LayerRecipe("two", TwoWays),
        LayerRecipe("up", partial(nn.Linear, D, D), takes=(Value("two", 0),)),
        LayerRecipe("plus", Plus, takes=(Value("up"), Value("two", 1))),
    )
    model = looked_at(recipe)
    assert [(value.layer, value.users) for value in model.values if value.layer == 0] == [(0, (1,)), (0, (2,))]


def test_equal_layers_are_looked_at_once() -> None:
    seen: list[str] = []
    linear = partial(nn.Linear, D, D)
    model = looked_at(chain(linear, nn.ReLU, linear, nn.ReLU, linear, nn.ReLU, linear), seen=seen)
    # The first product's input wants no gradient, and the last layer has the loss.
    assert seen == ["layer0", "layer1", "layer2", "layer6"]
    assert [layer.name for layer in model.layers] == [f"layer{i}" for i in range(7)]
    assert model.layers[4].graph_bytes == model.layers[2].graph_bytes


def test_seconds_are_at_least_those_of_the_layer() -> None:
    recipe = chain(partial(Sleeper, 0.02), partial(Sleeper, 0.04))
    conditions = Conditions(torch.device("cpu"), 0, None, None, partial(measure, make_optimizer=adam))
    x = torch.zeros(ROWS, D)
    first, second = Bench(recipe, signatures_of(recipe), conditions).run((x,), (x,)).layers
    assert first.forward_s >= 0.02
    assert second.forward_s >= 0.04


def test_what_makes_two_layers_the_same() -> None:
    assert signature(nn.Linear(D, D)) == signature(nn.Linear(D, D))
    assert signature(Sleeper(0.1)) == signature(Sleeper(0.1))
    different = [
        nn.Linear(D, D),
        nn.Linear(D, D, bias=False),
        nn.Linear(D, 2 * D),
        nn.Dropout(0.1),
        nn.Dropout(0.2),
        Sleeper(0.1),
        Sleeper(0.2),
        nn.Linear(D, D).requires_grad_(requires_grad=False),
        nn.TransformerEncoderLayer(D, 2, activation="relu"),
        nn.TransformerEncoderLayer(D, 2, activation=lambda x: x * 2),
        nn.TransformerEncoderLayer(D, 2, activation=lambda x: x * 3),
    ]
    assert len({signature(module) for module in different}) == len(different)


def test_a_module_with_a_hook_is_one_of_a_kind() -> None:
    hooked = nn.Linear(D, D)
    hooked.register_forward_hook(lambda module, args, output: None)
    assert signature(hooked) != signature(hooked)


def test_layers_without_parameters_and_frozen_ones() -> None:
    """Where no gradient is wanted nothing goes backwards, and nothing fails."""

    def frozen() -> nn.Module:
        return nn.Linear(D, D).requires_grad_(requires_grad=False)

    first, second, _ = looked_at(chain(nn.ReLU, frozen, partial(nn.Linear, D, D))).layers
    assert (first.graph_bytes, first.optimizer_bytes, second.optimizer_bytes) == (0, 0, 0)
    assert second.parameters == D * D + D


def test_modules_that_watch_themselves() -> None:
    """BatchNorm, dropout, and a module of the user's that counts its calls."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.register_buffer("seen", torch.zeros(D))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen += x.detach().mean(0)
            return x * 2

    model = looked_at(
        chain(partial(nn.Linear, D, D), partial(nn.BatchNorm1d, D), Counting, partial(nn.Linear, D, D)), "cpu"
    )
    assert [layer.parameters for layer in model.layers] == [D * D + D, 2 * D, 0, D * D + D]
