"""What a trace would lose is refused before training: where it is seen, by its line, and else by its numbers."""

import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipetrain.errors import ConfigError
from pipetrain.models import Recipe, check_layers
from pipetrain.models.capture import capture
from pipetrain.models.losses import find_loss
from pipetrain.models.whole import Whole, WithoutMemory

D = 4
X, Y = torch.randn(5, D, generator=torch.Generator().manual_seed(0)), torch.zeros(5, D)


def recipe_of(make: Callable[[], nn.Module]) -> Recipe:
    whole = Whole(make, seed=0)
    with WithoutMemory():
        module = make()
    layers, ties = capture(module, whole.module, 1)
    return Recipe(tuple(layers), *find_loss("mse"), ties=tuple(ties), release=whole.release, whole=whole.module)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)).tanh())  # type: ignore[no-any-return]


class Fine(Base):
    """Draws, statistics, a buffer that changes and a weight that is used twice: the same by both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(D), nn.Dropout(0.5)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(D, D))
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.norm(self.a(x)), 0.3, self.training)
        return super().forward(self.spectral(self.drop(x)) + torch.rand_like(x))


class OnlyFloat32(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(
            x + torch.eye(D, dtype=torch.float32)[0].to(torch.float32) @ torch.ones(D, D, dtype=x.dtype)
        )


class Between(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.hooked = nn.Linear(D, D), Base()
        self.hooked.register_full_backward_hook(lambda module, given, wanted: (2 * given[0],))

    def forward(self, x: Tensor) -> Tensor:
        return self.hooked(self.first(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "make", [Base, Fine, OnlyFloat32, Between, lambda: nn.Sequential(Base(), nn.ReLU(inplace=True), Base())]
)
def test_what_is_right_passes_and_leaves_nothing_behind(make: Callable[[], nn.Module]) -> None:
    recipe = recipe_of(make)
    before = torch.default_generator.get_state(), random.getstate(), X.clone()
    check_layers(recipe, (X,), (Y,))
    assert torch.equal(torch.default_generator.get_state(), before[0])
    assert random.getstate() == before[1]
    assert torch.equal(X, before[2])
    assert all(p.grad is None for layer in recipe.layers for p in layer.build().parameters())


# ---- by the line -----------------------------------------------------------------------------------------------------


class NoGradients(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.a(x).relu()
        return super().forward(x)


class Autocast(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.a(x)
        return super().forward(x.float())


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -gradient


class OwnBackward(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Reversed.apply(self.a(x)))


class LazyMask(Base):
    mask: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.ones(D)
        return super().forward(x * self.mask)


class InAList(Base):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Linear(D, D)]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.hidden[0](x))


class ParametrisedTwice(Base):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.utils.parametrizations.weight_norm(nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(F.linear(x, self.b.weight) + self.b(x))  # type: ignore[no-any-return]


class HookedTwice(Base):
    def __init__(self) -> None:
        super().__init__()
        self.a.weight.register_hook(lambda gradient: gradient * 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(self.b(self.a(x).relu()).relu()))  # type: ignore[no-any-return]


class OwnGenerator(Base):
    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.rng = generator


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (NoGradients, r"test_faithful.py:\d+, `x = self.a\(x\).relu\(\)`: it runs without gradients"),
        (Autocast, r"test_faithful.py:\d+, `x = self.a\(x\)`: it runs under autocast"),
        (OwnBackward, r"test_faithful.py:\d+, .*: it calls Reversed, an autograd.Function, whose backward"),
        (LazyMask, r"the forward of the module keeps a value in its attribute mask, which a trace would freeze"),
        (InAList, r"a Linear is called that is no part of the module .*not in a plain list"),
        (ParametrisedTwice, r"the module cannot be captured: RuntimeError: Serialization of parametrized modules"),
        (HookedTwice, r"parameter a@2.weight of layer a@2 has a hook and is used in several layers"),
        (lambda: OwnGenerator(torch.Generator()), r"has a random generator of its own in rng"),
        (lambda: OwnGenerator(random.Random(0)), r"has a random generator of its own in rng"),
        (lambda: OwnGenerator(np.random.default_rng(0)), r"has a random generator of its own in rng"),
    ],
)
def test_what_a_trace_would_lose_is_refused_where_it_stands(make: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        recipe_of(make)


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("inner", [NoGradients, OwnBackward, Autocast])
def test_in_a_sub_module_it_is_kept_whole_and_right(inner: Callable[[], nn.Module]) -> None:
    recipe = recipe_of(lambda: Outer(inner()))
    assert [layer.name for layer in recipe.layers] == ["inner", "head"]
    check_layers(recipe, (X,), (Y,))


# ---- by the numbers --------------------------------------------------------------------------------------------------


class IsTensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if isinstance(x, torch.Tensor) else x)


class Counter(Base):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x * self.calls)


class CounterAndDropout(Counter):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.1, self.training)


class Noting(nn.Module):
    noted: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.noted = x.square().mean()
        return x


class AuxiliaryLoss(Base):
    def __init__(self) -> None:
        super().__init__()
        self.noting = Noting()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.noting(x)) + self.noting.noted


class DrawnInInit(Base):
    def __init__(self) -> None:
        super().__init__()
        self.order = torch.randperm(D).tolist()
        self.scale = float(torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, self.order] * self.scale)


class Residual(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = x + block(x)
        return x


class CountsItsCalls(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class CountingTwice(Base):
    def __init__(self) -> None:
        super().__init__()
        self.count = CountsItsCalls()

    def forward(self, x: Tensor) -> Tensor:
        return self.count(super().forward(self.count(x)))  # type: ignore[no-any-return]


class ChangesAFlatView(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        view = h.ravel()
        g = self.b(x * 2).ravel()
        view += g
        return self.c(h)  # type: ignore[no-any-return]


class EvaluatesItsNorm(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D)

    def forward(self, x: Tensor) -> Tensor:
        self.norm.eval()
        return super().forward(self.norm(x))


def with_a_forward_of_its_own() -> nn.Module:
    module = Base()
    module.forward = types.MethodType(lambda self, x: self.a(x), module)  # type: ignore[method-assign]
    return module


class ClampsATiedWeight(Base):
    def __init__(self) -> None:
        super().__init__()
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        self.a.weight.data.clamp_(-0.1, 0.1)
        return self.c(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "make",
    [
        IsTensor,
        Counter,
        CounterAndDropout,
        AuxiliaryLoss,
        DrawnInInit,
        CountingTwice,
        ChangesAFlatView,
        EvaluatesItsNorm,
        with_a_forward_of_its_own,
        ClampsATiedWeight,
    ],
)
def test_layers_that_do_not_compute_what_the_module_computes_are_refused(make: Callable[[], nn.Module]) -> None:
    says = (
        r"(layers that the module was cut into do not compute what it computes itself: |changes the parameter|cannot)"
    )
    with pytest.raises(ConfigError, match=says):
        check_layers(recipe_of(make), (X,), (Y,))


def test_a_list_with_a_forward_of_its_own_is_no_chain() -> None:
    recipe = recipe_of(lambda: nn.Sequential(Residual([nn.Linear(D, D), nn.Linear(D, D)]), nn.Linear(D, D)))
    check_layers(recipe, (X,), (Y,))


def test_what_is_too_large_to_be_compared_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(IsTensor)
    monkeypatch.setattr("pipetrain.models.faithful.LARGEST_TRIED", 1)
    check_layers(recipe, (X,), (Y,))


class Fails(Base):
    """Where nobody looks: behind the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_full_backward_pre_hook(lambda module, given: 1 / 0)  # type: ignore[arg-type,return-value]


def test_a_module_that_fails_itself_is_said_to() -> None:
    with pytest.raises(ConfigError, match="the module itself fails: ZeroDivisionError"):
        check_layers(recipe_of(Fails), (X,), (Y,))
