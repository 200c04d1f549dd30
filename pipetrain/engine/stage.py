"""One stage: its layers, and what it keeps of the micro-batches in flight."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import TreeSpec

from pipetrain.engine.batchnorm import MiniBatchStatistics, exchange
from pipetrain.engine.layer import Layer, LayerGraph
from pipetrain.engine.loss import Loss, LossSum, Tensors
from pipetrain.engine.message import ValueId, Values
from pipetrain.engine.rng import LayerRandomness
from pipetrain.engine.segments import Segments
from pipetrain.engine.structure import TensorSpec, describe, same_kind, structure_of
from pipetrain.engine.transport import Replicas
from pipetrain.engine.wiring import Inputs, Wiring
from pipetrain.errors import LayerError
from pipetrain.schedule import Dataflow

_NOTHING = nullcontext()


@dataclass
class _InFlight:
    """A micro-batch between its forward and its last gradient. `inputs` and `own` are for a recompute to start from."""

    key: int
    targets: Tensors
    inputs: Values = field(default_factory=dict)
    own: dict[tuple[int, int], list[Any]] = field(default_factory=dict)  # what layers changed in themselves, as it was
    graphs: dict[int, tuple[Inputs, LayerGraph]] = field(default_factory=dict)  # by layer
    dead_ends: list[int] = field(default_factory=list)  # layers that get gradients and cannot pass them on


class Stage:
    """Runs forward, recompute and backward of single micro-batches. Knows nothing of ranks or messages.

    Attributes:
        step: the mini-batch of the micro-batches that are named next.
    """

    def __init__(
        self,
        index: int,
        layers: Sequence[tuple[str, str, nn.Module]],
        dataflow: Dataflow,
        *,
        device: torch.device,
        seed: int,
        first_microbatch: int = 0,
        loss_sum: LossSum | None = None,
        measures: Sequence[LossSum] = (),
        autocast_dtype: torch.dtype | None = None,
        recomputes: Callable[[str], bool] = lambda layer: True,
    ) -> None:
        """
        Args:
            index: which stage this is.
            layers: (name, prefix of its parameters' names in the unsplit model, module), the modules on `device`.
            dataflow: of the whole model, cut as it is.
            seed: the run's; random layers draw from it.
            first_microbatch: of this replica, in the whole mini-batch; random layers draw from its number there.
            loss_sum: on the last stage only.
            measures: further sums over the samples that are wanted in evaluation, there too.
            autocast_dtype: None computes in the parameters' own precision.
            recomputes: whether a recompute runs a layer, by its name; the others keep their graphs. The loss is
                called "loss".
        """
        self.index = index
        self.layers = [Layer(*layer) for layer in layers]
        self.step = 0
        self.random = LayerRandomness(device, seed, first_microbatch)
        self.wiring = Wiring(dataflow, index)
        # One context for each action. Its weight cache is off: it would outlive an update of the weights.
        self._autocast: Callable[[], AbstractContextManager[object]] = (
            nullcontext
            if autocast_dtype is None
            else partial(torch.autocast, device.type, dtype=autocast_dtype, cache_enabled=False)
        )
        self._loss = Loss(loss_sum, measures) if loss_sum is not None else None
        self._all = [*self.layers, Layer("loss", "loss.", self._loss)] if self._loss is not None else self.layers
        self._first = dataflow.stage_of.index(index)
        self._recomputed = {number for number, layer in enumerate(self._all, self._first) if recomputes(layer.name)}
        self.segments = Segments(self.layers)
        self._in_flight: dict[tuple[int, int], _InFlight] = {}  # by step and micro-batch
        self._came_training = [(m, m.training) for layer in self.layers for m in layer.module.modules()]
        self._trained = {name: parameter.requires_grad for name, parameter in self.named_parameters()}
        for layer in self.layers:
            self.random.watch(layer.module, layer.full_name)
        self._statistics = [
            MiniBatchStatistics(layer.full_name(name).rstrip("."), module)
            for layer in self.layers
            for name, module in layer.module.named_modules()
            if isinstance(module, _BatchNorm)
        ]

    @property
    def is_last(self) -> bool:
        return self._loss is not None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under their names in the unsplit model, in its order. Each use of a tied one is listed."""
        for layer in self.layers:
            for name, parameter in layer.module.named_parameters():
                yield layer.full_name(name), parameter

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Persistent buffers under their names in the unsplit model."""
        for layer in self.layers:
            persistent = layer.module.state_dict().keys()
            for name, buffer in layer.module.named_buffers():
                if name in persistent:
                    yield layer.full_name(name), buffer

    def train(self, mode: bool) -> None:
        """Switches dropout and its like on or off, and starts a new mini-batch.

        In training every module is in the mode in which it came: one that was put into evaluation for good stays so.

        Raises:
            LayerError: if a parameter was frozen or unfrozen since the stage was built.
        """
        for module, came_training in self._came_training:
            module.training = mode and came_training
        self.segments.train(mode)
        if self._loss is not None:
            self._loss.training = mode
        for statistics in self._statistics:
            statistics.forget()
        for name, parameter in self.named_parameters():
            if parameter.requires_grad != self._trained[name]:
                raise LayerError(
                    f"requires_grad of {name} has changed, and with it what the stages send each other; freeze or "
                    "unfreeze parameters before the pipeline is built"
                )

    def update_statistics(self, replicas: Replicas) -> None:
        """Moves the running statistics of all BatchNorms by those of the mini-batch, in all replicas alike."""
        if replicas.count > 1 and self._statistics:
            exchange(self._statistics, replicas)
        for statistics in self._statistics:
            statistics.update()

    def forward(
        self, microbatch: int, inputs: Values, *, targets: Tensors, key: int, for_backward: bool, keep_graph: bool
    ) -> Values:
        """Runs all layers.

        Args:
            inputs: what the layers take of other stages and of the mini-batch.
            targets: what the loss compares with; used on the last stage.
            key: the kind of micro-batch, see `structure.key_of`.
            for_backward: False in evaluation: nothing is kept.
            keep_graph: False where a recompute will come before the backward. (The graphs are made all the same, and
                dropped layer by layer: without one, torch picks other kernels for some layers, with other bits.)

        Returns:
            The values that other stages take; on the last stage with the loss sum among them.
        """
        state = _InFlight(key, targets)
        if for_backward:
            self._in_flight[self.step, microbatch] = state
        self._count_statistics(microbatch if for_backward else None)
        values = self._run(microbatch, inputs, state, for_backward, keep_graph=keep_graph)
        return values

    def recompute(self, microbatch: int) -> None:
        """Runs forwards again to have their graphs."""
        state = self._in_flight[self.step, microbatch]
        self._count_statistics(None)
        self._run(microbatch, state.inputs, state, with_graph=True, again=True)
        state.inputs, state.own = {}, {}

    def backward(self, microbatch: int, gradients: Values, *, split: bool = False) -> Values:
        """Runs all layers backwards, adding to the `.grad` of their parameters, or leaving that to `backward_weight`.

        Args:
            gradients: of the values that others used, as summed so far, where there are any; on the last stage that
                of the loss sum.

        Returns:
            The gradients, as summed so far, of the values that came from other stages. A value that the loss does not
            depend on has none: behind a `detach` plain PyTorch leaves `.grad` None, and optimizers heed that.
        """
        state = self._in_flight[self.step, microbatch]
        if not split:
            del self._in_flight[self.step, microbatch]
        self._count_statistics(None)
        for number in sorted(state.graphs, reverse=True):
            inputs, graph = state.graphs[number] if split else state.graphs.pop(number)
            self.random.before_backward(self.step, microbatch)
            own = {leaf: gradients.pop((layer, leaf)) for layer, leaf in list(gradients) if layer == number}
            for value, share in zip(inputs.wanting_gradients, graph.backward(own, split=split), strict=True):
                if share is not None:
                    gradients[value] = gradients[value] + share if value in gradients else share
        return gradients

    def backward_weight(self, microbatch: int) -> None:
        """Adds to the `.grad` of all parameters, after a `backward` that was split."""
        graphs = self._in_flight.pop((self.step, microbatch)).graphs
        self._count_statistics(None)
        for number in sorted(graphs, reverse=True):
            self.random.before_backward(self.step, microbatch)
            graphs.pop(number)[1].backward_weight()

    def loss_of(self, values: Values) -> Tensor:
        """The loss sum among what `forward` returned on the last stage."""
        loss: Tensor = values[self.loss_id]
        return loss

    @property
    def measured(self) -> list[Tensor]:
        """What the last forward in evaluation measured, on the last stage."""
        return self._loss.measured if self._loss is not None else []

    def gradient_of_loss(self, key: int, total: float) -> Tensor:
        """What a backward starts from: the mini-batch's loss is the sum over its micro-batches divided by `total`."""
        (kind,) = self.wiring.structure(key, self.loss_id[0]).leaves
        assert isinstance(kind, TensorSpec)
        return torch.full((), 1 / total, dtype=kind.dtype, device=self.random.device)

    @property
    def loss_id(self) -> ValueId:
        return self._first + len(self.layers), 0

    def first_non_finite(
        self, microbatch: int, inputs: Values, targets: Tensors, key: int
    ) -> tuple[Values, int | None]:
        """Runs the forward and looks at every output.

        Returns:
            The values for other stages, and the first layer (its place in this stage) with a NaN or infinite output,
            or None.
        """
        culprits: list[int] = []

        def look(place: int, leaves: Sequence[Any]) -> None:
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            if not all(bool(tensor.isfinite().all()) for tensor in tensors):
                culprits.append(place)

        self._count_statistics(None)
        values = self._run(microbatch, inputs, _InFlight(key, targets), with_graph=False, look=look)
        return values, culprits[0] if culprits else None

    def _count_statistics(self, microbatch: int | None) -> None:
        for statistics in self._statistics:
            statistics.microbatch = microbatch

    def _run(
        self,
        microbatch: int,
        inputs: Values,
        state: _InFlight,
        with_graph: bool,
        *,
        keep_graph: bool = True,
        again: bool = False,
        look: Callable[[int, Sequence[Any]], None] | None = None,
    ) -> Values:
        values, key = dict(inputs), state.key
        if self._loss is not None:
            self._loss.targets = state.targets
        with self._autocast():
            for number, layer in enumerate(self._all, self._first):
                is_recomputed = number in self._recomputed
                if again and not is_recomputed:
                    continue
                self.random.before(layer.name, self.step, microbatch, torch_only=layer.is_known)
                wired = self.wiring.inputs(key, number)
                taken = [values[value] for value in wired.values]
                is_run_again = is_recomputed and not keep_graph
                if is_run_again:
                    kept = zip(wired.values, taken, strict=True)
                    state.inputs.update((value, x) for value, x in kept if value[0] not in self._recomputed)
                with self._own_state(layer, number, microbatch, state, again, is_run_again):
                    if with_graph:
                        leaves, spec, graph = layer.forward_with_graph(taken, wired.arrange, wired.needs_grad)
                        if keep_graph or not is_recomputed:
                            state.graphs[number] = wired, graph
                        if graph.is_empty:
                            self._note_dead_end(number, layer, wired, state)
                    else:
                        leaves, spec = layer.forward(taken, wired.arrange)
                self._check_output(key, number, layer, leaves, spec, with_graph, wired)
                values.update({(number, leaf): value for leaf, value in enumerate(leaves)})
                for value in wired.last_used_here:
                    del values[value]
                if look is not None:
                    look(number - self._first, leaves)
        return values

    def _own_state(
        self, layer: Layer, number: int, microbatch: int, state: _InFlight, again: bool, is_run_again: bool
    ) -> AbstractContextManager[object]:
        """What a layer changes in itself in training is kept in the forward, and put back for the recompute."""
        contexts: list[AbstractContextManager[None]] = []
        place_in_stage, which = number - self._first, (self.step, microbatch)
        if self.segments.are_in(place_in_stage):
            segments = self.segments
            contexts.append(
                segments.recompute(place_in_stage, which)
                if again
                else segments.forward(place_in_stage, which, keep=is_run_again)
            )
        for place, own in enumerate(layer.own_state if layer.module.training else ()):
            if again:
                if saved := state.own.get((number, place)):
                    contexts.append(own.rewound(saved))
            elif own and (is_run_again or not own.is_for_recompute_only):
                contexts.append(own.renewed(state.own.setdefault((number, place), [])))
        if not contexts:
            return _NOTHING
        stack = ExitStack()
        for context in contexts:
            stack.enter_context(context)
        return stack

    def _check_output(
        self,
        key: int,
        number: int,
        layer: Layer,
        leaves: list[Any],
        spec: TreeSpec,
        with_graph: bool,
        wired: Inputs,
    ) -> None:
        """Learns what a layer's output looks like, or compares it with what was learned."""
        if not self.wiring.knows(key, number):
            # Which outputs want a gradient must hold for all micro-batches, so it follows from what goes in.
            passes = with_graph and self._passes_gradients(layer, wired)
            needs_grad = [passes and _is_continuous(x) for x in leaves]
            try:
                self.wiring.learn(key, {number: structure_of(leaves, spec, needs_grad)})
            except TypeError as error:
                raise LayerError(f"layer {layer.name}: {error}") from None
            self._check_changed_inputs(number, layer, wired)
            return
        known = self.wiring.structure(key, number)
        if spec != known.spec or not all(map(same_kind, leaves, known.leaves)):
            now = structure_of(leaves, spec, [False] * len(leaves))
            raise LayerError(
                f"the output of layer {layer.name} is {describe(now.leaves)}, but for the same input shapes it was "
                f"{describe(known.leaves)} before; only values of tensors and numbers may differ between micro-batches"
            )
        for place, kind in enumerate(known.leaves):
            if isinstance(kind, TensorSpec):
                leaves[place] = kind.conform(leaves[place])

    def _note_dead_end(self, number: int, layer: Layer, wired: Inputs, state: _InFlight) -> None:
        """A gradient may end in a layer, but not in the loss: then nothing could be trained."""
        if self._passes_gradients(layer, wired):
            state.dead_ends.append(number)
        if number != self.loss_id[0] or self._loss is None:
            return
        if not state.dead_ends:
            raise LayerError("the loss does not depend on any parameter that can be trained")
        name, first = self.wiring.name(state.dead_ends[0]), state.dead_ends[0]
        what = "" if first == number else f": it returns {describe(self.wiring.structure(state.key, first).leaves)}"
        raise LayerError(
            f"no gradient can pass layer {name}{what}; return floating-point tensors that depend on its input or its "
            "parameters"
        )

    def _passes_gradients(self, layer: Layer, wired: Inputs) -> bool:
        return bool(wired.wanting_gradients) or layer.has_trained_parameters

    def _check_changed_inputs(self, number: int, layer: Layer, wired: Inputs) -> None:
        """A layer changes copies of its inputs; elsewhere the value stays. In the unsplit model it would not."""
        for place in layer.changed_inputs or ():
            later = [user for user in self.wiring.users(wired.key, wired.values[place]) if user > number]
            if later:
                raise LayerError(
                    f"layer {layer.name} changes in place what layer {self.wiring.name(later[0])} takes after it; let "
                    "it compute a new tensor (inplace=False)"
                )


def _is_continuous(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
