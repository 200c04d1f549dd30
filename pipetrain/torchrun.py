"""What torchrun, or a job script that sets the same variables, tells this process. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipetrain.errors import ConfigError

_NEEDED = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def torchrun_rank(environ: Mapping[str, str]) -> int | None:
    """The rank of this process in a job that was started from outside, or None."""
    rank = environ.get("RANK", "")
    return int(rank) if rank.isdigit() and environ.get("WORLD_SIZE", "").isdigit() else None


@dataclass(frozen=True)
class Place:
    """Where this process stands in the job."""

    rank: int
    world_size: int
    local_rank: int
    own_gpu: bool

    @staticmethod
    def read(environ: Mapping[str, str]) -> "Place | None":
        """Reads the variables; None if there is no such job.

        Raises:
            ConfigError: if some are there and others are not.
        """
        rank = torchrun_rank(environ)
        if rank is None:
            return None
        missing = [name for name in _NEEDED if name not in environ]
        if missing:
            raise ConfigError(
                f"RANK and WORLD_SIZE are set, but {', '.join(missing)} is not: start the job with torchrun, which "
                "sets them all, or unset RANK and WORLD_SIZE to let pipetrain start its own processes"
            )
        # A batch system may show each process a single GPU, its own.
        visible = environ.get("CUDA_VISIBLE_DEVICES", "")
        return Place(rank, int(environ["WORLD_SIZE"]), int(environ["LOCAL_RANK"]), visible != "" and "," not in visible)

    def devices(self, asked_for: object, num_gpus: int) -> tuple[str, ...]:
        """One device name for each rank; of the other ranks only the kind is known.

        Args:
            asked_for: `auto`, or `cpu` to leave GPUs alone.
            num_gpus: GPUs that this process sees.

        Raises:
            ConfigError: if there are fewer GPUs than processes on this machine.
        """
        if num_gpus == 0 or asked_for == "cpu":
            return ("cpu",) * self.world_size
        index = 0 if self.own_gpu and num_gpus == 1 else self.local_rank
        if index >= num_gpus:
            raise ConfigError(
                f"rank {self.rank} is process {index} of this machine (counted from 0), which has {num_gpus} GPUs: "
                f"use --nproc-per-node={num_gpus}, or devices=cpu"
            )
        return tuple(f"cuda:{index}" if rank == self.rank else "cuda" for rank in range(self.world_size))
