"""From the settings to the running pieces of one rank."""

import dataclasses
import resource
from collections.abc import Callable, Sequence

import torch

from pipetrain import models
from pipetrain.config import AmoebaNetConfig, AnythingConfig, Config, TextConfig, num_microbatches
from pipetrain.data.text import TokenFolder
from pipetrain.engine.runtime import Runtime
from pipetrain.engine.stage import Stage
from pipetrain.engine.tied import Tie
from pipetrain.engine.transport import Transport
from pipetrain.errors import ConfigError
from pipetrain.models import Recipe
from pipetrain.partition.split import dataflow_of, stages_of_ties, take_stage
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
        return models.build(**settings, forwards_per_step=num_microbatches(cfg))
    assert isinstance(cfg.data, TextConfig)
    assert isinstance(prepared, TokenFolder)
    return models.build(
        **dataclasses.asdict(cfg.model),
        vocab_size=prepared.vocab_size,
        seq_len=cfg.data.seq_len,
        logit_clip=cfg.logit_clip,
        logit_clip_kind=cfg.logit_clip_kind,
    )


def balance_of(cfg: Config, num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage."""
    return even(num_layers, num_stages) if cfg.balance == "even" else tuple(cfg.balance)


def ties_of(recipe: Recipe, balance: Sequence[int]) -> list[Tie]:
    """The tied parameters with the stages they are used on."""
    return [Tie(tuple(uses)) for uses in stages_of_ties(recipe, balance)]


def build_runtime(
    cfg: Config, recipe: Recipe, balance: Sequence[int], transport: Transport, device: torch.device
) -> Runtime:
    """Builds this rank's stage and the runtime around it."""
    index, num_stages = transport.rank, len(balance)
    layers = take_stage(recipe, balance, index, seed=cfg.seed, device=device)
    stage = Stage(
        index,
        [(name, prefix, module.double()) for name, prefix, module in layers] if cfg.precision == "fp64" else layers,
        dataflow_of(recipe, balance),
        device=device,
        seed=cfg.seed,
        loss_sum=recipe.loss_sum if index == num_stages - 1 else None,
        measures=tuple(recipe.measures.values()),
        autocast_dtype=AUTOCAST[cfg.precision],
    )
    ties = ties_of(recipe, balance)
    return Runtime([stage], num_stages, transport, device, ties=ties, memory_bytes=_memory_meter(device))


def _memory_meter(device: torch.device) -> Callable[[], float]:
    """Measures the peak memory so far: of the device's allocator, or of this process."""
    if device.type == "cuda":
        return lambda: float(torch.cuda.max_memory_allocated(device))
    return lambda: float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
