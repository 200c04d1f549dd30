"""The plain reference: judged by torch itself, since it judges the engine."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import CPU, settings
from safetensors.torch import load_file
from torch import Tensor, nn

from pipetrain.check.reference import PlainModel, train
from pipetrain.config import Config, LrRuleConfig, SgdConfig
from pipetrain.models.capture import capture
from pipetrain.models.recipe import BATCH, LayerRecipe, Recipe, Tensors, Value
from pipetrain.partition.split import build_layer
from pipetrain.training.record import Recorder


def squared(output: Tensor, targets: Tensors) -> Tensor:
    return (output - targets[0]).square().sum()


def count(targets: Tensors) -> int:
    return targets[0].numel()


def recipe_of(*layers: LayerRecipe, **more: object) -> Recipe:
    return Recipe(layers, loss_sum=squared, count=count, **more)  # type: ignore[arg-type]


def plain_sgd(**changes: object) -> Config:
    defaults = {
        "optimizer": SgdConfig(name="sgd", lr=0.1),
        "lr_rule": LrRuleConfig(),
        "grad_clip": None,
        "micro_batches": 1,
    }
    return settings(**(defaults | changes))


def trained(recipe: Recipe, cfg: Config, batches: list[tuple[Tensors, Tensors]], tmp_path: Path) -> PlainModel:
    """Trains with no other run to follow: it follows itself."""
    model = PlainModel(recipe, cfg.seed, CPU)
    recorder = Recorder(lambda step: tmp_path / "recorded" / f"{step}", model.modules.items())

    def itself(step: int, kind: str) -> dict[str, Tensor]:
        if kind == "gradient":
            return {name: gradient.clone() for name, gradient in recorder._gradients.items()}
        recorded = load_file(tmp_path / "recorded" / f"{step}")
        return {key.removeprefix(f"{kind}/"): recorded[key] for key in recorded if key.startswith(f"{kind}/")}

    train(model, cfg, batches, recorder, itself)
    return model


def test_it_follows_another_run_step_by_step(tmp_path: Path) -> None:
    recipe = recipe_of(LayerRecipe("linear", partial(nn.Linear, 3, 3, bias=False)))
    batches = batches_of(3, 5, 2)
    theirs = {"weight": torch.randn(3, 3, dtype=torch.float64), "gradient": torch.randn(3, 3, dtype=torch.float64)}
    model = PlainModel(recipe, 0, CPU)
    recorder = Recorder(lambda step: tmp_path / "recorded" / f"{step}", [])
    asked: list[tuple[int, str]] = []

    def other(step: int, kind: str) -> dict[str, Tensor]:
        asked.append((step, kind))
        return {} if kind == "buffer" else {"linear.weight": theirs[kind].clone()}

    train(model, plain_sgd(grad_clip=0.5), batches, recorder, other)
    assert asked == [(1, "gradient"), (1, "weight"), (1, "buffer"), (2, "gradient")]
    ((x,), (y,)) = batches[1]
    recorded = load_file(tmp_path / "recorded" / "2")
    expected = 2 * (x @ theirs["weight"].T - y).T @ x / y.numel()
    torch.testing.assert_close(recorded["gradient/linear.weight"], expected, rtol=1e-12, atol=1e-14)
    update = 0.1 * theirs["gradient"] * 0.5 / (theirs["gradient"].norm() + 1e-6)
    torch.testing.assert_close(recorded["weight/linear.weight"], theirs["weight"] - update, rtol=1e-12, atol=1e-14)


def batches_of(width: int, rows: int, number: int) -> list[tuple[Tensors, Tensors]]:
    make: Callable[[], Tensor] = partial(torch.randn, rows, width, dtype=torch.float64)
    return [((make(),), (make(),)) for _ in range(number)]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_with_one_microbatch_batch_norm_is_torchs_own(tmp_path: Path, momentum: float | None) -> None:
    recipe = recipe_of(
        LayerRecipe("linear", partial(nn.Linear, 3, 3)),
        LayerRecipe("norm", partial(nn.BatchNorm1d, 3, momentum=momentum)),
    )
    batches = batches_of(3, 5, 3)
    own = nn.Sequential(*(build_layer(layer, 0) for layer in recipe.layers)).double()
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    for (x,), y in batches:
        optimizer.zero_grad()
        (squared(own(x), y) / count(y)).backward()
        optimizer.step()
    model = trained(recipe, plain_sgd(), batches, tmp_path)
    recorded = load_file(tmp_path / "recorded" / "3")
    for (name, ours), theirs in zip(model.parameters.items(), own.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14, msg=name)
    for name, buffer in own[1].named_buffers():
        torch.testing.assert_close(recorded[f"buffer/norm.{name}"], buffer, rtol=1e-12, atol=1e-14)


def test_running_statistics_are_those_of_the_whole_minibatch(tmp_path: Path) -> None:
    recipe = recipe_of(LayerRecipe("norm", partial(nn.BatchNorm2d, 3)))
    x = torch.randn(7, 3, 4, 4, dtype=torch.float64)
    model = trained(recipe, plain_sgd(micro_batches=3), [((x,), (x,))], tmp_path)
    whole = nn.BatchNorm2d(3).double()
    whole(x)
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(model.buffers()[f"norm.{name}"], buffer, rtol=1e-12, atol=1e-14)


class Two(nn.Module):
    """Gives its input twice, once under a name."""

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x + 1, {"kept": x}


class Join(nn.Module):
    def forward(self, x: Tensor, kept: Tensor, second: Tensor) -> Tensor:
        return x * kept + second


def test_layers_take_what_the_recipe_says(tmp_path: Path) -> None:
    recipe = recipe_of(
        LayerRecipe("two", Two, takes=(Value(BATCH, 0),)),
        LayerRecipe("linear", partial(nn.Linear, 3, 3), takes=(Value("two", 0),)),
        LayerRecipe("pick", Pick, takes=(Value("two", 1),)),
        LayerRecipe("join", Join, takes=(Value("linear"), Value("pick"), Value(BATCH, 1))),
    )
    x, second, y = torch.randn(3, 4, 3, dtype=torch.float64)
    model = PlainModel(recipe, 0, CPU)
    linear = build_layer(recipe.layers[1], 0).double()
    torch.testing.assert_close(model.forward((x, second), 0, 0), linear(x + 1) * x + second)
    trained(recipe, plain_sgd(micro_batches=2), [((x, second), (y,))], tmp_path)


class Pick(nn.Module):
    def forward(self, values: dict[str, Tensor]) -> Tensor:
        return values["kept"]


def test_a_tied_parameter_is_one_and_clipped_as_torch_does(tmp_path: Path) -> None:
    recipe = recipe_of(
        LayerRecipe("first", partial(nn.Linear, 3, 3)),
        LayerRecipe("last", partial(nn.Linear, 3, 3)),
        ties=((("first", "weight"), ("last", "weight")),),
    )
    (((x,), y),) = batches_of(3, 5, 1)
    first, last = (build_layer(layer, 0).double() for layer in recipe.layers)
    last.weight = first.weight
    (squared(last(first(x)), y) / count(y)).backward()
    parameters = [first.weight, first.bias, last.bias]
    before = [p.grad.clone() for p in parameters if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, 0.1)
    trained(recipe, plain_sgd(grad_clip=0.1), [((x,), y)], tmp_path)
    recorded = load_file(tmp_path / "recorded" / "1")
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)
    close(recorded["norm"], norm)
    close(recorded["gradient/first.weight"], before[0])
    close(recorded["gradient/last.weight"], before[0])
    close(recorded["clip/last.bias"], 0.1 / (norm + 1e-6))
    for name, parameter in zip(("first.weight", "first.bias", "last.bias"), parameters, strict=True):
        assert parameter.grad is not None
        close(recorded[f"weight/{name}"], (parameter - 0.1 * parameter.grad).detach())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.drop(x), self.drop(x)])


def test_every_call_draws_its_own_and_the_same_again() -> None:
    model = PlainModel(recipe_of(LayerRecipe("twice", Twice)), 0, CPU)
    ones = (torch.ones(64, dtype=torch.float64),)
    first, second = model.forward(ones, 0, 0)
    assert not torch.equal(first, second)
    assert torch.equal(model.forward(ones, 0, 0)[1], second)
    assert not torch.equal(model.forward(ones, 0, 1)[0], first)
    assert not torch.equal(model.forward(ones, 1, 0)[0], first)


class OneModule(nn.Module):
    """Calls one dropout twice, has a BatchNorm and a parameter used at both ends."""

    def __init__(self, *, draws: bool = False) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.4)
        self._draws = draws

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.norm(self.first(x)))
        if self._draws:
            h = nn.functional.dropout(h, 0.5)
        return self.drop(torch.tanh(h)) @ self.first.weight


def recipe_of_module(draws: bool) -> Recipe:
    torch.manual_seed(2)
    module = OneModule(draws=draws)
    layers, ties = capture(module, lambda: module, 1)
    return Recipe(tuple(layers), loss_sum=squared, count=count, ties=tuple(ties), whole=lambda: copy.deepcopy(module))


def test_a_module_as_it_is_gives_the_numbers_of_its_layers() -> None:
    """Draws, gradients, statistics and every name, of the module and of what it was cut into."""
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    recipe = recipe_of_module(draws=False)
    whole, layers = (PlainModel(recipe, 0, CPU, as_layers=as_layers) for as_layers in (False, True))
    outputs = []
    for model in (whole, layers):
        output = model.forward((x,), step=1, microbatch=2)
        squared(output, (y,)).backward()
        outputs.append(output)
    assert torch.equal(outputs[0], outputs[1])
    assert any(part.training for part in whole.modules.values())
    assert whole.parameters.keys() == layers.parameters.keys()
    for name, parameter in layers.parameters.items():
        assert parameter.grad is not None
        assert torch.allclose(whole.parameters[name].grad, parameter.grad, rtol=1e-12, atol=1e-14), name
    assert whole.buffers().keys() == layers.buffers().keys()


def test_draws_between_the_modules_are_found() -> None:
    x = torch.randn(6, 4, dtype=torch.float64)
    for draws in (True, False):
        assert PlainModel(recipe_of_module(draws), 0, CPU).draws_outside_of_modules((x,)) is draws


def test_statistics_are_of_what_batch_norm_saw_and_not_of_what_it_became() -> None:
    class ChangedBehind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + x.mul_(5)  # type: ignore[no-any-return]

    model = PlainModel(recipe_of(LayerRecipe("layer", ChangedBehind)), 0, CPU)
    x = torch.randn(4, 3, dtype=torch.float64) + 2
    model.forward((x.clone(),), 0, 0)
    model.batch_norms[0].end_of_step(1)
    torch.testing.assert_close(model.buffers()["layer.norm.running_mean"], 0.1 * x.mean(0))
