"""`action=plan`: what a run would do, before any worker starts: its stages, and its schedule as a picture."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from pipetrain.config import Config
from pipetrain.derived import num_stages, replica_microbatches, wanted_ranks
from pipetrain.devices import parse_devices
from pipetrain.errors import ConfigError, Exit
from pipetrain.launch import prepare, run_job
from pipetrain.models import Recipe
from pipetrain.paths import RunPaths
from pipetrain.planning.settle import settle
from pipetrain.schedule import Schedule, generate, timeline
from pipetrain.schedule.picture import svg
from pipetrain.torchrun import Place
from pipetrain.training.build import balance_of, build_recipe, build_schedule, steps_drawn
from pipetrain.training.plan import Plan, drawn, make_plan


def preview(cfg: Config, root: Path) -> int:
    """Prints the plan and leaves it in the run folder, with the picture of the schedule.

    Raises:
        PipetrainError: for everything that is wrong with the settings.
    """
    if Place.read(os.environ) is not None:
        raise ConfigError("action=plan starts no processes and needs none: run it without torchrun")
    run = RunPaths(root.absolute())
    if cfg.plan.devices:
        return _preview_counts(cfg, run, cfg.plan.devices)
    plan, schedule = _planned(cfg, run, None)
    run.root.mkdir(parents=True, exist_ok=True)
    run.plan.write_text(plan.to_json())
    run.schedule_picture.write_text(svg({schedule.name: timeline(schedule)}, schedule.placement))
    for line in (*plan.table(), *plan.memory_table(), *drawn(schedule)):
        _say(line)
    _say(f"the plan: {run.plan}\nthe schedule as a picture: {run.schedule_picture}")
    return Exit.DONE


def _preview_counts(cfg: Config, run: RunPaths, counts: list[int]) -> int:
    """A plan for each number of devices, or why there is none."""
    plans, problem, is_planned = dict[int, Any](), None, False
    for count in counts:
        _say(f"\n{count} devices" if count > 1 else "\n1 device")
        try:
            plan, _ = _planned(cfg, run, count)
        except ConfigError as error:
            if len(counts) == 1:
                raise
            problem, plans[count] = error, {"problem": str(error)}
            _say(str(error))
            continue
        is_planned, plans[count] = True, json.loads(plan.to_json())
        for line in (*plan.table(), *plan.memory_table()):
            _say(line)
    if problem is not None and not is_planned:
        raise problem
    run.root.mkdir(parents=True, exist_ok=True)
    run.plan.write_text(json.dumps(plans, indent=2))
    _say(f"\nthe plans: {run.plan}")
    return Exit.DONE


def _planned(cfg: Config, run: RunPaths, count: int | None) -> tuple[Plan, Schedule]:
    """
    Args:
        count: so many devices; None is what the settings say.
    """
    num_gpus = torch.cuda.device_count()
    devices = None
    if cfg.plan.device is not None or count is not None:
        here = parse_devices(cfg.devices, num_gpus if cfg.plan.device is None else 0, wanted_ranks(cfg))
        name = here[0] if cfg.plan.device is None else cfg.plan.device.name
        devices = (name,) * (len(here) if count is None else count)
        cfg = dataclasses.replace(cfg, devices="auto")
    job = settle(prepare(cfg, run, num_gpus, devices, say=_say), run_job, _say)
    recipe = build_recipe(job.cfg, job.data)
    num_ranks = job.num_ranks
    balance = balance_of(job.cfg, len(recipe.layers), num_stages(job.cfg, num_ranks))
    if count is None:
        schedule = build_schedule(job.cfg, recipe, balance, num_ranks, steps_drawn(job.cfg, len(balance)))
    else:  # nobody will run or draw it: messages and proofs of millions of actions can be left out
        each = len(balance) // num_ranks
        schedule = generate(job.cfg.schedule, num_ranks, replica_microbatches(job.cfg), each)
    parameters = _parameters(recipe, balance)
    plan = make_plan(schedule, job.devices, recipe, balance, parameters, job.cfg.recompute, job.prediction)
    return plan, schedule


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
