"""From checked settings to running processes: local workers, or one rank of a torchrun job. The first failure wins.

Local workers are started from a fork server that has torch loaded already. They meet through a file in the run folder,
so there is no port to collide on and nothing listens but gloo's own loopback pairs.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipetrain import config, rules
from pipetrain.config import AUTO, AmoebaNetConfig, AnythingConfig, Config, ImagesConfig, SyntheticConfig
from pipetrain.derived import num_microbatches, num_ranks, num_replicas, num_stages, wanted_ranks
from pipetrain.devices import parse_devices
from pipetrain.environment import write_environment
from pipetrain.errors import ConfigError, Exit, PipetrainError
from pipetrain.models import DoesNotFit, Recipe, check_layers, try_out
from pipetrain.paths import RunPaths
from pipetrain.planning.settle import settle, settle_together
from pipetrain.processes import Ended, run_workers
from pipetrain.torchrun import Place
from pipetrain.training import checkpoint, status
from pipetrain.training.build import build_recipe
from pipetrain.training.data import Prepared, image_facts, open_data, prepare_data
from pipetrain.training.init_from import find_start
from pipetrain.training.job import Job
from pipetrain.training.memory import ADVICE
from pipetrain.training.vocabulary import tokenizer_id
from pipetrain.worker import explain_failure, run_local_worker, run_torchrun_rank

_LARGE_FOR_SMALL_STEM = 96  # pixels
# The ends of a run behind which there is a checkpoint, and their names.
_SAVED = {Exit.DONE: "finished", Exit.PREEMPTED: "preempted, saved", Exit.INTERRUPTED: "interrupted, saved"}


def launch(cfg: Config, root: Path) -> int:
    """Trains; returns the exit code of the run.

    Args:
        cfg: the settings, not checked yet.
        root: the run folder.

    Raises:
        PipetrainError: for everything that is found before a worker starts.
    """
    # Under torchrun only the first rank was given a folder for the run; a resumed run has one for all.
    run = RunPaths((Path(cfg.resume) if cfg.resume else root).absolute())
    num_gpus = torch.cuda.device_count()
    place = Place.read(os.environ)
    if place is None:
        job = prepare(cfg, run, num_gpus, say=_say)
    else:
        devices = place.devices(cfg.devices, num_gpus)
        try:
            job = prepare(cfg, run, num_gpus, devices, say=_say if place.rank == 0 else lambda text: None)
        except PipetrainError as error:
            if place.rank == 0:
                raise
            return int(error.exit_code)  # every rank finds the same; the first one says it
    run.root.mkdir(parents=True, exist_ok=True)
    if place is not None:
        with _locked(run) if place.rank == 0 else contextlib.nullcontext():
            return _run_as_torchrun_rank(job, place.rank)
    job = settle(job, run_job, _say)
    with _locked(run):
        return _run_local_workers(job)


# ---- before a worker starts --------------------------------------------------------------------------------------


def prepare(
    cfg: Config,
    run: RunPaths,
    num_gpus: int,
    devices: tuple[str, ...] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Job:
    """Checks every rule, prepares the data, and finds the checkpoint of a resumed run or that of the run to start from.

    Args:
        num_gpus: GPUs of this machine.
        devices: one for each rank, where torchrun decides; None takes the settings'.
        say: takes a line for the user.

    Raises:
        ConfigError: with all that is wrong with the settings by themselves, or the first rule that a fact breaks.
        CheckpointError: if a run is to be resumed or to start from that has no usable checkpoint.
    """
    world_size = len(devices) if devices is not None else None
    rules.check(cfg, num_gpus, world_size)
    if devices is None:
        devices = parse_devices(cfg.devices, num_gpus, wanted_ranks(cfg))
    saved: checkpoint.Manifest | None = None
    found: Path | None = None
    if cfg.resume is not None:
        found, skipped = checkpoint.find_usable(run.checkpoints)
        for reason in skipped:
            say(f"skipped a checkpoint: {reason}")
        saved = checkpoint.read_manifest(found)
        rules.check_resume(cfg, saved.config)
        cfg = _with_micro_batches_of(saved, cfg)
        rules.check(cfg, num_gpus, world_size)
    data = prepare_data(cfg, say)
    steps_of_epoch = open_data(cfg, data, "train").num_batches
    if cfg.eval.every:
        try:
            open_data(cfg, data, "valid")
        except ConfigError as error:
            raise ConfigError(f"{error}; or train without evaluation: eval.every=0") from error
    recipe = build_recipe(cfg, data)
    fewest = 1 if cfg.data_parallel == AUTO else num_ranks(cfg, len(devices))
    _check_model(cfg, recipe, data, num_stages(cfg, fewest))
    _warn_of_large_images(cfg, data, say)
    # A resumed run has its weights, whatever its first start took them from.
    start: Path | None = None
    if cfg.init_from is not None and saved is None:
        start = find_start(cfg.init_from, recipe, tokenizer_id(data), say)
    job = Job(cfg, run, data, devices, found, start)
    if saved is not None and saved.data != job.data_id:
        path = getattr(cfg.data, "path", None)
        raise ConfigError(
            f"the data of {f'data.path={path}' if path else f'data={cfg.data.name}'} are not those that {run.root} was "
            "trained on; put the old ones back, or start a new run"
        )
    if saved is not None:
        _check_goes_on(cfg, saved.step, steps_of_epoch)
        say(f"going on from step {saved.step}{_changes(cfg, saved)}")
    return job


def _with_micro_batches_of(saved: checkpoint.Manifest, cfg: Config) -> Config:
    """The numbers of a run depend on its micro-batches, so they stay; what else is left open may be chosen anew."""
    if cfg.micro_batches == AUTO:
        return dataclasses.replace(cfg, micro_batches=saved.config["micro_batches"])
    has_other_replicas = cfg.data_parallel != saved.config.get("data_parallel", 1)
    if cfg.micro_batches is None and has_other_replicas and cfg.schedule == saved.config["schedule"]:
        return dataclasses.replace(cfg, micro_batches=num_microbatches(config.from_json(json.dumps(saved.config))))
    return cfg


def _check_model(cfg: Config, recipe: Recipe, data: Prepared | None, stages: int) -> None:
    """Everything that is wrong between the model, the data and the devices; whether it runs at all comes first."""
    names = [layer.name for layer in recipe.layers]
    checks = [partial(rules.check_model, cfg, len(names), stages), partial(rules.check_recomputed_layers, cfg, names)]
    if isinstance(cfg.model, AnythingConfig):
        checks.insert(0, partial(_try_out, cfg, recipe, data))
    problems: list[ConfigError] = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems.append(error)
    if problems:
        raise ConfigError("\n".join(map(str, problems))) from problems[0].__cause__


def _try_out(cfg: Config, recipe: Recipe, data: Prepared | None) -> None:
    """The first rows of the first batch, as many as the smallest micro-batch has."""
    rows = cfg.batch_size // num_microbatches(cfg)
    inputs, targets = open_data(cfg, data, "train").batch(0)
    try:
        some = tuple(tensor[:rows] for tensor in inputs)
        try_out(recipe, some, (targets[:rows],))
        check_layers(recipe, some, (targets[:rows],))
    except ConfigError as error:
        remedy = _remedy(cfg, str(error)) if isinstance(error, DoesNotFit) else ""
        raise ConfigError(
            f"model={cfg.model.name}, a micro-batch of {rows} from data={cfg.data.name}: {error}{remedy}"
        ) from error.__cause__


def _remedy(cfg: Config, failure: str) -> str:
    """What to type where a layer cannot take what the data give."""
    fewer = "; BatchNorm needs more samples in a micro-batch, as with micro_batches=1" if "1 value" in failure else ""
    if isinstance(cfg.data, SyntheticConfig):
        shape = ",".join(map(str, cfg.data.shape))
        return f"; if the module takes other sizes than data.shape=[{shape}], type them: data.shape=[3,224,224]{fewer}"
    if isinstance(cfg.data, ImagesConfig):
        return f"; if the module takes other images, type data.size=224 or data.channels=3{fewer}"
    return (
        "; if the module takes samples of another length, type another data.seq_len; if it takes none of token "
        f"numbers, data=synthetic 'data.shape=[3,224,224]'{fewer}"
    )


def _warn_of_large_images(cfg: Config, data: Prepared | None, say: Callable[[str], None]) -> None:
    if not isinstance(cfg.model, AmoebaNetConfig) or cfg.model.stem != "small":
        return
    height, width = image_facts(cfg, data).image_size
    if max(height, width) > _LARGE_FOR_SMALL_STEM:
        say(
            f"images of {height}x{width} are many pixels for model.stem=small, which is made for some 28 to 64: "
            "data.size=64 or model.stem=imagenet trains many times faster"
        )


def _check_goes_on(cfg: Config, step: int, steps_of_epoch: int) -> None:
    last = cfg.steps or (cfg.epochs or 0) * steps_of_epoch
    if last <= step:
        given = f"steps={cfg.steps}" if cfg.steps else f"epochs={cfg.epochs}, which is {last} steps,"
        more = f"steps={2 * step}" if cfg.steps else f"epochs={2 * -(-step // steps_of_epoch)}"
        raise ConfigError(f"the run has reached step {step} and {given} ends there or before; to go on: {more}")


def _changes(cfg: Config, saved: checkpoint.Manifest) -> str:
    changed = [f"{key}={new} (was {old})" for key, old, new in rules.changes(cfg, saved.config)]
    return f", with {', '.join(changed)}" if changed else ""


@contextlib.contextmanager
def _locked(run: RunPaths) -> Iterator[None]:
    """One living process for a run folder; the lock goes with the process, however it ends."""
    with run.lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{run.root} is being written by another process; wait for it or stop it first") from None
        yield


# ---- local workers --------------------------------------------------------------------------------------------------


def _run_local_workers(job: Job) -> int:
    run = job.run
    write_environment(run)
    _say(f"run folder: {_shown(run.root)}")
    if job.devices[0] == "cpu" and len(job.devices) > 1:
        stages = num_stages(job.cfg, job.num_ranks)
        each = "one for each stage" if stages == job.num_ranks else f"{stages} stages"
        replicas = num_replicas(job.cfg)
        each += f" of {replicas} replicas" if replicas > 1 else ""
        _say(f"{len(job.devices)} CPU processes, {each}")
    code = run_job(job)
    if code in _SAVED:
        _say_what_next(job, code)
    return code


def run_job(
    job: Job,
    worker: Callable[[str, int], None] = run_local_worker,
    argument: str | None = None,
    limit_s: float = math.inf,
) -> int:
    """Runs `worker(argument, rank)` in a local process for each device; prints a failure.

    Args:
        argument: the job as JSON, if it is left out.

    Returns:
        The exit code of the run.

    Raises:
        TimeoutError: if that takes longer than `limit_s` seconds.
    """
    run = job.run
    shutil.rmtree(run.scratch, ignore_errors=True)
    run.scratch.mkdir(mode=0o700)
    before = status.read(run)  # of a resumed run
    step, metrics = before.get("step", 0), before.get("metrics", {})
    status.write(run, "starting", step=step, exit_code=None, error=None, metrics=metrics)
    argument = job.to_json() if argument is None else argument
    ended = run_workers(worker, argument, len(job.devices), gpus=job.devices[0] != "cpu", limit_s=limit_s)
    if ended.timed_out:
        raise TimeoutError
    code = _outcome(job, ended)
    shutil.rmtree(run.scratch, ignore_errors=True)
    return code


def _outcome(job: Job, ended: Ended) -> int:
    """Decides how the run ended; prints a failure and writes it into `status.json`."""
    run = job.run
    if len(set(ended.codes)) == 1 and ended.codes[0] in _SAVED:
        return int(ended.codes[0])
    records = sorted((json.loads(path.read_text()) for path in run.scratch.glob("failure.*.json")), key=_blame)
    silent = {rank: code for rank, code in enumerate(ended.codes) if code and not run.failure(rank).exists()}
    if records and not records[0]["secondary"]:
        error, shown, code = records[0]["error"], records[0]["traceback"], int(records[0]["exit_code"])
    elif ended.signalled is not None:
        code = Exit.INTERRUPTED if ended.signalled is signal.SIGINT else Exit.TERMINATED
        error, shown = f"stopped by {ended.signalled.name} before a step could be finished and saved", ""
    elif silent or not records:
        error, shown, code = _silent_death(job, silent), "", Exit.FAILED
    else:  # only victims: the best that is known
        error, shown, code = records[0]["error"], records[0]["traceback"], int(records[0]["exit_code"])
    _complain(error, shown)
    _write_failure(run, "interrupted" if ended.signalled is not None else "failed", error, int(code))
    return int(code)


def _write_failure(run: RunPaths, state: str, error: str, code: int) -> None:
    """Adds the end to what `status.json` said while the run was living."""
    before = status.read(run)
    step, metrics = before.get("step", 0), before.get("metrics", {})
    with contextlib.suppress(OSError):  # a full disk may be the very failure
        status.write(run, state, step=step, exit_code=code, error=error, metrics=metrics)


def _blame(record: dict[str, Any]) -> tuple[bool, int]:
    """A rank that lost its neighbour is a victim, whenever it noticed."""
    return record["secondary"], record["time_ns"]


def _silent_death(job: Job, silent: dict[int, int]) -> str:
    """Names the first rank that ended without a word: killed from outside, or by a crash in native code."""
    if not silent:
        return "the workers did not end by themselves"
    rank, code = next(iter(silent.items()))
    if code >= 0:
        return f"{job.place_of(rank)} ended without a message (exit code {code})"
    name = signal.Signals(-code).name
    hint = f". If the system did it, it ran {ADVICE}" if name == "SIGKILL" else ""
    return f"{job.place_of(rank)} was killed by {name}{hint}"


# ---- torchrun ----------------------------------------------------------------------------------------------------


def _run_as_torchrun_rank(job: Job, rank: int) -> int:
    """torchrun shows what its processes print: the failing rank speaks, its victims keep silent."""
    if rank == 0:
        write_environment(job.run)
        _say(f"run folder: {_shown(job.run.root)}")
    try:
        code = run_torchrun_rank(job, settle_together)
        if rank == 0 and code in _SAVED:
            _say_what_next(job, code)
        return int(code)
    except Exception as error:
        failure = explain_failure(job, rank, error)
    if (failure.traceback and not failure.secondary) or (not failure.traceback and rank == 0):
        _complain(failure.error, failure.traceback)
    if rank == 0:
        text = "another rank failed; torchrun's output names it" if failure.secondary else failure.error
        _write_failure(job.run, "failed", text, failure.exit_code)
    os._exit(failure.exit_code)  # at once: a socket that stays open would keep the neighbours waiting


# ---- words -------------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _complain(error: str, shown: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"error: {error}\n{shown}")
    sys.stderr.flush()


def _shown(path: Path) -> str:
    """The path as the user would type it from here."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def _say_what_next(job: Job, code: int) -> None:
    run, step = job.run, status.read(job.run).get("step", 0)
    longer = f" epochs={2 * job.cfg.epochs}" if job.cfg.epochs else f" steps={2 * step}"
    more = longer if code == Exit.DONE else ""
    _say(
        f"{_SAVED[Exit(code)]} at step {step}\n"
        f"run folder:  {_shown(run.root)}\n"
        f"resume:      {_command('pipetrain')} resume={_shown(run.root)}{more}\n"
        f"TensorBoard: {_command('tensorboard')} --logdir {_shown(run.root)}"
    )


def _command(name: str) -> str:
    """How the user starts a program of this environment: by name, or by path where it is not active."""
    beside = Path(sys.executable).parent / name
    return _shown(beside) if shutil.which(name) is None and beside.exists() else name
