"""One stage: its layers, and what it keeps of the micro-batches in flight."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipetrain.engine.layer import Layer, LayerGraph, Tensors
from pipetrain.engine.rng import LayerRandomness
from pipetrain.engine.signature import Signature, gradients_of, signature_of

# (output of the last layer, target tensors of the micro-batch) -> sum of the loss over its valid tokens or samples
LossSum = Callable[[Any, Tensors], Tensor]


class _Loss(nn.Module):
    """The loss as one more layer behind the last one: it takes the outputs and gives the sum."""

    def __init__(self, loss_sum: LossSum) -> None:
        super().__init__()
        self._loss_sum = loss_sum
        self.targets: Tensors = ()

    def forward(self, *outputs: Tensor) -> Tensor:
        return self._loss_sum(outputs if len(outputs) > 1 else outputs[0], self.targets)


@dataclass
class _InFlight:
    """A micro-batch between its forward and its backward."""

    inputs: Tensors
    needs_grad: tuple[bool, ...]
    targets: Tensors
    key: int
    graphs: list[LayerGraph] = field(default_factory=list)


class Stage:
    """Runs forward, recompute and backward of single micro-batches. Knows nothing of ranks or messages."""

    def __init__(
        self,
        index: int,
        layers: Sequence[tuple[str, nn.Module]],
        *,
        device: torch.device,
        seed: int,
        loss_sum: LossSum | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            index: which stage this is.
            layers: (name in the unsplit model, module), the modules on `device`.
            seed: the run's; random layers draw from it.
            loss_sum: on the last stage only.
            autocast_dtype: None computes in the parameters' own precision.
        """
        self.index = index
        self.layers = [Layer(name, module) for name, module in layers]
        self.step = 0
        self.random = LayerRandomness(device, seed)
        # One context for each action. Its weight cache is off: it would outlive an update of the weights.
        self._autocast: Callable[[], AbstractContextManager[object]] = (
            nullcontext
            if autocast_dtype is None
            else partial(torch.autocast, device.type, dtype=autocast_dtype, cache_enabled=False)
        )
        self._loss = _Loss(loss_sum) if loss_sum is not None else None
        self._in_flight: dict[int, _InFlight] = {}
        self._signatures: dict[int, Signature] = {}

    @property
    def is_last(self) -> bool:
        return self._loss is not None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under their names in the unsplit model, in its order. Each use of a tied one is listed."""
        for layer in self.layers:
            for name, parameter in layer.module.named_parameters():
                yield f"{layer.name}.{name}", parameter

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Persistent buffers under their names in the unsplit model."""
        for layer in self.layers:
            persistent = layer.module.state_dict().keys()
            for name, buffer in layer.module.named_buffers():
                if name in persistent:
                    yield f"{layer.name}.{name}", buffer

    def train(self, mode: bool) -> None:
        """Switches dropout and its like on or off."""
        for layer in self.layers:
            layer.module.train(mode)

    def signature(self, key: int) -> Signature:
        """What the outputs of a micro-batch of this key look like; known after its first forward."""
        return self._signatures[key]

    def forward(
        self,
        microbatch: int,
        inputs: Tensors,
        *,
        needs_grad: tuple[bool, ...],
        targets: Tensors,
        key: int,
        for_backward: bool,
        keep_graph: bool,
    ) -> Tensors:
        """Runs all layers.

        Args:
            needs_grad: which inputs want a gradient.
            targets: what the loss compares with; used on the last stage.
            key: the kind of micro-batch, see `signature.key_of`.
            for_backward: False in evaluation: nothing is kept.
            keep_graph: False where a recompute will come before the backward.

        Returns:
            The outputs, or on the last stage the loss sum (a tuple of one scalar).
        """
        state = _InFlight(inputs, needs_grad, targets, key)
        if for_backward:
            self._in_flight[microbatch] = state
        # Without a graph nothing tells which outputs want a gradient, so the first forward of a kind has one.
        with_graph = for_backward and (keep_graph or key not in self._signatures)
        outputs = self._run(microbatch, state, with_graph)
        if key not in self._signatures:
            flags = state.graphs[-1].needs_grad if with_graph else (False,) * len(outputs)
            self._signatures[key] = signature_of(outputs, flags)
        if not keep_graph:
            state.graphs.clear()
        return outputs

    def recompute(self, microbatch: int) -> None:
        """Runs the forward again to have its graph."""
        self._run(microbatch, self._in_flight[microbatch], with_graph=True)

    def backward(self, microbatch: int, gradients: Tensors) -> Tensors:
        """Runs all layers backwards, adding to the `.grad` of their parameters.

        Args:
            gradients: of the outputs that want one; on the last stage that of the loss sum.

        Returns:
            The gradients of the inputs that want one.
        """
        state = self._in_flight.pop(microbatch)
        while state.graphs:
            gradients = state.graphs.pop().backward(gradients)
        return gradients

    def gradients_expected(self, microbatch: int) -> Signature:
        """What the next stage will send back for a micro-batch in flight."""
        return gradients_of(self._signatures[self._in_flight[microbatch].key])

    def first_non_finite(self, microbatch: int, inputs: Tensors, targets: Tensors) -> tuple[Tensors, int | None]:
        """Runs the forward and looks at every output.

        Returns:
            The outputs, and the first layer (its place in this stage) with a NaN or infinite output, or None.
        """
        culprits: list[int] = []

        def look(place: int, outputs: Tensors) -> None:
            if not all(bool(out.isfinite().all()) for out in outputs if out.is_floating_point()):
                culprits.append(place)

        state = _InFlight(inputs, (False,) * len(inputs), targets, key=0)
        outputs = self._run(microbatch, state, with_graph=False, look=look)
        return outputs, culprits[0] if culprits else None

    def _run(
        self,
        microbatch: int,
        state: _InFlight,
        with_graph: bool,
        look: Callable[[int, Tensors], None] | None = None,
    ) -> Tensors:
        values, needs_grad = state.inputs, state.needs_grad
        layers = self.layers
        if self._loss is not None:
            self._loss.targets = state.targets
            layers = [*layers, Layer("loss", self._loss)]
        with self._autocast():
            for place, layer in enumerate(layers):
                self.random.before(layer.name, self.step, microbatch)
                if with_graph:
                    values, graph = layer.forward_with_graph(values, needs_grad)
                    needs_grad = graph.needs_grad
                    state.graphs.append(graph)
                else:
                    values = layer.forward(values)
                if look is not None:
                    look(place, values)
        return values
