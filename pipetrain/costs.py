"""What layers, stages, links and devices cost: seconds and bytes. Measured or computed in `profile`, used in `sim`."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerCost:
    """One layer on one micro-batch.

    Attributes:
        forward_s: of the forward, also where it is run a second time.
        backward_s: of a whole backward.
        input_s, weight_s: of its two halves, where a schedule splits it: the input's gradient and the weights'.
        update_s: once a step: this layer's share of the gradient norm and of the optimizer.
        parameters: how many there are; a tied one counts in every layer that uses it, as it takes memory there.
        parameter_bytes: of the weights, and as much again of their gradients.
        optimizer_bytes: what the optimizer keeps of them.
        graph_bytes: what lives from the forward to the backward beside the layer's inputs and outputs.
        between_bytes: what lives beside that between the halves of its backward.
        forward_bytes, backward_bytes: the most that lives at once during one, of what was not there before it, the
            parameters' gradients left out.
    """

    name: str
    forward_s: float
    backward_s: float
    input_s: float
    weight_s: float
    update_s: float
    parameters: int
    parameter_bytes: int
    optimizer_bytes: int
    graph_bytes: int
    between_bytes: int
    forward_bytes: int
    backward_bytes: int


@dataclass(frozen=True)
class ValueCost:
    """A tensor that one layer gives to others.

    Attributes:
        layer: the one that makes it; -1 is the mini-batch.
        users: the layers that take it, ascending.
        keepers: the layers, of these and the one that makes it, whose graphs keep it for their backward.
        has_gradient: whether as many bytes come back.
    """

    layer: int
    num_bytes: int
    users: tuple[int, ...]
    keepers: tuple[int, ...]
    has_gradient: bool


@dataclass(frozen=True)
class ModelCost:
    """All layers of a model, in order, on micro-batches of `rows` samples, and what goes between them.

    The loss is part of the last layer.
    """

    rows: int
    layers: tuple[LayerCost, ...]
    values: tuple[ValueCost, ...]


@dataclass(frozen=True)
class Link:
    """Between two devices: a message of n bytes is there latency_s + n / bytes_per_s after it was sent."""

    latency_s: float = 0.0
    bytes_per_s: float = math.inf

    def seconds(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Device:
    """What one rank runs on.

    Attributes:
        memory_bytes: what it has for weights and all that comes with training them.
        slowness: seconds that it takes for a second of the device that the layers were measured on.
    """

    name: str
    memory_bytes: float = math.inf
    slowness: float = 1.0


@dataclass(frozen=True)
class StageCost:
    """Seconds of each kind of action on one stage.

    Attributes:
        backward_s: of a whole backward, or of its first half (I) where the schedule splits it.
        backward_weight_s: of the second half (W).
        reduce_s: from the last gradient of a mini-batch until those of all replicas are added up.
        output_bytes: what goes to the next stage with each micro-batch, and comes back as gradients.
    """

    forward_s: float
    backward_s: float
    backward_weight_s: float = 0.0
    recompute_s: float = 0.0
    update_s: float = 0.0
    reduce_s: float = 0.0
    output_bytes: int = 0
