"""The two halves of a backward together are the whole one, for whatever autograd can build, and cost no more."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

from pipetrain.engine.halves import backward_input

D = 6


class Called(nn.Module):
    """Parts under names, and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradients[0] * weight, (gradients[0] * x).sum(0)


def linear(size: int = D) -> nn.Linear:
    return nn.Linear(D, size)


def in_place(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, :2] += m.b(x)[:, :2]
    return y.relu_() * m.scale


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape or (D,)))


def checkpointed(use_reentrant: bool) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, x: torch.utils.checkpoint.checkpoint(m.a, x, use_reentrant=use_reentrant) + m.b(x)


def lstm() -> nn.Module:
    return nn.LSTM(D, D, num_layers=2, batch_first=True)


def image(*_: Any) -> tuple[Tensor, ...]:
    return (torch.randn(3, D, 5, 5),)


def sequence(*_: Any) -> tuple[Tensor, ...]:
    return (torch.randn(3, 4, D),)


def rows(*_: Any) -> tuple[Tensor, ...]:
    return (torch.randn(5, D),)


def two(*_: Any) -> tuple[Tensor, ...]:
    return torch.randn(5, D), torch.randn(5, D)


SPLIT: dict[str, tuple[Callable[[], nn.Module], Callable[..., tuple[Tensor, ...]]]] = {
    "linear": (linear, rows),
    "mlp": (lambda: nn.Sequential(linear(), nn.GELU(), nn.LayerNorm(D), linear()), rows),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(D, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, D, 1, bias=False)),
        image,
    ),
    "attention": (
        lambda: Called(
            lambda m, x: m.a(x, x, x, need_weights=False)[0] + x, a=nn.MultiheadAttention(D, 2, batch_first=True)
        ),
        sequence,
    ),
    "two inputs": (lambda: Called(lambda m, x, y: m.a(x) * m.b(y), a=linear(), b=linear()), two),
    "two outputs": (lambda: Called(lambda m, x: (m.a(x), m.b(x).sin()), a=linear(), b=linear()), rows),
    "an output of parameters only": (lambda: Called(lambda m, x: (m.a(x), m.p * 2), a=linear(), p=parameter()), rows),
    "the input is an output": (lambda: Called(lambda m, x: (x, m.a(x)), a=linear()), rows),
    "no parameters": (lambda: Called(lambda m, x: x.cos()), rows),
    "a branch": (lambda: Called(lambda m, x: m.a(x) + m.b(x.tanh()), a=linear(), b=linear()), rows),
    "one weight in two branches": (lambda: Called(lambda m, x: m.a(x) + m.a(x.tanh()), a=linear()), rows),
    "a weight made of parameters": (lambda: nn.utils.parametrizations.weight_norm(linear()), rows),
    "such a weight in two branches": (
        lambda: Called(lambda m, x: F.linear(x, m.p.tanh()) + F.linear(x.sin(), m.p.tanh()), p=parameter(D, D)),
        rows,
    ),
    "a made weight used one after the other": (
        lambda: Called(lambda m, x: F.linear(m.a(x), m.b.weight.tanh()), a=linear(), b=linear()),
        rows,
    ),
    "in place": (lambda: Called(in_place, a=linear(), b=linear(), scale=parameter()), rows),
    "checkpointed": (lambda: Called(checkpointed(False), a=linear(), b=linear()), rows),
    "a frozen weight": (lambda: Called(lambda m, x: m.a(x), a=linear().requires_grad_(False)), rows),
}
WHOLE: dict[str, tuple[Callable[[], nn.Module], Callable[..., tuple[Tensor, ...]]]] = {
    "one weight twice in a row": (lambda: Called(lambda m, x: m.a(m.a(x).tanh()), a=linear()), rows),
    "a function of one's own": (
        lambda: Called(lambda m, x: Scaled.apply(m.a(x), m.p), a=linear(), p=parameter()),
        rows,
    ),
    "the same weights at every step": (lstm, sequence),
    "checkpointed, reentrant": (lambda: Called(checkpointed(True), a=linear(), b=linear()), rows),
}


class Outcome:
    """Forward, then backward as a whole or in halves; the gradients after each."""

    def __init__(self, build: Callable[[], nn.Module], inputs: Callable[..., tuple[Tensor, ...]], split: bool) -> None:
        torch.manual_seed(3)
        module = build().double()
        leaves = [x.double().requires_grad_() for x in inputs()]
        outputs = module(*leaves)
        outputs = [out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(out, Tensor)]
        edges, gradients = [get_gradient_edge(out) for out in outputs], [torch.rand_like(out) for out in outputs]
        self.operations: Counter[str] = Counter()
        with _Count(self.operations):
            if split:
                other_half = backward_input(edges, gradients, leaves)
                self.after_first_half = gradients_of(module)
                other_half()
            else:
                torch.autograd.backward(edges, gradients)
        self.inputs = [x.grad for x in leaves]
        self.parameters = gradients_of(module)


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


class _Count(TorchDispatchMode):
    def __init__(self, counted: Counter[str]) -> None:
        super().__init__()
        self._counted = counted

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._counted[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*SPLIT, *WHOLE])
def test_both_halves_are_the_whole(name: str) -> None:
    build, inputs = (SPLIT | WHOLE)[name]
    whole, halves = Outcome(build, inputs, split=False), Outcome(build, inputs, split=True)
    for mine, other in zip(halves.inputs, whole.inputs, strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or torch.allclose(mine, other, rtol=1e-12, atol=1e-13)
    assert halves.parameters.keys() == whole.parameters.keys()
    for key, gradient in whole.parameters.items():
        assert torch.allclose(halves.parameters[key], gradient, rtol=1e-12, atol=1e-13), key


@pytest.mark.parametrize("name", SPLIT)
def test_the_first_half_leaves_the_parameters_alone(name: str) -> None:
    assert Outcome(*SPLIT[name], split=True).after_first_half == {}


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_told_apart_is_done_at_once(name: str) -> None:
    halves = Outcome(*WHOLE[name], split=True)
    assert halves.after_first_half.keys() == halves.parameters.keys()


@pytest.mark.parametrize("name", ["mlp", "attention", "convolutions", "two inputs", "a branch"])
def test_no_product_is_computed_twice(name: str) -> None:
    whole, halves = (Outcome(*SPLIT[name], split=split).operations for split in (False, True))
    for operation in ("aten.mm.default", "aten.bmm.default", "aten.addmm.default", "aten.gelu_backward.default"):
        assert halves[operation] == whole[operation], operation
    assert halves["aten.convolution_backward.default"] == 2 * whole["aten.convolution_backward.default"], "a half each"


def test_hooks_of_parameters_run_in_the_second_half() -> None:
    layer, seen = linear(), []
    layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.shape))
    x = torch.randn(3, D, requires_grad=True)
    y = layer(x)
    other_half = backward_input([get_gradient_edge(y)], [torch.ones_like(y)], [x])
    assert seen == []
    other_half()
    assert seen == [(D, D)]


def test_a_deep_graph_is_walked_without_recursion() -> None:
    x = torch.randn(3, D, requires_grad=True)
    y = x
    for _ in range(3000):
        y = y + 1
    y = linear()(y)
    backward_input([get_gradient_edge(y)], [torch.ones_like(y)], [x])()
    assert x.grad is not None
