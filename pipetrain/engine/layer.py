"""One layer of a stage: forward with or without a graph, and backward through that graph alone.

Every layer has an autograd graph of its own, on one stage as on many: its inputs are cut off from the layer before,
and the engine carries the gradients across. What happens at a border is therefore the same code whether or not the
border is also one between two stages, and that is why the numbers do not depend on the cut:

    inputs --entrance--> inputs of the module --module--> outputs
    gradients <-- entrance <-- autograd.backward(outputs, gradients)

An entrance has no memory of the value that went in, as a leaf would: a value lives on for the backward only where the
module's own graph needs it. Values and gradients keep their strides from layer to layer, also where they travel.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import TreeSpec

from pipetrain.engine.attributes import OwnAttributes
from pipetrain.engine.buffers import OwnBuffers
from pipetrain.engine.halves import backward_input
from pipetrain.engine.known import runs_known_code_only
from pipetrain.engine.structure import flatten, same_values, with_strides, without_gaps
from pipetrain.errors import LayerError

# Makes a module's positional arguments of its inputs, a flat list in which each value is once.
Arrange = Callable[[Sequence[Any]], Sequence[Any]]


class _Entrance(torch.autograd.Function):
    """Where a value enters a layer, and its gradient comes out: into a list, at a place."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, x: Tensor, gradients: list[Tensor | None], place: int) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.stride, ctx.gradients, ctx.place = x.stride(), gradients, place
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor | None) -> tuple[None, None, None, None]:
        (found,) = gradient
        if found is not None:
            ctx.gradients[ctx.place] = with_strides(without_gaps(found.detach()), ctx.stride)
        return None, None, None, None


_START = torch.zeros((), requires_grad=True)  # a graph ends in a leaf; this one never gets a gradient


class LayerGraph:
    """What backward needs of one forward of one layer. The memory of inputs and outputs is not part of it."""

    def __init__(self, gradients: list[Tensor | None], outputs: Sequence[Any]) -> None:
        """
        Args:
            gradients: of the inputs that want one, in which the entrances will put them.
        """
        self._gradients = gradients
        self._edges: dict[int, GradientEdge] = {
            place: get_gradient_edge(out)
            for place, out in enumerate(outputs)
            if isinstance(out, Tensor) and out.requires_grad
        }
        self._other_half: Callable[[], None] = _nothing

    @property
    def is_empty(self) -> bool:
        """Whether no gradient can flow through."""
        return not self._edges

    def backward(self, gradients: dict[int, Tensor], *, split: bool = False) -> list[Tensor | None]:
        """Adds to the `.grad` of the layer's parameters, or leaves that to `backward_weight`.

        Args:
            gradients: of those outputs that the loss depends on, by their place. One that depends on nothing is not
                needed.

        Returns:
            One gradient for each input that wanted one; None where these outputs do not depend on it.
        """
        wanted = [place for place in gradients if place in self._edges]
        if wanted:
            edges, theirs = [self._edges[place] for place in wanted], [gradients[place] for place in wanted]
            if split:
                self._other_half = backward_input(edges, theirs, [_START] if self._gradients else [])
            else:
                torch.autograd.backward(edges, theirs)
        found, self._gradients, self._edges = self._gradients.copy(), [], {}
        return found

    def backward_weight(self) -> None:
        """Adds to the `.grad` of the layer's parameters, after a `backward` that was split."""
        self._other_half()
        self._other_half = _nothing


def _nothing() -> None:
    pass


class Layer:
    """A module under its name in the unsplit model.

    A module may change its inputs in place, as `nn.ReLU(inplace=True)` does: it then gets copies, since a recompute
    needs the inputs as they were, and so may others. The first forward gets copies of all and shows which ones.
    """

    def __init__(self, name: str, prefix: str, module: nn.Module) -> None:
        """
        Args:
            name: the layer's own.
            prefix: what stands before the names of the module's parameters in the unsplit model.
        """
        self.name = name
        self.module = module
        self.is_known = runs_known_code_only(module)
        self.own_state: list[OwnBuffers | OwnAttributes] = [OwnBuffers(module, is_known=self.is_known)]
        if not self.is_known:
            self.own_state.append(OwnAttributes(module))
        self._changed_inputs: dict[bool, frozenset[int]] = {}  # by place, in training and in evaluation
        self._prefix = prefix

    @property
    def has_trained_parameters(self) -> bool:
        return any(parameter.requires_grad for parameter in self.module.parameters())

    @property
    def changed_inputs(self) -> frozenset[int] | None:
        """The inputs, by place, that the module changes in its present mode; None before its first forward."""
        return self._changed_inputs.get(self.module.training)

    def full_name(self, local: str) -> str:
        """The name in the unsplit model of one of the module's parameters, buffers or modules."""
        return self._prefix + local

    def forward(self, inputs: Sequence[Any], arrange: Arrange) -> tuple[list[Any], TreeSpec]:
        """Runs the module without a graph; returns the leaves of its output and their pytree."""
        with torch.no_grad():
            return self._run(inputs, arrange)

    def forward_with_graph(
        self, inputs: Sequence[Any], arrange: Arrange, needs_grad: Sequence[bool]
    ) -> tuple[list[Any], TreeSpec, LayerGraph]:
        """Runs the module and keeps its graph; the returned outputs are cut off from it."""
        gradients: list[Tensor | None] = []
        entered: list[Any] = []
        with torch.enable_grad():
            for x, need in zip(inputs, needs_grad, strict=True):
                if need:
                    x = _Entrance.apply(_START, x, gradients, len(gradients))  # type: ignore[no-untyped-call]
                    gradients.append(None)
                elif isinstance(x, Tensor):
                    x = x.detach()
                entered.append(x)
            outputs, spec = self._run(entered, arrange)
        graph = LayerGraph(gradients, outputs)
        return [out.detach() if isinstance(out, Tensor) else out for out in outputs], spec, graph

    def _run(self, inputs: Sequence[Any], arrange: Arrange) -> tuple[list[Any], TreeSpec]:
        known = self.changed_inputs
        originals, copied = inputs, range(len(inputs)) if known is None else known
        if copied:
            inputs = [x.clone() if p in copied and isinstance(x, Tensor) else x for p, x in enumerate(inputs)]
        tensors = [(place, x, x._version) for place, x in enumerate(inputs) if isinstance(x, Tensor)]
        leaves, spec = flatten(self.module(*arrange(inputs)))
        changed = frozenset(place for place, x, version in tensors if x._version != version)
        if known is None:
            # Changes through `.data` leave no version behind, but here there are copies to compare.
            changed |= {place for place, x, _ in tensors if not same_values(x, originals[place])}
            self._changed_inputs[self.module.training] = changed
        elif not changed <= known:
            raise LayerError(f"layer {self.name} changed an input in place, which it did not do the first time")
        return [without_gaps(x) if isinstance(x, Tensor) else x for x in leaves], spec
