"""A moving average of the weights: kept by each stage beside its weights, and what evaluation sees."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """An exponential moving average of the parameters of one stage.

    After update number n, counted from 1, average <- d average + (1 - d) weight, d = min(decay, (1 + n) / (10 + n)):
    TensorFlow's ExponentialMovingAverage with num_updates, as Real et al. 2019 train AmoebaNet with it (their code,
    amoeba_net_model.py). Without the second number a short run would be evaluated with little but its initial weights.

    Each parameter is averaged by itself, so the numbers do not depend on the cut, and copies of a tied parameter on
    several stages, which are equal, have equal averages. Buffers are not averaged: evaluation takes BatchNorm's running
    statistics as they are, which are averages already.

    Attributes:
        values: full name -> average, of every parameter that is trained, in the shape and precision of the parameter.
    """

    def __init__(self, decay: float, parameters: Mapping[str, nn.Parameter]) -> None:
        """
        Args:
            decay: above 0 and below 1.
            parameters: by full name, those that this stage's optimizer steps; the averages start from their values.
        """
        self._decay = decay
        self._parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Takes in the weights as they are after `num_updates` updates."""
        decay = min(self._decay, (1 + num_updates) / (10 + num_updates))
        for name, average in self.values.items():
            average.lerp_(self._parameters[name], 1 - decay)

    @contextmanager
    def as_weights(self) -> Iterator[None]:
        """Inside, the parameters are the averages; behind it they are themselves again, to the bit.

        Values are exchanged, not tensors: uses of a tied parameter share their memory.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, average in self.values.items():
            kept = average.clone()
            average.copy_(self._parameters[name])
            self._parameters[name].copy_(kept)
