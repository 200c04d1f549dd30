"""From the settings to the running pieces of one rank."""

import dataclasses
import fnmatch
import resource
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from pipetrain import models, schedule
from pipetrain.config import (
    AmoebaNetConfig,
    AnythingConfig,
    Config,
    Seq2SeqConfig,
    TextConfig,
    TransformerXLConfig,
    TranslationConfig,
)
from pipetrain.data.text import TokenFolder
from pipetrain.data.translation.prepare import PairFolder
from pipetrain.derived import num_replicas, replica_microbatches, stale_family
from pipetrain.engine.runtime import Runtime
from pipetrain.engine.stage import Stage
from pipetrain.engine.tied import Tie
from pipetrain.engine.transport import Transport
from pipetrain.errors import ConfigError
from pipetrain.models import Recipe
from pipetrain.partition.split import dataflow_of, stage_of_each_layer, stages_of_ties, take_stage
from pipetrain.schedule import NEVER, SELECTIVE, Schedule
from pipetrain.sim.balance import even
from pipetrain.training.data import Prepared, image_facts

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp64": None}


def build_recipe(cfg: Config, prepared: Prepared | None) -> Recipe:
    """The model that the settings ask for, as layers not built yet.

    Args:
        prepared: the data, see `prepare_data`.
    """
    if isinstance(cfg.model, AnythingConfig):
        return models.build(**dataclasses.asdict(cfg.model), seed=cfg.seed)
    if isinstance(cfg.model, AmoebaNetConfig):
        facts = image_facts(cfg, prepared)
        if cfg.model.num_classes is not None and cfg.model.num_classes < facts.num_classes:
            raise ConfigError(
                f"model.num_classes={cfg.model.num_classes} is less than the {facts.num_classes} classes of the data; "
                f"use model.num_classes={facts.num_classes} or more, or leave it out"
            )
        settings = facts._asdict() | {k: v for k, v in dataclasses.asdict(cfg.model).items() if v is not None}
        return models.build(**settings, forwards_per_step=replica_microbatches(cfg))
    if isinstance(cfg.model, Seq2SeqConfig):
        assert isinstance(cfg.data, TranslationConfig)
        assert isinstance(prepared, PairFolder)
        return models.build(
            **dataclasses.asdict(cfg.model),
            vocab_size=prepared.vocab_size,
            max_tokens=cfg.data.max_tokens,
            logit_clip=cfg.logit_clip,
            logit_clip_kind=cfg.logit_clip_kind,
        )
    assert isinstance(cfg.data, TextConfig)
    assert isinstance(prepared, TokenFolder)
    if isinstance(cfg.model, TransformerXLConfig) and max(cfg.model.cutoffs, default=0) >= prepared.vocab_size:
        raise ConfigError(
            f"model.cutoffs={cfg.model.cutoffs} must end below the {prepared.vocab_size} tokens of the text's "
            "vocabulary; use smaller numbers, or model.cutoffs=[]"
        )
    return models.build(
        **dataclasses.asdict(cfg.model),
        vocab_size=prepared.vocab_size,
        seq_len=cfg.data.seq_len,
        logit_clip=cfg.logit_clip,
        logit_clip_kind=cfg.logit_clip_kind,
    )


def outer_parameters(recipe: Recipe, names: Iterable[str]) -> set[str]:
    """Of some parameters those of the model's first and last layer."""
    prefixes = recipe.layers[0].full_name(""), recipe.layers[-1].full_name("")
    return {name for name in names if name.startswith(prefixes)}


def balance_of(cfg: Config, num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage, once the planner has chosen them where they were left to it."""
    return tuple(cfg.balance) if isinstance(cfg.balance, list) else even(num_layers, num_stages)


def ties_of(recipe: Recipe, balance: Sequence[int]) -> list[Tie]:
    """The tied parameters with the stages they are used on."""
    return [Tie(tuple(uses)) for uses in stages_of_ties(recipe, balance)]


def build_schedule(
    cfg: Config, recipe: Recipe, balance: Sequence[int], num_ranks: int, num_steps: int | None = None
) -> Schedule:
    """The schedule of a training step, or of a segment of a stale one.

    Args:
        num_ranks: of each pipeline.
        num_steps: mini-batches of the segment; None is a whole one.
    """
    recompute, skips = _policies(cfg, recipe, balance), dataflow_of(recipe, balance).skips()
    number, reduces = replica_microbatches(cfg), num_replicas(cfg) > 1
    if family := stale_family(cfg):
        steps = num_steps or cfg.stale.drain_every
        return schedule.build_stale(family, num_ranks, number, steps, recompute=recompute, skips=skips, reduces=reduces)
    return schedule.build(
        cfg.schedule,
        num_ranks,
        number,
        stages_per_rank=len(balance) // num_ranks,
        recompute=recompute,
        skips=skips,
        reduces=reduces,
    )


def steps_drawn(cfg: Config, num_stages: int) -> int:
    """Mini-batches of a segment that is short enough to be looked at, with some of them in the steady state."""
    return min(cfg.stale.drain_every, num_stages + 3)


def _policies(cfg: Config, recipe: Recipe, balance: Sequence[int]) -> list[str]:
    """Of each stage; one that is to recompute some layers and has none of them never does."""
    policies = cfg.recompute if isinstance(cfg.recompute, list) else [cfg.recompute] * len(balance)
    matching = {
        stage
        for stage, layer in zip(stage_of_each_layer(balance), recipe.layers, strict=True)
        if is_recomputed(cfg, SELECTIVE, layer.name)
    }
    return [NEVER if p == SELECTIVE and stage not in matching else p for stage, p in enumerate(policies)]


def is_recomputed(cfg: Config, policy: str, layer: str) -> bool:
    """Whether a recompute under this policy runs a layer."""
    return policy != SELECTIVE or any(fnmatch.fnmatchcase(layer, pattern) for pattern in cfg.recompute_layers or ())


def build_runtime(
    cfg: Config, recipe: Recipe, balance: Sequence[int], order: Schedule, transport: Transport, device: torch.device
) -> Runtime:
    """Builds this rank's stages and the runtime around them."""
    dataflow, last = dataflow_of(recipe, balance), len(balance) - 1

    def build_stage(index: int) -> Stage:
        layers = take_stage(recipe, balance, index, seed=cfg.seed, device=device)
        policy = cfg.recompute[index] if isinstance(cfg.recompute, list) else cfg.recompute
        return Stage(
            index,
            [(name, prefix, module.double()) for name, prefix, module in layers] if cfg.precision == "fp64" else layers,
            dataflow,
            device=device,
            seed=cfg.seed,
            first_microbatch=transport.replicas.number * replica_microbatches(cfg),
            loss_sum=recipe.loss_sum if index == last else None,
            measures=tuple(recipe.measures.values()),
            autocast_dtype=AUTOCAST[cfg.precision],
            recomputes=partial(is_recomputed, cfg, policy),
        )

    ties = ties_of(recipe, balance)
    stages = [build_stage(index) for index in order.stages_of(transport.rank)]
    if not order.waits:
        _check_stale(order, stages, ties)
    return Runtime(
        stages,
        len(balance),
        transport,
        device,
        ties=ties,
        memory_bytes=_memory_meter(device),
        narrow_messages=cfg.messages == "bf16",
        stale_weights=cfg.stale.weights,
    )


def _check_stale(order: Schedule, stages: Sequence[Stage], ties: Sequence[Tie]) -> None:
    """
    Raises:
        ConfigError: for what cannot be made right where ranks do not wait for each other.
    """
    synchronous = "use a synchronous schedule, such as schedule=1f1b"
    for tie in ties:
        if len({order.placement[stage] for _, stage in tie.uses}) > 1:
            first, last = tie.uses[0][0], tie.uses[-1][0]
            raise ConfigError(
                f"{first} and {last} are one parameter on several devices, which can only be updated when all have its "
                f"gradient, but schedule={order.name} waits for nobody; use schedule=ouroboros, which has the first "
                f"and the last stage on one device, or {synchronous}"
            )
    for layer in (layer for stage in stages for layer in stage.layers):
        for name, module in layer.module.named_modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                raise ConfigError(
                    f"layer {layer.full_name(name).rstrip('.')} is a BatchNorm, whose running statistics would be of "
                    f"many versions of the weights under schedule={order.name}; {synchronous}"
                )


def _memory_meter(device: torch.device) -> Callable[[], float]:
    """Measures the peak memory so far: of the device's allocator, or of this process."""
    if device.type == "cuda":
        return lambda: float(torch.cuda.max_memory_allocated(device))
    return lambda: float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
