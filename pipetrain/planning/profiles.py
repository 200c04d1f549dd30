"""Finds the profile of a job: a file that the user names, one that was measured before, or one that is measured now."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

import pipetrain
from pipetrain.errors import ConfigError, Exit, PipetrainError
from pipetrain.models import Recipe
from pipetrain.paths import RunPaths
from pipetrain.planning.choices import left_open
from pipetrain.planning.measuring import cpu_name, run_measuring_worker
from pipetrain.profile.signature import shown
from pipetrain.profile.store import Profile, hashed, load, save
from pipetrain.training.data import full_batch
from pipetrain.training.job import Job
from pipetrain.worker import num_threads

# (job, worker, its argument, seconds that it may take) -> exit code; see `launch.run_job`
RunJob = Callable[[Job, Callable[[str, int], None], str, float], int]
Say = Callable[[str], None]
# What a profile depends on, see `about_of`, and what it is of where that differs.
_PARTS = {
    "layers": "another model",
    "samples": "other data",
    "devices": "another device",
    "training": "another precision or optimizer",
    "processes": "another number of processes",
    "threads": "other threads",
    "versions": "other versions",
}


class MeasuringFailed(PipetrainError):
    """The layers could not be measured; what went wrong was said before."""

    def __init__(self, code: int) -> None:
        super().__init__("the layers could not be measured (see above); balance=even needs no measuring")
        self.exit_code = Exit(code)


def kept(job: Job, about: Mapping[str, str], rows: Sequence[int]) -> Profile | None:
    """What was measured before, if it is all that is asked for.

    Raises:
        ConfigError: if `plan.profile` is that of something else.
    """
    if job.cfg.plan.profile is not None:
        return _given(job.cfg.plan.profile, about, rows)
    found = load(Path(job.cfg.plan.cache_dir).expanduser(), about)
    return found if found is not None and set(rows) <= set(found.costs) else None


def _given(path: str, about: Mapping[str, str], rows: Sequence[int]) -> Profile:
    """The profile of a file.

    Raises:
        ConfigError: if it cannot be read, or is that of something else.
    """
    try:
        profile = Profile.from_json(Path(path).expanduser().read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"plan.profile={path} cannot be read as a profile ({type(error).__name__}: {error}); give the profile.json "
            "of a run folder, or leave it out to measure"
        ) from error
    for part, what in _PARTS.items():
        if profile.about.get(part) != about[part]:
            both = (
                "" if part == "layers" else f": its {part} are {profile.about.get(part)}, here they are {about[part]}"
            )
            raise ConfigError(f"plan.profile={path} is of {what}{both}; leave it out to measure")
    if missing := sorted(set(rows) - set(profile.costs)):
        raise ConfigError(
            f"plan.profile={path} has micro-batches of {_listed(sorted(profile.costs))} samples, but here they may "
            f"have {_listed(missing)}; use other micro_batches, or leave it out to measure"
        )
    return profile


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def keep(job: Job, profile: Profile, about: Mapping[str, str]) -> Profile:
    """Beside what was measured before of other sizes; what was disturbed is for this time only."""
    if profile.disturbed:
        return dataclasses.replace(profile, about=about)
    folder = Path(job.cfg.plan.cache_dir).expanduser()
    before = load(folder, about)
    costs = {**(before.costs if before is not None else {}), **profile.costs}
    profile = dataclasses.replace(profile, about=about, costs=costs)
    save(folder, profile)
    return profile


def measure_here(job: Job, rows: Sequence[int], run_job: RunJob, say: Say) -> Profile:
    """By worker processes, in a folder that is gone afterwards."""
    say(measuring_line(job))
    devices, limit_s = measuring_devices(job), job.cfg.plan.timeout_s
    with tempfile.TemporaryDirectory(prefix="pipetrain-") as folder:
        run = RunPaths(Path(folder))
        cfg = dataclasses.replace(
            job.cfg, threads=num_threads(job)
        )  # as many as in the run, which may have more processes
        asked = dataclasses.replace(job, cfg=cfg, devices=devices, run=run)
        try:
            code = run_job(asked, run_measuring_worker, json.dumps([asked.to_json(), list(rows)]), limit_s)
        except TimeoutError:
            where = f"at layer {run.measuring.read_text()}" if run.measuring.exists() else "before the first one"
            raise ConfigError(
                f"measuring the layers was not done after plan.timeout_s={limit_s:g} seconds, {where}; give it more"
                + (", or use balance=even" if _can_do_without(job) else "")
            ) from None
        if code != Exit.DONE:
            raise MeasuringFailed(code)
        return Profile.from_json(run.profile.read_text())


def measuring_line(job: Job) -> str:
    """What is said before it begins."""
    without = " (balance=even does without)" if _can_do_without(job) else ""
    return f"measuring the layers, once for these sizes on this machine{without}"


def measuring_devices(job: Job) -> tuple[str, ...]:
    """One device for each process that measures. Of equal CPU processes two tell all, and a message between them."""
    return job.devices[:2] if job.devices[0] == "cpu" else tuple(dict.fromkeys(job.devices))


def _can_do_without(job: Job) -> bool:
    return job.cfg.action != "plan" and left_open(job.cfg, len(job.devices)) == ("balance",)


def about_of(job: Job, recipe: Recipe, signatures: Sequence[str], processes: int) -> dict[str, str]:
    """Everything that the costs depend on.

    Args:
        processes: that measure.
    """
    cfg = job.cfg
    inputs, targets = full_batch(cfg, job.data)
    takes = [str(recipe.taken_by(place)) for place in range(len(recipe.layers))]
    wanted = [f"{tensor.dtype}{tuple(tensor.shape[1:])}" for tensor in (*inputs, targets)]
    return {
        "layers": hashed([*signatures, *takes, shown(recipe.loss_sum)]),
        "samples": ", ".join(wanted),
        "devices": ", ".join(sorted(set(map(_device_name, job.devices)))),
        "training": f"{cfg.precision} {shown(dataclasses.asdict(cfg.optimizer))} ema={cfg.ema}",
        "processes": str(processes),
        "threads": str(num_threads(job)),
        "versions": f"torch {torch.__version__}, pipetrain {pipetrain.__version__}",
    }


def _device_name(device: str) -> str:
    """Before any process has looked at it."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()
