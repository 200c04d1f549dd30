"""The process in which the plain reference runs: started, watched and listened to like a worker."""

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from pipetrain.check.compare import Recorded
from pipetrain.check.reference import PlainModel, train
from pipetrain.errors import Exit, PipetrainError
from pipetrain.models.recipe import Tensors
from pipetrain.paths import RunPaths
from pipetrain.training.build import build_recipe
from pipetrain.training.data import open_data, to_device
from pipetrain.training.job import Job
from pipetrain.training.loop import Request, Signals
from pipetrain.training.record import Recorder
from pipetrain.worker import num_threads, run_process


class _Stopped(Exception):
    """A signal asked for the end."""


def run_reference(job_json: str, rank: int, *, other: str) -> None:
    """Body of the process: trains the job's settings in plain PyTorch and records the steps in the job's folder.

    Args:
        other: folder of the run whose steps are to be judged.
    """
    run_process(job_json, rank, partial(_body, Recorded(RunPaths(Path(other)))))


def _body(other: Recorded, job: Job, signals: Signals) -> Exit:
    logging.basicConfig(filename=job.run.log, level=logging.INFO, format="[%(asctime)s][plain] %(message)s")
    logging.captureWarnings(True)
    torch.set_num_threads(num_threads(job))
    try:
        device = torch.device(job.devices[0])
        model = _model(job, device)
        recorder = Recorder(lambda step: job.run.recorded(step, 0), model.modules.items())
        train(model, job.cfg, _batches(job, device, signals), recorder, other.tensors)
    except _Stopped:
        return Exit.INTERRUPTED if signals.request is Request.INTERRUPT else Exit.PREEMPTED
    except Exception as error:
        raise PipetrainError(f"the plain model, without any pipeline, failed: {error}") from error
    return Exit.DONE


def _model(job: Job, device: torch.device) -> PlainModel:
    """The user's module as it is; its layers one after the other where it draws numbers between its modules' calls."""
    recipe = build_recipe(job.cfg, job.data)
    inputs, _ = open_data(job.cfg, job.data, "train").batch(0)
    first = tuple(to_device(tensor[:2], job.cfg, device) for tensor in inputs)
    if recipe.whole is None or not PlainModel(recipe, job.cfg.seed, device).draws_outside_of_modules(first):
        return PlainModel(recipe, job.cfg.seed, device)
    return PlainModel(recipe, job.cfg.seed, device, as_layers=True)


def _batches(job: Job, device: torch.device, signals: Signals) -> Iterator[tuple[Tensors, Tensors]]:
    data = open_data(job.cfg, job.data, "train")
    for step in range(job.cfg.steps or 0):
        if signals.request:
            raise _Stopped
        inputs, targets = data.batch(step)
        yield tuple(to_device(x, job.cfg, device) for x in inputs), (to_device(targets, job.cfg, device),)
