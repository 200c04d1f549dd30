"""Updates of a stale schedule: a rank makes them by itself, when its own gradients are there.

Updates that stand next to each other in its list are one: its optimizer steps once, with the gradients that came since
the last time. A parameter that several of the rank's stages share gets the sum of what its uses have then, added in
ascending layer order: in Ouroboros the fresh gradient of the output layer and the late one of the embedding.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipetrain.engine.versions import WeightVersions
from pipetrain.schedule import Action


@dataclass(frozen=True)
class JointUpdate:
    """What an optimizer is called for.

    Attributes:
        steps: the mini-batch of each stage that updates, counted from the start of the training.
        staleness: how many updates late the gradient of each of these stages is.
        stage_of: the stage to which each parameter with a gradient counts, by the parameter's own name: where several
            updating stages share it, the first one.
        squared_norms: of the gradient of each stage that updates.
        loss: mean of the mini-batch that the last stage updates for, where it does.
    """

    steps: Mapping[int, int]
    staleness: Mapping[int, int]
    stage_of: Mapping[str, int]
    squared_norms: Mapping[int, float]
    loss: float | None

    @property
    def norm(self) -> float:
        """Of all that is updated."""
        return math.sqrt(sum(self.squared_norms.values()))


class JointUpdates:
    """Makes them, for one rank."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], owners: Mapping[str, str], versions: WeightVersions
    ) -> None:
        """
        Args:
            parameters: all of the rank, by full name, in the order of the layers.
            owners: of each name the one under which an optimizer has the parameter.
        """
        self._parameters, self._owners, self._versions = parameters, owners, versions

    def make(
        self, actions: Sequence[Action], first_step: int, loss: float | None, update: Callable[[JointUpdate], None]
    ) -> JointUpdate:
        """Hands the optimizer its gradients and calls it.

        Args:
            actions: the updates, by ascending stage.
            first_step: the mini-batch that the schedule calls 0.
            update: steps the optimizer.
        """
        found: dict[str, Tensor] = {}
        stage_of: dict[str, int] = {}
        late: dict[int, int] = {}
        for action in actions:
            gradients, late[action.stage] = self._versions.take_gradients(action.stage, action.step)
            for name in [name for name in self._parameters if name in gradients]:
                owner = self._owners[name]
                found[owner] = found[owner] + gradients[name] if owner in found else gradients[name]
                stage_of.setdefault(owner, action.stage)
        joint = JointUpdate(
            {action.stage: first_step + action.step for action in actions},
            late,
            stage_of,
            {action.stage: _squared_norm(found, stage_of, action.stage) for action in actions},
            loss,
        )
        changing = {name: self._parameters[name] for name in found}
        for name, parameter in changing.items():
            parameter.grad = found[name]
        with self._versions.update(list(changing.values())):
            update(joint)
        for parameter in changing.values():
            parameter.grad = None
        return joint


def _squared_norm(gradients: Mapping[str, Tensor], stage_of: Mapping[str, int], stage: int) -> float:
    squares = [
        torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        for name, gradient in gradients.items()
        if stage_of[name] == stage
    ]
    return float(torch.stack(squares).sum()) if squares else 0.0
