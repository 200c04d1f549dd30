"""What the variables of torchrun mean."""

import pytest

from pipetrain.errors import ConfigError
from pipetrain.torchrun import Place, torchrun_rank

JOB = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host0", "MASTER_PORT": "29500"}


def place(**changes: str) -> Place:
    found = Place.read(JOB | changes)
    assert found is not None
    return found


def test_without_the_variables_there_is_no_job() -> None:
    assert Place.read({}) is None
    assert torchrun_rank({"RANK": "1"}) is None
    assert torchrun_rank(JOB) == 3


@pytest.mark.parametrize("missing", ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_a_job_is_refused(missing: str) -> None:
    with pytest.raises(
        ConfigError, match=f"RANK and WORLD_SIZE are set, but {missing} is not: start the job with torchrun"
    ):
        Place.read({name: value for name, value in JOB.items() if name != missing})


def test_every_process_takes_the_gpu_of_its_local_rank() -> None:
    assert place().devices("auto", num_gpus=2) == ("cuda", "cuda", "cuda", "cuda:1")
    assert place().devices("auto", num_gpus=0) == ("cpu",) * 4
    assert place().devices("cpu", num_gpus=2) == ("cpu",) * 4
    assert place(CUDA_VISIBLE_DEVICES="5").devices("auto", num_gpus=1) == ("cuda", "cuda", "cuda", "cuda:0")


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match="which has 1 GPUs: use --nproc-per-node=1, or devices=cpu"):
        place().devices("auto", num_gpus=1)
