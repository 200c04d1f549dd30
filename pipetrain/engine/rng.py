"""Draws of random layers that depend on what is computed, never on when or where.

Before a layer runs, the device's generator is seeded from (run seed, step, layer name, micro-batch), where those of all
replicas are counted through; before each call
of a module in it that may draw, once more, from the module's name in the unsplit model (and the number of the call,
where a module is called several times). A recompute seeds the same way, so it sees the same dropout mask; a stage more
or less changes nothing; and a plain loop over the unsplit model that seeds at the same places draws the same numbers.

Modules that are not torch's own may also draw from Python's `random` and numpy's global generator: see `seeds`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pipetrain.engine.known import is_torchs_own, runs_known_code_only
from pipetrain.errors import LayerError
from pipetrain.seeds import derive_seed, name_of_call, pythons_generators_preserved, seed_pythons_generators

_DRAWING = (
    nn.modules.dropout._DropoutNd,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RReLU,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)


class LayerRandomness:
    """Seeds the generators that the layers of one device draw from."""

    def __init__(self, device: torch.device, seed: int, first_microbatch: int = 0) -> None:
        """
        Args:
            first_microbatch: of this replica, in the whole mini-batch.
        """
        self.device = device
        self._seed, self._first_microbatch = seed, first_microbatch
        self._now = (0, 0)
        self._calls: dict[str, int] = {}
        self._most_calls: dict[str, int] = {}
        self._in_backward = False
        # torch.manual_seed reseeds every device and takes 0.7 ms; one generator takes a microsecond.
        self._generator: torch.Generator = (
            torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
        )

    def watch(self, module: nn.Module, full_name: Callable[[str], str]) -> None:
        """Seeds before every call of a part of a layer that may draw."""
        for local, part in module.named_modules():
            if local and _may_draw(part):
                self._watch_one(part, full_name(local))

    def _watch_one(self, part: nn.Module, name: str) -> None:
        torch_only = runs_known_code_only(part)

        def seed(module: nn.Module, args: object) -> None:
            if module.training:
                call = self._calls[name] = self._calls.get(name, 0) + 1
                if not self._in_backward:
                    self._most_calls[name] = max(call, self._most_calls.get(name, 0))
                elif self._most_calls[name] > 1:
                    raise LayerError(
                        f"{name} is called several times under torch.utils.checkpoint, and its draws could not be "
                        "repeated; leave the checkpoint out and use recompute=always, or give each call a module"
                    )
                step, microbatch = self._now
                self._seed_with(derive_seed(self._seed, step, name_of_call(name, call), microbatch), torch_only)

        part.register_forward_pre_hook(seed)

    def before(self, layer: str, step: int, microbatch: int, *, torch_only: bool = False) -> None:
        """Makes the next draws those of this layer, step and micro-batch.

        Args:
            torch_only: where nothing draws from Python's generators.
        """
        self._now = step, microbatch = step, self._first_microbatch + microbatch
        self._calls.clear()
        self._in_backward = False
        self._seed_with(derive_seed(self._seed, step, layer, microbatch), torch_only)

    def _seed_with(self, number: int, torch_only: bool) -> None:
        self._generator.manual_seed(number)
        if not torch_only:
            seed_pythons_generators(number)

    def before_backward(self, step: int, microbatch: int) -> None:
        """For modules that run again in a backward (torch.utils.checkpoint): they draw what they drew before."""
        self._now = step, self._first_microbatch + microbatch
        self._calls.clear()
        self._in_backward = True

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Gives the generators back as they were: the engine leaves no trace in the user's randomness."""
        state = self._generator.get_state()
        try:
            with pythons_generators_preserved():
                yield
        finally:
            self._generator.set_state(state)


def _may_draw(part: nn.Module) -> bool:
    """torch's own modules are known; of others, those without parts: whatever they do, they do themselves."""
    if isinstance(part, _DRAWING):
        return True
    return not is_torchs_own(part) and next(part.children(), None) is None
