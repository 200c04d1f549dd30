"""Every rule about settings, in one place; all of them are checked before a worker starts.

`check` collects everything that is wrong with the settings by themselves. `check_model`, `check_recomputed_layers` and
`check_resume` add the rules that need a fact found later: the layers of the model, the settings of the run to go on
with. No torch here.
"""

import dataclasses
import json
import re
from typing import Any

from pipetrain.config import (
    AUTO,
    PLANNED,
    AmoebaNetConfig,
    Config,
    ImagesConfig,
    SyntheticConfig,
    TextConfig,
    TransformerConfig,
    from_json,
)
from pipetrain.derived import is_number
from pipetrain.errors import ConfigError
from pipetrain.rules.data import check_images, check_synthetic, check_text, check_translation
from pipetrain.rules.inference import OF_A_RUN, check_inference
from pipetrain.rules.lr_rules import LR_RULES, check_lr_rule
from pipetrain.rules.models import INIT_SCALES, check_amoebanet, check_anything, check_seq2seq, check_transformer
from pipetrain.rules.optimizers import check_optimizer
from pipetrain.rules.pipeline import check_model, check_pipeline, check_recomputed_layers
from pipetrain.rules.plan import check_plan
from pipetrain.rules.words import plain, shown
from pipetrain.suggest import one_of

ACTIONS = ("train", "plan", "check", *OF_A_RUN)
PRECISIONS = ("fp32", "bf16", "fp64")
MESSAGES = ("exact", "bf16")
LOGIT_CLIP_KINDS = ("hard", "soft")
POSITIONS = ("learned", "sinusoidal")
READING_ORDERS = ("shuffled", "contiguous")
GENOTYPES = ("D", "B")
STEMS = ("imagenet", "small")
_FIXED = ("model", "data", "batch_size", "seed", "logit_clip", "logit_clip_kind", "optimizer.name")  # in a resumed run
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


def check(cfg: Config, num_gpus: int, world_size: int | None = None) -> None:
    """Checks all rules that need nothing but the settings and the number of GPUs of this machine.

    Args:
        world_size: ranks of the torchrun job that this process belongs to, which then decides the number of devices.

    Raises:
        ConfigError: with one line for each rule that is broken.
    """
    problems: list[str] = []
    _check_ranges(cfg, problems)
    _check_choices(cfg, problems)
    check_pipeline(cfg, num_gpus, world_size, problems)
    of_data = (check_text, check_synthetic, check_images, check_translation)
    for check_part in (*of_data, check_transformer, check_seq2seq, check_anything, check_amoebanet):
        check_part(cfg, problems)
    check_plan(cfg, problems)
    check_inference(cfg, problems)
    check_optimizer(cfg.optimizer, problems)
    check_lr_rule(cfg, problems)
    if cfg.steps is not None and cfg.epochs is not None:
        problems.append(
            f"steps={cfg.steps} and epochs={cfg.epochs} are both set: type steps=null epochs={cfg.epochs}, "
            f"or epochs=null steps={cfg.steps}"
        )
    elif cfg.steps is None and cfg.epochs is None:
        problems.append("steps=null and epochs=null leave open how long to train; type steps=300 or epochs=1")
    if cfg.ema is not None and not 0 < cfg.ema < 1:
        problems.append(f"ema={cfg.ema} must be above 0 and below 1; 0.9999 is common, null is off")
    if not _NAME.fullmatch(cfg.name):
        problems.append(
            f"name={cfg.name} must be a plain folder name of letters, digits, '.', '-' and '_', such as name=first"
        )
    if isinstance(cfg.data, TextConfig) and cfg.data.path == "":
        problems.append("data.path= is empty: give a file or folder, or data.path=null for Python's own manual")
    if cfg.action == "check" and cfg.resume is not None:
        problems.append("action=check runs the first steps of the settings: leave resume out")
    if cfg.action == "check" and cfg.messages != "exact":
        problems.append(
            f"action=check compares cuts, which differ with messages={cfg.messages}: leave it out, or messages=exact"
        )
    if cfg.action == "check" and cfg.init_from is not None:
        problems.append("action=check compares with plain PyTorch from the seed on: leave init_from out")
    if problems:
        raise ConfigError("\n".join(problems))


def _check_ranges(cfg: Config, problems: list[str]) -> None:
    at_least: list[tuple[str, float | None, float]] = [
        ("batch_size", cfg.batch_size, 1),
        ("steps", cfg.steps, 1),
        ("epochs", cfg.epochs, 1),
        ("log_every", cfg.log_every, 1),
        ("trace_every", cfg.trace_every, 0),
        ("eval.every", cfg.eval.every, 0),
        ("eval.batches", cfg.eval.batches, 1),
        ("checkpoint.every", cfg.checkpoint.every, 0),
        ("checkpoint.keep", cfg.checkpoint.keep, 1),
        ("check.steps", cfg.check.steps, 2),
        ("plan.timeout_s", cfg.plan.timeout_s, 1),
        ("seed", cfg.seed, 0),
        ("optimizer.weight_decay", cfg.optimizer.weight_decay, 0),
        ("lr_rule.warmup_steps", cfg.lr_rule.warmup_steps, 0),
        ("lr_rule.end_fraction", cfg.lr_rule.end_fraction, 0),
    ]
    if isinstance(cfg.data, SyntheticConfig):
        at_least += [("data.classes", cfg.data.classes, 1), ("data.samples", cfg.data.samples, 1)]
        at_least += [(f"data.shape[{i}]", size, 1) for i, size in enumerate(cfg.data.shape)]
    if isinstance(cfg.data, TextConfig):
        at_least += [("data.seq_len", cfg.data.seq_len, 1), ("data.vocab_size", cfg.data.vocab_size, 1)]
    if isinstance(cfg.data, ImagesConfig):
        at_least += [("data.size", cfg.data.size, 1), ("data.workers", cfg.data.workers, 0)]
    numbers: list[tuple[str, Any, tuple[str | None, ...]]] = [
        ("micro_batches", cfg.micro_batches, (None, AUTO)),
        ("partitions", cfg.partitions, (None, AUTO)),
        ("data_parallel", cfg.data_parallel, (AUTO,)),
        ("threads", cfg.threads, (AUTO,)),
    ]
    for key, value, others in numbers:
        if is_number(value):
            at_least.append((key, value, 1))
        elif value not in others:
            words = " or ".join(plain(other) for other in others)
            problems.append(f"{key}={shown(value)} must be a whole number or {words}; try {key}=4")
    for key, value, least in at_least:
        if value is not None and not value >= least:
            problems.append(f"{key}={value} must be at least {least:g}")
    positive = [
        ("plan.memory_gib", cfg.plan.memory_gib, "use null for what the devices have"),
        ("logit_clip", cfg.logit_clip, "use null to switch it off"),
        ("grad_clip", cfg.grad_clip, "use null to switch it off"),
        ("optimizer.lr", cfg.optimizer.lr, "1e-3 is a common value"),
    ]
    for key, amount, remedy in positive:
        if amount is not None and not 0 < amount < float("inf"):
            problems.append(f"{key}={amount} must be greater than 0 and finite; {remedy}")


def _check_choices(cfg: Config, problems: list[str]) -> None:
    choices: list[tuple[str, str, tuple[str, ...]]] = [
        ("action", cfg.action, ACTIONS),
        ("precision", cfg.precision, PRECISIONS),
        ("messages", cfg.messages, MESSAGES),
        ("logit_clip_kind", cfg.logit_clip_kind, LOGIT_CLIP_KINDS),
        ("lr_rule.name", cfg.lr_rule.name, LR_RULES),
    ]
    if isinstance(cfg.model, TransformerConfig):
        choices += [
            ("model.positions", cfg.model.positions, POSITIONS),
            ("model.init_scale", cfg.model.init_scale, INIT_SCALES),
        ]
    if isinstance(cfg.model, AmoebaNetConfig):
        choices += [("model.genotype", cfg.model.genotype, GENOTYPES), ("model.stem", cfg.model.stem, STEMS)]
    if isinstance(cfg.data, TextConfig):
        choices.append(("data.order", cfg.data.order, READING_ORDERS))
    for key, value, allowed in choices:
        if value not in allowed:
            problems.append(f"{key}={value}: no such choice. {one_of(value, allowed)}")


def check_resume(cfg: Config, saved: dict[str, Any]) -> None:
    """Checks that a resumed run is still the run it was: its model, data, batch size, seed and kind of optimizer.

    Args:
        saved: the settings in the checkpoint.

    Raises:
        ConfigError: with every such setting that differs.
    """
    problems = [
        f"{key}={plain(new)}, but the run to resume has {key}={plain(old)}: leave {key} out, or start a new run"
        for key, old, new in changes(cfg, saved)
        if key.split(".")[0] in _FIXED or key in _FIXED
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def changes(cfg: Config, saved: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The settings that differ from saved ones, as (key, saved, now).

    Neither where the data lie nor what is left to the planner counts.
    """

    # What an older version did not know has its default.
    saved = dataclasses.asdict(from_json(json.dumps(saved)))

    def flat(settings: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in settings.items():
            out |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        return out

    before, now = flat(saved), flat(dataclasses.asdict(cfg))
    ignored = {"data.path", "data.cache_dir", "data.workers", "resume", "name", "action", "check.steps"}
    ignored |= {key for key in now if key.startswith(("generate.", "evaluate.", "input", "weights"))}
    keys = [key for key in {**before, **now} if key not in ignored]
    keys = [key for key in keys if before.get(key) != now.get(key) and not (key in PLANNED and now[key] == AUTO)]
    return [(key, before.get(key), now.get(key)) for key in keys]


__all__ = ["changes", "check", "check_model", "check_recomputed_layers", "check_resume"]
