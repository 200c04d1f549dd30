"""What the stages of a balance cost: the layers' costs added up, and what goes over the borders."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pipetrain.costs import LayerCost, ModelCost, StageCost, ValueCost


@dataclass(frozen=True)
class StageBytes:
    """What a stage holds.

    Attributes:
        parameters: of its weights; their gradients take as much.
        optimizer: what the optimizer keeps of them.
        inputs: what comes from other stages and the mini-batch, for one micro-batch.
        outputs: what goes to other stages, for one micro-batch.
        kept: for each micro-batch from its forward to its recompute, `inputs` left out: the graphs of those layers that
            are not recomputed.
        graph: what the graphs of all layers keep between the forward and the backward of one micro-batch, inputs among
            it.
        between: what lives beside `graph` between the halves of a backward.
        forward: the most that a forward needs beside `inputs` where it is recomputed later.
        building, backward: the most that a forward which keeps its graphs, or a backward, needs beside `graph`.
    """

    parameters: int
    optimizer: int
    inputs: int
    outputs: int
    kept: int
    graph: int
    between: int
    forward: int
    building: int
    backward: int


@dataclass(frozen=True)
class Cut:
    """A model and the layers of each stage.

    Attributes:
        recomputed: for each layer, whether a recompute runs it.
    """

    model: ModelCost
    balance: tuple[int, ...]
    recomputed: tuple[bool, ...]

    def costs(self, *, split: bool, slowness: Sequence[float]) -> list[StageCost]:
        """Seconds of each stage.

        Args:
            split: whether backwards come in halves.
            slowness: of the device of each stage.
        """
        sent = self._bytes_over_borders()
        return [
            StageCost(
                forward_s=slow * sum(layer.forward_s for layer in layers),
                backward_s=slow * sum(layer.input_s if split else layer.backward_s for layer in layers),
                backward_weight_s=slow * sum(layer.weight_s for layer in layers) if split else 0.0,
                recompute_s=slow * sum(layer.forward_s for layer, again in zip(layers, redone, strict=True) if again),
                update_s=slow * sum(layer.update_s for layer in layers),
                output_bytes=sent[s],
            )
            for s, (layers, redone, slow) in enumerate(zip(self._layers(), self._redone(), slowness, strict=True))
        ]

    def bytes(self) -> list[StageBytes]:
        """Bytes of each stage."""
        ends = list(itertools.accumulate(self.balance))
        values: list[list[ValueCost]] = [[] for _ in self.balance]  # that a stage makes or takes
        stage_of = [s for s, number in enumerate(self.balance) for _ in range(number)]
        for value in self.model.values:
            for s in sorted({stage_of[layer] for layer in (value.layer, *value.users) if layer >= 0}):
                values[s].append(value)
        return [
            _bytes_of(layers, redone, theirs, end - len(layers))
            for layers, redone, theirs, end in zip(self._layers(), self._redone(), values, ends, strict=True)
        ]

    def _layers(self) -> list[tuple[LayerCost, ...]]:
        return [self.model.layers[a:b] for a, b in itertools.pairwise((0, *itertools.accumulate(self.balance)))]

    def _redone(self) -> list[tuple[bool, ...]]:
        return [self.recomputed[a:b] for a, b in itertools.pairwise((0, *itertools.accumulate(self.balance)))]

    def _bytes_over_borders(self) -> list[int]:
        """Behind each stage."""
        crossing = crossing_bytes(self.model)
        return [crossing[end] for end in itertools.accumulate(self.balance)]


def crossing_bytes(model: ModelCost) -> list[int]:
    """[layers + 1]: what goes over a border in front of each layer; nothing in front of the first and behind the last.

    A value that goes straight to a later stage counts at all borders between, as if it were handed on.
    """
    crossing = [0] * (len(model.layers) + 1)
    for value in model.values:
        if value.users and value.layer >= 0:
            for border in range(value.layer + 1, value.users[-1] + 1):
                crossing[border] += value.num_bytes
    return crossing


def _bytes_of(
    layers: Sequence[LayerCost], redone: Sequence[bool], values: Sequence[ValueCost], first: int
) -> StageBytes:
    here = range(first, first + len(layers))
    inputs = outputs = kept = held = 0
    gradients = [0] * len(layers)  # of a layer's outputs: they are there while it goes backwards
    for value in values:
        is_made_here = value.layer in here
        keepers = [layer - first for layer in value.keepers if layer in here]
        held += value.num_bytes if keepers else 0
        if is_made_here:
            outputs += value.num_bytes if any(user not in here for user in value.users) else 0
            gradients[value.layer - first] += value.num_bytes if value.has_gradient else 0
            # A recomputed layer starts from what a layer that is not recomputed has made.
            taken = any(redone[user - first] for user in value.users if user in here)
            is_kept = not redone[value.layer - first] and taken
            kept += value.num_bytes if is_kept or any(not redone[keeper] for keeper in keepers) else 0
        else:
            inputs += value.num_bytes
    graphs = [layer.graph_bytes for layer in layers]
    kept += sum(size for size, again in zip(graphs, redone, strict=True) if not again)
    backwards = itertools.accumulate(graphs)  # while layer k goes backwards the graphs of those behind it are gone
    graph = held + sum(graphs)
    return StageBytes(
        parameters=sum(layer.parameter_bytes for layer in layers),
        optimizer=sum(layer.optimizer_bytes for layer in layers),
        inputs=inputs,
        outputs=outputs,
        kept=kept,
        graph=graph,
        between=sum(layer.between_bytes for layer in layers),
        forward=max(layer.forward_bytes for layer in layers),
        building=max(layer.forward_bytes - layer.graph_bytes for layer in layers),
        backward=max(
            0,
            *(
                left + layer.backward_bytes + gradient - sum(graphs)
                for left, layer, gradient in zip(backwards, layers, gradients, strict=True)
            ),
        ),
    )
