"""The versions of one rank's weights that micro-batches in flight still need.

In a stale schedule weights change between the forward and the backward of a micro-batch. Three answers:

    stash    the backward sees the weights of its forward: a weight that somebody still needs is not written over, it
             moves to new memory for its update. So stage s keeps as many versions as micro-batches are in flight there
    replay   the forward is run again with the newest weights before the backward: no copies, and no graph is kept
    current  the backward goes through the graph of the old forward with the newest weights: no copies

In a segment no module holds its parameters themselves, since torch refuses a backward through weights that were written
to. Each holds a *leaf*: a parameter of its own on the same memory. The optimizer writes to the parameters. A leaf stays
as long as its memory is what it was when the leaf was made; it gets the gradients, which are kept apart by mini-batch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from pipetrain.engine.stage import Stage
from pipetrain.errors import LayerError
from pipetrain.schedule.stale import REPLAY, STASH

Leaves = dict[str, nn.Parameter]  # by full name
MicroBatch = tuple[int, int]  # its mini-batch, and its number there


@dataclass(frozen=True)
class _Place:
    """Where a module holds a parameter."""

    module: nn.Module
    attribute: str
    name: str


@dataclass
class _Weights:
    """One stage's."""

    places: list[_Place]
    newest: Leaves = field(default_factory=dict)
    seen: dict[MicroBatch, Leaves] = field(default_factory=dict)  # by the micro-batches in flight
    gradients: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # by mini-batch
    updates: int = 0
    first_read: dict[int, int] = field(default_factory=dict)  # by mini-batch: updates before its first forward

    def install(self, leaves: Mapping[str, nn.Parameter]) -> None:
        for place in self.places:
            if place.module._parameters[place.attribute] is not leaves[place.name]:
                setattr(place.module, place.attribute, leaves[place.name])


class WeightVersions:
    """Puts the right weights into the modules of a rank's stages, from `begin` to `end` of a segment."""

    def __init__(
        self, stages: Iterable[Stage], parameters: Mapping[str, nn.Parameter], owners: Mapping[str, str], policy: str
    ) -> None:
        """
        Args:
            parameters: by full name.
            owners: of each name the one whose memory it has, see `tied`.
            policy: one of `WEIGHTS`.
        """
        self._parameters, self._owners = parameters, owners
        self._policy = policy
        self._stages = {stage.index: _Weights(list(_places(stage))) for stage in stages}

    def begin(self) -> None:
        """Every module gets leaves."""
        for weights in self._stages.values():
            weights.newest = {}
            self._renew(weights)

    def end(self) -> None:
        """Every module gets its parameters back."""
        for name, owner in self._owners.items():
            self._parameters[name].data = self._parameters[owner].data
        for weights in self._stages.values():
            assert not weights.seen
            assert not weights.gradients
            weights.install({place.name: self._parameters[place.name] for place in weights.places})

    def forward(self, stage: int, which: MicroBatch) -> None:
        """Called before a forward: it runs with the newest weights."""
        weights = self._stages[stage]
        weights.seen[which] = weights.newest if self._policy != REPLAY else {}
        weights.first_read.setdefault(which[0], weights.updates)

    @contextmanager
    def recompute(self, stage: int, which: MicroBatch) -> Iterator[None]:
        """Around a recompute: it runs with the weights of its forward, or else with the newest."""
        weights = self._stages[stage]
        if self._policy != STASH:
            weights.seen[which] = weights.newest
        weights.install(weights.seen[which])
        try:
            yield
        finally:
            weights.install(weights.newest)

    @contextmanager
    def backward(self, stage: int, which: MicroBatch) -> Iterator[None]:
        """Around a backward: gradients are added to those of the mini-batch.

        Raises:
            LayerError: if a module did not use the weights that it was given.
        """
        weights = self._stages[stage]
        leaves = weights.seen.pop(which)
        gradients = weights.gradients.setdefault(which[0], {})
        for name, leaf in leaves.items():
            leaf.grad = gradients.get(name)
        weights.install(leaves)  # for modules that run again in a backward (torch.utils.checkpoint)
        try:
            yield
        finally:
            weights.install(weights.newest)
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                gradients[name] = leaf.grad
                leaf.grad = None
            if self._parameters[name].grad is not None:
                raise LayerError(
                    f"{name} is used by a module that holds it elsewhere than among its parameters, where no other "
                    "version of it can be put in its place; use a synchronous schedule"
                )

    def gradients(self, stage: int, step: int) -> dict[str, Tensor]:
        """Those of a mini-batch by full name; what is changed there is changed here."""
        return self._stages[stage].gradients.setdefault(step, {})

    def take_gradients(self, stage: int, step: int) -> tuple[dict[str, Tensor], int]:
        """For an update of a stage: the gradients of a mini-batch by full name, and how many updates late they are."""
        weights = self._stages[stage]
        late = weights.updates - weights.first_read.pop(step)
        weights.updates += 1
        return weights.gradients.pop(step, {}), late

    @contextmanager
    def update(self, changing: Sequence[nn.Parameter]) -> Iterator[None]:
        """Around an update of some parameters: those that somebody still needs move to new memory first."""
        if self._policy == STASH:
            needed = {
                leaf.data_ptr()
                for weights in self._stages.values()
                for leaves in weights.seen.values()
                for leaf in leaves.values()
            }
            for parameter in changing:
                if parameter.data_ptr() in needed:
                    # The memory that graphs know stays as it is, under their leaves.
                    parameter.data = parameter.data.clone()
        yield
        for weights in self._stages.values():
            self._renew(weights)

    def _renew(self, weights: _Weights) -> None:
        """Makes leaves for the parameters that have new memory."""
        leaves: Leaves = {}
        for place in weights.places:
            parameter, leaf = self._parameters[self._owners[place.name]], weights.newest.get(place.name)
            if leaf is None or leaf.data_ptr() != parameter.data_ptr():
                # `.data`, unlike `.detach()`, does not tell the leaf's graphs that the optimizer writes: see above for
                # who makes sure that what they hold is what the policy says.
                leaf = nn.Parameter(parameter.data)
            leaves[place.name] = leaf
        weights.newest = leaves
        weights.install(leaves)


def _places(stage: Stage) -> Iterator[_Place]:
    """Of all parameters that are trained. One that a module has twice is listed twice, under its first name."""
    for layer in stage.layers:
        names = {parameter: name for name, parameter in layer.module.named_parameters()}
        for module in layer.module.modules():
            for attribute, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    yield _Place(module, attribute, layer.full_name(names[parameter]))
