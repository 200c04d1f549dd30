"""The gradients of a stage, added up over all replicas.

They travel in one message for each layer, whatever the stages: the order of a sum may depend on where a number stands
in its message, and the cut must not show.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from pipetrain.engine.transport import Posted, Replicas


@dataclass(frozen=True)
class _Bucket:
    """What a message carries: the gradients of some parameters, zeros for what does not exist, and whether it does."""

    parameters: Sequence[tuple[str, nn.Parameter]]
    message: Posted


class PendingSum:
    """The gradients of a stage, on their way."""

    def __init__(
        self, layers: Iterable[Mapping[str, nn.Parameter]], own: dict[str, Tensor], replicas: Replicas
    ) -> None:
        """
        Args:
            layers: of each its parameters that are trained, in one order on all replicas.
            own: this replica's gradients; emptied, so that memory is free again as soon as it has been copied.
        """
        self._buckets = [
            _Bucket(parameters, replicas.start_sum(_packed(parameters, own)))
            for layer in layers
            for _, same in groupby(sorted(layer.items(), key=_dtype), key=_dtype)
            if (parameters := list(same))
        ]

    def wait(self) -> dict[str, Tensor]:
        """The sums, of the parameters that have a gradient on any replica."""
        found: dict[str, Tensor] = {}
        for bucket in self._buckets:
            sizes = [parameter.numel() for _, parameter in bucket.parameters]
            *sums, exist = bucket.message.wait().split([*sizes, len(sizes)])
            for (name, parameter), total, exists in zip(bucket.parameters, sums, exist.tolist(), strict=True):
                if exists:
                    found[name] = total.view(parameter.shape)
        return found


def _dtype(parameter: tuple[str, nn.Parameter]) -> str:
    return str(parameter[1].dtype)


def _packed(parameters: Sequence[tuple[str, nn.Parameter]], own: dict[str, Tensor]) -> Tensor:
    exist = torch.tensor([float(name in own) for name, _ in parameters])
    like = parameters[0][1]
    gradients = [own.pop(name) if name in own else torch.zeros_like(p) for name, p in parameters]
    flat = [gradient.reshape(-1) for gradient in gradients]
    return torch.cat([*flat, exist.to(like.device, like.dtype)])
