"""`action=plan`: what a run would do, before any worker starts: its stages, and its schedule as a picture."""

import os
import sys
from pathlib import Path

import torch

from pipetrain.config import Config, num_stages
from pipetrain.errors import ConfigError, Exit
from pipetrain.launch import prepare, run_job
from pipetrain.models import Recipe
from pipetrain.paths import RunPaths
from pipetrain.planning.settle import settle
from pipetrain.schedule import timeline
from pipetrain.schedule.picture import svg
from pipetrain.torchrun import Place
from pipetrain.training.build import balance_of, build_recipe, build_schedule
from pipetrain.training.plan import drawn, make_plan


def preview(cfg: Config, root: Path) -> int:
    """Prints the plan and leaves it in the run folder, with the picture of the schedule.

    Raises:
        PipetrainError: for everything that is wrong with the settings.
    """
    if Place.read(os.environ) is not None:
        raise ConfigError("action=plan starts no processes and needs none: run it without torchrun")
    run = RunPaths(root.absolute())
    job = prepare(cfg, run, torch.cuda.device_count(), say=_say)
    job = settle(job, run_job, _say)
    cfg = job.cfg
    recipe = build_recipe(cfg, job.data)
    num_ranks = len(job.devices)
    balance = balance_of(cfg, len(recipe.layers), num_stages(cfg, num_ranks))
    schedule = build_schedule(cfg, recipe, balance, num_ranks)
    parameters = _parameters(recipe, balance)
    plan = make_plan(schedule, job.devices, recipe, balance, parameters, cfg.recompute, job.prediction)
    run.root.mkdir(parents=True, exist_ok=True)
    run.plan.write_text(plan.to_json())
    run.schedule_picture.write_text(svg({schedule.name: timeline(schedule)}, schedule.placement))
    for line in (*plan.table(), *drawn(schedule)):
        _say(line)
    _say(f"the plan: {run.plan}\nthe schedule as a picture: {run.schedule_picture}")
    return Exit.DONE


def _parameters(recipe: Recipe, balance: tuple[int, ...]) -> list[int]:
    """Parameters of every stage, a tied one where it is used first. The layers are built without their memory."""
    later_uses = {use for tie in recipe.ties for use in tie[1:]}
    counts: list[int] = []
    for number in balance:
        layers = recipe.layers[sum(balance[: len(counts)]) :][:number]
        with torch.device("meta"):
            built = [(layer.name, layer.build()) for layer in layers]
        counts.append(
            sum(
                parameter.numel()
                for layer, module in built
                for name, parameter in module.named_parameters()
                if (layer, name) not in later_uses
            )
        )
    recipe.release()
    return counts


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
