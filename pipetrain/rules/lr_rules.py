"""The rules about the learning rate's course: each rule needs its keys and refuses those of the others."""

from pipetrain.config import Config
from pipetrain.rules.words import plain

LR_RULES = ("constant", "linear", "cosine", "inverse_sqrt", "exponential")
_KEYS = {  # the keys besides warmup_steps -> the rules that they mean something to
    "decay_steps": ("cosine", "linear"),
    "end_fraction": ("cosine", "linear", "exponential"),
    "decay_factor": ("exponential",),
    "decay_every": ("exponential",),
}


def check_lr_rule(cfg: Config, problems: list[str]) -> None:
    """Adds a line for every rule that is broken."""
    rule = cfg.lr_rule
    if rule.name in ("linear", "cosine"):
        if rule.decay_steps is None:
            problems.append(
                f"lr_rule={rule.name} needs lr_rule.decay_steps, the step at which the decay ends"
                + (f"; try lr_rule.decay_steps={cfg.steps}" if cfg.steps else "")
            )
        elif rule.decay_steps <= rule.warmup_steps:
            problems.append(
                f"lr_rule.decay_steps={rule.decay_steps} must be greater than lr_rule.warmup_steps={rule.warmup_steps}"
            )
    if rule.name == "exponential":
        if rule.decay_factor is None or not 0 < rule.decay_factor <= 1:
            problems.append(
                f"lr_rule.decay_factor={plain(rule.decay_factor)} must be above 0 and at most 1 for "
                "lr_rule=exponential; 0.97 is the ImageNet recipe's"
            )
        if rule.decay_every is None or rule.decay_every < 1:
            problems.append(
                f"lr_rule.decay_every={plain(rule.decay_every)} must be at least 1 for lr_rule=exponential: the steps "
                "between two multiplications by lr_rule.decay_factor, such as those of two epochs"
            )
        if rule.end_fraction > 1:
            problems.append(
                f"lr_rule.end_fraction={rule.end_fraction} must be at most 1; 1e-4 is the ImageNet recipe's"
            )
    for key, rules in _KEYS.items():
        value = getattr(rule, key)
        if rule.name in LR_RULES and rule.name not in rules and (value is not None and value > 0):
            problems.append(
                f"lr_rule.{key}={value} means nothing to lr_rule={rule.name}; "
                f"use {' or '.join(f'lr_rule={name}' for name in rules)}, or leave it out"
            )
