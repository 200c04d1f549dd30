"""Every rule about settings, in one place; all of them are checked before a worker starts.

`check` collects everything that is wrong with the settings by themselves. `check_model` and `check_resume` add the
rules that need a fact found later: the layers of the model, the settings of the run to go on with. No torch here.
"""

import dataclasses
import re
from typing import Any

from pipetrain.config import (
    AdafactorConfig,
    AdamConfig,
    AmoebaNetConfig,
    AnythingConfig,
    Config,
    OptimizerConfig,
    SgdConfig,
    SyntheticConfig,
    TextConfig,
    TransformerConfig,
    num_microbatches,
)
from pipetrain.devices import parse_devices
from pipetrain.errors import ConfigError
from pipetrain.schedule import SCHEDULES
from pipetrain.suggest import one_of

RECOMPUTE = ("always", "never")
ACTIONS = ("train", "check")
PRECISIONS = ("fp32", "bf16", "fp64")
LOGIT_CLIP_KINDS = ("hard", "soft")
INIT_SCALES = ("none", "inverse_depth", "inverse_sqrt_depth")
POSITIONS = ("learned", "sinusoidal")
READING_ORDERS = ("shuffled", "contiguous")
GENOTYPES = ("D", "B")
STEMS = ("imagenet", "small")
_FIXED = ("model", "data", "batch_size", "seed", "logit_clip", "logit_clip_kind", "optimizer.name")  # in a resumed run
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
LR_RULES = ("constant", "linear", "cosine", "inverse_sqrt")


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
    _check_pipeline(cfg, num_gpus, world_size, problems)
    _check_model_shape(cfg, problems)
    _check_anything(cfg, problems)
    _check_amoebanet(cfg, problems)
    _check_optimizer(cfg.optimizer, problems)
    if cfg.steps is not None and cfg.epochs is not None:
        problems.append(
            f"steps={cfg.steps} and epochs={cfg.epochs} are both set: type steps=null epochs={cfg.epochs}, "
            f"or epochs=null steps={cfg.steps}"
        )
    elif cfg.steps is None and cfg.epochs is None:
        problems.append("steps=null and epochs=null leave open how long to train; type steps=300 or epochs=1")
    if not _NAME.fullmatch(cfg.name):
        problems.append(
            f"name={cfg.name} must be a plain folder name of letters, digits, '.', '-' and '_', such as name=first"
        )
    if isinstance(cfg.data, TextConfig) and cfg.data.path == "":
        problems.append("data.path= is empty: give a file or folder, or data.path=null for Python's own manual")
    if cfg.action == "check" and cfg.resume is not None:
        problems.append("action=check runs the first steps of the settings: leave resume out")
    if problems:
        raise ConfigError("\n".join(problems))


def _check_ranges(cfg: Config, problems: list[str]) -> None:
    at_least: list[tuple[str, float | None, float]] = [
        ("batch_size", cfg.batch_size, 1),
        ("micro_batches", cfg.micro_batches, 1),
        ("steps", cfg.steps, 1),
        ("epochs", cfg.epochs, 1),
        ("partitions", cfg.partitions, 1),
        ("log_every", cfg.log_every, 1),
        ("eval.every", cfg.eval.every, 0),
        ("eval.batches", cfg.eval.batches, 1),
        ("checkpoint.every", cfg.checkpoint.every, 0),
        ("checkpoint.keep", cfg.checkpoint.keep, 1),
        ("check.steps", cfg.check.steps, 2),
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
    if cfg.threads != "auto":
        if isinstance(cfg.threads, bool) or not isinstance(cfg.threads, int):
            problems.append(f"threads={cfg.threads} must be a whole number or auto; try threads=1")
        else:
            at_least.append(("threads", cfg.threads, 1))
    for key, value, least in at_least:
        if value is not None and not value >= least:
            problems.append(f"{key}={value} must be at least {least:g}")
    positive = [
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
        ("schedule", cfg.schedule, tuple(SCHEDULES)),
        ("recompute", cfg.recompute, RECOMPUTE),
        ("precision", cfg.precision, PRECISIONS),
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
    if cfg.lr_rule.name in ("linear", "cosine"):
        if cfg.lr_rule.decay_steps is None:
            problems.append(
                f"lr_rule={cfg.lr_rule.name} needs lr_rule.decay_steps, the step at which the decay ends"
                + (f"; try lr_rule.decay_steps={cfg.steps}" if cfg.steps else "")
            )
        elif cfg.lr_rule.decay_steps <= cfg.lr_rule.warmup_steps:
            problems.append(
                f"lr_rule.decay_steps={cfg.lr_rule.decay_steps} must be greater than "
                f"lr_rule.warmup_steps={cfg.lr_rule.warmup_steps}"
            )
    elif cfg.lr_rule.decay_steps is not None:
        problems.append(
            f"lr_rule.decay_steps={cfg.lr_rule.decay_steps} means nothing to lr_rule={cfg.lr_rule.name}; "
            "use lr_rule=cosine or lr_rule=linear, or leave it out"
        )


def _check_pipeline(cfg: Config, num_gpus: int, world_size: int | None, problems: list[str]) -> None:
    try:
        devices = parse_devices(cfg.devices, num_gpus, cfg.partitions) if world_size is None else ("any",) * world_size
    except ConfigError as error:
        problems.append(str(error))
    else:
        if world_size is not None and cfg.devices not in ("auto", "cpu"):
            problems.append(
                f"devices={cfg.devices}, but torchrun started {world_size} processes and chooses the devices; "
                "leave devices out, or use devices=auto where a file sets it"
            )
        if cfg.partitions is not None and cfg.partitions != len(devices):
            problems.append(
                f"partitions={cfg.partitions}, but devices={cfg.devices} gives {len(devices)} devices and "
                f"schedule={cfg.schedule} runs one stage on each; use devices={cfg.partitions} or leave partitions out"
            )
        elif isinstance(cfg.balance, list) and cfg.balance and len(cfg.balance) != len(devices):
            problems.append(
                f"balance={_show(cfg.balance)} names {len(cfg.balance)} stages, but there are {len(devices)} devices; "
                f"use devices={len(cfg.balance)}, or a list of {len(devices)}, or balance=even"
            )
    if isinstance(cfg.balance, list):
        bad = [n for n in cfg.balance if isinstance(n, bool) or not isinstance(n, int) or n < 1]
        if bad or not cfg.balance:
            problems.append(
                f"balance={_show(cfg.balance)} must be a list of whole numbers, each at least 1: "
                "every stage needs a layer"
            )
    elif cfg.balance != "even":
        problems.append(f"balance={cfg.balance} must be even or a list of layers per stage, such as balance=[2,3,3]")
    if cfg.micro_batches is not None and cfg.micro_batches > cfg.batch_size >= 1:
        problems.append(
            f"micro_batches={cfg.micro_batches} is more than batch_size={cfg.batch_size}: a micro-batch needs at least "
            f"one sample; use micro_batches={cfg.batch_size} or a larger batch_size"
        )


def _check_model_shape(cfg: Config, problems: list[str]) -> None:
    if isinstance(cfg.model, TransformerConfig):
        model = cfg.model
        for key in ("layers", "d_model", "d_ff", "heads"):
            if getattr(model, key) < 1:
                problems.append(f"model.{key}={getattr(model, key)} must be at least 1")
        if not 0 <= model.dropout < 1:
            problems.append(f"model.dropout={model.dropout} must be at least 0 and below 1")
        if model.heads >= 1 and model.d_model % model.heads:
            divisors = [h for h in range(1, model.d_model + 1) if model.d_model % h == 0]
            nearest = min(divisors, key=lambda h: abs(h - model.heads))
            problems.append(
                f"model.heads={model.heads} does not divide model.d_model={model.d_model}; try model.heads={nearest}"
            )
        if model.positions == "sinusoidal" and model.d_model % 2:
            problems.append(f"model.positions=sinusoidal needs an even model.d_model (got {model.d_model})")
    if isinstance(cfg.data, TextConfig):
        data = cfg.data
        fractions = (data.valid_fraction, data.test_fraction)
        if min(fractions) < 0 or sum(fractions) >= 1:
            problems.append(
                f"data.valid_fraction={fractions[0]} and data.test_fraction={fractions[1]} must be at least 0 "
                "and leave something to train on; 0.05 each is common"
            )
        if data.tokenizer == "sentencepiece" and data.vocab_size is None:
            problems.append("data.tokenizer=sentencepiece needs data.vocab_size; try data.vocab_size=8000")
        if data.tokenizer != "sentencepiece" and data.vocab_size is not None:
            problems.append(
                f"data.vocab_size={data.vocab_size} is only for data.tokenizer=sentencepiece; "
                f"data.tokenizer={data.tokenizer} brings its own vocabulary"
            )


def _check_anything(cfg: Config, problems: list[str]) -> None:
    if isinstance(cfg.data, SyntheticConfig) and not cfg.data.shape:
        problems.append("data.shape=[] must have at least one size, such as data.shape=[3,64,64]")
    if isinstance(cfg.data, SyntheticConfig) and isinstance(cfg.model, TransformerConfig):
        problems.append(f"data=synthetic gives numbers, but model={cfg.model.name} reads tokens; use data=text")
    if not isinstance(cfg.model, AnythingConfig):
        return
    if not cfg.model.factory:
        problems.append(
            "model=anything needs model.factory: a function of yours that gives the module, such as "
            "model.factory=my_models:build, or the name of a classifier of torchvision, such as model.factory=resnet18"
        )
    if cfg.logit_clip is not None:
        problems.append(
            f"logit_clip={cfg.logit_clip} is for pipetrain's own language models: of model=anything nobody knows which "
            "values are the logits; clamp them in the module's forward, or type logit_clip=null"
        )


def _check_amoebanet(cfg: Config, problems: list[str]) -> None:
    model = cfg.model
    if not isinstance(model, AmoebaNetConfig):
        return
    if isinstance(cfg.data, TextConfig):
        problems.append("data=text gives tokens, but model=amoebanet looks at images; use data=synthetic")
    elif isinstance(cfg.data, SyntheticConfig) and len(cfg.data.shape) != 3:
        problems.append(
            f"data.shape={_show(cfg.data.shape)} must be the channels, height and width of an image for "
            "model=amoebanet, such as data.shape=[3,32,32]"
        )
    if cfg.logit_clip is not None:
        problems.append(f"logit_clip={cfg.logit_clip} is for language models; type logit_clip=null")
    # Half the filters in the first cell of the large stem, and convolutions on a quarter of a cell's filters.
    for key, value, divisor in (("layers", model.layers, 3), ("filters", model.filters, _filter_unit(model))):
        if value < 1 or value % divisor:
            nearest = max(1, round(value / divisor)) * divisor
            problems.append(f"model.{key}={value} must be divisible by {divisor}; try model.{key}={nearest}")
    for key in ("dropout", "drop_path", "label_smoothing"):
        if not 0 <= getattr(model, key) < 1:
            problems.append(f"model.{key}={getattr(model, key)} must be at least 0 and below 1")
    if not 0 <= model.aux_weight < float("inf"):
        problems.append(f"model.aux_weight={model.aux_weight} must be at least 0 and finite; 0.4 is common, 0 is off")
    if not 0 < model.bn_momentum <= 1:
        problems.append(f"model.bn_momentum={model.bn_momentum} must be above 0 and at most 1; 0.1 is common")
    if not 0 < model.bn_eps < float("inf"):
        problems.append(f"model.bn_eps={model.bn_eps} must be above 0 and finite; 1e-5 is common")
    if model.drop_path_steps < 0:
        problems.append(f"model.drop_path_steps={model.drop_path_steps} must be at least 0")
    if model.drop_path_steps and not model.drop_path:
        problems.append(f"model.drop_path_steps={model.drop_path_steps} needs model.drop_path, such as 0.3")
    samples = cfg.batch_size // num_microbatches(cfg) if num_microbatches(cfg) >= 1 else 0
    if model.aux_weight and samples == 1:
        fewer = f"micro_batches={cfg.batch_size // 2}, or " if cfg.batch_size > 1 else ""
        problems.append(
            f"micro_batches={num_microbatches(cfg)} of batch_size={cfg.batch_size} leave one sample in a micro-batch, "
            "and the auxiliary head normalises over nothing else; "
            f"use a larger batch_size, or {fewer}model.aux_weight=0"
        )


def _filter_unit(model: AmoebaNetConfig) -> int:
    return 4 if model.stem == "small" else 8


def _check_optimizer(optimizer: OptimizerConfig, problems: list[str]) -> None:
    if isinstance(optimizer, AdamConfig):
        betas = optimizer.betas
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            shown = ",".join(map(str, betas))
            problems.append(f"optimizer.betas=[{shown}] must be two numbers from 0 to below 1; try [0.9,0.999]")
        if not optimizer.eps >= 0:
            problems.append(f"optimizer.eps={optimizer.eps} must be at least 0")
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


def check_model(cfg: Config, num_layers: int, num_stages: int) -> None:
    """Checks the rules between the pipeline and the layers of the built recipe.

    Raises:
        ConfigError: if the balance does not fit the layers, or there are more stages than layers.
    """
    if num_stages > num_layers:
        way_out = (
            "a model whose forward is made of smaller sub-modules, or a list of blocks from the factory"
            if isinstance(cfg.model, AnythingConfig)
            else "a deeper model"
        )
        raise ConfigError(
            f"devices={cfg.devices} makes {num_stages} stages, but the model has only {num_layers} layers "
            "and every stage needs one; "
            f"use devices={num_layers} or fewer, or {way_out}"
        )
    if isinstance(cfg.balance, list) and sum(cfg.balance) != num_layers:
        last = num_layers - sum(cfg.balance[:-1])
        remedy = f"the last number could be {last}" if last >= 1 else "use smaller numbers or balance=even"
        raise ConfigError(
            f"balance={_show(cfg.balance)} sums to {sum(cfg.balance)}, but the model has {num_layers} layers ({remedy})"
        )


def check_resume(cfg: Config, saved: dict[str, Any]) -> None:
    """Checks that a resumed run is still the run it was: its model, data, batch size, seed and kind of optimizer.

    Args:
        saved: the settings in the checkpoint.

    Raises:
        ConfigError: with every such setting that differs.
    """
    problems = [
        f"{key}={_plain(new)}, but the run to resume has {key}={_plain(old)}: leave {key} out, or start a new run"
        for key, old, new in changes(cfg, saved)
        if key.split(".")[0] in _FIXED or key in _FIXED
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def changes(cfg: Config, saved: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The settings that differ from saved ones, as (key, saved, now). Where the text lies does not count."""

    def flat(settings: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in settings.items():
            out |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        return out

    before, now = flat(saved), flat(dataclasses.asdict(cfg))
    ignored = {"data.path", "data.cache_dir", "resume", "name", "action", "check.steps"}
    keys = [key for key in {**before, **now} if key not in ignored]
    return [(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]


def _plain(value: Any) -> str:
    return "null" if value is None else str(value)


def _show(balance: list[int]) -> str:
    return "[" + ",".join(map(str, balance)) + "]"
