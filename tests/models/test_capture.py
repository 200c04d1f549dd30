"""Any module as layers: the layers together are the module."""

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import assert_equal_to_plain, captured
from torch import Tensor, nn

from pipetrain.errors import ConfigError
from pipetrain.models.borders import MAX_LAYERS
from pipetrain.models.recipe import BATCH, Value, unsplit
from pipetrain.vision import import_torchvision

import_torchvision()
vision: Any = importlib.import_module("torchvision.models")


def small_vit() -> nn.Module:
    return vision.VisionTransformer(  # type: ignore[no-any-return]
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, dropout=0.1, num_classes=7
    )


def small_swin() -> nn.Module:
    depth: dict[str, Any] = {"depths": [2, 2], "num_heads": [2, 2], "stochastic_depth_prob": 0.3}
    return vision.SwinTransformer([4, 4], 8, window_size=[4, 4], dropout=0.1, num_classes=7, **depth)  # type: ignore[no-any-return]


TORCHVISION = {
    "resnet18": (lambda: vision.resnet18(num_classes=7), 32),
    "densenet121": (lambda: vision.densenet121(num_classes=7, drop_rate=0.1), 32),
    "googlenet": (lambda: vision.googlenet(num_classes=7, init_weights=False), 64),
    "mobilenet_v3_small": (lambda: vision.mobilenet_v3_small(num_classes=7), 32),
    "efficientnet_b0": (lambda: vision.efficientnet_b0(num_classes=7), 32),
    "shufflenet": (lambda: vision.shufflenet_v2_x0_5(num_classes=7), 32),
    "vit": (small_vit, 32),
    "swin": (small_swin, 32),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_models_are_the_sum_of_their_layers(name: str) -> None:
    factory, size = TORCHVISION[name]
    model = captured(factory)
    inputs = torch.randn(4, 3, size, size, dtype=torch.float64)
    for mode in (True, False):
        assert_equal_to_plain(model, inputs, mode=mode)
    assert model.state_names() == set(model.plain.state_dict())
    assert 7 <= len(model.layers) <= MAX_LAYERS
    assert len(set(model.names)) == len(model.names)


def test_auxiliary_heads_are_there_in_training_only() -> None:
    factory, size = TORCHVISION["googlenet"]
    model = captured(factory)
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    model.train(True)
    assert type(model.run(images)).__name__ == "GoogLeNetOutputs"
    model.train(False)
    assert model.run(images).shape == (2, 7)


class UNet(nn.Module):
    """Two levels down and up, each level's values skipping to the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 4), (4, 8), (8, 8))])
        self.up = nn.ModuleList([nn.Conv2d(i, o, 3, padding=1) for i, o in ((16, 4), (8, 4))])
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down[0](x))
        b = F.relu(self.down[1](F.max_pool2d(a, 2)))
        c = F.relu(self.down[2](F.max_pool2d(b, 2)))
        y = self.up[0](torch.cat([F.interpolate(c, size=b.shape[-2:]), b], 1))
        return self.norm(self.up[1](torch.cat([F.interpolate(y, size=x.shape[-2:]), a], dim=1)))  # type: ignore[no-any-return]


def test_skips_go_from_their_layer_to_their_user() -> None:
    model = captured(UNet)
    for mode in (True, False):
        assert_equal_to_plain(model, torch.randn(2, 3, 8, 8, dtype=torch.float64), mode=mode)
    assert model.names == ["down.0", "down.1", "down.2", "up.0", "up.1", "norm"]
    far = [(layer.name, value.layer) for layer in model.layers for value in layer.takes or ()]
    assert ("up.0", "down.0") in far
    assert ("down.2", "down.0") not in far  # a layer between takes nothing of it


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.block(self.embed(ids))))  # type: ignore[no-any-return]


class TiedByHand(nn.Module):
    """Fetches the weight of a module that another layer calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.block(self.embed(ids))), self.embed.weight)


class Shared(nn.Module):
    """One module in two layers, and one random module in each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.between = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.between(self.drop(torch.tanh(self.inner(x))))
        return x


def test_a_parameter_of_two_layers_is_a_tie() -> None:
    ids = torch.randint(11, (3, 5))
    tied = captured(Tied)
    assert_equal_to_plain(tied, ids, mode=True)
    assert tied.ties == [(("embed", "embed.weight"), ("head", "head.weight"))]
    by_hand = captured(TiedByHand)
    assert_equal_to_plain(by_hand, ids, mode=True)
    assert by_hand.ties == [(("embed", "embed.weight"), ("embed.weight@2", "embed.weight@2"))]


def test_a_module_of_two_layers_has_a_name_for_each_use() -> None:
    model = captured(Shared)
    assert_equal_to_plain(model, torch.randn(3, 8, dtype=torch.float64), mode=True)
    assert model.names == ["inner", "between", "inner@2", "between@2"]
    assert (("inner", "inner.weight"), ("inner@2", "inner@2.weight")) in model.ties
    assert [n for m in model.modules for n, _ in m.named_modules() if "drop" in n] == ["drop", "drop@2"]
    assert len({id(module) for layer in model.modules for module in layer.modules()}) == 4 + 6 + 0


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(self.a(x), 0.5, training=self.training))  # type: ignore[no-any-return]


class OnlyInEvaluation(nn.Module):
    """The graphs differ both ways: each mode has an operation that the other has not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.aux, self.b = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        extra = self.aux(y) if self.training else None
        y = self.b(y)
        return (y, extra) if self.training else F.softmax(y, -1)


@pytest.mark.parametrize("module", [FunctionalDropout, OnlyInEvaluation])
def test_each_mode_runs_its_own_graph(module: type[nn.Module]) -> None:
    model = captured(module)
    inputs = torch.randn(4, 8, dtype=torch.float64)
    for mode in (True, False):
        assert_equal_to_plain(model, inputs, mode=mode)
    model.train(False)
    evaluated = model.run(inputs)
    model.train(True)
    assert isinstance(model.run(inputs), tuple) or not torch.equal(model.run(inputs), evaluated)


class OldNameReadLater(nn.Module):
    """`before` is another name of what is changed in place two layers later."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.change = change
        self.relu = nn.ReLU(inplace=True)
        self.same = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        before = y.view(-1, 8) if self.change == "view" else self.same(y) if self.change == "alias" else y
        z = self.b(self.c(x))
        if self.change == "method":
            y.add_(z)
        elif self.change == "operator":
            y += z
        elif self.change == "item":
            y[:, 0] = z[:, 0]
        elif self.change == "module":
            self.relu(y)
        elif self.change == "function":
            F.relu(y, inplace=True)
        elif self.change in ("view", "alias"):
            torch.relu_(y)
        return self.d(z) + before


@pytest.mark.parametrize("change", ["method", "operator", "item", "module", "function", "view", "alias"])
def test_no_border_between_a_value_and_its_change_in_place_that_is_seen_later(change: str) -> None:
    model = captured(lambda: OldNameReadLater(change))
    inputs = torch.randn(4, 8, dtype=torch.float64)
    for mode in (True, False):
        assert_equal_to_plain(model, inputs, mode=mode)
    assert len(model.layers) == 2  # a, b and c together; then d


class ChangedInput(nn.Module):
    """The input itself is changed in place, and read again by a later layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x.relu_())
        return self.c(self.b(y) + x)  # type: ignore[no-any-return]


def test_layers_that_read_a_changed_input_are_one() -> None:
    model = captured(ChangedInput)
    inputs = torch.randn(4, 8, dtype=torch.float64)
    model.train(True)
    torch.testing.assert_close(model.run(inputs.clone()), model.plain(inputs.clone()))
    assert model.names == ["a", "c"]


class NormTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.norm(self.b(self.norm(self.a(x)))))  # type: ignore[no-any-return]


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("values", torch.linspace(1, 2, 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.values  # type: ignore[no-any-return]


class RotaryTwice(nn.Module):
    """A buffer that is not saved is a constant: it may be in several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("table", torch.linspace(1, 2, 8), persistent=False)
        self.rotate = Table()

    def forward(self, x: Tensor) -> Tensor:
        return self.rotate(self.b(self.a(self.rotate(x * self.table)))) * self.table  # type: ignore[no-any-return]


def test_calls_that_share_changing_buffers_are_one_layer() -> None:
    model = captured(NormTwice)
    assert_equal_to_plain(model, torch.randn(4, 8, dtype=torch.float64), mode=True)
    assert model.names == ["a", "norm", "c"]


def test_a_buffer_that_is_only_read_is_in_each_layer() -> None:
    model = captured(RotaryTwice)
    assert_equal_to_plain(model, torch.randn(4, 8, dtype=torch.float64), mode=True)
    buffers = [name for module in model.modules for name, _ in module.named_buffers()]
    assert buffers == ["table", "rotate.values", "table@2", "rotate@2.values"]
    assert model.state_names() == set(model.plain.state_dict())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if x.sum() > 0:
            x = x * 2
        return x


class ChildBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.odd, self.b = nn.Linear(8, 8), Branches(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.odd(self.a(x)))  # type: ignore[no-any-return]


def test_a_child_whose_forward_branches_on_data_is_kept_whole() -> None:
    model = captured(ChildBranches)
    assert model.names == ["a", "odd", "b"]
    for sign in (1, -1):
        assert_equal_to_plain(model, sign * torch.randn(4, 8, dtype=torch.float64), mode=True)
    assert isinstance(model.modules[1].get_submodule("odd"), Branches)


def test_a_root_that_branches_on_data_is_refused_with_the_line() -> None:
    with pytest.raises(ConfigError, match=r"test_capture.py:\d+, `if x.sum\(\) > 0:`.*sub-module of its own.*blocks"):
        captured(Branches)


class LikeMinGpt(nn.Module):
    """Sizes of the input, a check of them, positions made on its device, an argument with a default, a tuple output."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
        rows, length = ids.size()
        assert length <= 6, f"{length} is too long"
        if ids.ndim != 2:
            raise ValueError("a matrix, please")
        x = self.token(ids) + self.position(torch.arange(0, length, device=ids.device))
        noise = torch.rand(rows, length, 1, dtype=torch.float64)
        logits = self.head(x * noise)
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_what_language_models_do_before_their_first_block() -> None:
    model = captured(LikeMinGpt)
    for length in (5, 3):  # nothing of the trace depends on the length, or on what was drawn
        assert_equal_to_plain(model, torch.randint(11, (2, length)), mode=True)
    with pytest.raises(ValueError, match=r"test_capture.py:\d+, `assert length <= 6.*fails"):
        model.run(torch.randint(11, (2, 7)))
    with_loss = captured(LikeMinGpt, num_inputs=2)
    assert_equal_to_plain(with_loss, torch.randint(11, (2, 5)), torch.randint(11, (2, 5)), mode=True)
    assert Value(BATCH, 1) in (with_loss.layers[-1].takes or ())


class Device(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.how = nn.Linear(8, 8), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "method":
            return self.a(x).cuda()  # type: ignore[no-any-return]
        if self.how == "text":
            return self.a(x).to("cuda:0")  # type: ignore[no-any-return]
        if self.how == "factory":
            return self.a(x) + torch.zeros(8, device=torch.device("cpu"))  # type: ignore[no-any-return]
        return self.a(x) + torch.zeros(8, device=x.device, dtype=x.dtype)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["method", "text", "factory"])
def test_a_fixed_device_is_refused_with_the_line(how: str) -> None:
    for factory in (lambda: Device(how), lambda: Holder(Device(how))):
        with pytest.raises(ConfigError, match=r"test_capture.py:\d+, `return .*bound to one device.*x.device"):
            captured(factory)


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


def test_the_device_of_an_input_is_fine() -> None:
    assert_equal_to_plain(captured(lambda: Device("input")), torch.randn(2, 8, dtype=torch.float64), mode=True)


class PythonsDice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        import random

        return self.a(x) * random.random()  # type: ignore[no-any-return]


def test_numbers_that_a_trace_would_freeze_are_refused() -> None:
    with pytest.raises(ConfigError, match="draws random numbers"):
        captured(PythonsDice)


def test_a_chain_is_taken_as_it_stands() -> None:
    def chain() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), Branches()), nn.Linear(8, 8))

    model = captured(chain)
    assert model.names == ["0", "1.0", "1.1", "2"]
    assert [type(module) for module in model.modules] == [nn.Linear, nn.ReLU, Branches, nn.Linear]
    assert all(layer.takes is None for layer in model.layers)
    assert_equal_to_plain(model, torch.randn(4, 8, dtype=torch.float64), mode=True)
    assert model.state_names() == set(model.plain.state_dict())


def test_a_chain_with_a_module_twice() -> None:
    def chain() -> nn.Module:
        again = nn.Linear(8, 8)
        return nn.Sequential(again, nn.Tanh(), again)

    model = captured(chain)
    assert_equal_to_plain(model, torch.randn(4, 8, dtype=torch.float64), mode=True)
    assert model.names == ["0", "1", "0@2"]
    assert (("0", "weight"), ("0@2", "weight")) in model.ties
    assert model.layers[2].full_name("weight") == "0@2.weight"


def test_a_chain_with_a_batchnorm_twice_keeps_it_in_one_layer() -> None:
    def chain() -> nn.Module:
        norm = nn.BatchNorm1d(8)
        return nn.Sequential(nn.Linear(8, 8), norm, nn.Linear(8, 8), norm, nn.Linear(8, 8))

    model = captured(chain)
    assert_equal_to_plain(model, torch.randn(4, 8, dtype=torch.float64), mode=True)
    assert model.names == ["0", "1", "4"]


def test_deep_models_have_at_most_32_layers_each_of_some_weight() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ModuleList([nn.Linear(4, 4) for _ in range(150)])

        def forward(self, x: Tensor) -> Tensor:
            for step in self.steps:
                x = x + torch.tanh(step(x))
            return x

    model = captured(Deep)
    sizes = [sum(isinstance(m, nn.Linear) for m in module.modules()) for module in model.modules]
    assert sum(sizes) == 150
    assert min(sizes) >= 5  # 150 / 32, rounded up
    assert max(sizes) <= 9
    assert all(len(layer.takes or ()) == 1 for layer in model.layers)  # every border lies behind an addition


def test_two_calls_of_a_module_with_parts_that_is_kept_whole_are_one_layer() -> None:
    """Its dropout's second call is numbered by counting, which nobody could do in another layer."""

    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.linear(x)) if x.sum() > 0 else self.linear(x)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.between, self.last = Deciding(), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.block(self.between(self.block(x))))

    model = captured(Twice)
    called = [{unsplit(name) for name, _ in module.named_modules()} for module in model.modules]
    assert {"block.drop", "between"} <= called[0]
    assert sum("block.drop" in names for names in called) == 1


class FetchedThenCalled(nn.Module):
    """Fetches a weight, in a layer before the one that calls its module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(F.linear(x, self.b.weight)))  # type: ignore[no-any-return]


def test_what_a_called_module_has_keeps_its_plain_name() -> None:
    model = captured(FetchedThenCalled)
    assert_equal_to_plain(model, torch.randn(3, 8, dtype=torch.float64), mode=True)
    assert model.state_names() == {"b.weight@2", "a.weight", "a.bias", "b.weight", "b.bias"}
    assert [layer for layer, _ in model.ties[0]] == ["b.weight@2", "b"]


class ReadsStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.norm(self.a(x)))
        return self.d(self.c(y) - self.norm.running_mean)  # type: ignore[no-any-return]


def test_a_buffer_that_a_module_changes_is_read_in_the_layer_of_that_module() -> None:
    model = captured(ReadsStatistics)
    for mode in (True, True, False):
        assert_equal_to_plain(model, torch.randn(4, 8, dtype=torch.float64), mode=mode)
    assert model.names == ["a", "norm", "d"]


class TiedInOneLayer(nn.Module):
    """The name that the module lists is not the one that is used first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        before = self.b(x)
        after = before.add_(self.a(x))
        return after + before  # type: ignore[no-any-return]


def test_a_parameter_with_two_names_has_the_one_that_the_module_lists() -> None:
    model = captured(TiedInOneLayer)
    (module,) = model.modules
    assert [name for name, _ in module.named_parameters()] == ["a.weight"]
    assert [name for name, _ in model.plain.named_parameters()] == ["a.weight"]
    assert_equal_to_plain(model, torch.randn(3, 8, dtype=torch.float64), mode=True)
    assert model.state_names() == {"a.weight", "b.weight"}
