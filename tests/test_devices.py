"""What every form of `devices=` gives, with and without GPUs."""

from typing import Any

import pytest

from pipetrain.devices import parse_devices
from pipetrain.errors import ConfigError


@pytest.mark.parametrize(
    ("devices", "num_gpus", "partitions", "names"),
    [
        ("auto", 0, None, ["cpu"]),
        ("auto", 0, 3, ["cpu"] * 3),
        ("auto", 4, None, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
        ("auto", 4, 2, ["cuda:0", "cuda:1"]),
        (1, 0, None, ["cpu"]),
        (4, 0, None, ["cpu"] * 4),
        ("4", 0, None, ["cpu"] * 4),
        (2, 4, None, ["cuda:0", "cuda:1"]),
        ("cpu", 4, None, ["cpu"]),
        ("cpu:4", 0, None, ["cpu"] * 4),
        (" cpu:2 ", 4, None, ["cpu"] * 2),
        ("cuda", 2, None, ["cuda:0"]),
        ("cuda:1", 2, None, ["cuda:1"]),
        ([0, 1], 2, None, ["cuda:0", "cuda:1"]),
        ([1, 0], 2, None, ["cuda:1", "cuda:0"]),
        (["cuda:0", "cuda:1"], 2, None, ["cuda:0", "cuda:1"]),
        (["cpu", "cpu"], 2, None, ["cpu", "cpu"]),
        (("cpu",), 0, None, ["cpu"]),
    ],
)
def test_forms(devices: Any, num_gpus: int, partitions: int | None, names: list[str]) -> None:
    assert parse_devices(devices, num_gpus, partitions) == tuple(names)


@pytest.mark.parametrize(
    ("devices", "num_gpus", "partitions", "text"),
    [
        (0, 0, None, "devices=0 must be at least 1; use devices=1"),
        (-1, 0, None, "devices=-1 must be at least 1"),
        (4, 2, None, "devices=4, but this machine has 2 GPUs. Use devices=2, or devices=cpu:4 for CPU processes"),
        (2, 1, None, "devices=2, but this machine has 1 GPU. Use devices=1, or devices=cpu:2"),
        ("auto", 2, 3, "this machine has 2 GPUs"),
        ("cpu:0", 0, None, "devices=cpu:0 must ask for at least 1 process; use devices=cpu:1"),
        ("cuda:1", 1, None, "asks for cuda:1, but this machine has cuda:0 to cuda:0"),
        ("cuda", 0, None, "asks for cuda:0, but this machine has no GPU; use devices=cpu:1"),
        ([0, 5], 2, None, "asks for cuda:5, but this machine has cuda:0 to cuda:1; use devices=cpu:2"),
        ([0, 0], 2, None, "devices=[0,0] names a GPU twice"),
        (["cpu", "cuda:0"], 2, None, "must be all cpu or all GPU numbers"),
        ([], 2, None, "devices=[] names no device"),
        ([[0]], 2, None, "must be all cpu or all GPU numbers"),
        ("gpu", 0, None, "devices=gpu is none of: 4, auto, cpu, cpu:4"),
        ("cuda:x", 2, None, "devices=cuda:x is none of"),
        ("cuda:", 2, None, "devices=cuda: is none of"),
        ("cpu:", 0, None, "devices=cpu: is none of"),
        ("", 0, None, "devices= is none of"),
        (True, 0, None, "devices=True is none of"),
        (None, 0, None, "devices=None is none of"),
        (1.5, 0, None, "devices=1.5 is none of"),
    ],
)
def test_mistakes(devices: Any, num_gpus: int, partitions: int | None, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_devices(devices, num_gpus, partitions)
    assert text in str(caught.value)
