"""What can be done about gradients that come late: each corrector changes the learning rate or what an update does.

Their tensors live in the optimizer's own state of each parameter, so checkpoints have them. All of them leave a
gradient that is not late alone. (The other answers are optimizers: `optimizer=nadam`, `muon` and `rotated_adam`.)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from pipetrain.config import StaleConfig

Late = Mapping[nn.Parameter, int]  # of parameters with a gradient: how many updates late it is


class Corrector:
    """One that does nothing."""

    def learning_rate(self, lr: float, late: int, step: int) -> float:
        """The learning rate of gradients so many updates late, after mini-batch `step`."""
        return lr

    @contextmanager
    def update(self, optimizer: torch.optim.Optimizer, late: Late) -> Iterator[None]:
        """Around a step of the optimizer."""
        yield


class ErrorFeedback(Corrector):
    """w <- w - lr (u_t + c (u_t - u_(t-1))), where u_t is the optimizer's own update, without the learning rate.

    The update before was made with a gradient one step too old; what it lacked is only known now, u_t - u_(t-1), and is
    added c times. Source: after arXiv 2606.30634, whose exact formula we have not seen; c = 1 is the one for a delay of
    one. Where gradients are later a larger c is better (docs/convergence.md): momentum m lags too, and c = m / (1 - m)
    would take all of that lag out of m_t.
    """

    def __init__(self, strength: float) -> None:
        """
        Args:
            strength: c.
        """
        self._strength = strength

    @contextmanager
    def update(self, optimizer: torch.optim.Optimizer, late: Late) -> Iterator[None]:
        lr = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        before = {parameter: parameter.detach().clone() for parameter, number in late.items() if number}
        yield
        with torch.no_grad():
            for parameter, old in before.items():
                if lr[parameter] == 0:
                    continue
                now = (old - parameter) / lr[parameter]
                state = optimizer.state[parameter]
                if "last_update" in state:
                    parameter.sub_(now - state["last_update"], alpha=lr[parameter] * self._strength)
                state["last_update"] = now


class SpikeCompensation(Corrector):
    """SGD with momentum m, D updates late: w <- w - lr (a v + b g), a = m^D, b = (1 - m^D) / (1 - m).

    A gradient makes at once the steps that it would have made in the D updates it is late.
    Source: Kosson et al. 2020, arXiv 2003.11666 (SC_D).
    """

    @contextmanager
    def update(self, optimizer: torch.optim.Optimizer, late: Late) -> Iterator[None]:
        kept: list[tuple[nn.Parameter, torch.Tensor, float, float, int]] = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if late.get(parameter, 0) and parameter.grad is not None:
                    gradient = parameter.grad + group["weight_decay"] * parameter.detach()
                    kept.append((parameter, gradient, group["lr"], group["momentum"], late[parameter]))
        yield
        with torch.no_grad():
            for parameter, gradient, lr, momentum, number in kept:
                a, b = momentum**number, (1 - momentum**number) / (1 - momentum)
                parameter.sub_((a - 1) * optimizer.state[parameter]["momentum_buffer"] + b * gradient, alpha=lr)


class Pipemare(Corrector):
    """A learning rate of lr / D^(1 - min(t / T, 1)) for D updates late, D at least 1, after t steps.

    Source: Yang et al. 2021 (PipeMare), T1; as in AsyncPP's adjust_learning_rate.
    """

    def __init__(self, anneal_steps: int) -> None:
        """
        Args:
            anneal_steps: T, after which all stages have the same learning rate.
        """
        self._anneal_steps = anneal_steps

    def learning_rate(self, lr: float, late: int, step: int) -> float:
        return float(lr / max(1, late) ** (1 - min(step / self._anneal_steps, 1)))


class Correctors(Corrector):
    """Several, one within the other."""

    def __init__(self, correctors: Sequence[Corrector]) -> None:
        self._correctors = correctors

    def learning_rate(self, lr: float, late: int, step: int) -> float:
        for corrector in self._correctors:
            lr = corrector.learning_rate(lr, late, step)
        return lr

    @contextmanager
    def update(self, optimizer: torch.optim.Optimizer, late: Late) -> Iterator[None]:
        with ExitStack() as stack:
            for corrector in self._correctors:
                stack.enter_context(corrector.update(optimizer, late))
            yield


def build_correctors(cfg: StaleConfig) -> Corrector:
    """Those that the settings name, in their order."""
    makers: dict[str, Callable[[], Corrector]] = {
        "error_feedback": lambda: ErrorFeedback(cfg.feedback),
        "spike_compensation": SpikeCompensation,
        "pipemare": lambda: Pipemare(cfg.anneal_steps),
    }
    return Correctors([makers[name]() for name in cfg.correctors])
