"""What follows from the settings: the usual value where nothing is said, or where the planner is yet to choose.

No torch here, as in `config`.
"""

from typing import Any

from pipetrain import schedule
from pipetrain.config import AmoebaNetConfig, Config, TransformerXLConfig
from pipetrain.schedule import SCHEDULES, STALE, StaleFamily, is_file, read_file
from pipetrain.schedule.stale import LOCKED

MAX_DEFAULT_MICRO_BATCHES = 16
MIN_DEFAULT_SAMPLES = 4  # in a micro-batch of a model with BatchNorm, which normalises each by itself
ONE_MICRO_BATCH = ("ouroboros", "pipedream")  # schedules with an update after every one


def num_replicas(cfg: Config) -> int:
    """Pipelines that share each mini-batch; 1 while the planner is to choose."""
    return int(cfg.data_parallel) if is_number(cfg.data_parallel) else 1


def num_ranks(cfg: Config, num_devices: int) -> int:
    """Of each pipeline."""
    return num_devices // num_replicas(cfg)


def num_microbatches(cfg: Config) -> int:
    """Micro-batches of one mini-batch, of all replicas together. The default does not depend on the devices, and on the
    replicas only where it has to be a multiple: numbers must not either."""
    if is_number(cfg.micro_batches):
        return int(cfg.micro_batches)
    replicas = num_replicas(cfg)
    if is_file(cfg.schedule):
        return read_file(cfg.schedule).num_microbatches * replicas
    if cfg.schedule in ONE_MICRO_BATCH:
        return replicas
    usual = min(MAX_DEFAULT_MICRO_BATCHES, max(1, cfg.batch_size // least_samples(cfg)))
    return max(1, usual // replicas) * replicas


def replica_microbatches(cfg: Config) -> int:
    """Micro-batches of one mini-batch in each pipeline."""
    return num_microbatches(cfg) // num_replicas(cfg)


def least_samples(cfg: Config) -> int:
    """In a micro-batch, where nobody says otherwise."""
    return MIN_DEFAULT_SAMPLES if isinstance(cfg.model, AmoebaNetConfig) else 1


def num_stages(cfg: Config, num_ranks: int) -> int:
    """Stages of the whole pipeline: the partitions asked for, or as many on each rank as the schedule usually has."""
    if is_file(cfg.schedule):
        return read_file(cfg.schedule).num_stages
    if is_number(cfg.partitions):
        return int(cfg.partitions)
    family = STALE.get(cfg.schedule)
    return num_ranks * _usual_stages(cfg) if family is None else family.num_stages(num_ranks)


def wanted_ranks(cfg: Config) -> int | None:
    """How many ranks of all pipelines `devices=auto` should give, where a setting says it."""
    replicas = num_replicas(cfg)
    if is_file(cfg.schedule):
        return read_file(cfg.schedule).num_ranks * replicas
    extra = STALE[cfg.schedule].extra if cfg.schedule in STALE else 0
    if is_number(cfg.partitions):
        return max(1, (int(cfg.partitions) - extra) // _usual_stages(cfg)) * replicas
    return replicas if replicas > 1 else None


def remembers(cfg: Config) -> bool:
    """Whether the model carries something from one sample to the next."""
    return isinstance(cfg.model, TransformerXLConfig) and cfg.model.memory + (cfg.model.evaluation_memory or 0) > 0


def stale_family(cfg: Config) -> StaleFamily | None:
    """Of a stale schedule."""
    return schedule.stale_family(cfg.schedule, locked=cfg.stale.tied == LOCKED)


def _usual_stages(cfg: Config) -> int:
    """On each rank."""
    family = SCHEDULES.get(cfg.schedule)  # none where the planner is to choose, or where rules will object
    return 1 if family is None else family.usual


def is_number(value: Any) -> bool:
    """Whether it is a whole one."""
    return isinstance(value, int) and not isinstance(value, bool)
