"""Models with memory through the training loop: the same numbers for every cut, resumed as never stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline import build_runtime
from runs import assert_same, losses, run, saved, settings
from torch import Tensor

from pipetrain import schedule
from pipetrain.config import CheckpointConfig, Config, EvalConfig, StaleConfig, TextConfig, TransformerXLConfig
from pipetrain.engine.local import LocalTransport, run_ranks
from pipetrain.models import build
from pipetrain.partition.split import build_layer
from pipetrain.segment_memory import SegmentMemory


def xl(**changes: Any) -> Config:
    model = TransformerXLConfig(
        layers=2,
        d_model=16,
        d_ff=32,
        heads=2,
        memory=12,
        evaluation_memory=20,
        attention_dropout=0.1,
        **{"shared_biases": True, **changes.pop("model", {})},
    )
    return settings(**{"model": model, "data": TextConfig(seq_len=8, order="contiguous"), **changes})


def test_runs_are_the_same_bits_on_1_2_and_4_stages(tmp_path: Path) -> None:
    cases: dict[str, tuple[int, dict[str, Any]]] = {
        "1": (1, {}),
        "2": (2, {"recompute": "never"}),
        "4": (4, {"schedule": "1f1b"}),
        "v": (2, {"schedule": "interleaved", "partitions": 4, "recompute": "except_last"}),
    }
    for name, (stages, options) in cases.items():
        run(tmp_path, name, stages, xl(**options))
    for name in cases:
        assert losses(tmp_path, name) == losses(tmp_path, "1")
        assert_same(saved(tmp_path, name, 6), saved(tmp_path, "1", 6))


@pytest.mark.slow
def test_resumed_on_other_stages_equals_never_stopped_also_over_a_new_epoch(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 80, "checkpoint": CheckpointConfig(every=40), "eval": EvalConfig(every=40)}
    run(tmp_path, "whole", 1, xl(**options))
    run(tmp_path, "halves", 2, xl(**options | {"steps": 40}))
    run(tmp_path, "halves", 4, xl(**options), resume=True)
    assert losses(tmp_path, "halves") == losses(tmp_path, "whole")
    assert_same(saved(tmp_path, "halves", 80), saved(tmp_path, "whole", 80))
    memory = saved(tmp_path, "whole", 80)["memory/blocks.1.memory"]
    assert memory.shape == (4, 12, 16)  # all rows of the mini-batch, model.memory tokens, width


def test_evaluation_leaves_what_training_remembers_alone(tmp_path: Path) -> None:
    run(tmp_path, "with", 2, xl(eval=EvalConfig(every=1, batches=2)))
    run(tmp_path, "without", 2, xl(eval=EvalConfig(every=0)))
    assert_same(saved(tmp_path, "with", 6), saved(tmp_path, "without", 6))


@pytest.mark.parametrize("weights", ["stash", "replay"])
def test_stale_runs_remember_in_the_order_of_the_mini_batches(tmp_path: Path, weights: str) -> None:
    options: dict[str, Any] = {
        "model": {"shared_biases": False},
        "schedule": "ouroboros",
        "eval": EvalConfig(every=3, batches=2),
    }
    stale = StaleConfig(drain_every=3, weights=weights)
    run(tmp_path, "whole", 2, xl(**options, stale=stale))
    run(tmp_path, "halves", 2, xl(**options, stale=stale, steps=3))
    run(tmp_path, "halves", 2, xl(**options, stale=stale), resume=True)
    assert_same(saved(tmp_path, "halves", 6), saved(tmp_path, "whole", 6))


def test_gradients_are_those_of_plain_pytorch_with_a_memory_for_each_micro_batch() -> None:
    recipe = build(
        name="transformer_xl",
        layers=2,
        d_model=8,
        d_ff=16,
        heads=2,
        dropout=0.0,
        attention_dropout=0.0,
        memory=9,
        evaluation_memory=None,
        tied=False,
        shared_biases=False,
        vocab_size=11,
        seq_len=6,
    )
    torch.manual_seed(0)
    steps = [(torch.randint(11, (5, 6)), torch.randint(11, (5, 6))) for _ in range(4)]
    modules = [build_layer(layer, 0).double() for layer in recipe.layers]
    memories = [part for module in modules for part in module.modules() if isinstance(part, SegmentMemory)]
    states: dict[int, list[Tensor | None]] = {m: [None] * len(memories) for m in range(2)}
    for inputs, targets in steps:
        for module in modules:
            module.zero_grad()
        for m, (x, y) in enumerate(zip(inputs.tensor_split(2), targets.tensor_split(2), strict=True)):
            for memory, state in zip(memories, states[m], strict=True):
                memory.state = state
            value = x
            for module in modules:
                value = module(value)
            (recipe.loss_sum(value, (y,)) / 30).backward()
            states[m] = [memory.state for memory in memories]
    right = {
        layer.full_name(name): p.grad
        for layer, module in zip(recipe.layers, modules, strict=True)
        for name, p in module.named_parameters()
    }

    def rank_main(transport: LocalTransport) -> dict[str, Tensor | None]:
        runtime = build_runtime(recipe, [2, 2], transport, dtype=torch.float64)
        program = runtime.prepare(schedule.build("1f1b", 2, 2, recompute="always"))
        for number, (inputs, targets) in enumerate(steps):
            runtime.train_step(program, number, (inputs,), (targets,), total=30, update=lambda report: None)
        return {name: p.grad for name, p in runtime.parameters.items()}

    for found in run_ranks(2, rank_main):
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, right[name], rtol=1e-10, atol=1e-12)
