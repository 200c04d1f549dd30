"""The process in which the plain reference runs: started, watched and listened to like a worker."""

from collections.abc import Iterator

import torch

from pipetrain.check.reference import PlainModel, train
from pipetrain.config import TextConfig
from pipetrain.errors import Exit, PipetrainError
from pipetrain.models.recipe import Tensors
from pipetrain.training.build import build_recipe, open_data, to_device
from pipetrain.training.job import Job
from pipetrain.training.loop import Request, Signals
from pipetrain.training.record import Recorder
from pipetrain.worker import num_threads, run_process


class _Stopped(Exception):
    """A signal asked for the end."""


def run_reference(job_json: str, rank: int) -> None:
    """Body of the process: trains the job's settings in plain PyTorch and records the steps in the job's folder."""
    run_process(job_json, rank, _body)


def _body(job: Job, signals: Signals) -> Exit:
    torch.set_num_threads(num_threads(job))
    cfg, device = job.cfg, torch.device(job.devices[0])
    assert isinstance(cfg.data, TextConfig)
    data = open_data(cfg, job.tokens, "train")

    def batches() -> Iterator[tuple[Tensors, Tensors]]:
        for step in range(cfg.steps or 0):
            if signals.request:
                raise _Stopped
            inputs, targets = data.batch(step)
            yield (to_device(inputs, cfg, device),), (to_device(targets, cfg, device),)

    try:
        model = PlainModel(build_recipe(cfg, job.tokens), cfg.seed, device)
        train(model, cfg, batches(), Recorder(lambda step: job.run.recorded(step, 0), model.modules.items()))
    except _Stopped:
        return Exit.INTERRUPTED if signals.request is Request.INTERRUPT else Exit.PREEMPTED
    except Exception as error:
        raise PipetrainError(f"the plain model, without any pipeline, failed: {error}") from error
    return Exit.DONE
