"""BatchNorm on micro-batches: normalise with each one's own statistics, update the running ones once a mini-batch.

torch updates the running statistics at every call, so with M micro-batches it would move them M times a step, by
statistics of M small samples, and once more at every recompute. Here they move once, by the mean and the unbiased
variance of the whole mini-batch, made of those of the micro-batches (Huang et al. 2019, section 2: "during training,
the sufficient statistics ... are computed over each micro-batch ... track the moving average of the sufficient
statistics over the entire mini-batch"): its squares are those within the micro-batches and those between their means.
"""

from collections.abc import Callable
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
        self._parts: dict[int, list[tuple[int, Tensor, Tensor]]] = {}
        # In the place of hooks, which would double the time that a small one takes.
        earlier = getattr(module.forward, "__self__", None)
        self._modules_own: Callable[..., Any] = (
            earlier._modules_own if isinstance(earlier, MiniBatchStatistics) else module.forward
        )
        module.forward = self._forward  # type: ignore[method-assign]

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

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        module, buffers = self._module, self._module._buffers
        mean, variance = buffers.get("running_mean"), buffers.get("running_var")
        if mean is None or variance is None or not module.training:
            return self._modules_own(*args, **kwargs)
        counter, momentum = buffers["num_batches_tracked"], module.momentum
        # New ones each time: the graph of this call keeps them.
        its_mean = buffers["running_mean"] = torch.zeros_like(mean)
        its_variance = buffers["running_var"] = torch.zeros_like(variance)
        buffers["num_batches_tracked"], module.__dict__["momentum"] = None, 1.0
        try:
            output = self._modules_own(*args, **kwargs)
        finally:
            buffers["running_mean"], buffers["running_var"] = mean, variance
            buffers["num_batches_tracked"], module.__dict__["momentum"] = counter, momentum
        if self.microbatch is not None:
            x = args[0] if args else kwargs["input"]
            self._parts.setdefault(self.microbatch, []).append((x.numel() // x.shape[1], its_mean, its_variance))
        return output


def _merged(parts: list[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of samples given by (count, mean, unbiased variance), in float64."""
    counts, means, variances = zip(*parts, strict=True)
    total, mean, variance = sum(counts), torch.stack(means).double(), torch.stack(variances).double()
    count = torch.tensor(counts, dtype=torch.float64, device=mean.device).unsqueeze(1)
    merged = (count * mean).sum(0) / total
    squares = ((count - 1) * variance + count * (mean - merged).square()).sum(0)
    return merged, squares / (total - 1)
