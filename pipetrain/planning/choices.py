"""What settings leave to the planner, and what it may choose from."""

import dataclasses
import itertools
from collections.abc import Iterator

from pipetrain.config import AUTO, PLANNED, Config
from pipetrain.derived import (
    is_number,
    least_samples,
    num_microbatches,
    num_ranks,
    num_replicas,
    num_stages,
    replica_microbatches,
    stale_family,
)
from pipetrain.errors import ConfigError
from pipetrain.schedule import ALWAYS, EXCEPT_LAST, NEVER, SCHEDULES, is_file, read_file
from pipetrain.sim.forecast import LEAST_VARIANCE, Choice

# In the order in which equally good ones are taken. Without those that add up gradients in reverse: their numbers are
# others, and what is left to the planner may change nothing but time.
_SCHEDULES = ("1f1b", "gpipe", "interleaved", "zb_h1", "zb_v")
_RECOMPUTE = (NEVER, EXCEPT_LAST, ALWAYS)
_STAGES_PER_RANK = (1, 2, 4, 8)
# Micro-batches for each rank: with fewer the bubble is most of a step, with more it is a few percent.
_FEWEST, _MOST = 0.5, 16


def left_open(cfg: Config, num_devices: int) -> tuple[str, ...]:
    """The settings that the planner is to choose, by their keys."""
    found = [
        key for key in PLANNED if getattr(cfg, key) == AUTO or (key == "balance" and cfg.balance == LEAST_VARIANCE)
    ]
    if is_file(cfg.schedule):  # which decides about the others
        found = [key for key in found if key in ("data_parallel", "recompute", "balance")]
    if found == ["balance"] and num_stages(cfg, num_ranks(cfg, num_devices)) == 1:
        return ()
    return tuple(found)


def choices(cfg: Config, num_devices: int, num_layers: int) -> list[Choice]:
    """All that the settings leave to the planner.

    Raises:
        ConfigError: if nothing is left to choose from.
    """
    given = range(1, num_devices + 1) if cfg.data_parallel == AUTO else [num_replicas(cfg)]
    found = [
        choice
        for replicas in given
        if num_devices % replicas == 0 and replicas <= cfg.batch_size
        for choice in _choices(dataclasses.replace(cfg, data_parallel=replicas), num_devices // replicas, num_layers)
    ]
    if not found:
        lengths = {len(value) for value in (cfg.balance, cfg.recompute) if isinstance(value, list)}
        raise ConfigError(
            f"{num_layers} layers on {num_devices} devices with data_parallel={cfg.data_parallel} "
            f"partitions={cfg.partitions} schedule={cfg.schedule} batch_size={cfg.batch_size}"
            f"{''.join(f' and a list of {n} stages' for n in sorted(lengths))}: there is no such plan; use fewer "
            "devices, or leave more open, such as partitions=auto schedule=auto"
        )
    return found


def _choices(cfg: Config, num_ranks: int, num_layers: int) -> list[Choice]:
    """With a given number of replicas."""
    if not _can_be_shared(cfg) or (is_file(cfg.schedule) and read_file(cfg.schedule).num_ranks != num_ranks):
        return []
    schedules = _SCHEDULES if cfg.schedule == AUTO else (cfg.schedule,)
    wanted = [cfg.recompute] if cfg.recompute != AUTO else list(_RECOMPUTE)
    balance = tuple(cfg.balance) if isinstance(cfg.balance, list) else cfg.balance
    num_steps = cfg.stale.drain_every if stale_family(cfg) else 1
    lengths = {len(value) for value in (cfg.balance, cfg.recompute) if isinstance(value, list)}
    return [
        Choice(
            schedule,
            each,
            m,
            tuple(recompute) if isinstance(recompute, list) else recompute,
            balance,
            num_steps,
            num_replicas(cfg),
        )
        for schedule in schedules
        for each in _stages_per_rank(cfg, schedule, num_ranks)
        for m, recompute in itertools.product(_microbatches(cfg, num_ranks), wanted)
        # Under gpipe the last stage has all its micro-batches in flight like the others: the exception changes nothing.
        if not (cfg.recompute == AUTO and schedule == "gpipe" and recompute == EXCEPT_LAST)
        if _num_stages(cfg, each, num_ranks) <= num_layers and lengths <= {_num_stages(cfg, each, num_ranks)}
    ]


def _can_be_shared(cfg: Config) -> bool:
    """Whether its replicas can have the micro-batches that one alone would have: the numbers depend on them."""
    replicas = num_replicas(cfg)
    if replicas == 1 or is_file(cfg.schedule) or stale_family(cfg):
        return True
    if cfg.micro_batches == AUTO:
        return cfg.batch_size // replicas >= least_samples(cfg)
    return num_microbatches(dataclasses.replace(cfg, data_parallel=1)) % replicas == 0


def _num_stages(cfg: Config, stages_per_rank: int, num_ranks: int) -> int:
    return num_stages(cfg, num_ranks) if stale_family(cfg) else stages_per_rank * num_ranks


def _stages_per_rank(cfg: Config, schedule: str, num_ranks: int) -> Iterator[int]:
    if stale_family(cfg):
        yield 1
        return
    if is_file(schedule) or is_number(cfg.partitions):
        each, left = divmod(num_stages(cfg, num_ranks), num_ranks)
        tried = [] if left else [each]
    else:
        tried = list(_STAGES_PER_RANK) if cfg.partitions == AUTO else [SCHEDULES[schedule].usual]
    yield from (n for n in tried if is_file(schedule) or SCHEDULES[schedule].fits(n * num_ranks, num_ranks))


def _microbatches(cfg: Config, num_ranks: int) -> list[int]:
    """Of each replica. Powers of two: twice as many are seldom worth less than a twentieth of a step or more than a
    half of it."""
    if cfg.micro_batches != AUTO or is_file(cfg.schedule) or stale_family(cfg):
        return [replica_microbatches(cfg)]
    most = max(1, min(_MOST * num_ranks, cfg.batch_size // num_replicas(cfg) // least_samples(cfg)))
    powers = [2**n for n in range(most.bit_length())]
    return [n for n in powers if n >= _FEWEST * num_ranks] or [powers[-1]]
