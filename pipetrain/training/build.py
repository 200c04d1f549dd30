"""From the settings to the running pieces of one rank."""

import dataclasses
import resource
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipetrain import models
from pipetrain.config import AmoebaNetConfig, AnythingConfig, Config, SyntheticConfig, TextConfig, num_microbatches
from pipetrain.data.batches import ONCE, Batches, TextBatches
from pipetrain.data.synthetic import SyntheticBatches
from pipetrain.data.text import TokenFolder
from pipetrain.engine.runtime import Runtime
from pipetrain.engine.stage import Stage
from pipetrain.engine.tied import Tie
from pipetrain.engine.transport import Transport
from pipetrain.models import Recipe
from pipetrain.partition.split import dataflow_of, stages_of_ties, take_stage
from pipetrain.sim.balance import even

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp64": None}


def build_recipe(cfg: Config, tokens: TokenFolder | None) -> Recipe:
    """The model that the settings ask for, as layers not built yet.

    Args:
        tokens: the text, if the data is text.
    """
    if isinstance(cfg.model, AnythingConfig):
        return models.build(**dataclasses.asdict(cfg.model), seed=cfg.seed)
    if isinstance(cfg.model, AmoebaNetConfig):
        return models.build(
            **dataclasses.asdict(cfg.model), **_images(cfg)._asdict(), forwards_per_step=num_microbatches(cfg)
        )
    assert isinstance(cfg.data, TextConfig)
    assert tokens is not None
    return models.build(
        **dataclasses.asdict(cfg.model),
        vocab_size=tokens.vocab_size,
        seq_len=cfg.data.seq_len,
        logit_clip=cfg.logit_clip,
        logit_clip_kind=cfg.logit_clip_kind,
    )


class Images(NamedTuple):
    """What a model of images must know of the data: `image_size` is (height, width)."""

    channels: int
    image_size: tuple[int, int]
    num_classes: int


def _images(cfg: Config) -> Images:
    assert isinstance(cfg.data, SyntheticConfig)
    channels, height, width = cfg.data.shape
    return Images(channels, (height, width), cfg.data.classes)


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
        autocast_dtype=AUTOCAST[cfg.precision],
    )
    ties = ties_of(recipe, balance)
    return Runtime([stage], num_stages, transport, device, ties=ties, memory_bytes=_memory_meter(device))


def open_data(cfg: Config, tokens: TokenFolder | None, split: str) -> Batches:
    """One split of the data, in the order of the settings for training and each sample once for the others."""
    data = cfg.data
    if isinstance(data, SyntheticConfig):
        samples = data.samples if split == "train" else max(1, data.samples // 10)
        return SyntheticBatches(data.shape, data.classes, samples, split, batch_size=cfg.batch_size, seed=cfg.seed)
    assert isinstance(data, TextConfig)
    assert tokens is not None
    order = data.order if split == "train" else ONCE
    return TextBatches(tokens, split, seq_len=data.seq_len, batch_size=cfg.batch_size, order=order, seed=cfg.seed)


def to_device(tensor: Tensor, cfg: Config, device: torch.device) -> Tensor:
    """A tensor of a batch where the model takes it: on its device and, where it is floating, in its precision."""
    return tensor.to(device, torch.float64 if cfg.precision == "fp64" and tensor.is_floating_point() else None)


def _memory_meter(device: torch.device) -> Callable[[], float]:
    """Measures the peak memory so far: of the device's allocator, or of this process."""
    if device.type == "cuda":
        return lambda: float(torch.cuda.max_memory_allocated(device))
    return lambda: float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
