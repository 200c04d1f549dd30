"""Stale training in one process: what `schedule=ouroboros stale.tied=locked` does to the weights, without a pipeline.

At iteration t all modules are at version w(t) there. So one needs no versions: the whole gradient is taken at w(t), and
module k applies the one of K - k iterations ago. tests/test_delayed.py shows that the pipeline gives the same bits.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipetrain.config import Config
from pipetrain.engine.joint_update import JointUpdate
from pipetrain.models import Recipe
from pipetrain.partition.split import build_layer, stage_of_each_layer
from pipetrain.seeds import derive_seed
from pipetrain.training.optim import build_optimizer
from pipetrain.training.stale import UpdateRule

Batch = tuple[Tensor, Tensor]


class DelayedTraining:
    """A chain of layers without dropout, in K modules on K - 1 devices."""

    def __init__(self, recipe: Recipe, balance: Sequence[int], cfg: Config, delays: Sequence[int]) -> None:
        """
        Args:
            delays: updates by which the gradients of each module are late.
        """
        self._recipe, self._cfg, self._delays = recipe, cfg, delays
        self.modules = [build_layer(layer, cfg.seed) for layer in recipe.layers]
        self._stages = stage_of_each_layer(balance)
        layers = list(zip(recipe.layers, self.modules, self._stages, strict=True))
        self._parameters = {layer.full_name(n): p for layer, module, _ in layers for n, p in module.named_parameters()}
        stage_of = {layer.full_name(n): s for layer, module, s in layers for n, _ in module.named_parameters()}
        self._stage_of: dict[str, int] = stage_of
        by_name = {layer.name: layer for layer in recipe.layers}
        self._owner = {name: name for name in self._parameters}
        for first, *others in recipe.ties:
            owner = by_name[first[0]].full_name(first[1])
            for layer, name in others:
                use = by_name[layer].full_name(name)
                self._owner[use] = owner
                self._parameters[use].data = self._parameters[owner].data  # one memory, two gradients
        shared = {self._owner[name] for name in self._parameters if self._owner[name] != name}
        own = {name: p for name, p in self._parameters.items() if self._owner[name] == name}
        ends = recipe.layers[0].full_name(""), recipe.layers[-1].full_name("")
        optimizer = build_optimizer(
            cfg.optimizer,
            own,
            stage_of={name: None if name in shared else stage_of[name] for name in own},
            outer=[name for name in own if name.startswith(ends)],
        )
        self._rule = UpdateRule(cfg, optimizer, own, len(balance))
        last = len(balance) - 1
        # Devices update by themselves; where nothing is late all of them meet, for the norm of the whole gradient.
        apart: list[tuple[int, ...]] = [(0, last) if last else (0,), *((s,) for s in range(1, last))]
        self._groups = apart if any(delays) else [tuple(range(len(balance)))]
        self._gradients: dict[int, dict[str, Tensor]] = {}
        self._losses: dict[int, float] = {}

    def train(
        self, batches: Callable[[int], Batch], steps: int, after: Callable[[int], None] = lambda step: None
    ) -> None:
        """Synchronous steps to warm up, then stale ones, then what is still on its way.

        Args:
            after: called with the number of steps done.
        """
        warmup = min(self._cfg.stale.warmup_steps, steps)
        for step in range(warmup):
            self._compute(step, batches(step))
            self._update(dict.fromkeys(range(len(self._delays)), step))
            after(step + 1)
        for step in range(warmup, steps + max(self._delays)):
            if step < steps:
                self._compute(step, batches(step))
            due = {stage: step - delay for stage, delay in enumerate(self._delays)}
            self._update({stage: of for stage, of in due.items() if warmup <= of < steps})
            if step < steps:
                after(step + 1)

    def loss_of(self, batches: Sequence[Batch]) -> float:
        """Mean over all tokens, without training."""
        for module in self.modules:
            module.eval()
        with torch.no_grad():
            total = sum(float(self._recipe.loss_sum(self._run(x), (y,))) for x, y in batches)
        for module in self.modules:
            module.train()
        return total / sum(self._recipe.count((y,)) for _, y in batches)

    def weights(self) -> dict[str, Tensor]:
        """By full name."""
        return {name: p.detach() for name, p in self._parameters.items()}

    def _run(self, value: Tensor, before: Callable[[int], None] = lambda place: None) -> Tensor:
        for place, module in enumerate(self.modules):
            before(place)
            value = module(value)
        return value

    def _compute(self, step: int, batch: Batch) -> None:
        def seed(place: int) -> None:
            torch.manual_seed(derive_seed(self._cfg.seed, step, self._recipe.layers[place].name, 0))

        inputs, targets = batch
        loss = self._recipe.loss_sum(self._run(inputs, seed), (targets,)) / self._recipe.count((targets,))
        loss.backward()
        self._losses[step] = loss.item()
        self._gradients[step] = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        for parameter in self._parameters.values():
            parameter.grad = None
        self._gradients.pop(step - max(self._delays) - 1, None)

    def _update(self, due: dict[int, int]) -> None:
        """Updates modules by the gradients of some mini-batches, device by device."""
        for stages in self._groups:
            steps = {stage: due[stage] for stage in stages if stage in due}
            if steps:
                self._update_device(steps)

    def _update_device(self, steps: dict[int, int]) -> None:
        found: dict[str, Tensor] = {}
        stage_of: dict[str, int] = {}
        for stage, step in steps.items():
            for name, gradient in self._gradients[step].items():
                if self._stage_of[name] == stage:
                    owner = self._owner[name]
                    found[owner] = found[owner] + gradient if owner in found else gradient
                    stage_of.setdefault(owner, stage)
        squares = {stage: [_squared_norm(found[name]) for name in found if stage_of[name] == stage] for stage in steps}
        # Behind the warm-up the pipeline fills.
        warmup = self._cfg.stale.warmup_steps
        staleness = {s: min(self._delays[s], max(0, step - warmup)) for s, step in steps.items()}
        norms = {stage: float(torch.stack(of).sum()) if of else 0.0 for stage, of in squares.items()}
        for name, gradient in found.items():
            # Gradients are kept for other modules of the same mini-batch; clipping scales in place.
            self._parameters[name].grad = gradient.clone()
        self._rule.apply(JointUpdate(steps, staleness, stage_of, norms, None))
        for name in found:
            self._parameters[name].grad = None


def _squared_norm(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
