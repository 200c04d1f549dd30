"""Draws of random layers that depend on what is computed, never on when or where.

Before a layer runs, the device's generator is seeded from (run seed, step, layer name, micro-batch). A recompute seeds
it the same way, so it sees the same dropout mask; a stage more or less changes nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipetrain.seeds import derive_seed


class LayerRandomness:
    """Seeds the generator that the layers of one device draw from."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self._seed = seed
        # torch.manual_seed reseeds every device and takes 0.7 ms; one generator takes a microsecond.
        self._generator: torch.Generator = (
            torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
        )

    def before(self, layer: str, step: int, microbatch: int) -> None:
        """Makes the next draws those of this layer, step and micro-batch."""
        self._generator.manual_seed(derive_seed(self._seed, step, layer, microbatch))

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Gives the generator back as it was: the engine leaves no trace in the user's randomness."""
        state = self._generator.get_state()
        try:
            yield
        finally:
            self._generator.set_state(state)
