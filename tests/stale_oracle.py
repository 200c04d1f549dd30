"""What stale training is, written down once more: one process, plain PyTorch, no schedule and no engine.

The oracle is told how many updates its rank has made before each forward, before each backward, and which gradients
each update applies. Everything else follows on demand: weights from the update before, gradients from activations and
weights, activations from those of the stage before. Each version of the weights is a copy of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipetrain.models import Recipe
from pipetrain.partition.split import build_layer
from pipetrain.seeds import derive_seed

Weights = dict[str, Tensor]  # by full name
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Versions:
    """What the oracle is told.

    Attributes:
        rank_of: for each stage.
        forward, backward: updates of its rank before that of (stage, mini-batch, micro-batch).
        updates: for each rank what each of its updates applies: (stage, mini-batch) pairs, by ascending stage.
        num_microbatches: of each mini-batch.
    """

    rank_of: Sequence[int]
    forward: Mapping[tuple[int, int, int], int]
    backward: Mapping[tuple[int, int, int], int]
    updates: Sequence[Sequence[tuple[tuple[int, int], ...]]]
    num_microbatches: int


class StaleOracle:
    """Trains a chain of layers, each of which takes and gives one tensor."""

    def __init__(
        self,
        recipe: Recipe,
        balance: Sequence[int],
        batches: Sequence[tuple[Tensor, Tensor]],
        versions: Versions,
        policy: str,
        make: Make,
        *,
        before_update: Callable[[dict[str, nn.Parameter], int], None] = lambda parameters, stages: None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            policy: stash | replay | current.
            make: gives the optimizer of a rank's parameters.
            before_update: called with the parameters that have a gradient and the number of stages that update.
        """
        self._recipe, self._batches, self._versions, self._policy = recipe, batches, versions, policy
        self._before_update, self._seed = before_update, seed
        starts = [sum(balance[:s]) for s in range(len(balance) + 1)]
        self._layers = [range(*pair) for pair in pairwise(starts)]
        self._modules = [build_layer(layer, seed).to(dtype) for layer in recipe.layers]
        self._call: tuple[int, int] = (0, 0)
        self._calls: dict[str, int] = {}
        for number, module in enumerate(self._modules):
            for local, part in module.named_modules():
                if isinstance(part, nn.Dropout):
                    part.register_forward_pre_hook(self._seed_call(recipe.layers[number].full_name(local)))
        stage_of = {recipe.layers[i].name: s for s, layers in enumerate(self._layers) for i in layers}
        full = {
            (layer.name, local): layer.full_name(local) for layer in recipe.layers for local in self._locals(layer.name)
        }
        self._owner = {name: name for name in full.values()}
        initial = {
            full[layer.name, n]: p
            for layer, m in zip(recipe.layers, self._modules, strict=True)
            for n, p in m.named_parameters()
        }
        for first, *others in recipe.ties:
            self._owner |= {full[other]: full[first] for other in others}
        self._parameters: list[dict[str, nn.Parameter]] = [{} for _ in versions.updates]
        for (layer, _), name in full.items():
            own = self._parameters[versions.rank_of[stage_of[layer]]]
            if self._owner[name] == name:
                own[name] = nn.Parameter(initial[name].detach().clone())
        self._optimizers = [make(list(own.values())) for own in self._parameters]
        self._history = [[{n: p.detach().clone() for n, p in own.items()}] for own in self._parameters]
        self.losses: dict[int, float] = {}
        self.norms: dict[tuple[int, int], float] = {}
        self.activations = cache(self._activations)
        self.gradients = cache(self._gradients)

    def _locals(self, layer: str) -> list[str]:
        place = [other.name for other in self._recipe.layers].index(layer)
        return [name for name, _ in self._modules[place].named_parameters()]

    # ---- the definition --------------------------------------------------------------------------------------

    def weights(self, rank: int, updates: int) -> Weights:
        """A rank's weights after so many of its updates."""
        while len(self._history[rank]) <= updates:
            self._update(rank, self._versions.updates[rank][len(self._history[rank]) - 1])
        return self._history[rank][updates]

    def _update(self, rank: int, applied: tuple[tuple[int, int], ...]) -> None:
        found: dict[str, Tensor] = {}
        for stage, step in applied:
            of_step: dict[str, Tensor] = {}
            for m in range(self._versions.num_microbatches):
                for name, gradient in self.gradients(stage, step, m)[0].items():
                    of_step[name] = of_step[name] + gradient if name in of_step else gradient
            for name in sorted(of_step, key=list(self._owner).index):
                owner = self._owner[name]
                found[owner] = found[owner] + of_step[name] if owner in found else of_step[name]
        # What is needed of the weights before this update is asked for above: now they may be written to.
        parameters = self._parameters[rank]
        for name, parameter in parameters.items():
            parameter.grad = found[name].clone() if name in found else None
        self._before_update({name: parameters[name] for name in found}, len(applied))
        self._optimizers[rank].step()
        self._history[rank].append({name: p.detach().clone() for name, p in parameters.items()})

    def _activations(self, stage: int, step: int, m: int) -> tuple[Tensor, Tensor, Weights]:
        """Input, output and weights of a stage; the output of the last one is the loss."""
        before = self.activations(stage - 1, step, m)[1].detach() if stage else self._pieces(step, 0)[m]
        its = self.weights(self._versions.rank_of[stage], self._versions.forward[stage, step, m])
        if before.is_floating_point():
            before.requires_grad_()
        weights = {name: tensor.clone().requires_grad_() for name, tensor in self._of_stage(stage, its).items()}
        return before, self._run(stage, before, weights, step, m), weights

    def _gradients(self, stage: int, step: int, m: int) -> tuple[Weights, Tensor | None]:
        """Gradients of a stage's weights and of its input."""
        last = stage == len(self._layers) - 1
        x, y, weights = self.activations(stage, step, m)
        theirs = (
            torch.ones_like(y) / self._recipe.count((self._batches[step][1],))
            if last
            else self.gradients(stage + 1, step, m)[1]
        )
        now = self._of_stage(
            stage, self.weights(self._versions.rank_of[stage], self._versions.backward[stage, step, m])
        )
        if self._policy == "replay":
            weights = {name: tensor.clone().requires_grad_() for name, tensor in now.items()}
            x = x.detach().requires_grad_(x.requires_grad)
            y = self._run(stage, x, weights, step, m)
        elif self._policy == "current":
            with torch.autograd._unsafe_preserve_version_counter(tuple(weights.values())), torch.no_grad():
                for name, tensor in weights.items():
                    tensor.copy_(now[name])
        y.backward(theirs)
        return {name: tensor.grad for name, tensor in weights.items() if tensor.grad is not None}, x.grad

    # ---- plumbing --------------------------------------------------------------------------------------------

    def _of_stage(self, stage: int, weights: Weights) -> Weights:
        """By the names that its layers have for them: each use of a tied weight is a tensor of its own."""
        layers = [self._recipe.layers[i] for i in self._layers[stage]]
        names = [layer.full_name(local) for layer in layers for local in self._locals(layer.name)]
        return {name: weights[self._owner[name]] for name in names}

    def _run(self, stage: int, value: Tensor, weights: Weights, step: int, m: int) -> Tensor:
        self._call = (step, m)
        self._calls.clear()
        for i in self._layers[stage]:
            layer = self._recipe.layers[i]
            torch.manual_seed(derive_seed(self._seed, step, layer.name, m))
            own = {local: weights[layer.full_name(local)] for local in self._locals(layer.name)}
            value = functional_call(self._modules[i], own, (value,))
        if stage < len(self._layers) - 1:
            return value
        loss = self._recipe.loss_sum(value, (self._pieces(step, 1)[m],))
        return loss

    def _pieces(self, step: int, which: int) -> tuple[Tensor, ...]:
        return self._batches[step][which].tensor_split(self._versions.num_microbatches)

    def _seed_call(self, name: str) -> Callable[[nn.Module, object], None]:
        def hook(module: nn.Module, arguments: object) -> None:
            self._calls[name] = self._calls.get(name, 0) + 1
            called = name if self._calls[name] == 1 else f"{name}@{self._calls[name]}"
            step, m = self._call
            torch.manual_seed(derive_seed(self._seed, step, called, m))

        return hook
