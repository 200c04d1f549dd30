"""model=anything: factories, losses, and what is said when they cannot work."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipetrain.errors import ConfigError
from pipetrain.models import BATCH, LayerRecipe, Recipe, Value, try_out
from pipetrain.models.anything import anything
from pipetrain.models.capture import capture
from pipetrain.models.losses import find_loss

MODELS = """
import torch
from torch import Tensor, nn
import torch.nn.functional as F

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.a, self.b = nn.Linear(4, width), nn.Linear(width, 3)
    def forward(self, x):
        return self.b(torch.relu(self.a(x)))

class ReadsItself(Net):
    def __init__(self):
        super().__init__()
        self.scale = float(self.a.weight.abs().max())

class Branches(Net):
    def forward(self, x):
        return self.a(x) if x.sum() > 0 else x

def build(width=8): return Net(width)
def blocks(): return [nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 3))]
def raises(): raise RuntimeError("no luck today")
def inner(width=8): return Net(width).forward()
def nothing(): return None
def half(): return [nn.Linear(4, 8), "relu"]
number = 3

def loss(output, target): return F.cross_entropy(output, target, reduction="sum")
def mean_of_each(output, target): return F.cross_entropy(output, target, reduction="none")
def detached(output, target): return loss(output.detach(), target)
def as_item(output, target): return torch.tensor(loss(output, target).item())
def of_argmax(output, target): return (output.argmax(-1) != target).sum().float()
"""


@pytest.fixture(autouse=True)
def _own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_models.py").write_text(MODELS)
    (tmp_path / "broken_models.py").write_text("import no_such_package\n")
    (tmp_path / "raising_models.py").write_text("raise ValueError('half written')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere", *__import__("sys").path])


def recipe(factory: str, loss: str = "cross_entropy", seed: int = 1, **arguments: Any) -> Recipe:
    return anything(factory=factory, arguments=arguments, loss=loss, seed=seed)


def weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    built = {
        layer.full_name(name): p.detach().clone()
        for layer in recipe.layers
        for name, p in layer.build().state_dict().items()
    }
    recipe.release()
    return built


def test_initial_values_are_those_of_the_seed_each_time() -> None:
    torch.manual_seed(9)
    before = torch.default_generator.get_state()
    made = recipe("users_models:build", width=5)
    first, again, other = weights(made), weights(made), weights(recipe("users_models:build", seed=2, width=5))
    assert torch.equal(torch.default_generator.get_state(), before)
    torch.manual_seed(1)
    import users_models  # type: ignore[import-not-found]

    plain = users_models.Net(5).state_dict()
    assert set(first) == set(plain)
    assert all(torch.equal(first[name], plain[name]) and torch.equal(again[name], plain[name]) for name in plain)
    assert not torch.equal(other["a.weight"], plain["a.weight"])


def test_layers_share_one_whole_until_it_is_released() -> None:
    made = recipe("users_models:Net")
    first, second = made.layers[0].build(), made.layers[0].build()
    assert next(first.parameters()) is next(second.parameters())
    made.release()
    assert next(made.layers[0].build().parameters()) is not next(first.parameters())


@pytest.mark.parametrize("factory", ["users_models:build", "users_models:Net", "users_models:ReadsItself"])
def test_factories_are_functions_or_classes(factory: str) -> None:
    assert [layer.name for layer in recipe(factory).layers] == ["a", "b"]


def test_a_list_of_blocks_is_a_chain() -> None:
    assert [layer.name for layer in recipe("users_models:blocks").layers] == ["0", "1.0", "1.1"]


def test_a_model_of_torchvision() -> None:
    made = recipe("alexnet", num_classes=5)
    assert [layer.name for layer in made.layers][-1] == "classifier.6"
    assert made.layers[-1].build().get_parameter("classifier.6.bias").shape == (5,)


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        ("resnet19", {}, "resnet19 is no classification model of torchvision. Did you mean 'resnet18'"),
        ("user_models:build", {}, "no module user_models.*Did you mean 'users_models'"),
        ("users_models:bild", {}, "users_models has no bild. Did you mean 'build'"),
        ("users_models:", {}, "must name a module and something in it"),
        ("broken_models:build", {}, "broken_models imports no_such_package, which is not installed"),
        (
            "raising_models:build",
            {},
            r"importing raising_models fails: ValueError: half written \(.*raising_models.py:1",
        ),
        ("users_models:number", {}, "is a int, not a function or class"),
        (
            "users_models:raises",
            {},
            r"calling it with \(\) raised RuntimeError: no luck today \(.*users_models.py:\d+, `",
        ),
        ("users_models:inner", {"width": 3}, r"calling it with \(width=3\) raised TypeError: .*users_models.py:\d+, `"),
        (
            "users_models:build",
            {"wide": 3},
            r"cannot be called with \(wide=3\): got an unexpected .* 'wide'; it takes \(width=8\), and model.arguments",
        ),
        ("users_models:nothing", {}, "it gives None, a NoneType; it must give an nn.Module or a list"),
        ("users_models:half", {}, "it gives 'relu', a str; it must give"),
        (
            "users_models:Branches",
            {},
            "users_models:Branches: the model cannot be captured.*users_models.py:.*if x.sum",
        ),
        ("resnet18", {"classes": 3}, r"calling it with \(classes=3\) raised TypeError: .*unexpected .* 'classes'"),
    ],
)
def test_bad_factories_are_explained(factory: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"model.factory=.*{message}"):
        recipe(factory, **arguments)


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_cross_entropy_sums_over_what_is_not_padding_and_adds_auxiliary_heads() -> None:
    loss_sum, count = find_loss("cross_entropy")
    logits, aux, target = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.tensor([[1, 2, -100], [0, 4, 3]])
    each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    torch.testing.assert_close(loss_sum(logits, (target,)), each.sum())
    assert count((target,)) == 5
    extra = F.cross_entropy(aux.flatten(0, 1), target.flatten(), reduction="sum")
    torch.testing.assert_close(loss_sum((logits, None, aux), (target,)), each.sum() + 0.3 * extra)


def test_squared_error_is_the_mean_of_each_sample_summed() -> None:
    loss_sum, count = find_loss("mse")
    output, target = torch.randn(4, 3), torch.randn(4, 3)
    torch.testing.assert_close(loss_sum(output, (target,)) / count((target,)), F.mse_loss(output, target))


def test_an_own_loss_by_name() -> None:
    loss_sum, count = find_loss("users_models:loss")
    output, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    torch.testing.assert_close(loss_sum(output, (target,)) / count((target,)), F.cross_entropy(output, target))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("cross_entrop", "no such loss. Did you mean 'cross_entropy'"),
        ("users_models:los", "model.loss=.*has no los. Did you mean 'loss'"),
    ],
)
def test_unknown_losses_are_explained(loss: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe("users_models:build", loss)


# ---- trying it out ---------------------------------------------------------------------------------------------------


X, Y = torch.randn(2, 4), torch.tensor([0, 2])


def test_what_fits_passes_and_leaves_nothing_behind() -> None:
    made = recipe("users_models:build")
    before = torch.default_generator.get_state()
    try_out(made, (X,), (Y,))
    assert torch.equal(torch.default_generator.get_state(), before)
    assert {p.device.type for p in made.layers[0].build().parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("loss", "inputs", "targets", "message"),
    [
        ("cross_entropy", torch.randn(2, 5), Y, r"layer a fails on float32 \[2, 5\]: RuntimeError: .*cannot be mult"),
        ("mse", X, Y, r"model.loss=mse needs an output of the targets' shape \[2\], but the model returns \[2, 3\]"),
        ("cross_entropy", X, torch.zeros(2, 4, dtype=torch.long), r"needs logits of shape \[2, 4, 'classes'\]"),
        ("users_models:mean_of_each", X, Y, r"returns a tensor of shape \[2\]; it must return one number"),
        (
            "users_models:loss",
            X,
            torch.randn(2, 4),
            r"the loss fails on the model's output float32 \[2, 3\] and targets",
        ),
    ],
)
def test_what_does_not_fit_is_named(loss: str, inputs: torch.Tensor, targets: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        try_out(recipe("users_models:build", loss), (inputs,), (targets,))


class Words(nn.Module):
    def forward(self, x: torch.Tensor) -> str:
        return "words"


def test_a_layer_that_gets_no_tensor_is_named_with_the_one_that_gives_it() -> None:
    layers = [("words", Words), ("last", lambda: nn.Linear(4, 4))]
    made = Recipe(tuple(LayerRecipe(*layer) for layer in layers), *find_loss("cross_entropy"))
    with pytest.raises(ConfigError, match="layer last fails on 'words' from words: TypeError") as caught:
        try_out(made, (X,), (Y,))
    assert type(caught.value) is ConfigError, "no other size of the data would help"


class Rounds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x).argmax(-1)  # type: ignore[no-any-return]


def test_the_layer_behind_which_no_gradient_is_left_is_named() -> None:
    layers = (
        LayerRecipe("first", lambda: nn.Linear(4, 4)),
        LayerRecipe("rounds", Rounds),
        LayerRecipe("last", nn.Identity, takes=(Value("rounds"),)),
    )
    made = Recipe(layers, loss_sum=lambda output, targets: output.sum(), count=lambda targets: 2)
    with pytest.raises(ConfigError, match=r"layer rounds gives nothing that a gradient.*int64 \[2\]"):
        try_out(made, (X,), (Y,))
    assert made.taken_by(0) == (Value(BATCH),)


@pytest.mark.parametrize("name", ["users_models:detached", "users_models:as_item", "users_models:of_argmax"])
def test_a_loss_that_drops_the_gradient_is_blamed_by_its_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.loss={name} returns a number that no gradient flows back from"):
        try_out(recipe("users_models:build", name), (X,), (Y,))
    with torch.no_grad():  # an evaluation, or a forward that is recomputed later
        find_loss(name)[0](torch.randn(2, 3, requires_grad=True), (Y,))


def test_a_target_that_the_output_has_no_class_for_is_found() -> None:
    with pytest.raises(ConfigError, match=r"the loss fails on the model's output float32 \[2, 3\].*IndexError"):
        try_out(recipe("users_models:build"), (X,), (Y + 5,))


class Looks(nn.Linear):
    """Cannot run without values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def test_a_model_that_looks_at_values_is_tried_with_values_and_leaves_them_alone(monkeypatch: Any) -> None:
    made = Recipe((LayerRecipe("looks", lambda: Looks(4, 3)),), *find_loss("cross_entropy"))
    before = X.clone()
    try_out(made, (X,), (Y,))
    assert torch.equal(X, before)
    wrong = Recipe((LayerRecipe("looks", lambda: Looks(5, 3)),), *find_loss("cross_entropy"))
    with pytest.raises(ConfigError, match=r"layer looks fails on float32 \[2, 4\]"):
        try_out(wrong, (X,), (Y,))
    seen_twice = (LayerRecipe("looks", lambda: Looks(4, 4)), LayerRecipe("same", nn.Identity, takes=(Value(BATCH),)))
    shared = Recipe(seen_twice, *find_loss("cross_entropy"))
    with pytest.raises(ConfigError, match="layer looks changes a tensor in place that layer same also gets, from"):
        try_out(shared, (X,), (Y,))
    monkeypatch.setattr("pipetrain.models.tryout.LARGEST_TRIED", 1)
    try_out(made, (X,), (Y,))  # too large to be tried with values


class Aliased(nn.Module):
    """Changes in place what, under another name that the trace knows nothing of, is used again three layers later."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.parts, self.same = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)), nn.Sequential()
        self._in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        a = self.parts[0](x)
        v = self.same(a)
        if self._in_place:
            v += self.parts[1](x)
        else:
            v = v + self.parts[1](x)
        return self.parts[3](self.parts[2](a)) + v


def test_a_change_in_place_that_others_would_see_is_refused_and_nothing_else() -> None:
    x, y = (torch.randn(3, 4),), (torch.randn(3, 4),)
    for in_place in (True, False):
        torch.manual_seed(0)
        module = Aliased(in_place)
        layers, ties = capture(module, lambda module=module: copy.deepcopy(module), 1)
        recipe = Recipe(tuple(layers), *find_loss("mse"), ties=tuple(ties))
        if in_place:
            with pytest.raises(ConfigError, match=r"changes a tensor in place that layer .* also gets, from"):
                try_out(recipe, x, y)
        else:
            try_out(recipe, x, y)


@pytest.mark.parametrize(
    ("module", "error"),
    [
        (nn.Sequential(nn.LazyLinear(4)), "module 0 is lazy"),
        (nn.Sequential(nn.Embedding(4, 4, sparse=True)), "module 0 has sparse gradients"),
    ],
)
def test_modules_that_cannot_be_cut_are_named(module: nn.Module, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        capture(module, lambda: module, 1)


def test_hooks_of_a_container_are_not_lost_silently() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    module[1].register_forward_hook(lambda part, args, output: output * 2)
    with pytest.raises(ConfigError, match="module 1 has a forward hook"):
        capture(module, lambda: module, 1)
