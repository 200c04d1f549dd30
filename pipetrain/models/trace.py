"""The graph of a module's forward, by `torch.fx`, in training and in evaluation mode.

What is never looked into: modules of `torch.nn`, modules without children, and every module whose own forward cannot be
traced. All of them stay one node of the graph, run by their own code.
"""

import contextlib
import inspect
import linecache
import operator
import random
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from pipetrain.errors import ConfigError
from pipetrain.models.checks import assume
from pipetrain.models.imports import is_users

# Functions that make a tensor from numbers. A call is recorded as a node: its numbers may be sizes of an input, its
# values random or changed in place later; as a constant of the trace all of that would be frozen.
_FACTORIES = (
    *("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor", "zeros"),
    *("tril_indices", "triu_indices"),
)
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|hpu)(:\d+)?")
WAYS_OUT = (
    "Two ways out: put these lines into a sub-module of its own, which is then kept whole; "
    "or let the factory return an nn.Sequential or a list of blocks, which needs no tracing"
)


def trace(root: nn.Module, num_inputs: int, training: bool) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph of `root.forward` in one mode, and the constants that the trace came across, by name.

    In training every part is in the mode in which it came, and afterwards it is so again.

    Args:
        num_inputs: the first so many arguments of forward are inputs; the others keep their defaults.

    Raises:
        ConfigError: with the line that is in the way, if the forward of `root` itself cannot be traced, or if a part
            of it is bound to one device.
    """
    modes = [(part, part.training) for part in root.modules()]
    try:
        for part, came_training in modes:
            part.training = training and came_training
        return _trace(root, num_inputs)
    finally:
        for part, came_training in modes:
            part.training = came_training


def _trace(root: nn.Module, num_inputs: int) -> tuple[fx.Graph, dict[str, Any]]:
    whole: set[type[nn.Module]] = set()
    while True:
        tracer = _Tracer(root, num_inputs, whole)
        try:
            with torch.enable_grad(), _nothing_random(), _own_gradients_refused(), _factories_recorded(tracer):
                graph = tracer.trace(root)
        except ConfigError:
            raise
        except Exception as error:
            if tracer.failed_in is None:
                raise ConfigError(_in_the_way(error)) from error
            if tracer.failed_in in whole:
                raise ConfigError(
                    f"a {tracer.failed_in.__name__} is called that is no part of the module ({error}); keep modules in "
                    "attributes or in an nn.ModuleList, not in a plain list or dict"
                ) from error
            whole.add(tracer.failed_in)
        else:
            _refuse_kept_values(root)
            return graph, _constants(root, set(tracer.tensor_attrs.values()))


def _refuse_kept_values(root: nn.Module) -> None:
    for name, part in root.named_modules():
        for attribute, value in vars(part).items():
            if isinstance(value, fx.Proxy):
                delattr(part, attribute)
                raise ConfigError(
                    f"the forward of {name or 'the module'} keeps a value in its attribute {attribute}, which a trace "
                    f"would freeze. {WAYS_OUT}; or make it in __init__, as a buffer"
                )


def check(values: Sequence[object], expected: Sequence[bool], where: str) -> None:
    """An `assert`, or an `if ...: raise`, of the traced code: one of the values is as expected."""
    if not any(bool(value) is wanted for value, wanted in zip(values, expected, strict=True)):
        raise ValueError(f"the check in {where} fails")


class _Proxy(fx.Proxy):
    """Records what torch.fx leaves out: operations that change a tensor in place."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __getattr__(self, name: str) -> "_Attribute":
        return _Attribute(self, name)


class _Attribute(fx.proxy.Attribute):
    """An attribute of a traced value, such as `x.T`, which may be changed in place as well."""


def _in_place(function: Callable[..., Any]) -> Callable[[_Proxy, Any], Any]:
    return lambda proxy, other: proxy.tracer.create_proxy("call_function", function, (proxy, other), {})


def _hash(proxy: fx.Proxy) -> int:
    """By identity, as ever; but not to the user's code, where `size in {1, 2}` would always be False."""
    if is_users(sys._getframe(1).f_code.co_filename):
        raise fx.proxy.TraceError("it looks up a value in a set or dict that is known only when the model runs")
    return id(proxy)


def _len(proxy: fx.Proxy) -> int:
    raise fx.proxy.TraceError("len() must give a number, which is known only when the model runs; use x.shape[0]")


for _recorded in (_Proxy, _Attribute):
    _recorded.__hash__ = _hash  # type: ignore[method-assign,assignment]
    _recorded.__len__ = _len  # type: ignore[method-assign]
for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    for _recorded in (_Proxy, _Attribute):
        setattr(_recorded, f"__{_name}__", _in_place(getattr(operator, _name)))


class _State(_Proxy):
    """A parameter or buffer: read where the layer runs, never at trace time, but of a known size."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self.shape, self.ndim = tensor.shape, tensor.ndim

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def __len__(self) -> int:
        return self.shape[0]


class _Tracer(fx.Tracer):
    def __init__(self, root: nn.Module, num_inputs: int, whole: set[type[nn.Module]]) -> None:
        super().__init__()
        self._state = {id(tensor): path for path, tensor in (*root.named_parameters(), *root.named_buffers())}
        self.failed_in: type[nn.Module] | None = None  # innermost module, but the root, whose forward raised
        self._num_inputs = num_inputs
        self._whole = whole
        self._deciding = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        childless = next(m.children(), None) is None
        return childless or type(m) in self._whole or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        _refuse_contexts()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or type(m)
            raise

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        names = input_names(root_fn, self._num_inputs)
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        path = self._state.get(id(attr_val))
        if path is None:
            return attr_val
        if path not in parameter_proxy_cache:
            state = self.create_proxy(
                "get_attr", path, (), {}, proxy_factory_fn=lambda node: _State(node, self, attr_val)
            )
            parameter_proxy_cache[path] = state
        return parameter_proxy_cache[path]

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any) -> fx.Node:
        if kind.startswith("call_") and kind != "call_module":
            _refuse_contexts()
            _refuse_fixed_device(target if kind == "call_method" else "", (*args, *kwargs.values()))
        return super().create_node(kind, target, args, kwargs, *more, **named)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """What a branch on a traced value takes: only a check of the input can be known, it is assumed to pass."""
        frame = _users_frame()
        self._deciding, again = True, self._deciding
        try:
            assumed = None if again else assume(frame, obj)
        finally:
            self._deciding = again
        if assumed is None:
            raise fx.proxy.TraceError("it decides by a value or size that is known only when the model runs")
        values, expected = zip(*assumed.parts, strict=True)
        self.create_proxy("call_function", check, (values, expected, _place(frame)), {})
        return assumed.taken


def input_names(forward: Callable[..., Any], num_inputs: int) -> list[str]:
    """Names for the first inputs of an unbound forward; those that `*args` takes are numbered."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p.name for p in inspect.signature(forward).parameters.values() if p.kind in kinds][1:]
    return named[:num_inputs] + [f"input_{k}" for k in range(len(named), num_inputs)]


# ---- what a trace would freeze ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _factories_recorded(tracer: _Tracer) -> Iterator[None]:
    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: tracer.create_proxy("call_function", function, args, kwargs)

    originals = {name: getattr(torch, name) for name in _FACTORIES}
    try:
        for name, original in originals.items():
            setattr(torch, name, recorded(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


@contextlib.contextmanager
def _nothing_random() -> Iterator[None]:
    def states() -> tuple[Any, ...]:
        return random.getstate(), str(np.random.get_state()), torch.default_generator.get_state().tolist()

    before = states()
    yield
    if states() != before:
        raise ConfigError(
            "forward draws random numbers from Python, NumPy or torch in a way that a trace would freeze. "
            f"{WAYS_OUT}, or draw with torch.rand and the like"
        )


def _refuse_contexts() -> None:
    """They would be lost: a graph has no notion of them."""
    if not torch.is_grad_enabled():
        raise fx.proxy.TraceError("it runs without gradients (torch.no_grad or the like), which a trace would not keep")
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise fx.proxy.TraceError(
            "it runs under autocast, which a trace would not keep; precision=bf16 does it for all"
        )


@contextlib.contextmanager
def _own_gradients_refused() -> Iterator[None]:
    """An autograd.Function would be traced through, and its backward lost."""

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        raise fx.proxy.TraceError(f"it calls {cls.__name__}, an autograd.Function, whose backward a trace would lose")

    original = torch.autograd.Function.__dict__["apply"]
    setattr(torch.autograd.Function, "apply", classmethod(apply))  # noqa: B010
    try:
        yield
    finally:
        setattr(torch.autograd.Function, "apply", original)  # noqa: B010


def _constants(root: nn.Module, paths: set[str]) -> dict[str, Any]:
    """The tensors that the trace itself kept, which another instance of the module has not."""
    constants = {path: getattr(root, path) for path in sorted(paths) if path.startswith("_tensor_constant")}
    for value in constants.values():
        if value.requires_grad:
            raise ConfigError(
                f"forward uses a tensor of shape {list(value.shape)} that was computed from parameters outside of any "
                f"recorded operation: they would never be trained. {WAYS_OUT}"
            )
    return constants


def _refuse_fixed_device(called: str, arguments: tuple[Any, ...]) -> None:
    fixed = [a for a in arguments if isinstance(a, torch.device) or (isinstance(a, str) and _DEVICE.fullmatch(a))]
    if fixed or called in ("cuda", "cpu"):
        shown = f".{called}()" if called in ("cuda", "cpu") else f"device {fixed[0]}"
        raise ConfigError(
            f"{_place(_users_frame())} is bound to one device ({shown}), but every stage has its own. "
            "Use the device of an input instead, such as x.device, or register the tensor as a buffer"
        )


# ---- the user's lines ------------------------------------------------------------------------------------------------


def _users_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe()
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def _place(frame: FrameType | None) -> str:
    if frame is None:
        return "forward"
    file, line = frame.f_code.co_filename, frame.f_lineno
    return f"{file}:{line}, `{linecache.getline(file, line).strip()}`,"


def _in_the_way(error: Exception) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_users(frame.filename)]
    if not frames:  # a container of torch's own
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == "forward"]
    where = f"{frames[-1].filename}:{frames[-1].lineno}, `{frames[-1].line}`" if frames else "its forward"
    reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
    return f"the model cannot be captured because of {where}: {reason}. {WAYS_OUT}"
