"""Random modules that know nothing of pipelines, captured and cut at random: the numbers are those of the plain module.

A module is a list of steps, each of some values before it: parts of torch and of the user's own (some of which cannot
be traced), parts called several times, tied and fetched weights, functions, views, changes in place, tuples and dicts.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pipeline import train
from reference import plain_step
from test_any_module import assert_same, data
from torch import Tensor, nn

from pipetrain.errors import ConfigError
from pipetrain.models import Recipe, try_out
from pipetrain.models.capture import capture
from pipetrain.models.whole import Whole, WithoutMemory

D = 6  # as in test_any_module.data; halves and thirds


# ---- parts of the user's own -----------------------------------------------------------------------------------------


class Block(nn.Module):
    """Is traced through."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(D, D), nn.Linear(D, D), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != D:
            raise ValueError("another width")
        return x + self.drop(self.b(F.relu(self.a(x), inplace=True)))


class Deciding(nn.Module):
    """Is kept whole, with the parts and the dropout in it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(D, D), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.linear(x)) if x.sum() > 0 else self.linear(self.drop(x))


class Draws(nn.Module):
    """No module of torch's draws here."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand_like(x)


class Same(nn.Module):
    """Gives what it gets, under another name."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Two(nn.Module):
    """Two tensors and a number that depends on the data; is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        return self.linear(x), x * 2, float(x.detach().max())


class Named(nn.Module):
    """A dict; is traced through."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"left": torch.tanh(self.linear(x)), "right": x, "none": None}


class Joins(nn.Module):
    """Takes a whole tuple or dict."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((D,), 0.5))

    def forward(self, several: Any) -> Tensor:
        a, b, *_ = several.values() if isinstance(several, dict) else several
        return a * self.scale + b  # type: ignore[no-any-return]


PARTS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D, D),
    "frozen": lambda: nn.Linear(D, D).requires_grad_(False),
    "half": lambda: nn.Linear(D // 2, D // 2),
    "wide": lambda: nn.Linear(2 * D, D),
    "norm": lambda: nn.BatchNorm1d(D),
    "layer_norm": lambda: nn.LayerNorm(D),
    "dropout": lambda: nn.Dropout(0.4),
    "dropout_in_place": lambda: nn.Dropout(0.4, inplace=True),
    "relu_in_place": lambda: nn.ReLU(inplace=True),
    "sequence": lambda: nn.Sequential(nn.Linear(D, D), nn.ReLU(inplace=True), nn.BatchNorm1d(D)),
    "block": Block,
    "deciding": Deciding,
    "draws": Draws,
    "same": Same,
    "two": Two,
    "named": Named,
    "joins": Joins,
}


# ---- steps -----------------------------------------------------------------------------------------------------------


def _set_item(a: Tensor, b: Tensor) -> Tensor:
    a[:, 0] = b[:, 1]
    return a


def _add_to(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


def _swapped(a: Tensor) -> Tensor:
    first, second = a.chunk(2, dim=1)
    return torch.cat([second, first], 1)


def _across(a: Tensor) -> Tensor:
    rows, width = a.shape
    return a.view(rows, 2, width // 2).transpose(1, 2).reshape(a.shape[0], -1)


# Of values that are tensors [rows, D], by the number of those they take.
FUNCTIONS: dict[int, dict[str, Callable[..., Tensor]]] = {
    1: {
        "tanh": torch.tanh,
        "swapped": _swapped,
        "across": _across,
        "transposed": lambda a: (a * 0.5).t().contiguous().t(),
        "view": lambda a: a.view(-1, D),
        "column": lambda a: a + a.unbind(1)[2].unsqueeze(-1),
        "softmax": lambda a: F.softmax(a, -1),
        "positions": lambda a: a + torch.arange(a.shape[1], device=a.device) / 10,
        "relu_": lambda a: F.relu(a, inplace=True),
        "mul_": lambda a: a.mul_(0.9),
        "detached": lambda a: a.detach() * 0.5,
        "centred": lambda a: a - a.mean(dim=1, keepdim=True),
    },
    2: {
        "add": lambda a, b: a + b,
        "mul": lambda a, b: a * torch.sigmoid(b),
        "add_to": _add_to,
        "set_item": _set_item,
        "add_": lambda a, b: a.add_(b, alpha=0.5),
        "matmul": lambda a, b: (a.unsqueeze(2) @ b.unsqueeze(1)).mean(1),
    },
}
# Of the module itself and a tensor.
FETCHING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "scale": lambda net, a: a * net.scale,
    "weight": lambda net, a: F.linear(a, net.weight) + net.scale,
    "softmax_of_weight": lambda net, a: a @ net.weight.softmax(0),
    "constant": lambda net, a: a * net.constant,
    "saved": lambda net, a: a - net.saved,
    "by_hand": lambda net, a: F.linear(a, net.parts["first"].weight, net.scale),
}
GIVES_SEVERAL = {"two": (0, 1), "named": ("left", "right")}


@dataclass(frozen=True)
class Step:
    """What is done, with which values (0 is the input), by which step's part, and what is taken of the result."""

    kind: str
    takes: tuple[int, ...]
    part: str = ""
    element: int | str | None = None


class Net(nn.Module):
    def __init__(self, steps: tuple[Step, ...], tied: frozenset[str], gives: tuple[int, ...]) -> None:
        super().__init__()
        self._steps, self._gives = steps, gives
        self.parts = nn.ModuleDict({"first": nn.Linear(D, D)})
        self.scale, self.weight = nn.Parameter(torch.ones(D)), nn.Parameter(torch.randn(D, D) / 3)
        self.register_buffer("saved", torch.linspace(0, 1, D))
        self.register_buffer("constant", torch.linspace(1, 2, D), persistent=False)
        for step in steps:
            if step.part and step.part not in self.parts:
                self.parts[step.part] = PARTS[step.kind]()
                if step.part in tied:
                    self.parts[step.part].weight = self.parts["first"].weight

    def forward(self, x: Tensor) -> Tensor:
        values: list[Any] = [x]
        for step in self._steps:
            taken = [values[i] for i in step.takes]
            value = self._done(step, taken)
            values.append(value if step.element is None else value[step.element])
        return sum((values[i] for i in self._gives[1:]), self.parts["first"](values[self._gives[0]]))

    def _done(self, step: Step, taken: list[Any]) -> Any:
        if step.kind == "half":
            left, right = taken[0].split(D // 2, dim=1)
            return torch.cat([self.parts[step.part](left), self.parts[step.part](right)], dim=1)
        if step.part:
            return self.parts[step.part](torch.cat(taken, 1) if step.kind == "wide" else taken[0])
        if step.kind in FETCHING:
            return FETCHING[step.kind](self, taken[0])
        return FUNCTIONS[len(taken)][step.kind](*taken)


@dataclass(frozen=True)
class Case:
    steps: tuple[Step, ...]
    tied: frozenset[str]
    gives: tuple[int, ...]
    cuts: tuple[float, ...]  # as shares of the layers, of which nobody knows the number yet
    rows: int
    num_microbatches: int
    recompute: bool

    def module(self) -> Net:
        return Net(self.steps, self.tied, self.gives)


@st.composite
def cases(draw: Any) -> Case:
    steps: list[Step] = []
    tensors, several = [0], []
    tied = set()
    for number in range(1, draw(st.integers(4, 10)) + 1):
        how = draw(st.sampled_from(["part", "part", "part", "again", "function", "function", "fetch", "several"]))
        recent = st.sampled_from([tensors[-1], *tensors[-3:], *tensors])
        step = Step("linear", (draw(recent),), f"linear{number}")
        if how == "part":
            kind = draw(st.sampled_from(list(PARTS)))
            kind = kind if kind != "joins" or several else "linear"
            taken = (draw(st.sampled_from(several)) if kind == "joins" else draw(recent),)
            step = Step(kind, taken if kind != "wide" else (*taken, draw(recent)), f"{kind}{number}")
            if kind in ("linear", "frozen") and draw(st.booleans()):
                tied.add(step.part)
        elif how == "again" and (used := [s for s in steps if s.part]):
            earlier = draw(st.sampled_from(used))
            step = Step(earlier.kind, (draw(recent), *earlier.takes[1:]), earlier.part, earlier.element)
            if earlier.kind == "joins":
                step = earlier
        elif how == "function":
            number_taken = draw(st.integers(1, 2))
            kind = draw(st.sampled_from(list(FUNCTIONS[number_taken])))
            step = Step(kind, tuple(draw(recent) for _ in range(number_taken)))
        elif how == "fetch":
            step = Step(draw(st.sampled_from(list(FETCHING))), (draw(recent),))
        elif how == "several" and several:
            step = Step("joins", (draw(st.sampled_from(several)),), f"joins{number}")
        if step.kind in GIVES_SEVERAL and draw(st.booleans()):
            step = Step(step.kind, step.takes, step.part, draw(st.sampled_from(GIVES_SEVERAL[step.kind])))
        whole = step.kind in GIVES_SEVERAL and step.element is None
        (several if whole else tensors).append(number)
        steps.append(step)
    gives = (tensors[-1], *draw(st.lists(st.sampled_from(tensors[-4:]), max_size=2)))
    num_microbatches = draw(st.integers(1, 3))
    return Case(
        tuple(steps),
        frozenset(tied),
        gives,
        tuple(draw(st.lists(st.floats(0, 0.99), min_size=1, max_size=3))),
        draw(st.integers(2 * num_microbatches, 9)),
        num_microbatches,
        draw(st.booleans()),
    )


# ---- what must hold --------------------------------------------------------------------------------------------------


def captured(case: Case) -> Recipe:
    whole = Whole(case.module, seed=3)
    with WithoutMemory():
        look = case.module()
    layers, ties = capture(look, whole.module, 1)
    return Recipe(
        tuple(layers),
        loss_sum=lambda output, targets: (output - targets[0]).square().sum(),
        count=lambda targets: targets[0].numel(),
        ties=tuple(ties),
        release=whole.release,
        whole=whole.module,
    )


@contextmanager
def only_if_plain_pytorch_can() -> Iterator[None]:
    """A change in place may be of what the backward needs."""
    try:
        yield
    except RuntimeError as error:
        assume("inplace" not in str(error).replace("-", ""))
        raise


def check(case: Case) -> None:
    batch = data((case.rows,))[0]
    recipe = captured(case)
    options: dict[str, Any] = {"num_microbatches": case.num_microbatches}
    with only_if_plain_pytorch_can():
        loss_sum, gradients, buffers = plain_step(recipe, *batch, **options)
        # All values that come from a layer with parameters want a gradient in the engine: here all do.
        case.module()(batch[0].clone().requires_grad_().clone()).sum().backward()
    try:
        try_out(recipe, batch[:1], batch[1:])
    except ConfigError as error:  # a part gives its own input, unseen by the trace
        if "changes a tensor in place that layer" in str(error) and any(s.kind in ("two", "joins") for s in case.steps):
            return
        raise
    recipe_names = [layer.name for layer in recipe.layers]
    num_layers = len(recipe.layers)
    edges = [0, *sorted({1 + int(share * (num_layers - 1)) for share in case.cuts} - {num_layers}), num_layers]
    balance = tuple(b - a for a, b in itertools.pairwise(edges))
    cut = train(recipe, balance, [batch], recompute=case.recompute, dtype=torch.float64, **options)
    one = train(recipe, (num_layers,), [batch], recompute=not case.recompute, dtype=torch.float64, **options)
    assert_same(cut, one, case)
    assert cut.reports[0].loss_sum == pytest.approx(loss_sum, rel=1e-11)
    # Each use of a tied parameter has its own name; plain PyTorch knows the first.
    tied = {recipe.layers[recipe_names.index(layer)].full_name(name) for tie in recipe.ties for layer, name in tie}
    assert cut.gradients.keys() ^ gradients.keys() <= tied, (cut.gradients.keys() ^ gradients.keys(), tied)
    largest = max((float(g.abs().max()) for g in gradients.values()), default=1.0)
    for name, gradient in cut.gradients.items():
        assert float((gradient - gradients[name]).abs().max()) <= 1e-10 * largest, name
    for name, buffer in cut.buffers.items():
        assert torch.allclose(buffer, buffers[name], rtol=1e-10, atol=1e-12), name


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases())
def test_a_random_module_at_a_random_cut(case: Case) -> None:
    check(case)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(cases())
def test_many_random_modules_at_random_cuts(case: Case) -> None:
    check(case)
