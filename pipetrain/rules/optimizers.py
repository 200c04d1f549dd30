"""The rules about each optimizer's settings."""

from pipetrain.config import (
    AdafactorConfig,
    AdamConfig,
    MuonConfig,
    NadamConfig,
    OptimizerConfig,
    RmspropConfig,
    RotatedAdamConfig,
    SgdConfig,
)


def check_optimizer(optimizer: OptimizerConfig, problems: list[str]) -> None:
    if isinstance(optimizer, AdamConfig):
        betas = optimizer.betas
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            shown = ",".join(map(str, betas))
            problems.append(f"optimizer.betas=[{shown}] must be two numbers from 0 to below 1; try [0.9,0.999]")
        if not optimizer.eps >= 0:
            problems.append(f"optimizer.eps={optimizer.eps} must be at least 0")
    if isinstance(optimizer, MuonConfig) and not 0 <= optimizer.momentum < 1:
        problems.append(f"optimizer.momentum={optimizer.momentum} must be at least 0 and below 1; 0.95 is common")
    if isinstance(optimizer, NadamConfig) and not optimizer.momentum_decay >= 0:
        problems.append(f"optimizer.momentum_decay={optimizer.momentum_decay} must be at least 0; 4e-3 is common")
    if isinstance(optimizer, RotatedAdamConfig):
        for key in ("refresh", "largest"):
            if getattr(optimizer, key) < 1:
                problems.append(f"optimizer.{key}={getattr(optimizer, key)} must be at least 1")
    if isinstance(optimizer, SgdConfig):
        if not optimizer.momentum >= 0:
            problems.append(f"optimizer.momentum={optimizer.momentum} must be at least 0")
        if optimizer.nesterov and optimizer.momentum == 0:
            problems.append("optimizer.nesterov=true needs momentum; try optimizer.momentum=0.9")
    if isinstance(optimizer, AdafactorConfig):
        if not optimizer.clip_threshold >= 1:
            problems.append(f"optimizer.clip_threshold={optimizer.clip_threshold} must be at least 1")
        if not optimizer.beta2_decay <= 0:
            problems.append(f"optimizer.beta2_decay={optimizer.beta2_decay} must be 0 or less; -0.8 is common")
    if isinstance(optimizer, RmspropConfig):
        for key in ("decay", "momentum"):
            if not 0 <= getattr(optimizer, key) < 1:
                problems.append(
                    f"optimizer.{key}={getattr(optimizer, key)} must be at least 0 and below 1; 0.9 is common"
                )
        # Without it a gradient of zero would be divided by zero.
        if not 0 < optimizer.eps < float("inf"):
            problems.append(f"optimizer.eps={optimizer.eps} must be greater than 0 and finite; 0.1 is the paper's")
