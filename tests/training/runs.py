"""Runs the training loop with all ranks in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipetrain.config import (
    AdamConfig,
    CheckpointConfig,
    Config,
    DeviceConfig,
    EvalConfig,
    LrRuleConfig,
    TextConfig,
    TransformerConfig,
)
from pipetrain.data.text import TokenFolder, prepare_text
from pipetrain.derived import num_replicas
from pipetrain.engine.local import LocalTransport, run_ranks
from pipetrain.errors import Exit
from pipetrain.paths import RunPaths
from pipetrain.training import checkpoint
from pipetrain.training.data import prepare_data
from pipetrain.training.job import Job
from pipetrain.training.loop import Signals, train

CPU = torch.device("cpu")
DESCRIBED = DeviceConfig(
    name="X",
    memory_gib=1.0,
    fp32_tflops=1.0,
    bf16_tflops=4.0,
    fp64_tflops=0.5,
    memory_gb_per_s=100.0,
    link_gb_per_s=10.0,
    link_us=10.0,
    kernel_us=5.0,
    efficiency=0.5,
)


def settings(**changes: Any) -> Config:
    """A model that trains a step in milliseconds."""
    model = TransformerConfig(layers=2, d_model=16, d_ff=32, heads=2, tied=changes.pop("tied", False))
    defaults: dict[str, Any] = {
        "name": "test",
        "model": model,
        "data": TextConfig(seq_len=8),
        "optimizer": AdamConfig(name="adamw", lr=1e-2),
        "lr_rule": LrRuleConfig(warmup_steps=3),
        "balance": "even",  # nothing is measured first
        "batch_size": 4,
        "steps": 6,
        "log_every": 2,
        "eval": EvalConfig(every=3, batches=3),
        "checkpoint": CheckpointConfig(every=3),
    }
    return Config(**(defaults | changes))


def tokens_of(tmp_path: Path, text: str | None = None) -> TokenFolder:
    path = tmp_path / "text.txt"
    if not path.exists():
        path.write_text(text or "the quick brown fox jumps over the lazy dog, " * 60)
    return prepare_text(
        path=str(path),
        tokenizer="bytes",
        vocab_size=None,
        valid_fraction=0.1,
        test_fraction=0.1,
        cache_dir=str(tmp_path / "cache"),
    )


def run(
    tmp_path: Path,
    name: str,
    stages: int,
    cfg: Config,
    *,
    resume: bool = False,
    start: Path | None = None,
    signals: Callable[[int], Signals] = lambda rank: Signals(),
) -> Exit:
    """Trains `cfg` on `stages` ranks, of all replicas, in folder `name`."""
    paths = RunPaths(tmp_path / name)
    paths.root.mkdir(exist_ok=True)
    found = checkpoint.find_usable(paths.checkpoints)[0] if resume else None
    data = tokens_of(tmp_path) if isinstance(cfg.data, TextConfig) else prepare_data(cfg, lambda text: None)
    job = Job.from_json(Job(cfg, paths, data, ("cpu",) * stages, found, start).to_json())

    def rank_main(transport: LocalTransport) -> Exit:
        rank = transport.replicas.number * transport.num_ranks + transport.rank
        return train(job, transport, CPU, signals(rank))

    codes = run_ranks(stages, rank_main, num_replicas(cfg))
    assert len(set(codes)) == 1
    return codes[0]


def metrics(tmp_path: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]


def losses(tmp_path: Path, name: str) -> list[tuple[float, float]]:
    """(step, loss) of every line, training and validation."""
    return [(row["step"], row.get("loss/train", row.get("loss/val"))) for row in metrics(tmp_path, name)]  # type: ignore[misc]


def saved(tmp_path: Path, name: str, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whatever stage wrote them."""
    folder = tmp_path / name / "checkpoints" / f"step_{step:08d}"
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
