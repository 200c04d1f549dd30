"""Optimizers from torch, and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from pipetrain.config import (
    AdafactorConfig,
    AdamConfig,
    LrRuleConfig,
    MuonConfig,
    NadamConfig,
    OptimizerConfig,
    RmspropConfig,
    RotatedAdamConfig,
    SgdConfig,
)
from pipetrain.training.optimizers import Composite, RotatedAdam


def build_optimizer(
    cfg: OptimizerConfig,
    parameters: Mapping[str, nn.Parameter],
    *,
    stage_of: Mapping[str, int | None] = MappingProxyType({}),
    outer: Collection[str] = (),
) -> torch.optim.Optimizer:
    """The optimizer of one rank.

    Whether a parameter is decayed depends on that parameter alone (matrices are, vectors are not), so the groups are
    the same for every partitioning. Adam, AdamW and SGD run fused: one pass over the memory of each parameter.

    Args:
        stage_of: by which parameters are grouped, by name, beside the decay; a group's is its "stage". Stages that
            update by themselves have learning rates of their own.
        outer: the parameters of the whole model's first and last layer, by name: embedding and output, which Muon
            leaves to AdamW.
    """
    trained = {name: p for name, p in parameters.items() if p.requires_grad}

    def groups(wanted: Callable[[str, nn.Parameter], bool] = lambda name, p: True) -> list[dict[str, Any]]:
        return [
            {
                "params": [
                    p
                    for name, p in trained.items()
                    if wanted(name, p) and is_matrix == (p.ndim >= 2) and stage_of.get(name) == stage
                ],
                "weight_decay": cfg.weight_decay if is_matrix else 0.0,
                "stage": stage,
            }
            for stage in dict.fromkeys([stage_of.get(name) for name in trained] or [None])
            for is_matrix in (True, False)
        ]

    def is_inner(name: str, p: nn.Parameter) -> bool:
        return p.ndim == 2 and name not in outer

    if isinstance(cfg, MuonConfig):
        return _muon(cfg, groups(is_inner), groups(lambda name, p: not is_inner(name, p)))
    # Parameters without memory are only counted.
    return _of_one_kind(cfg, groups(), fused=not any(p.is_meta for p in trained.values()))


Groups = list[dict[str, Any]]


def _muon(cfg: MuonConfig, inner: Groups, others: Groups) -> torch.optim.Optimizer:
    """Its step is scaled to the size of AdamW's, so that one learning rate is right for both."""
    muon = torch.optim.Muon(inner, lr=cfg.lr, momentum=cfg.momentum, nesterov=True, adjust_lr_fn="match_rms_adamw")
    return Composite([muon, torch.optim.AdamW(others, lr=cfg.lr, betas=_pair(cfg.betas), eps=cfg.eps)])


def _of_one_kind(cfg: OptimizerConfig, groups: Groups, *, fused: bool) -> torch.optim.Optimizer:
    if isinstance(cfg, RotatedAdamConfig):
        betas = _pair(cfg.betas)
        return RotatedAdam(groups, lr=cfg.lr, betas=betas, eps=cfg.eps, refresh=cfg.refresh, largest=cfg.largest)
    if isinstance(cfg, NadamConfig):
        betas, decay = _pair(cfg.betas), cfg.momentum_decay
        return torch.optim.NAdam(
            groups, lr=cfg.lr, betas=betas, eps=cfg.eps, momentum_decay=decay, decoupled_weight_decay=True
        )
    if isinstance(cfg, AdamConfig):
        kind = torch.optim.AdamW if cfg.name == "adamw" else torch.optim.Adam
        return kind(groups, lr=cfg.lr, betas=_pair(cfg.betas), eps=cfg.eps, fused=fused)
    if isinstance(cfg, SgdConfig):
        return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov, fused=fused)
    if isinstance(cfg, RmspropConfig):
        return torch.optim.RMSprop(groups, lr=cfg.lr, alpha=cfg.decay, eps=cfg.eps, momentum=cfg.momentum)
    assert isinstance(cfg, AdafactorConfig)
    return torch.optim.Adafactor(groups, lr=cfg.lr, beta2_decay=cfg.beta2_decay, d=cfg.clip_threshold)


def _pair(betas: list[float]) -> tuple[float, float]:
    return betas[0], betas[1]


def learning_rate(peak: float, rule: LrRuleConfig, step: int) -> float:
    """The learning rate of the update after mini-batch `step` (0, 1, ...).

    It never depends on how many steps the run has, so that a finished run can go on. inverse_sqrt: Vaswani et al. 2017,
    section 5.3, scaled to reach the peak at the end of the warm-up. exponential: the stairs of the TensorFlow code of
    Real et al. 2019 (model_builder.py), which counts them from the first step; here they begin behind the warm-up.
    """
    if step < rule.warmup_steps:
        return peak * (step + 1) / rule.warmup_steps
    if rule.name == "constant":
        return peak
    if rule.name == "inverse_sqrt":
        return peak * math.sqrt(max(rule.warmup_steps, 1) / (step + 1))
    if rule.name == "exponential":
        assert rule.decay_factor is not None
        assert rule.decay_every is not None
        stairs = (step - rule.warmup_steps) // rule.decay_every
        return peak * max(rule.decay_factor**stairs, rule.end_fraction)
    assert rule.decay_steps is not None
    progress = min(1.0, (step - rule.warmup_steps) / (rule.decay_steps - rule.warmup_steps))
    left = 1 - progress if rule.name == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak * (rule.end_fraction + (1 - rule.end_fraction) * left)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Makes the next update use this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], norm: float, limit: float | None) -> None:
    """Scales the gradients down if their global norm is above the limit; every rank takes the same factor."""
    if limit is None or norm <= limit:
        return
    factor = limit / (norm + 1e-6)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
