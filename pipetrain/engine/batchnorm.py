"""BatchNorm on micro-batches: normalise with each one's own statistics, update the running ones once a mini-batch.

torch updates the running statistics at every call, so with M micro-batches it would move them M times a step, by
statistics of M small samples, and once more at every recompute. Here they move once, by the mean and the unbiased
variance of the whole mini-batch, merged from those of the micro-batches in their order (Huang et al. 2019, section 2:
"during training, the sufficient statistics ... are computed over each micro-batch ... track the moving average of the
sufficient statistics over the entire mini-batch"; merging by Chan, Golub and LeVeque 1979).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipetrain.errors import ConfigError


class MiniBatchStatistics:
    """Watches one BatchNorm module.

    While it runs, it has running statistics of zero and a momentum of one: so torch itself leaves in them the mean and
    the unbiased variance of the micro-batch, exactly and at no cost.

    Attributes:
        microbatch: the one whose statistics count; None where none do, as in a recompute.
    """

    def __init__(self, name: str, module: _BatchNorm) -> None:
        """
        Raises:
            ConfigError: for SyncBatchNorm, which would have to wait for micro-batches that are still to come.
        """
        if isinstance(module, nn.SyncBatchNorm):
            raise ConfigError(
                f"layer {name} is a SyncBatchNorm, which needs all micro-batches at once; use BatchNorm: its running "
                "statistics are those of the whole mini-batch here"
            )
        self.microbatch: int | None = None
        self._module = module
        self._kept: tuple[Any, ...] = ()
        self._parts: dict[int, list[tuple[int, Tensor, Tensor]]] = {}
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after, with_kwargs=True, always_call=True)

    def forget(self) -> None:
        """Starts a new mini-batch."""
        self._parts.clear()

    @torch.no_grad()
    def update(self) -> None:
        """Moves the running statistics by those of the mini-batch.

        torch's rule: running = (1 - momentum) * running + momentum * new, and a cumulative mean for momentum None.
        """
        parts = [part for microbatch in sorted(self._parts) for part in self._parts[microbatch]]
        self._parts.clear()
        module = self._module
        if not parts or module.running_mean is None or module.running_var is None:
            return
        assert module.num_batches_tracked is not None
        module.num_batches_tracked += 1
        mean, variance = _merged(parts)
        momentum = 1 / int(module.num_batches_tracked) if module.momentum is None else module.momentum
        for running, new in ((module.running_mean, mean), (module.running_var, variance)):
            running.copy_(running * (1 - momentum) + momentum * new.to(running.dtype))

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not module.training or module._buffers.get("running_mean") is None:
            return
        self._kept = (*(module._buffers[name] for name in _BUFFERS), module.momentum)
        mean, variance, _, _ = self._kept
        # New ones each time: the graph of this call keeps them.
        module._buffers.update(zip(_BUFFERS, (torch.zeros_like(mean), torch.zeros_like(variance), None), strict=True))
        module.momentum = 1.0  # type: ignore[assignment]

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        if not self._kept:
            return
        mean, variance = module._buffers["running_mean"], module._buffers["running_var"]
        *buffers, momentum = self._kept
        module._buffers.update(zip(_BUFFERS, buffers, strict=True))
        module.momentum = momentum
        self._kept = ()
        if self.microbatch is not None and mean is not None and variance is not None and output is not None:
            x = args[0] if args else kwargs["input"]
            count = x.numel() // x.shape[1]
            self._parts.setdefault(self.microbatch, []).append((count, mean, variance))


_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def _merged(parts: list[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of samples given by (count, mean, unbiased variance), in float64."""
    count, mean, variance = parts[0]
    mean, squares = mean.double(), variance.double() * (count - 1)
    for more, other, variance in parts[1:]:
        delta = other.double() - mean
        mean = mean + delta * (more / (count + more))
        squares = squares + variance.double() * (more - 1) + delta.square() * (count * more / (count + more))
        count += more
    return mean, squares / (count - 1)
