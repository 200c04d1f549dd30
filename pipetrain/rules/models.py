"""The rules about each model's own settings. Each function adds a line for every rule that is broken."""

from itertools import pairwise

from pipetrain.config import (
    AmoebaNetConfig,
    AnythingConfig,
    Config,
    Seq2SeqConfig,
    SyntheticConfig,
    TextConfig,
    TransformerConfig,
    TransformerXLConfig,
    TranslationConfig,
)
from pipetrain.derived import num_microbatches
from pipetrain.rules.words import shown
from pipetrain.suggest import one_of

EMBEDDINGS = ("all", "output", "none")
NORMS = ("pre", "post")
INIT_SCALES = ("none", "inverse_depth", "inverse_sqrt_depth")


def check_transformer(cfg: Config, problems: list[str]) -> None:
    if isinstance(cfg.model, TransformerConfig | TransformerXLConfig):
        if not isinstance(cfg.data, TextConfig | TranslationConfig):
            problems.append(
                f"data={cfg.data.name} gives numbers, but model={cfg.model.name} reads tokens; use data=text"
            )
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
        what = f"model={model.name}"
        if isinstance(model, TransformerConfig):
            what = "model.positions=sinusoidal" if model.positions == "sinusoidal" else ""
        if what and model.d_model % 2:
            problems.append(f"{what} needs an even model.d_model (got {model.d_model})")
    if isinstance(cfg.model, TransformerXLConfig):
        _check_memory(cfg, cfg.model, problems)


def check_seq2seq(cfg: Config, problems: list[str]) -> None:
    model, data = cfg.model, cfg.data
    if isinstance(model, Seq2SeqConfig) != isinstance(data, TranslationConfig):
        use = "data=translation" if isinstance(model, Seq2SeqConfig) else "model=seq2seq"
        problems.append(
            f"model={model.name} does not go with data={data.name}; use {use}, or leave data={data.name} out"
        )
    if not isinstance(model, Seq2SeqConfig):
        return
    for key in ("layers", "d_model", "d_ff", "heads", "head_width"):
        if getattr(model, key) < 1:
            problems.append(f"model.{key}={getattr(model, key)} must be at least 1")
    for key in ("dropout", "label_smoothing"):
        if not 0 <= getattr(model, key) < 1:
            problems.append(f"model.{key}={getattr(model, key)} must be at least 0 and below 1")
    choices = (
        ("embeddings", model.embeddings, EMBEDDINGS),
        ("norm", model.norm, NORMS),
        ("init_scale", model.init_scale, INIT_SCALES),
    )
    for key, value, allowed in choices:
        if value not in allowed:
            problems.append(f"model.{key}={value}: no such choice. {one_of(value, allowed)}")
    if model.d_model % 2:
        problems.append(f"model={model.name} needs an even model.d_model (got {model.d_model})")


def _check_memory(cfg: Config, model: TransformerXLConfig, problems: list[str]) -> None:
    for key in ("memory", "evaluation_memory"):
        if (getattr(model, key) or 0) < 0:
            problems.append(f"model.{key}={getattr(model, key)} must be at least 0")
    if not 0 <= model.attention_dropout < 1:
        problems.append(f"model.attention_dropout={model.attention_dropout} must be at least 0 and below 1")
    if model.cutoffs:
        _check_cutoffs(cfg, model.cutoffs, problems)
    if isinstance(cfg.data, TextConfig) and cfg.data.order != "contiguous" and model.memory > 0:
        problems.append(
            f"data.order={cfg.data.order}: model.memory={model.memory} remembers the sample before, which is then some "
            "other text; use data.order=contiguous, or model.memory=0"
        )


def _check_cutoffs(cfg: Config, cutoffs: list[int], problems: list[str]) -> None:
    given = f"model.cutoffs={shown(cutoffs)}"
    if any(end <= start for start, end in pairwise((0, *cutoffs))):
        problems.append(f"{given} must be numbers above 0 that ascend, such as model.cutoffs=[20000,40000]")
    if cfg.logit_clip is not None:
        problems.append(
            f"logit_clip={cfg.logit_clip} is not there for an adaptive softmax, {given}; leave one of them out"
        )


def check_anything(cfg: Config, problems: list[str]) -> None:
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


def check_amoebanet(cfg: Config, problems: list[str]) -> None:
    model = cfg.model
    if not isinstance(model, AmoebaNetConfig):
        return
    if isinstance(cfg.data, TextConfig):
        problems.append("data=text gives tokens, but model=amoebanet looks at images; use data=images")
    elif isinstance(cfg.data, SyntheticConfig) and len(cfg.data.shape) != 3:
        problems.append(
            f"data.shape={shown(cfg.data.shape)} must be the channels, height and width of an image for "
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
    if model.num_classes is not None and model.num_classes < 2:
        problems.append(f"model.num_classes={model.num_classes} must be at least 2, or null for the data's number")
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
