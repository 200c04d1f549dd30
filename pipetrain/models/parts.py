"""The parts of a module that a layer uses, and what they are called there.

A *part* is a module, a parameter or a buffer that a layer takes out of the whole module, under the path that it has
there: a layer's state then has the names of the whole module's state_dict. The k-th call of a module (k > 1), where it
is the first one in its layer, is the part `path@k`, so that every use has a name of its own.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from pipetrain.errors import ConfigError
from pipetrain.models.slots import Slot

Parts = dict[str, str]  # path in the whole module -> name in the layer


def look_up(root: nn.Module, path: str) -> Any:
    """A module, parameter, buffer or other attribute by its dotted path."""
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def number_calls(slots: Sequence[Slot]) -> dict[int, int]:
    """Slot of a module's call -> the how many-th call of that module it is; calls in evaluation only count behind."""
    calls: dict[str, int] = {}
    numbers: dict[int, int] = {}
    for mode in (0, 1):
        for i, slot in enumerate(slots):
            node = slot.nodes[mode]
            if node is not None and node.op == "call_module" and i not in numbers:
                calls[str(node.target)] = numbers[i] = calls.get(str(node.target), 0) + 1
    return numbers


class Naming:
    """Gives names to the parts of one layer after the other."""

    def __init__(self, root: nn.Module, called: Iterable[str]) -> None:
        """
        Args:
            called: paths of the modules that are called in any layer. What is theirs has its plain name there, also
                where an earlier layer fetches a parameter of one.
        """
        self._root = root
        self._given: set[str] = set()  # full names of parameters and buffers
        self._of_calls = {name for path in called for name in self._state(path, path)}

    def of_layer(self, first_call: Mapping[str, int], fetched: Sequence[str]) -> Parts:
        """Names for the parts of the next layer.

        Args:
            first_call: module path -> which call of it is the first one in this layer.
            fetched: paths of the parameters, buffers and constants that are read without a call.
        """
        parts: Parts = {}
        wanted = {**dict.fromkeys(fetched, 1), **first_call}
        for path in sorted(wanted, key=lambda path: path.count(".")):  # a module before what lies in it
            holder = next((p for p in parts if path.startswith(f"{p}.")), None)
            if holder is not None:
                parts[path] = parts[holder] + path.removeprefix(holder)
                continue
            k = wanted[path]
            taken = self._given if path in first_call else self._given | self._of_calls
            while not (names := self._state(path, at(path, k))).isdisjoint(taken):
                k += 1
            self._given |= names
            parts[path] = at(path, k)
        return parts

    def _state(self, path: str, name: str) -> set[str]:
        part = look_up(self._root, path) if not path.startswith("_tensor_constant") else None
        if isinstance(part, nn.Module):
            return {f"{name}.{key}" for key in dict([*part.named_parameters(), *part.named_buffers()])}
        return {name}


def at(path: str, k: int) -> str:
    """The name of the k-th call."""
    return path if k == 1 else f"{path}@{k}"


def register(layer: nn.Module, name: str, part: Any, persistent: bool) -> None:
    """Puts a part into a layer under its dotted name; bare modules stand for those on the way."""
    *path, last = name.split(".")
    owner = layer
    for step in path:
        if step not in owner._modules:
            owner.add_module(step, nn.Module())
        owner = owner._modules[step]  # type: ignore[assignment]
    if isinstance(part, nn.Module):
        owner.add_module(last, part)
    elif isinstance(part, nn.Parameter):
        owner.register_parameter(last, part)
    elif isinstance(part, Tensor) and last not in owner._buffers:
        owner.register_buffer(last, part, persistent=persistent)


def twin(module: nn.Module) -> nn.Module:
    """Another module object with the same parameters and buffers, for a use in another layer."""
    other = copy.copy(module)
    for key, value in vars(module).items():
        if isinstance(value, dict | set):
            vars(other)[key] = copy.copy(value)
    other._modules = {name: child and twin(child) for name, child in module._modules.items()}
    return other


def shared_parameters(layers: Sequence[tuple[str, Mapping[str, nn.Parameter]]]) -> list[tuple[tuple[str, str], ...]]:
    """The parameters that several layers use: (layer, parameter) of every use.

    Args:
        layers: name of each layer with its parameters by their names in it.

    Raises:
        ConfigError: if one of them has a hook, which would act on each use's share instead of on the sum.
    """
    uses: dict[int, dict[str, str]] = {}
    for layer, parameters in layers:
        for name, parameter in parameters.items():
            uses.setdefault(id(parameter), {}).setdefault(layer, name)
            if parameter._backward_hooks and len(uses[id(parameter)]) > 1:
                raise ConfigError(
                    f"parameter {name} of layer {layer} has a hook and is used in several layers, each of which has a "
                    "gradient of its own; do what the hook does in the forward, or leave it out"
                )
    return [tuple(group.items()) for group in uses.values() if len(group) > 1]


def fetched_by(nodes: Sequence[fx.Node]) -> list[str]:
    """The paths of what the nodes read from the module without calling it, each once."""
    return list(dict.fromkeys(str(s.target) for node in nodes for s in node.all_input_nodes if s.op == "get_attr"))
