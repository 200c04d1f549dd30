"""The same command on GPUs. Skipped, with the reason, where there are none."""

from pathlib import Path

import pytest
import torch
from commands import QUICK, Command, numbers

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.dist, pytest.mark.gpu]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path, tmp_path / "cache")


@pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_trains_what_a_cpu_trains(command: Command, precision: str) -> None:
    words = [*QUICK, "steps=5", "model.dropout=0", f"precision={precision}"]
    for name, devices in (("cpu", "cpu"), ("gpu", "cuda:0")):
        done = command(*words, f"name={name}", f"devices={devices}")
        assert done.returncode == 0, done.stderr
    cpu, gpu = (numbers(command.run_folder(f"runs/{name}/*")) for name in ("cpu", "gpu"))
    for (_, expected, *_), (_, loss, *_) in zip(cpu, gpu, strict=True):
        assert loss == pytest.approx(expected, rel=1e-4 if precision == "fp32" else 2e-2)


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs: NCCL does not let two ranks share one")
def test_two_gpus_give_the_numbers_of_one(command: Command) -> None:
    for devices in ("cuda:0", "[cuda:0,cuda:1]"):
        done = command(*QUICK, "steps=5", f"name=stages{len(devices)}", f"devices={devices}")
        assert done.returncode == 0, done.stderr
    one, two = (numbers(command.run_folder(f"runs/stages{length}/*")) for length in (6, 15))
    for (_, expected, *_), (_, loss, *_) in zip(one, two, strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
