"""What may cross a border, and what a layer may do: each against plain PyTorch and against itself at other cuts."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from pipeline import Result, train
from reference import plain_step
from torch import Tensor, nn

from pipetrain.engine.batchnorm import MiniBatchStatistics
from pipetrain.errors import ConfigError, LayerError
from pipetrain.models import BATCH, LayerRecipe, Recipe, Value

D = 6


def squared_error(output: Any, targets: tuple[Tensor, ...]) -> Tensor:
    return (output - targets[0]).square().sum()


def recipe_of(*layers: LayerRecipe, ties: Any = (), loss: Callable[..., Tensor] = squared_error) -> Recipe:
    return Recipe(layers, loss_sum=loss, count=lambda targets: targets[0].numel(), ties=ties)


def chain(*modules: Callable[[], nn.Module]) -> Recipe:
    return recipe_of(*(LayerRecipe(f"layer{i}", build) for i, build in enumerate(modules)))


def linear() -> nn.Module:
    return nn.Linear(D, D)


def data(rows: Sequence[int] = (5, 7), shape: tuple[int, ...] = (D,)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(n, *shape, generator=generator), torch.randn(n, *shape, generator=generator)) for n in rows]


def every_cut(num_layers: int, most_stages: int = 4) -> list[tuple[int, ...]]:
    cuts = []
    for stages in range(1, min(num_layers, most_stages) + 1):
        for borders in itertools.combinations(range(1, num_layers), stages - 1):
            edges = [0, *borders, num_layers]
            cuts.append(tuple(b - a for a, b in itertools.pairwise(edges)))
    return cuts


def assert_same(a: Result, b: Result, case: object) -> None:
    assert [r.loss_sum for r in a.reports] == [r.loss_sum for r in b.reports], case
    assert [r.grad_norm for r in a.reports] == [r.grad_norm for r in b.reports], case
    for kind in ("parameters", "gradients", "buffers"):
        mine, other = getattr(a, kind), getattr(b, kind)
        assert mine.keys() == other.keys(), (case, kind)
        for name, tensor in mine.items():
            assert torch.equal(tensor, other[name]), (case, kind, name)


def assert_every_cut_is_plain(recipe: Recipe, batches: Any = None, num_microbatches: int = 3) -> None:
    """The same bits at every cut, with and without recompute; equal to plain PyTorch in float64."""
    batches = batches or data()
    one = train(recipe, (len(recipe.layers),), batches, num_microbatches=num_microbatches, recompute=False)
    for balance in every_cut(len(recipe.layers)):
        for recompute in (True, False):
            got = train(recipe, balance, batches, num_microbatches=num_microbatches, recompute=recompute)
            assert_same(got, one, (balance, recompute))
    exact = train(
        recipe, (1,) * len(recipe.layers), batches[:1], num_microbatches=num_microbatches, dtype=torch.float64
    )
    loss_sum, gradients, buffers = plain_step(recipe, *batches[0], num_microbatches=num_microbatches)
    assert exact.reports[0].loss_sum == pytest.approx(loss_sum, rel=1e-12)
    largest = max(float(g.abs().max()) for g in gradients.values())
    assert exact.gradients.keys() == gradients.keys()
    halves = train(
        recipe,
        (1,) * len(recipe.layers),
        batches[:1],
        num_microbatches=num_microbatches,
        dtype=torch.float64,
        name="zb_h1",
    )
    for result in (exact, halves):
        for name, gradient in result.gradients.items():
            difference = gradient - gradients[name]
            assert float(difference.abs().max()) <= 1e-10 * largest, name
    assert halves.gradients.keys() == gradients.keys()
    assert exact.buffers.keys() == buffers.keys()
    for name, buffer in buffers.items():
        assert torch.allclose(exact.buffers[name], buffer, rtol=1e-10, atol=1e-12), name


# ---- values ----------------------------------------------------------------------------------------------------------


class Pack(nn.Module):
    """Gives a dict with everything that may travel."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.linear(x)
        return {
            "hidden": (torch.tanh(y), torch.sigmoid(y)),
            "largest": float(x.max()),  # differs from micro-batch to micro-batch
            "rows": len(x),
            "on": True,
            "mode": "sum",
            "nothing": None,
            "mask": x > 0,
            "order": x.argsort(dim=1),
        }


class Use(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, values: dict[str, Any]) -> dict[str, Any]:
        a, b = values["hidden"]
        assert values["mode"] == "sum"
        assert values["nothing"] is None
        assert values["on"] is True
        assert values["rows"] == len(a)
        mixed = self.linear(a).gather(1, values["order"]) * values["largest"] + b * values["mask"]
        return {**values, "hidden": (mixed, b * 0.5)}


class Unpack(nn.Module):
    def forward(self, values: dict[str, Any]) -> Tensor:
        a, b = values["hidden"]
        return a + b


def test_dicts_tuples_none_numbers_strings_masks_and_integers_between_stages() -> None:
    assert_every_cut_is_plain(chain(Pack, Use, Use, Unpack))


def test_frozen_tensors_and_stages_without_parameters() -> None:
    def frozen() -> nn.Module:
        return nn.Linear(D, D).requires_grad_(False)

    assert_every_cut_is_plain(chain(frozen, nn.Tanh, linear, frozen, nn.Sigmoid))


def test_a_frozen_part_gets_no_gradient_and_no_update() -> None:
    recipe = chain(lambda: nn.Linear(D, D).requires_grad_(False), linear)
    got = train(recipe, (1, 1), data(), num_microbatches=2)
    assert set(got.gradients) == {"layer1.weight", "layer1.bias"}


class Growing(nn.Module):
    """Its output's length follows from its input's: another message size for every input size."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.flip(1)], dim=1)[:, : x.shape[1]]


def test_uneven_and_changing_batches_without_a_restart() -> None:
    recipe = chain(linear, Growing, nn.Tanh, linear)
    batches = [
        data((n,), shape)[0] for n, shape in [(5, (D,)), (3, (D,)), (7, (4, D)), (5, (D,)), (3, (2, D)), (4, (D,))]
    ]
    assert_every_cut_is_plain(recipe, batches, num_microbatches=3)


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_any_batch_size_for_any_number_of_micro_batches(rows: int) -> None:
    recipe = chain(linear, nn.Tanh, linear)
    for num_microbatches in range(1, rows + 1):
        got = train(recipe, (1, 2), data((rows,)), num_microbatches=num_microbatches, dtype=torch.float64)
        loss_sum, gradients, _ = plain_step(recipe, *data((rows,))[0], num_microbatches=1)
        assert got.reports[0].loss_sum == pytest.approx(loss_sum, rel=1e-12)
        for name, gradient in gradients.items():
            assert torch.allclose(got.gradients[name], gradient, rtol=1e-10, atol=1e-13), name


# ---- skips -----------------------------------------------------------------------------------------------------------


class Add(nn.Module):
    def forward(self, *values: Tensor) -> Tensor:
        return torch.stack(values).sum(0)


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        y = self.linear(x)
        return torch.tanh(y), torch.sigmoid(y), 2


class Scaled(nn.Module):
    def forward(self, x: Tensor, factor: int) -> Tensor:
        return x * factor


def test_a_u_net_runs_at_every_cut() -> None:
    """One value for three users on up to four stages: its gradient is one chain of additions."""
    recipe = recipe_of(
        LayerRecipe("down0", linear),
        LayerRecipe("down1", linear),
        LayerRecipe("middle", linear),
        LayerRecipe("up1", Add, takes=(Value("middle"), Value("down1"), Value("down0"))),
        LayerRecipe("mix", linear),
        LayerRecipe("up0", Add, takes=(Value("mix"), Value("down0"), Value("down1"), Value(BATCH, 0))),
    )
    assert_every_cut_is_plain(recipe)


def test_elements_go_only_where_they_are_taken() -> None:
    recipe = recipe_of(
        LayerRecipe("halves", Halves),
        LayerRecipe("left", linear, takes=(Value("halves", 0),)),
        LayerRecipe("right", linear, takes=(Value("halves", 1),)),
        LayerRecipe("scaled", Scaled, takes=(Value("left"), Value("halves", 2))),
        LayerRecipe("sum", Add, takes=(Value("scaled"), Value("right"), Value("halves", 0))),
    )
    assert_every_cut_is_plain(recipe)


def test_several_inputs_of_which_later_layers_take_some() -> None:
    recipe = recipe_of(
        LayerRecipe("first", Add),
        LayerRecipe("second", linear),
        LayerRecipe("third", Add, takes=(Value("second"), Value(BATCH, 1))),
        LayerRecipe("fourth", linear),
    )
    batches = [((x, x.flip(0)), y) for x, y in data()]
    assert_every_cut_is_plain(recipe, batches)


def test_a_branch_that_nobody_takes_gets_no_gradient() -> None:
    recipe = recipe_of(
        LayerRecipe("a", linear),
        LayerRecipe("unused", linear),
        LayerRecipe("b", linear, takes=(Value("a"),)),
    )
    got = [train(recipe, balance, data(), num_microbatches=2) for balance in every_cut(3)]
    for other in got[1:]:
        assert_same(other, got[0], "unused branch")
    assert "unused.weight" not in got[0].gradients


class Stops(nn.Module):
    """Lets a gradient pass for its second input only."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return x.detach() if y is None else x.detach() + y


def test_behind_a_detach_there_is_no_gradient_and_not_one_of_zeros() -> None:
    frozen_by_detach = chain(linear, nn.Tanh, Stops, linear)
    assert_every_cut_is_plain(frozen_by_detach)
    assert list(train(frozen_by_detach, (1, 3), data(), num_microbatches=2).gradients) == [
        "layer3.weight",
        "layer3.bias",
    ]
    tied_before_it = replace(frozen_by_detach, layers=(LayerRecipe("first", linear), *frozen_by_detach.layers))
    tied_before_it = replace(tied_before_it, ties=((("first", "weight"), ("layer0", "weight")),))
    assert_every_cut_is_plain(tied_before_it)
    one_of_two_ways = recipe_of(
        LayerRecipe("stem", linear),
        LayerRecipe("left", linear, takes=(Value("stem"),)),
        LayerRecipe("right", linear, takes=(Value("stem"),)),
        LayerRecipe("add", Stops, takes=(Value("left"), Value("right"))),
        LayerRecipe("head", linear),
    )
    assert_every_cut_is_plain(one_of_two_ways)
    got = train(one_of_two_ways, (2, 1, 2), data(), num_microbatches=2).gradients
    assert {name.split(".")[0] for name in got} == {"stem", "right", "head"}


class StopsFor(nn.Module):
    """Lets a gradient pass for micro-batches of the given sign of their sum."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = sign
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return (x if x.sum() * self.sign > 0 else x.detach()) * self.weight


def test_a_gradient_that_exists_only_for_later_micro_batches_is_refused_between_stages() -> None:
    up = torch.ones(2, D)
    batches = [(torch.cat([up, -up]), torch.ones(4, D))]
    recipe = chain(nn.Identity, lambda: nn.PReLU(D, 1.0), lambda: StopsFor(-1.0), linear)
    train(recipe, (4,), batches, num_microbatches=2)
    train(
        chain(nn.Identity, lambda: nn.PReLU(D, 1.0), lambda: StopsFor(1.0), linear), (2, 2), batches, num_microbatches=2
    )
    with pytest.raises(LayerError, match="output of layer layer1 now, but did not in the first micro-batch"):
        train(recipe, (2, 2), batches, num_microbatches=2)


# ---- what a layer may do ---------------------------------------------------------------------------------------------


def test_in_place_layers_anywhere() -> None:
    inplace = lambda: nn.ReLU(inplace=True)  # noqa: E731
    assert_every_cut_is_plain(chain(inplace, linear, inplace, linear, lambda: nn.Dropout(0.4, inplace=True), linear))


def test_an_in_place_layer_leaves_the_users_batch_alone() -> None:
    batches = data()
    before = batches[0][0].clone()
    train(chain(lambda: nn.ReLU(inplace=True), linear), (1, 1), batches, num_microbatches=2)
    assert torch.equal(batches[0][0], before)


def test_changing_in_place_what_another_layer_takes_later_is_refused() -> None:
    recipe = recipe_of(
        LayerRecipe("a", linear),
        LayerRecipe("relu", lambda: nn.ReLU(inplace=True)),
        LayerRecipe("sum", Add, takes=(Value("relu"), Value("a"))),
    )
    with pytest.raises(LayerError, match="layer relu changes in place what layer sum takes after it"):
        train(recipe, (2, 1), data(), num_microbatches=2)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_statistics_move_once_a_mini_batch(momentum: float | None) -> None:
    norm = lambda: nn.BatchNorm1d(D, momentum=momentum)  # noqa: E731
    assert_every_cut_is_plain(chain(linear, norm, nn.Tanh, norm, linear), data((9, 8)), num_microbatches=3)


def test_batch_norm_statistics_are_those_of_the_whole_mini_batch() -> None:
    """Of a first layer, whose input is the batch itself, they can be written down."""
    ((x, y),) = data((7,))
    got = train(chain(lambda: nn.BatchNorm1d(D), linear), (1, 1), [(x, y)], num_microbatches=3, dtype=torch.float64)
    mean, variance = got.buffers["layer0.running_mean"], got.buffers["layer0.running_var"]
    assert torch.allclose(mean, 0.1 * x.double().mean(0), rtol=1e-12)
    assert torch.allclose(variance, 0.9 + 0.1 * x.double().var(0, unbiased=True), rtol=1e-12)
    assert got.buffers["layer0.num_batches_tracked"] == 1


def test_a_second_pipeline_of_the_same_batch_norm_counts_for_itself() -> None:
    norm = nn.BatchNorm1d(D).double()
    first, second = MiniBatchStatistics("norm", norm), MiniBatchStatistics("norm", norm)
    x = torch.randn(6, D, dtype=torch.float64)
    second.microbatch = 0
    norm(x)
    first.update()
    assert norm.num_batches_tracked == 0
    second.update()
    assert torch.allclose(norm.running_mean, 0.1 * x.mean(0), rtol=1e-12)


def test_sync_batch_norm_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer layer0 is a SyncBatchNorm"):
        train(chain(lambda: nn.SyncBatchNorm(D), linear), (1, 1), data(), num_microbatches=2)


def test_spectral_and_weight_norm() -> None:
    spectral = lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(D, D))  # noqa: E731
    weight = lambda: nn.utils.parametrizations.weight_norm(nn.Linear(D, D))  # noqa: E731
    assert_every_cut_is_plain(chain(spectral, nn.Tanh, weight, spectral))


class Counting(nn.Module):
    """Changes buffers of its own, one in place and one by putting a new tensor there, and uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(D))
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x * self.weight + self.calls * self.mean


class Remembering(nn.Module):
    """Changes plain attributes of its own, a number, a list and one that comes into being, and uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.rows: list[int] = []
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.rows.append(len(x))
        self.first = getattr(self, "first", 0.1 * self.calls)
        return x * self.weight * self.calls + self.first * sum(self.rows)


def test_attributes_that_a_layer_changes_are_changed_once_and_seen_again_by_a_recompute() -> None:
    assert_every_cut_is_plain(chain(linear, Remembering, linear, Remembering))


class DrawsElsewhere(nn.Module):
    """Draws from Python's and numpy's generators, itself and in a part."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        if depth:
            self.part = DrawsElsewhere(depth - 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.weight * random.random() + float(np.random.standard_normal())
        return self.part(x) if hasattr(self, "part") else x


def test_draws_from_python_and_numpy_are_the_same_at_every_cut_and_in_a_recompute() -> None:
    assert_every_cut_is_plain(chain(linear, DrawsElsewhere, linear, DrawsElsewhere))


class ChangesQuietly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.data.mul_(2)
        return x.tanh()


class ChangesAView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.T.add_(1)
        return x


@pytest.mark.parametrize("change", [ChangesQuietly, ChangesAView])
def test_changes_in_place_by_detours_are_seen_all_the_same(change: Callable[[], nn.Module]) -> None:
    assert_every_cut_is_plain(chain(linear, change, linear))


def test_buffers_that_a_layer_changes_are_changed_once_and_seen_again_by_a_recompute() -> None:
    assert_every_cut_is_plain(chain(linear, Counting, linear, Counting))


@pytest.mark.parametrize("balance", [(4,), (1, 3), (2, 2), (1, 1, 1, 1)])
def test_tied_parameters_of_three_layers(balance: tuple[int, ...]) -> None:
    ties = ((("layer0", "weight"), ("layer2", "weight"), ("layer3", "weight")),)
    recipe = recipe_of(*chain(linear, nn.Tanh, linear, linear).layers, ties=ties)
    got = train(recipe, balance, data(), num_microbatches=3)
    assert_same(got, train(recipe, (4,), data(), num_microbatches=3), balance)
    weight = got.parameters["layer0.weight"]
    assert all(torch.equal(got.parameters[f"layer{i}.weight"], weight) for i in (2, 3))
    exact = train(recipe, balance, data()[:1], num_microbatches=3, dtype=torch.float64)
    _, gradients, _ = plain_step(recipe, *data()[0], num_microbatches=3)
    assert torch.allclose(exact.gradients["layer0.weight"], gradients["layer0.weight"], rtol=1e-10, atol=1e-13)


def test_one_module_in_two_layers_is_tied_and_not_added_up_twice() -> None:
    shared: list[nn.Module] = []

    def same() -> nn.Module:
        if not shared:  # made once for the whole model, from a seed of its own
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                shared.append(nn.Linear(D, D))
        return shared[0]

    def run(balance: tuple[int, ...]) -> Result:
        ties = tuple((("a", name), ("b", f"{name}")) for name in ("weight", "bias"))
        layers = (LayerRecipe("a", same), LayerRecipe("tanh", nn.Tanh), LayerRecipe("b", same))
        return train(replace(recipe_of(*layers, ties=ties), release=shared.clear), balance, data(), num_microbatches=2)

    assert_same(run((1, 2)), run((3,)), "one module, two layers")


def test_attention_and_recurrent_dropout_is_the_same_at_every_cut() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(D, D, num_layers=2, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]  # type: ignore[no-any-return]

    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(D, 2, dropout=0.3, batch_first=True)
            self.drop = nn.Dropout(0.2)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(x + self.drop(self.attention(x, x, x, need_weights=False)[0]))  # type: ignore[no-any-return]

    assert_every_cut_is_plain(chain(Recurrent, Attentive, Attentive), data((5, 4), (3, D)))


class Gate(nn.Module):
    """Its output wants a gradient for some micro-batches and not for others."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.linear, self._sign = nn.Linear(D, D), sign

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if float(x.detach().sum()) * self._sign > 0 else x * 2


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_layer_whose_output_wants_a_gradient_only_sometimes(sign: float) -> None:
    x = torch.ones(6, D) * torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, 1.0])[:, None]
    assert_every_cut_is_plain(chain(lambda: Gate(sign), linear), [(x, torch.randn(6, D))], num_microbatches=3)


class Checkpointed(nn.Module):
    """Recomputes by itself, with torch's own means."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        self.first, self.drop, self._calls = nn.Linear(D, D), nn.Dropout(0.4), calls

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self._calls):
            x = torch.utils.checkpoint.checkpoint(self._once, x, use_reentrant=False)
        return x

    def _once(self, x: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def test_torchs_own_checkpointing_inside_a_layer() -> None:
    assert_every_cut_is_plain(chain(linear, Checkpointed, lambda: nn.BatchNorm1d(D), Checkpointed), data((9, 8)))


def test_torchs_own_checkpointing_of_several_calls_of_one_dropout_is_refused() -> None:
    with pytest.raises(LayerError, match=r"layer1.drop is called several times under torch.utils.checkpoint"):
        train(chain(linear, lambda: Checkpointed(2)), (1, 1), data(), num_microbatches=2)


def test_a_buffer_that_changes_only_later_is_refused() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(D))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > 1:
                self.mean += x.detach().mean(0)
            return x + self.mean

    with pytest.raises(LayerError, match="buffer mean of a Late changed, which it did not do in the first forward"):
        train(chain(linear, Late, linear), (3,), data(), num_microbatches=3)


def test_a_buffer_that_is_replaced_only_later_is_refused() -> None:
    class Replaced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(D))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > 1:  # the new one may lie where the old one was, and have its id
                del self.mean
                self.register_buffer("mean", torch.ones(D))
            return x + self.mean

    with pytest.raises(LayerError, match="buffer mean of a Replaced changed, which it did not do in the first forward"):
        train(chain(linear, Replaced, linear), (3,), data(), num_microbatches=3)


def test_parts_that_stay_in_evaluation_for_good() -> None:
    def frozen_norm() -> nn.Module:
        module = nn.Sequential(linear(), nn.BatchNorm1d(D), nn.Dropout(0.5))
        module[1].eval()
        return module

    recipe = chain(frozen_norm, linear)
    assert_every_cut_is_plain(recipe, data((9, 8)))
    got = train(recipe, (1, 1), data((9, 8)), num_microbatches=3)
    assert got.buffers["layer0.1.num_batches_tracked"] == 0


def test_complex_values_and_batch_norm_called_by_keyword() -> None:
    class Complex(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.complex(x, 0.5 * x).conj()

    class Real(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(D)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(input=(x.real + 2 * x.imag).contiguous())  # type: ignore[no-any-return]

    assert_every_cut_is_plain(chain(linear, Complex, Real, linear), data((9, 8)))


# ---- bad modules -----------------------------------------------------------------------------------------------------


def test_a_module_without_a_gradient_is_named() -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> float:
            return float(x.detach().sum())

    loss = lambda output, targets: output * targets[0].sum()  # noqa: E731
    layers = chain(linear, Cut).layers
    with pytest.raises(LayerError, match=r"no gradient can pass layer layer1: it returns a number \(float\)"):
        train(recipe_of(*layers, loss=loss), (1, 1), data(), num_microbatches=2)


def test_nothing_to_train_is_said() -> None:
    with pytest.raises(LayerError, match="the loss does not depend on any parameter that can be trained"):
        train(chain(nn.Tanh, nn.Sigmoid), (1, 1), data(), num_microbatches=2)


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda output, targets: (output - targets[0]).square(), r"got a float32 tensor \[2, 6\]"),
        (lambda output, targets: 1.0, r"got a number \(float\)"),
        (lambda output, targets: output.sum().long(), r"got a int64 tensor \[\]"),
    ],
)
def test_a_loss_of_the_wrong_shape_is_refused(loss: Callable[..., Any], got: str) -> None:
    with pytest.raises(LayerError, match=f"the loss must be one number.*{got}"):
        train(recipe_of(*chain(linear, nn.Tanh).layers, loss=loss), (1, 1), data((4,)), num_microbatches=2)


def test_an_object_that_cannot_travel_is_named() -> None:
    class Box:
        pass

    class Boxed(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Box]:
            return x, Box()

    with pytest.raises(LayerError, match=r"layer layer0: a .*Box cannot go from layer to layer; return tensors"):
        train(chain(Boxed, linear), (1, 1), data(), num_microbatches=2)


def test_an_element_that_is_not_there_is_named() -> None:
    recipe = recipe_of(LayerRecipe("a", Halves), LayerRecipe("b", linear, takes=(Value("a", 3),)))
    with pytest.raises(LayerError, match="layer b takes element 3 of a, which is"):
        train(recipe, (1, 1), data(), num_microbatches=2)


class _Aligned(nn.Module):
    """Fails where a value or a gradient begins in the middle of other memory; gives views that do, and odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()

    def forward(self, value: Any) -> dict[str, Tensor]:
        x = value["x"] if isinstance(value, dict) else value
        for tensor in value.values() if isinstance(value, dict) else (value,):
            assert tensor.data_ptr() % 64 == 0, "a value"
        y = self.linear(torch.cat([x.new_zeros(1, D), x]))
        outputs = {"odd": y[:1, :1] * 2, "x": y[1:]}
        if outputs["x"].requires_grad:
            outputs["x"].register_hook(_check_gradient)
        return outputs


def _check_gradient(gradient: Tensor) -> None:
    assert gradient.data_ptr() % 64 == 0, "a gradient"


def test_values_and_gradients_are_aligned_as_fresh_ones_are() -> None:
    """Products of matrices that lie otherwise have other last bits, on some processors."""

    def loss(output: dict[str, Tensor], targets: tuple[Tensor, ...]) -> Tensor:
        return (output["x"] - targets[0]).square().sum() + output["odd"].sum()

    recipe = recipe_of(*(LayerRecipe(f"layer{i}", _Aligned) for i in range(3)), loss=loss)
    for balance in every_cut(3):
        for recompute in ("always", "never"):
            train(recipe, balance, data(rows=(7,)), num_microbatches=3, recompute=recompute)
