"""A run's whole model on one device, with the weights of one of its checkpoints, whatever it was cut into."""

import dataclasses
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipetrain import config, rules
from pipetrain.config import Config
from pipetrain.devices import parse_devices
from pipetrain.engine import local
from pipetrain.engine.runtime import Runtime
from pipetrain.errors import ConfigError
from pipetrain.models import Recipe
from pipetrain.paths import RunPaths
from pipetrain.schedule import Schedule
from pipetrain.torchrun import Place
from pipetrain.training import checkpoint, state
from pipetrain.training.build import AUTOCAST, build_recipe, build_runtime, build_schedule, ties_of
from pipetrain.training.checkpoint import Manifest, Reader
from pipetrain.training.data import Prepared

BEST = "best"


@dataclass(frozen=True)
class Found:
    """A checkpoint of a run that fits the settings.

    Attributes:
        cfg: the settings, for one device.
    """

    cfg: Config
    run: RunPaths
    reader: Reader
    device: torch.device

    @property
    def manifest(self) -> Manifest:
        return self.reader.manifest


def find(cfg: Config, run: RunPaths, say: Callable[[str], None]) -> Found:
    """Looks for the checkpoint that the settings ask for.

    Args:
        say: takes a line for the user.

    Raises:
        ConfigError: if the settings are not those of the run.
        CheckpointError: if there is none.
    """
    if Place.read(os.environ) is not None:
        raise ConfigError(f"action={cfg.action} is one process: run it without torchrun")
    num_gpus = torch.cuda.device_count()
    device = parse_devices(_first_of(cfg.devices), num_gpus)[0]
    cfg = _for_one(cfg, device)
    rules.check(cfg, num_gpus)
    path, skipped = checkpoint.find_usable(run.checkpoints, best=cfg.weights == BEST)
    for reason in skipped:
        say(f"skipped a checkpoint: {reason}")
    reader = Reader(path)
    # What is drawn when text is made has nothing to do with what was drawn in training.
    seed = reader.manifest.config["seed"] if cfg.action == "generate" else cfg.seed
    rules.check_resume(dataclasses.replace(cfg, seed=seed), reader.manifest.config)
    torch.set_num_threads(len(os.sched_getaffinity(0)) if cfg.threads == config.AUTO else cfg.threads)
    return Found(cfg, run, reader, torch.device(device))


def _first_of(devices: Any) -> Any:
    """One device of those that a run was trained on: there may be fewer here."""
    if isinstance(devices, list | tuple):
        return list(devices[:1])
    return 1 if isinstance(devices, int) or str(devices).strip().isdigit() else devices


def _for_one(cfg: Config, device: str) -> Config:
    """Without all that says how the run was cut and spread."""
    return dataclasses.replace(
        cfg,
        devices=[device],
        partitions=None,
        balance="even",
        data_parallel=1,
        micro_batches=None if cfg.micro_batches == config.AUTO else cfg.micro_batches,
        schedule="gpipe",
        recompute="never",
        recompute_layers=None,
        messages="exact",
    )


@dataclass(frozen=True)
class Gathered:
    """The model, in evaluation mode.

    Attributes:
        modules: the layers.
    """

    recipe: Recipe
    runtime: Runtime
    schedule: Schedule
    modules: list[nn.Module]
    precision: Callable[[], AbstractContextManager[object]]


def gather(found: Found, prepared: Prepared | None) -> Gathered:
    """Builds the model and fills it: with the average of the weights, where the run has one.

    Args:
        prepared: what is known of the data.

    Raises:
        CheckpointError: if a tensor is missing or has another shape.
    """
    cfg = found.cfg
    recipe = build_recipe(cfg, prepared)
    balance = (len(recipe.layers),)
    schedule = build_schedule(cfg, recipe, balance, 1)
    runtime = build_runtime(cfg, recipe, balance, schedule, local.alone(), found.device)
    state.restore_weights(found.reader, runtime, ties_of(recipe, balance), averaged=True)
    modules = [layer.module.eval() for layer in runtime.stages[0].layers]

    def precision() -> AbstractContextManager[object]:
        dtype = AUTOCAST[cfg.precision]
        return torch.autocast(found.device.type, dtype) if dtype is not None else nullcontext()

    return Gathered(recipe, runtime, schedule, modules, precision)
