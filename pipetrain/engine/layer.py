"""One layer of a stage: forward with or without a graph, and backward through that graph alone.

Every layer has an autograd graph of its own, on one stage as on many: its inputs are cut off from the layer before,
and the engine carries the gradients across. What happens at a border is therefore the same code whether or not the
border is also one between two stages, and that is why the numbers do not depend on the cut:

    inputs --detach--> leaves --module--> outputs (contiguous)
    leaves.grad <------ autograd.backward(outputs, gradients made contiguous)

(Contiguous, because the same sum over other strides can give other bits.)
"""

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

Tensors = tuple[Tensor, ...]


class LayerGraph:
    """What backward needs of one forward of one layer. The outputs' memory is not part of it."""

    def __init__(self, leaves: Tensors, outputs: Tensors) -> None:
        self._leaves = leaves
        self._edges: list[GradientEdge] = [get_gradient_edge(out) for out in outputs if out.requires_grad]
        self.needs_grad = tuple(out.requires_grad for out in outputs)

    def backward(self, gradients: Tensors) -> Tensors:
        """Adds to the `.grad` of the layer's parameters.

        Args:
            gradients: one for each output with `needs_grad`.

        Returns:
            One gradient for each input that wanted one; zeros where the outputs do not depend on it.
        """
        if self._edges:
            torch.autograd.backward(self._edges, tuple(gradient.contiguous() for gradient in gradients))
        self._edges = []
        wanted = [leaf for leaf in self._leaves if leaf.requires_grad]
        return tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in wanted)


class Layer:
    """A module under its name in the unsplit model."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module

    def forward(self, inputs: Tensors) -> Tensors:
        """Runs the module without a graph."""
        with torch.no_grad():
            return _outputs_of(self.module(*inputs))

    def forward_with_graph(self, inputs: Tensors, needs_grad: tuple[bool, ...]) -> tuple[Tensors, LayerGraph]:
        """Runs the module and keeps its graph; the returned outputs are cut off from it."""
        leaves = tuple(t.detach().requires_grad_(need) for t, need in zip(inputs, needs_grad, strict=True))
        with torch.enable_grad():
            outputs = _outputs_of(self.module(*leaves))
        return tuple(out.detach() for out in outputs), LayerGraph(leaves, outputs)


def _outputs_of(returned: object) -> Tensors:
    outputs = returned if isinstance(returned, tuple) else (returned,)
    for out in outputs:
        if not isinstance(out, Tensor):
            raise TypeError(f"a layer must return a tensor or a tuple of tensors (got {type(out).__name__})")
    return tuple(out.contiguous() for out in outputs)
