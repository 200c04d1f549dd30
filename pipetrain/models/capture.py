"""Any module as layers: an `nn.Sequential` or a list of blocks as it stands, everything else by its traced graph."""

import linecache
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from pipetrain.errors import ConfigError
from pipetrain.models.borders import find_borders, last_uses, must_stay_whole
from pipetrain.models.imports import shown
from pipetrain.models.parts import (
    Naming,
    Parts,
    at,
    fetched_by,
    look_up,
    number_calls,
    register,
    shared_parameters,
    twin,
)
from pipetrain.models.recipe import BATCH, LayerRecipe, Value
from pipetrain.models.slots import MODES, align
from pipetrain.models.trace import WAYS_OUT, trace

Make = Callable[[], nn.Module]
Forward = Callable[..., Any]
Tie = tuple[tuple[str, str], ...]
Captured = tuple[list[LayerRecipe], list[Tie]]

_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)

_files = count()


def capture(module: nn.Module, make: Make, num_inputs: int) -> Captured:
    """The layers of a module, and the parameters that several of them use.

    Args:
        module: what is looked at; its parameters need no memory.
        make: gives such a module with its initial values, from which the layers take their parts.
        num_inputs: the first so many arguments of its forward are the mini-batch; the others keep their defaults.

    Raises:
        ConfigError: if it cannot be captured, with the line that is in the way.
    """
    _refuse_what_cannot_be_cut(module)
    children = _chain(module)
    uses = Counter(child for _, child in children)
    if children and not any(must_stay_whole(child) for child, times in uses.items() if times > 1):
        return _capture_chain(children, make)
    try:
        return _Cutter(module, num_inputs).capture(make)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"the module cannot be captured: {shown(error)}. {WAYS_OUT}") from error


def _refuse_what_cannot_be_cut(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in part.parameters(recurse=False)):
            raise ConfigError(f"module {name} is lazy: its sizes are not known yet; give them, as in nn.Linear(8, 4)")
        if isinstance(part, nn.parallel.DistributedDataParallel | nn.DataParallel):
            raise ConfigError(
                f"{f'module {name}' if name else 'the module'} is wrapped in {type(part).__name__}, which shares out "
                "batches or gradients behind the pipeline's back, micro-batch by micro-batch; give the module inside it"
            )
        for attribute, value in vars(part).items():
            if isinstance(value, _GENERATORS):
                raise ConfigError(
                    f"module {name} has a random generator of its own in {attribute}: a recompute would draw other "
                    "numbers; draw from torch's default generator, or from Python's or NumPy's global one"
                )
        if getattr(part, "sparse", False) is True:
            raise ConfigError(f"module {name} has sparse gradients, which are not supported; use sparse=False")
        is_opened = not name or type(part).forward is nn.Sequential.forward
        if is_opened and (part._forward_hooks or part._forward_pre_hooks):
            where = f"module {name}" if name else "the module"
            raise ConfigError(
                f"{where} has a forward hook, but only its parts are in the pipeline; put what the hook does "
                "into a module"
            )


# ---- a chain ---------------------------------------------------------------------------------------------------------


def _chain(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """The children of an `nn.Sequential` with their paths, those of one inside it too; nothing for other modules."""
    found: list[tuple[str, nn.Module]] = []
    if type(module).forward is nn.Sequential.forward or _is_plain_list(module):
        for name, child in module._modules.items():
            assert child is not None
            found += _chain(child, f"{prefix}{name}.") or [(prefix + name, child)]
    return found


def _is_plain_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and type(module).forward is nn.ModuleList.forward


def _capture_chain(children: Sequence[tuple[str, nn.Module]], make: Make) -> Captured:
    layers: list[LayerRecipe] = []
    first_path: dict[nn.Module, str] = {}
    calls: dict[nn.Module, int] = {}
    for path, child in children:
        calls[child] = calls.get(child, 0) + 1
        name = at(first_path.setdefault(child, path), calls[child])
        name = name if name != BATCH else f"{name}~2"
        build = partial(_take_child, make, first_path[child], again=calls[child] > 1)
        layers.append(LayerRecipe(name, build, prefix=f"{at(first_path[child], calls[child])}."))
    named = [(layer.name, dict(child.named_parameters())) for layer, (_, child) in zip(layers, children, strict=True)]
    return layers, shared_parameters(named)


def _take_child(make: Make, path: str, again: bool) -> nn.Module:
    child = make().get_submodule(path)
    return twin(child) if again else child


# ---- a graph ---------------------------------------------------------------------------------------------------------


class CapturedLayer(nn.Module):
    """Some operations of a traced forward, with the parts that they use under the paths of the whole module."""

    def __init__(self, training: Forward, evaluation: Forward) -> None:
        super().__init__()
        self._training, self._evaluation = training, evaluation

    def forward(self, *values: Any) -> Any:
        return (self._training if self.training else self._evaluation)(self, *values)


@dataclass(frozen=True)
class _Plan:
    """How a layer is put together, without anything of the module that was traced but its constants."""

    parts: Parts
    persistent: frozenset[str]
    constants: Mapping[str, Tensor]
    training: Forward
    evaluation: Forward

    def build(self, make: Make) -> CapturedLayer:
        whole, layer = make(), CapturedLayer(self.training, self.evaluation)
        for path, name in self.parts.items():
            part = self.constants[path] if path in self.constants else look_up(whole, path)
            if isinstance(part, nn.Module) and path != name:
                part = twin(part)
            register(layer, name, part, path in self.persistent)
        return layer


class _Cutter:
    """Cuts the graphs of one module into layers."""

    def __init__(self, root: nn.Module, num_inputs: int) -> None:
        self._root = root
        (training, constants), (evaluation, more) = (trace(root, num_inputs, mode) for mode in (True, False))
        self._constants = {**constants, **more}
        self._graphs = (training, evaluation)
        self._slots = align(self._graphs)
        self._place = [{slot.nodes[mode]: i for i, slot in enumerate(self._slots)} for mode in MODES]
        self._inputs = [
            {node: k for k, node in enumerate(graph.find_nodes(op="placeholder"))} for graph in self._graphs
        ]
        self._outputs = [next(iter(graph.find_nodes(op="output"))) for graph in self._graphs]
        self._last_use = last_uses(self._slots)
        self._calls = number_calls(self._slots)
        called = {str(node.target) for slot in self._slots for node in slot.there if node.op == "call_module"}
        self._naming = Naming(root, called)
        self._saved = set(root.state_dict())
        self._value: dict[int, Value] = {}  # of every slot that later layers take
        self._names: set[str] = {BATCH}

    def capture(self, make: Make) -> Captured:
        layers: list[LayerRecipe] = []
        named: list[tuple[str, dict[str, nn.Parameter]]] = []
        for begin, end in pairwise([0, *find_borders(self._root, self._slots)]):
            takes, plan, name = self._layer(begin, end)
            layers.append(LayerRecipe(name, partial(plan.build, make), takes, prefix=""))
            named.append((name, dict(plan.build(lambda: self._root).named_parameters())))
        return layers, shared_parameters(named)

    def _layer(self, begin: int, end: int) -> tuple[tuple[Value, ...], _Plan, str]:
        nodes = [self._nodes(mode, begin, end) for mode in MODES]
        parts = self._parts(begin, end, [*nodes[0], *nodes[1]])
        name = self._name(begin, end, parts)
        sources = sorted({source for mode in MODES for source in self._sources(mode, begin, nodes[mode])})
        gives = [i for i in range(begin, end) if self._last_use[i] >= end] if end < len(self._slots) else None
        for element, i in enumerate(gives or ()):
            self._value[i] = Value(name, element if len(gives or ()) > 1 else None)
        takes = tuple(Value(BATCH, k) if kind == 0 else self._value[k] for kind, k in sources)
        forwards = [self._compile(mode, nodes[mode], parts, sources, gives) for mode in MODES]
        persistent = frozenset(path for path in parts if path in self._saved and "@" not in parts[path])
        constants = {path: self._constants[path] for path in parts if path in self._constants}
        return takes, _Plan(self._as_registered(parts), persistent, constants, *forwards), name

    def _nodes(self, mode: int, begin: int, end: int) -> list[fx.Node]:
        """The operations of a layer in one mode; the last layer's end with the output."""
        nodes = [node for slot in self._slots[begin:end] if (node := slot.nodes[mode]) is not None]
        return [*nodes, self._outputs[mode]] if end == len(self._slots) else nodes

    def _sources(self, mode: int, begin: int, nodes: Sequence[fx.Node]) -> set[tuple[int, int]]:
        """What comes from outside: (0, number of an input) or (1, slot of an earlier layer)."""
        found = set()
        for source in (source for node in nodes for source in node.all_input_nodes):
            if source in self._inputs[mode]:
                found.add((0, self._inputs[mode][source]))
            elif self._place[mode].get(source, begin) < begin:
                found.add((1, self._place[mode][source]))
        return found

    def _parts(self, begin: int, end: int, nodes: Sequence[fx.Node]) -> Parts:
        first_call: dict[str, int] = {}
        for i in range(begin, end):
            for node in self._slots[i].there:
                if node.op == "call_module":
                    first_call.setdefault(str(node.target), self._calls[i])
        return self._naming.of_layer(first_call, fetched_by(nodes))

    def _as_registered(self, parts: Parts) -> Parts:
        """In the order of the whole module: of the names of one parameter, a layer then lists the one that it lists."""
        order = {path: i for i, (path, _) in enumerate(self._root.named_modules(remove_duplicate=False))}
        return dict(
            sorted(parts.items(), key=lambda item: order.get(item[0], order.get(item[0].rpartition(".")[0], 0)))
        )

    def _name(self, begin: int, end: int, parts: Parts) -> str:
        """The first module with parameters, or else the first module, parameter or function."""
        nodes = [node for slot in self._slots[begin:end] for node in slot.there]
        called = [str(node.target) for node in nodes if node.op == "call_module"]
        trained = [path for path in called if next(self._root.get_submodule(path).parameters(), None) is not None]
        words = [parts[path] for path in [*trained, *called, *parts]] or [nodes[0].name if nodes else "output"]
        name = next(n for n in chain(words[:1], (f"{words[0]}~{i}" for i in count(2))) if n not in self._names)
        self._names.add(name)
        return name

    def _compile(
        self,
        mode: int,
        nodes: Sequence[fx.Node],
        parts: Parts,
        sources: Sequence[tuple[int, int]],
        gives: Sequence[int] | None,
    ) -> Forward:
        """A function (layer, values taken) -> values given. A value that this mode does not have is None."""
        graph, made = fx.Graph(), {}
        outside = {node: (0, k) for node, k in self._inputs[mode].items()}
        outside |= {node: (1, i) for node, i in self._place[mode].items() if node is not None}
        arrives = {source: graph.placeholder(f"value_{i}") for i, source in enumerate(sources)}

        def inside(node: fx.Node) -> fx.Node:
            if node not in made:
                made[node] = (
                    graph.get_attr(parts[str(node.target)]) if node.op == "get_attr" else arrives[outside[node]]
                )
            return made[node]

        for node in nodes:
            made[node] = graph.node_copy(node, inside)
            if node.op == "call_module":
                made[node].target = parts[str(node.target)]
        if gives is not None:
            given = [self._slots[i].nodes[mode] for i in gives]
            values = [None if node is None else made[node] for node in given]
            graph.output(values[0] if len(values) == 1 else tuple(values))
        return _compiled(graph)


def _compiled(graph: fx.Graph) -> Forward:
    code = graph.python_code("self")
    file = f"<captured layer {next(_files)}>"
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(keepends=True), file)  # for tracebacks
    exec(compile(code.src, file, "exec"), code.globals)
    forward: Forward = code.globals["forward"]
    return forward
