"""Two optimizers that torch does not have: one that rotates Adam, and one that is made of two."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class RotatedAdam(torch.optim.Optimizer):
    """AdamW in a slowly refreshed eigenbasis of the gradients' second moments.

    For a matrix W with gradient G:

        M <- b1 M + (1 - b1) G,   L <- b2 L + (1 - b2) G G^T,   R <- b2 R + (1 - b2) G^T G
        at the first update and every `refresh`:  U <- QR(L U),   V <- QR(R V)       (one power iteration each)
        G' = U^T G V,   M' = U^T M V,   S <- b2 S + (1 - b2) G'^2
        W <- W - lr U (M'^ / (sqrt(S^) + eps)) V^T                       (^: Adam's bias correction)

    U and V start as the identity. A side longer than `largest` is not rotated, and what is no matrix gets AdamW; with
    no rotation at all it is AdamW. Source: basis rotation, arXiv 2602.03515 (S = 2nd, bilateral), which is SOAP (arXiv
    2409.11321); the former find it the best answer to stale gradients.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        refresh: int = 10,
        largest: int = 1024,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._betas, self._eps, self._refresh, self._largest = betas, eps, refresh, largest

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"], group["weight_decay"])

    def _update(self, weight: Tensor, gradient: Tensor, lr: float, decay: float) -> None:
        state, (beta1, beta2) = self.state[weight], self._betas
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
            for name, side, _ in self._sides(gradient):
                state[f"second_{name}"] = torch.zeros_like(side)
                state[f"basis_{name}"] = torch.eye(len(side), dtype=side.dtype, device=side.device)
        state["step"] += 1
        number = int(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        sides = self._sides(gradient)
        for name, side, _ in sides:
            state[f"second_{name}"].lerp_(side, 1 - beta2)
            if number == 1 or number % self._refresh == 0:
                state[f"basis_{name}"] = torch.linalg.qr(state[f"second_{name}"] @ state[f"basis_{name}"]).Q
        rotated, momentum = gradient, state["exp_avg"]
        for name, _, is_left in sides:
            rotated, momentum = (_turned(x, state[f"basis_{name}"], is_left) for x in (rotated, momentum))
        state["exp_avg_sq"].mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
        scale = (state["exp_avg_sq"] / (1 - beta2**number)).sqrt_().add_(self._eps)
        change = momentum / (1 - beta1**number) / scale
        for name, _, is_left in sides:
            change = _turned(change, state[f"basis_{name}"].mT, is_left)
        weight.mul_(1 - lr * decay).sub_(change, alpha=lr)

    def _sides(self, gradient: Tensor) -> list[tuple[str, Tensor, bool]]:
        """Name and second moment of each side that is to be rotated, and whether it is that of the rows."""
        if gradient.ndim != 2:
            return []
        sides = [("left", gradient @ gradient.mT, True)] if gradient.shape[0] <= self._largest else []
        return sides + ([("right", gradient.mT @ gradient, False)] if gradient.shape[1] <= self._largest else [])


def _turned(x: Tensor, basis: Tensor, is_left: bool) -> Tensor:
    return basis.mT @ x if is_left else x @ basis


class Composite(torch.optim.Optimizer):
    """Several optimizers, each for some of the parameters, that look like one."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        groups = [group for part in parts for group in part.param_groups]
        super().__init__([{"params": group["params"]} for group in groups], {})
        self._parts = parts
        self.param_groups = groups
        self._share()

    def _share(self) -> None:
        """Groups and states are the same objects in the whole and in its parts."""
        start = 0
        for part in self._parts:
            number = len(part.param_groups)
            part.param_groups = self.param_groups[start : start + number]
            part.state = self.state
            start += number

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See torch."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Of all parts."""
        for part in self._parts:
            part.step()
