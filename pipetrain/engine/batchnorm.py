"""BatchNorm on micro-batches: normalise with each one's own statistics, update the running ones once a mini-batch.

torch updates the running statistics at every call, so with M micro-batches it would move them M times a step, by
statistics of M small samples, and once more at every recompute. Here they move once, by the mean and the unbiased
variance of the whole mini-batch, made of those of the micro-batches (Huang et al. 2019, section 2: "during training,
the sufficient statistics ... are computed over each micro-batch ... track the moving average of the sufficient
statistics over the entire mini-batch"): its squares are those within the micro-batches and those between their means.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipetrain.engine.replicas import gather_rows
from pipetrain.engine.transport import Replicas
from pipetrain.errors import ConfigError

Part = tuple[int, Tensor, Tensor]  # of one call: numbers in a channel, their mean and their unbiased variance


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
        self._parts: dict[int, list[Part]] = {}
        # In the place of hooks, which would double the time that a small one takes.
        earlier = getattr(module.forward, "__self__", None)
        self._modules_own: Callable[..., Any] = (
            earlier._modules_own if isinstance(earlier, MiniBatchStatistics) else module.forward
        )
        module.forward = self._forward  # type: ignore[method-assign]

    def forget(self) -> None:
        """Starts a new mini-batch."""
        self._parts.clear()

    def take_parts(self) -> list[Part]:
        """Those of all micro-batches, in their order; none are left."""
        parts = [part for microbatch in sorted(self._parts) for part in self._parts[microbatch]]
        self._parts.clear()
        return parts

    @property
    def num_features(self) -> int:
        return self._module.num_features

    def add_parts(self, rows: Tensor) -> None:
        """Takes parts from elsewhere, behind those that are there: [parts, numbers + mean + variance]."""
        if self._module.running_mean is None:
            return
        here = rows.to(self._module.running_mean.device)
        self._parts.setdefault(0, []).extend(
            (int(row[0]), row[1 : 1 + self.num_features], row[1 + self.num_features :]) for row in here
        )

    @torch.no_grad()
    def update(self) -> None:
        """Moves the running statistics by those of the mini-batch.

        torch's rule: running = (1 - momentum) * running + momentum * new, and a cumulative mean for momentum None.
        """
        parts = self.take_parts()
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


@torch.no_grad()
def exchange(statistics: Sequence[MiniBatchStatistics], replicas: Replicas) -> None:
    """Gives every replica the parts of all of them, in the order of the micro-batches.

    Args:
        statistics: of the same modules in all of them.
    """
    own = [each.take_parts() for each in statistics]
    widths = torch.tensor([1 + 2 * each.num_features for each in statistics])
    numbers = replicas.gather(torch.tensor([len(parts) for parts in own]))
    rows = [
        torch.cat([mean.new_tensor([n], dtype=torch.float64), mean.double(), variance.double()])
        for parts in own
        for n, mean, variance in parts
    ]
    vector = torch.cat(rows).cpu() if rows else torch.zeros(0, dtype=torch.float64)
    for number, gathered in zip(numbers, gather_rows(vector, replicas), strict=True):
        pieces = gathered.split((number * widths).tolist())
        for each, piece, width in zip(statistics, pieces, widths.tolist(), strict=True):
            each.add_parts(piece.reshape(-1, width))


def _merged(parts: list[Part]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of samples given by (count, mean, unbiased variance), in float64."""
    counts, means, variances = zip(*parts, strict=True)
    total, mean, variance = sum(counts), torch.stack(means).double(), torch.stack(variances).double()
    count = torch.tensor(counts, dtype=torch.float64, device=mean.device).unsqueeze(1)
    merged = (count * mean).sum(0) / total
    squares = ((count - 1) * variance + count * (mean - merged).square()).sum(0)
    return merged, squares / (total - 1)
