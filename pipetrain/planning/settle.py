"""Fills in what settings leave to the planner, from a profile that is measured now or was measured before."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pipetrain.config import AUTO, TextConfig
from pipetrain.costs import Device
from pipetrain.derived import num_microbatches
from pipetrain.errors import ConfigError
from pipetrain.models import Recipe
from pipetrain.planning.choices import choices, left_open
from pipetrain.planning.described import described_profile
from pipetrain.planning.measuring import measure_together
from pipetrain.planning.profiles import (
    RunJob,
    Say,
    about_of,
    keep,
    kept,
    measure_here,
    measuring_devices,
    measuring_line,
)
from pipetrain.planning.warnings import warnings_of
from pipetrain.profile.bench import signatures_of
from pipetrain.profile.store import Profile
from pipetrain.schedule import SELECTIVE
from pipetrain.schedule.stale import LOCKED, STASH
from pipetrain.sim.accounts import account
from pipetrain.sim.balance import even
from pipetrain.sim.forecast import Forecast, Setting, forecast, samples_of, schedule_of
from pipetrain.sim.planner import plans
from pipetrain.training.build import build_recipe, is_recomputed
from pipetrain.training.job import Job
from pipetrain.training.plan import Prediction, StagePrediction, Weighed
from pipetrain.worker import crowding, num_cores

_WORTH_SAYING = 1.02  # times as long


def settle(job: Job, run_job: RunJob, say: Say) -> Job:
    """The job with nothing left open, and with a prediction where something was.

    Raises:
        ConfigError: if no plan fits, or measuring takes too long.
        MeasuringFailed: if it fails.
    """
    if not _is_open(job):
        return job
    recipe = build_recipe(job.cfg, job.data)
    signatures, rows = signatures_of(recipe), _rows(job, recipe)
    about = about_of(job, recipe, signatures, len(measuring_devices(job)))
    device = job.cfg.plan.device
    if device is not None:
        profile = described_profile(job, recipe, signatures, rows)
        profile = dataclasses.replace(profile, about={**about, "devices": f"{device.name}, described"})
    else:
        profile = kept(job, about, rows) or keep(job, measure_here(job, rows, run_job, say), about)
    return _settled(job, recipe, profile, say)


def settle_together(job: Job, device: torch.device, say: Say = print) -> Job:
    """As `settle`, where all ranks of a process group call it: they measure, and the first one decides for all.

    Raises:
        ConfigError: on every rank, if no plan fits.
    """
    if not _is_open(job):
        return job
    recipe = build_recipe(job.cfg, job.data)
    about, rows = about_of(job, recipe, signatures_of(recipe), len(job.devices)), _rows(job, recipe)
    profile = _of_the_first_rank(lambda: kept(job, about, rows))
    if profile is None:
        _of_the_first_rank(lambda: say(measuring_line(job)))
        measured = measure_together(job, rows, device)
        profile = _of_the_first_rank(lambda: measured and keep(job, measured, about))
    return Job.from_json(_of_the_first_rank(lambda: _settled(job, recipe, profile, say).to_json()))


def _of_the_first_rank(work: Callable[[], Any]) -> Any:
    """What it returns there, on every rank; or the ConfigError that it raises."""
    said: list[Any] = [None, ""]
    if dist.get_rank() == 0:
        try:
            said[0] = work()
        except ConfigError as error:
            said[1] = str(error)
    dist.broadcast_object_list(said, src=0)
    if said[1]:
        raise ConfigError(said[1])
    return said[0]


def _is_open(job: Job) -> bool:
    """Whether there is something to choose, or to say."""
    return job.cfg.action == "plan" or bool(left_open(job.cfg, len(job.devices)))


def _rows(job: Job, recipe: Recipe) -> list[int]:
    """The samples of micro-batches, of all numbers of them that may be chosen."""
    every = choices(job.cfg, len(job.devices), len(recipe.layers))
    return sorted({rows for choice in every for rows in samples_of(job.cfg.batch_size, choice)})


def _settled(job: Job, recipe: Recipe, profile: Profile, say: Say) -> Job:
    setting = _setting(job, recipe, profile)
    every = choices(job.cfg, len(job.devices), len(recipe.layers))
    possible = [choice for choice in every if profile.costs[samples_of(job.cfg.batch_size, choice)[0]] is not None]
    if not possible:
        raise ConfigError(
            f"micro_batches={num_microbatches(job.cfg)} makes micro-batches of which the devices have no memory for a "
            "single layer; use more of them, or micro_batches=auto"
        )
    ranked = plans(setting, possible)
    best, opened = ranked[0], left_open(job.cfg, len(job.devices))
    job.run.root.mkdir(parents=True, exist_ok=True)
    job.run.profile.write_text(profile.to_json())
    if opened:
        as_even = even(len(recipe.layers), len(best.balance))
        say(_told(best, opened, forecast(setting.of_one(best.choice.replicas), best.choice, as_even)))
    cfg = dataclasses.replace(job.cfg, **{key: _typed(best)[key] for key in (*opened, "balance")})
    prediction = _prediction(job, recipe, setting, ranked, opened)
    if profile.disturbed:
        prediction.warnings.append(
            "other processes took part of the cores while the layers were measured: all may be faster than predicted, "
            "and is measured anew next time"
        )
    return dataclasses.replace(job, cfg=cfg, prediction=prediction)


def _typed(plan: Forecast) -> dict[str, Any]:
    """The settings of a plan."""
    choice = plan.choice
    return {
        "data_parallel": choice.replicas,
        "schedule": choice.schedule,
        "partitions": len(plan.balance),
        "micro_batches": choice.num_microbatches * choice.replicas,
        "recompute": choice.recompute if isinstance(choice.recompute, str) else list(choice.recompute),
        "balance": list(plan.balance),
    }


def _told(best: Forecast, opened: Sequence[str], as_even: Forecast) -> str:
    typed = _typed(best) | {"balance": f"[{','.join(map(str, best.balance))}]"}
    text = f"{' '.join(f'{key}={typed[key]}' for key in opened)} (type that for the same plan again)"
    if "balance" not in opened or len(best.balance) == 1:
        return text
    if best.balance == as_even.balance:
        return f"{text}, as even"
    other, gain = ",".join(map(str, as_even.balance)), as_even.step_s / best.step_s
    return f"{text}; balance=even, which is [{other}], would take {gain:.2f} times as long"


def _setting(job: Job, recipe: Recipe, profile: Profile) -> Setting:
    """What the planner must know of this job."""
    cfg, gib = job.cfg, job.cfg.plan.memory_gib
    kinds = list(profile.memory_bytes)
    is_shared = job.devices[0] == "cpu" and cfg.plan.devices is None  # one machine has all of them
    share, crowded = (len(job.devices), crowding(job) / profile.crowding) if is_shared else (1, 1.0)
    devices = [
        Device(
            name,
            memory_bytes=(profile.memory_bytes[kind] / share) if gib is None else gib * 2**30,
            slowness=crowded * profile.slowness[kind],
        )
        for name, kind in ((name, _kind_of(name, kinds)) for name in job.devices)
    ]
    return Setting(
        model={rows: cost for rows, cost in profile.costs.items() if cost is not None}.__getitem__,
        batch_size=cfg.batch_size,
        devices=tuple(devices),
        link=profile.link,
        sums=profile.sums,
        selected=tuple(is_recomputed(cfg, SELECTIVE, layer.name) for layer in recipe.layers),
        engine_s=profile.engine_s,
        process_bytes=profile.process_bytes,
        stashes=cfg.stale.weights == STASH,
        locked=cfg.stale.tied == LOCKED,
    )


def _kind_of(device: str, kinds: Sequence[str]) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else kinds[0]


def _tokens(job: Job) -> int:
    """In a mini-batch of text."""
    return job.cfg.batch_size * job.cfg.data.seq_len if isinstance(job.cfg.data, TextConfig) else 0


def _slower_than_auto(setting: Setting, best: Forecast) -> list[str]:
    """What another cut would gain, where one was typed."""
    if best.choice.balance == AUTO:
        return []
    auto = plans(setting, [dataclasses.replace(best.choice, balance=AUTO)])[0]
    if not auto.fits or best.step_s <= _WORTH_SAYING * auto.step_s:
        return []
    cut = ",".join(map(str, auto.balance))
    return [f"balance=auto, which is [{cut}], would take {auto.step_s / best.step_s:.2f} of the time"]


def _crowded(job: Job) -> list[str]:
    if job.cfg.plan.devices is not None or crowding(job) == 1:
        return []
    return [
        f"{len(job.devices)} CPU processes share {num_cores()} cores: a step is no faster than on {num_cores()} of them"
    ]


def _prediction(
    job: Job, recipe: Recipe, setting: Setting, ranked: Sequence[Forecast], opened: Sequence[str]
) -> Prediction:
    """For the plan of the run, and to be compared with what is measured."""
    best = ranked[0]
    own = setting.of_one(best.choice.replicas)
    return Prediction(
        step_s=best.step_s,
        bubble_fraction=best.bubble_fraction,
        stages=[
            StagePrediction(
                forward_s=stage.cost.forward_s,
                backward_s=stage.cost.backward_s + stage.cost.backward_weight_s,
                idle_s=stage.idle_s,
                memory=dataclasses.asdict(stage.memory),
            )
            for stage in best.stages
        ],
        process_bytes=setting.process_bytes,
        device_bytes=list(best.rank_bytes),
        accounts=dataclasses.asdict(
            account(schedule_of(own, best.choice, best.balance), [stage.cost for stage in best.stages], best.step_s)
        ),
        samples_per_s=job.cfg.batch_size / best.step_s,
        tokens_per_s=_tokens(job) / best.step_s if _tokens(job) else None,
        warnings=[
            *warnings_of(own, best, [layer.name for layer in recipe.layers]),
            *_slower_than_auto(setting, best),
            *_crowded(job),
        ],
        chosen=list(opened),
        weighed=[
            Weighed(_typed(plan), plan.step_s, plan.bubble_fraction, max(plan.rank_bytes), plan.fits) for plan in ranked
        ],
    )
