"""Rules about devices, stages, micro-batches, schedule and recompute."""

import fnmatch
from collections.abc import Sequence
from dataclasses import replace

from pipetrain.config import AUTO, BALANCES, AnythingConfig, Config
from pipetrain.derived import is_number, num_microbatches, num_replicas, num_stages, replica_microbatches, wanted_ranks
from pipetrain.devices import parse_devices
from pipetrain.errors import ConfigError, ScheduleError
from pipetrain.rules.stale import check_stale
from pipetrain.rules.words import shown
from pipetrain.schedule import POLICIES, SCHEDULES, SELECTIVE, STALE, build, is_file, read_file
from pipetrain.suggest import one_of


def check_pipeline(cfg: Config, num_gpus: int, world_size: int | None, problems: list[str]) -> None:
    """Adds what is wrong with the settings by themselves."""
    if not is_file(cfg.schedule) and cfg.schedule not in (*SCHEDULES, *STALE, AUTO):
        known = one_of(cfg.schedule, (*SCHEDULES, *STALE, AUTO))
        problems.append(f"schedule={cfg.schedule}: no such choice. {known}, or the path of a file that ends in .csv")
        return
    if world_size is not None and world_size < 1:
        return  # a number of devices to plan for, see check_plan
    try:
        devices = (
            parse_devices(cfg.devices, num_gpus, wanted_ranks(cfg)) if world_size is None else ("any",) * world_size
        )
    except ConfigError as error:
        problems.append(str(error))
        check_stale(cfg, 0, problems)
    else:
        ranks = _check_replicas(cfg, len(devices), problems)
        check_stale(cfg, ranks, problems)
        if world_size is not None and cfg.devices not in ("auto", "cpu"):
            problems.append(
                f"devices={cfg.devices}, but torchrun started {world_size} processes and chooses the devices; "
                "leave devices out, or use devices=auto where a file sets it"
            )
        if cfg.data_parallel == AUTO:
            problems += _problems_of_all(cfg, len(devices))
        elif ranks:
            _check_stages(cfg, ranks, problems)
    if isinstance(cfg.balance, list):
        bad = [n for n in cfg.balance if isinstance(n, bool) or not isinstance(n, int) or n < 1]
        if bad or not cfg.balance:
            problems.append(
                f"balance={shown(cfg.balance)} must be a list of whole numbers, each at least 1: "
                "every stage needs a layer"
            )
    elif cfg.balance not in BALANCES:
        problems.append(
            f"balance={cfg.balance} must be {', '.join(BALANCES)} or a list of layers per stage, such as "
            "balance=[2,3,3]"
        )
    if is_number(cfg.micro_batches) and cfg.micro_batches > cfg.batch_size >= 1:
        problems.append(
            f"micro_batches={cfg.micro_batches} is more than batch_size={cfg.batch_size}: a micro-batch needs at least "
            f"one sample; use micro_batches={cfg.batch_size} or a larger batch_size"
        )


def _problems_of_all(cfg: Config, num_devices: int) -> list[str]:
    """What is wrong whatever the number of replicas; nothing if one of them is right."""
    found: list[list[str]] = []
    for replicas in (n for n in range(1, num_devices + 1) if num_devices % n == 0):
        found.append([])
        _check_stages(replace(cfg, data_parallel=replicas), num_devices // replicas, found[-1])
    return min(found, key=len)


def _check_replicas(cfg: Config, num_devices: int, problems: list[str]) -> int:
    """Returns the ranks of each pipeline; 0 if that makes no sense."""
    replicas, given = num_replicas(cfg), f"data_parallel={cfg.data_parallel}"
    if replicas < 1:
        return 0
    if cfg.data_parallel != 1 and cfg.action == "check":
        problems.append(
            f"action=check compares sums to the last bit, but {given} adds them up in another order; leave "
            "data_parallel out"
        )
    if replicas > max(1, cfg.batch_size):
        problems.append(f"{given} is more than batch_size={cfg.batch_size} samples to share; use a larger batch_size")
    elif is_number(cfg.micro_batches) and cfg.micro_batches % replicas:
        near = max(1, round(cfg.micro_batches / replicas)) * replicas
        problems.append(
            f"micro_batches={cfg.micro_batches}, of the whole mini-batch, cannot be shared evenly by {given} replicas; "
            f"use micro_batches={near}"
        )
    if num_devices % replicas:
        near = max(1, round(num_devices / replicas)) * replicas
        divisors = [str(n) for n in range(1, num_devices + 1) if num_devices % n == 0]
        problems.append(
            f"{num_devices} devices cannot be shared evenly by {given} replicas; use data_parallel="
            f"{' or '.join(divisors)}, or devices={near}"
        )
        return 0
    return num_devices // replicas


def _check_stages(cfg: Config, num_ranks: int, problems: list[str]) -> None:
    """Whether the stages fit the ranks, and what is said of each stage the stages."""
    if is_file(cfg.schedule):
        if problem := _file_problem(cfg, num_ranks):
            problems.append(problem)
            return
    elif cfg.schedule in STALE:
        if num_stages(cfg, num_ranks) != STALE[cfg.schedule].num_stages(num_ranks):
            problems.append(_wrong_stages(cfg, num_ranks))
            return
    elif cfg.schedule == AUTO:
        if is_number(cfg.partitions) and cfg.partitions % num_ranks:
            problems.append(
                f"partitions={cfg.partitions} cannot be spread evenly over {num_ranks} devices; use a multiple of "
                f"{num_ranks}, or partitions=auto"
            )
            return
    else:
        family = SCHEDULES[cfg.schedule]
        if not family.fits(num_stages(cfg, num_ranks), num_ranks):
            exact = {1: "one stage", 2: "two stages"}.get(family.most or 0)
            rule = exact or f"the same number of stages, at least {family.fewest},"
            problems.append(
                f"partitions={cfg.partitions}, but schedule={cfg.schedule} runs {rule} on each of the "
                f"{num_ranks} devices; use partitions={num_ranks * family.usual} or leave partitions out"
                + (f", or devices={cfg.partitions}" if family.most == 1 else "")
            )
            return
    number = num_stages(cfg, num_ranks)
    if not is_number(cfg.partitions) and AUTO in (cfg.schedule, cfg.partitions):
        for key, value in (("balance", cfg.balance), ("recompute", cfg.recompute)):
            if isinstance(value, list) and value and len(value) % num_ranks:
                problems.append(
                    f"{key}={shown(value)} names {len(value)} stages, which cannot be spread evenly over {num_ranks} "
                    f"devices; use a list of {num_ranks}, or of a multiple"
                )
        _check_recompute(cfg, None, problems)
        return
    there_are = f"{number} devices" if number == num_ranks else f"{number} stages on {num_ranks} devices"
    there_are += " in each replica" if num_replicas(cfg) > 1 else ""
    if isinstance(cfg.balance, list) and cfg.balance and len(cfg.balance) != number:
        use = f"devices={len(cfg.balance) * num_replicas(cfg)}, or " if number == num_ranks else ""
        problems.append(
            f"balance={shown(cfg.balance)} names {len(cfg.balance)} stages, but there are {there_are}; "
            f"use {use}a list of {number}, or balance=even"
        )
    _check_recompute(cfg, number, problems)


def _wrong_stages(cfg: Config, num_ranks: int) -> str:
    family = STALE[cfg.schedule]
    rule = (
        "one stage more than devices: the first device has the first and the last one" if family.extra else "one each"
    )
    return (
        f"partitions={cfg.partitions}, but schedule={cfg.schedule} runs {rule}, and there are {num_ranks} devices; use "
        f"partitions={family.num_stages(num_ranks)} or leave partitions out, or devices="
        f"{max(1, num_stages(cfg, num_ranks) - family.extra)}"
    )


def _file_problem(cfg: Config, num_ranks: int) -> str | None:
    """What is wrong with a schedule of the user's own; also whether it can run at all."""
    schedule = read_file(cfg.schedule)
    if schedule.num_ranks != num_ranks:
        return (
            f"schedule={cfg.schedule} has {schedule.num_ranks} lines, one for each device, but there are {num_ranks} "
            f"devices; use devices={schedule.num_ranks}, or another schedule"
        )
    if cfg.partitions not in (None, AUTO, schedule.num_stages):
        return f"partitions={cfg.partitions}, but schedule={cfg.schedule} has {schedule.num_stages} stages"
    if replica_microbatches(cfg) != schedule.num_microbatches:
        return (
            f"micro_batches={cfg.micro_batches}, but schedule={cfg.schedule} has {schedule.num_microbatches}"
            f"{' in each replica' if num_replicas(cfg) > 1 else ''}; leave micro_batches out"
        )
    if num_microbatches(cfg) > cfg.batch_size:
        return (
            f"schedule={cfg.schedule} has {num_microbatches(cfg)} micro-batches, more than "
            f"batch_size={cfg.batch_size} samples; use batch_size={num_microbatches(cfg)} or more"
        )
    try:
        build(cfg.schedule, num_ranks, schedule.num_microbatches, recompute="never")
    except ScheduleError as error:
        return str(error)
    return None


def _check_recompute(cfg: Config, number: int | None, problems: list[str]) -> None:
    """
    Args:
        number: of stages; None where the planner is to choose it.
    """
    if cfg.recompute == AUTO and cfg.recompute_layers is None:
        return
    is_list = isinstance(cfg.recompute, list)
    policies, known = (cfg.recompute, POLICIES) if is_list else ([cfg.recompute], (*POLICIES, AUTO))
    for policy in policies:
        if policy not in known:
            problems.append(f"recompute={shown(cfg.recompute)}: no such choice. {one_of(str(policy), known)}")
            return
    if isinstance(cfg.recompute, list) and number is not None and len(policies) != number:
        problems.append(
            f"recompute={shown(cfg.recompute)} must have a policy for each of the {number} stages, or be one for all"
        )
    if (SELECTIVE in policies) != bool(cfg.recompute_layers):
        problems.append(
            f"recompute={shown(cfg.recompute)} and recompute_layers={shown(cfg.recompute_layers)} do not go together: "
            "type recompute=selective 'recompute_layers=[blocks.*]', or another recompute alone"
        )


def check_model(cfg: Config, num_layers: int, num_stages: int) -> None:
    """Checks the rules between the pipeline and the layers of the built recipe.

    Raises:
        ConfigError: if the balance does not fit the layers, or there are more stages than layers.
    """
    if num_stages > num_layers:
        way_out = (
            "a model whose forward is made of smaller sub-modules, or a list of blocks from the factory"
            if isinstance(cfg.model, AnythingConfig)
            else "a deeper model"
        )
        most = _most_for(cfg, num_layers)
        fewer = f"{_key_of_stages(cfg)}={most} or fewer, or " if most else ""
        raise ConfigError(
            f"{_what_makes_stages(cfg)} makes {num_stages} stages, but the model has only {num_layers} layers "
            f"and every stage needs one; use {fewer}{way_out}"
        )
    if isinstance(cfg.balance, list) and sum(cfg.balance) != num_layers:
        last = num_layers - sum(cfg.balance[:-1])
        remedy = f"the last number could be {last}" if last >= 1 else "use smaller numbers or balance=even"
        raise ConfigError(
            f"balance={shown(cfg.balance)} sums to {sum(cfg.balance)}, but the model has {num_layers} layers ({remedy})"
        )


def _key_of_stages(cfg: Config) -> str:
    if is_number(cfg.partitions):
        return "partitions"
    return "plan.devices" if cfg.plan.devices else "devices"


def _most_for(cfg: Config, num_layers: int) -> int:
    """The most partitions or devices with which every stage has a layer; 0 where there are none."""
    if is_number(cfg.partitions):
        return num_layers
    counts = (count for count in range(num_layers, 0, -1) if num_stages(cfg, count) <= num_layers)
    return next(counts, 0) * num_replicas(cfg)


def _what_makes_stages(cfg: Config) -> str:
    if is_number(cfg.partitions):
        return f"partitions={cfg.partitions}"
    usual = num_stages(cfg, 1) == 1
    devices = f"plan.devices={shown(cfg.plan.devices)}" if cfg.plan.devices else f"devices={cfg.devices}"
    return devices + ("" if usual else f" with schedule={cfg.schedule}")


def check_recomputed_layers(cfg: Config, layers: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: if a pattern of `recompute_layers` is that of no layer.
    """
    for pattern in cfg.recompute_layers or ():
        if not fnmatch.filter(layers, pattern):
            raise ConfigError(
                f"recompute_layers={shown(cfg.recompute_layers)}: {pattern} is no layer of the model, which has "
                f"{', '.join(layers[:8])}{', ...' if len(layers) > 8 else ''}"
            )
