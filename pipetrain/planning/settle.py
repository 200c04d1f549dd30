"""Fills in what settings leave to the planner, from a profile that is measured now or was measured before."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import pipetrain
from pipetrain.costs import Device
from pipetrain.errors import ConfigError, Exit, PipetrainError
from pipetrain.models import Recipe
from pipetrain.paths import RunPaths
from pipetrain.planning.choices import choices, left_open
from pipetrain.planning.described import described_profile
from pipetrain.planning.measuring import cpu_name, measure_together, run_measuring_worker
from pipetrain.profile.bench import signatures_of
from pipetrain.profile.signature import shown
from pipetrain.profile.store import Profile, hashed, load, save
from pipetrain.schedule import ALWAYS, SELECTIVE
from pipetrain.sim.balance import even
from pipetrain.sim.forecast import Forecast, Setting, forecast
from pipetrain.sim.planner import plans
from pipetrain.training.build import build_recipe, is_recomputed
from pipetrain.training.data import open_data
from pipetrain.training.job import Job
from pipetrain.training.plan import Prediction, StagePrediction, Weighed

# (job, worker, its argument, seconds that it may take) -> exit code; see `launch.run_job`
RunJob = Callable[[Job, Callable[[str, int], None], str, float], int]
Say = Callable[[str], None]


class MeasuringFailed(PipetrainError):
    """The layers could not be measured; what went wrong was said before."""

    def __init__(self, code: int) -> None:
        super().__init__("the layers could not be measured (see above); balance=even needs no measuring")
        self.exit_code = Exit(code)


def settle(job: Job, run_job: RunJob, say: Say) -> Job:
    """The job with nothing left open, and with a prediction where something was.

    Raises:
        ConfigError: if no plan fits, or measuring takes too long.
        MeasuringFailed: if it fails.
    """
    if not _is_open(job):
        return job
    recipe = build_recipe(job.cfg, job.data)
    rows = _rows(job, recipe)
    if job.cfg.plan.device is not None:
        return _settled(job, recipe, described_profile(job, recipe, rows), say)
    about = _about(job, recipe)
    profile = _kept(job, about, rows)
    if profile is None:
        profile = _keep(job, _measured(job, rows, run_job, say), about)
    return _settled(job, recipe, profile, say)


def settle_together(job: Job, device: torch.device) -> Job:
    """As `settle`, where all ranks of a process group call it: they measure, and the first one decides for all.

    Raises:
        ConfigError: on every rank, if no plan fits.
    """
    if not _is_open(job):
        return job
    recipe, rank = build_recipe(job.cfg, job.data), dist.get_rank()
    about, rows = _about(job, recipe), _rows(job, recipe)
    profile = _kept(job, about, rows) if rank == 0 else None
    is_kept = [profile is not None]
    dist.broadcast_object_list(is_kept, src=0)
    if not is_kept[0]:
        measured = measure_together(job, rows, device)
        profile = _keep(job, measured, about) if measured is not None else None
    said: list[Any] = [None, ""]
    if profile is not None:
        try:
            said[0] = _settled(job, recipe, profile, print).to_json()
        except ConfigError as error:
            said[1] = str(error)
    dist.broadcast_object_list(said, src=0)
    if said[1]:
        raise ConfigError(said[1])
    return Job.from_json(said[0])


def _is_open(job: Job) -> bool:
    """Whether there is something to choose, or to say."""
    return job.cfg.plan.device is not None or bool(left_open(job.cfg, len(job.devices)))


def _rows(job: Job, recipe: Recipe) -> list[int]:
    """The samples of the largest micro-batches, of all numbers of micro-batches that may be chosen."""
    counts = {choice.num_microbatches for choice in choices(job.cfg, len(job.devices), len(recipe.layers))}
    return sorted({-(-job.cfg.batch_size // count) for count in counts})


def _settled(job: Job, recipe: Recipe, profile: Profile, say: Say) -> Job:
    num_ranks, setting = len(job.devices), _setting(job, recipe, profile)
    measured = {rows for rows, cost in profile.costs.items() if cost is not None}
    ranked = plans(
        setting,
        [
            choice
            for choice in choices(job.cfg, num_ranks, len(recipe.layers))
            if setting.rows_of(choice.num_microbatches) in measured
        ],
    )
    best, opened = ranked[0], left_open(job.cfg, num_ranks)
    job.run.root.mkdir(parents=True, exist_ok=True)
    job.run.profile.write_text(profile.to_json())
    if opened:
        say(_told(best, opened, forecast(setting, best.choice, even(len(recipe.layers), len(best.balance)))))
    cfg = dataclasses.replace(job.cfg, **{key: _typed(best)[key] for key in (*opened, "balance")})
    return dataclasses.replace(job, cfg=cfg, prediction=_prediction(ranked, opened))


def _typed(plan: Forecast) -> dict[str, Any]:
    """The settings of a plan."""
    choice = plan.choice
    return {
        "schedule": choice.schedule,
        "partitions": len(plan.balance),
        "micro_batches": choice.num_microbatches,
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


def _kept(job: Job, about: Mapping[str, str], rows: Sequence[int]) -> Profile | None:
    """What was measured before, if it is all that is asked for."""
    found = load(Path(job.cfg.plan.cache_dir).expanduser(), about)
    return found if found is not None and set(rows) <= set(found.costs) else None


def _keep(job: Job, profile: Profile, about: Mapping[str, str]) -> Profile:
    """Beside what was measured before for micro-batches of other sizes."""
    folder = Path(job.cfg.plan.cache_dir).expanduser()
    before = load(folder, about)
    costs = {**(before.costs if before is not None else {}), **profile.costs}
    profile = dataclasses.replace(profile, about=about, costs=costs)
    save(folder, profile)
    return profile


def _measured(job: Job, rows: Sequence[int], run_job: RunJob, say: Say) -> Profile:
    """By worker processes, in a folder that is gone afterwards."""
    # Equal CPU processes: two tell all, and a message between them.
    devices = job.devices[:2] if job.devices[0] == "cpu" else tuple(dict.fromkeys(job.devices))
    say("measuring the layers, once for these sizes on this machine (balance=even does without)")
    limit_s = job.cfg.plan.timeout_s
    with tempfile.TemporaryDirectory(prefix="pipetrain-") as folder:
        run = RunPaths(Path(folder))
        measured = dataclasses.replace(job, devices=devices, run=run)
        try:
            code = run_job(measured, run_measuring_worker, json.dumps([measured.to_json(), list(rows)]), limit_s)
        except TimeoutError:
            layer = run.measuring.read_text() if run.measuring.exists() else "the first one"
            raise ConfigError(
                f"measuring the layers was not done after plan.timeout_s={limit_s:g} seconds, at layer {layer}; "
                "give it more, or use balance=even"
            ) from None
        if code != Exit.DONE:
            raise MeasuringFailed(code)
        return Profile.from_json(run.profile.read_text())


def _about(job: Job, recipe: Recipe) -> dict[str, str]:
    """Everything that the costs depend on."""
    cfg = job.cfg
    inputs, targets = open_data(cfg, job.data, "train").batch(0)
    takes = [str(recipe.taken_by(place)) for place in range(len(recipe.layers))]
    wanted = [f"{tensor.dtype}{tuple(tensor.shape[1:])}" for tensor in (inputs, targets)]
    return {
        "layers": hashed([*signatures_of(recipe), *takes, shown(recipe.loss_sum)]),
        "samples": ", ".join(wanted),
        "devices": ", ".join(sorted(set(map(_device_name, job.devices)))),
        "training": f"{cfg.precision} {shown(dataclasses.asdict(cfg.optimizer))} ema={cfg.ema}",
        "threads": str(cfg.threads),
        "versions": f"torch {torch.__version__}, pipetrain {pipetrain.__version__}",
    }


def _device_name(device: str) -> str:
    """Before any process has looked at it."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()


def _setting(job: Job, recipe: Recipe, profile: Profile) -> Setting:
    """What the planner must know of this job."""
    cfg, gib = job.cfg, job.cfg.plan.memory_gib
    kinds = list(profile.memory_bytes)
    policy = SELECTIVE if SELECTIVE in cfg.recompute else ALWAYS  # of the stages that recompute at all
    share = len(job.devices) if job.devices[0] == "cpu" else 1
    devices = [
        Device(
            name,
            memory_bytes=(profile.memory_bytes[kind] / share) if gib is None else gib * 2**30,
            slowness=profile.slowness[kind],
        )
        for name, kind in ((name, _kind_of(name, kinds)) for name in job.devices)
    ]
    return Setting(
        model={rows: cost for rows, cost in profile.costs.items() if cost is not None}.__getitem__,
        batch_size=cfg.batch_size,
        devices=tuple(devices),
        link=profile.link,
        recomputed=tuple(is_recomputed(cfg, policy, layer.name) for layer in recipe.layers),
        process_bytes=profile.process_bytes,
    )


def _kind_of(device: str, kinds: Sequence[str]) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else kinds[0]


def _prediction(ranked: Sequence[Forecast], opened: Sequence[str]) -> Prediction:
    """For the plan of the run, and to be compared with what is measured."""
    best = ranked[0]
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
        chosen=list(opened),
        weighed=[
            Weighed(_typed(plan), plan.step_s, plan.bubble_fraction, max(plan.rank_bytes), plan.fits) for plan in ranked
        ],
    )
