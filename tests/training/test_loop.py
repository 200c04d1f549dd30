"""The training loop: the same run for every partitioning, and a resumed run is one that never stopped."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same, losses, metrics, run, saved, settings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipetrain.config import CheckpointConfig, EvalConfig
from pipetrain.engine.stage import Stage
from pipetrain.errors import Exit, NonFiniteError, StageFailed
from pipetrain.training import loop
from pipetrain.training.loop import Request, Signals


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_runs_are_the_same_bits_on_1_2_and_4_stages(tmp_path: Path, tied: bool, precision: str) -> None:
    cases: dict[str, tuple[int, Any]] = {
        "one": (1, "even"),
        "two": (2, "even"),
        "four": (4, "even"),
        "uneven": (2, [1, 3]),
    }
    for name, (stages, balance) in cases.items():
        cfg = settings(tied=tied, precision=precision, balance=balance)
        assert run(tmp_path, name, stages, cfg) is Exit.DONE
    for name in cases:
        assert losses(tmp_path, name) == losses(tmp_path, "one")
        assert_same(saved(tmp_path, name, 6), saved(tmp_path, "one", 6))


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (4, 2), (2, 3), (3, 1)])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_resumed_in_the_middle_equals_never_stopped(tmp_path: Path, before: int, after: int, tied: bool) -> None:
    run(tmp_path, "whole", 1, settings(tied=tied))
    run(tmp_path, "halves", before, settings(tied=tied, steps=3))
    assert losses(tmp_path, "halves")[-1][0] == 3
    run(tmp_path, "halves", after, settings(tied=tied), resume=True)
    assert_same(saved(tmp_path, "halves", 6), saved(tmp_path, "whole", 6))
    whole, halves = losses(tmp_path, "whole"), losses(tmp_path, "halves")
    assert [row for row in halves if row in whole] == whole


def test_float64_is_all_float64_and_resumes(tmp_path: Path) -> None:
    run(tmp_path, "whole", 1, settings(precision="fp64"))
    run(tmp_path, "halves", 2, settings(precision="fp64", steps=3))
    run(tmp_path, "halves", 2, settings(precision="fp64"), resume=True)
    tensors = saved(tmp_path, "whole", 6)
    assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith("/step")} == {torch.float64}
    assert_same(saved(tmp_path, "halves", 6), tensors)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adafactor", "rmsprop"])
def test_every_optimizer_resumes_on_another_number_of_stages(tmp_path: Path, optimizer: str) -> None:
    from pipetrain.config import SCHEMAS

    cfg = {"optimizer": SCHEMAS["optimizer"][optimizer](name=optimizer, lr=1e-2)}
    if optimizer == "sgd":
        cfg["optimizer"].momentum = 0.9
    run(tmp_path, "whole", 1, settings(**cfg))
    run(tmp_path, "halves", 4, settings(**cfg, steps=3))
    run(tmp_path, "halves", 2, settings(**cfg), resume=True)
    assert_same(saved(tmp_path, "halves", 6), saved(tmp_path, "whole", 6))


def test_the_loss_falls(tmp_path: Path) -> None:
    run(tmp_path, "run", 2, settings(steps=60, log_every=10, checkpoint=CheckpointConfig(), eval=EvalConfig(every=60)))
    rows = metrics(tmp_path, "run")
    assert rows[0]["loss/train"] > 5
    assert rows[-1]["loss/val"] < 2.9


def test_epochs_are_passes_over_the_data(tmp_path: Path) -> None:
    run(tmp_path, "run", 1, settings(steps=None, epochs=1, log_every=1000, eval=EvalConfig()))
    text_bytes = (tmp_path / "text.txt").stat().st_size
    windows = (round(text_bytes * 0.8) - 1) // 8
    assert metrics(tmp_path, "run")[-1]["step"] == windows // 4


def test_metrics_have_the_same_names_and_values_in_tensorboard(tmp_path: Path) -> None:
    run(tmp_path, "run", 2, settings())
    board = EventAccumulator(str(tmp_path / "run")).Reload()
    expected: dict[str, dict[float, float]] = {}
    for row in metrics(tmp_path, "run"):
        for name, value in row.items():
            if name != "step":
                expected.setdefault(name, {})[row["step"]] = value
    assert {
        "loss/train",
        "loss/val",
        "lr",
        "grad/norm",
        "stage_1/wait_s",
        "pipeline/bubble_predicted",
    } <= expected.keys()
    for name, values in expected.items():
        events = {event.step: event.value for event in board.Scalars(name)}
        assert events == pytest.approx(values, rel=1e-5), name
    assert len(list((tmp_path / "run").glob("events.*"))) == 1
    assert (
        "_hparams_/session_start_info" in board.Tags()["tensors"]
        or board.summary_metadata["_hparams_/session_start_info"]
    )


@pytest.mark.parametrize("schedule", ["gpipe", "zb_v"])
def test_accounts_of_a_step_add_up_to_it(tmp_path: Path, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_s = 0.02
    part_of_batch = loop.part_of_batch

    def slowly(*args: Any, **options: Any) -> Any:
        time.sleep(slow_s)
        return part_of_batch(*args, **options)

    monkeypatch.setattr(loop, "part_of_batch", slowly)
    run(tmp_path, "run", 2, settings(schedule=schedule, log_every=1))
    rows = [row for row in metrics(tmp_path, "run") if "loss/train" in row]
    for row in rows:
        accounts = {name: value for name, value in row.items() if name.startswith("time/")}
        assert sum(accounts.values()) == pytest.approx(row["speed/step_s"])
        assert accounts["time/data_s"] >= slow_s
        assert min(accounts[f"time/{name}_s"] for name in ("forward", "recompute", "backward")) > 0
    assert rows[0]["time/update_s"] == 0  # it is the step's before
    assert all(row["time/update_s"] > 0 for row in rows[1:])


def test_resume_drops_the_lines_behind_the_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, "run", 1, settings(steps=5, checkpoint=CheckpointConfig(every=2)))
    last = tmp_path / "run" / "checkpoints" / "step_00000005"
    (last / "manifest.json").unlink()
    run(tmp_path, "run", 1, settings(steps=6), resume=True)
    steps = [row["step"] for row in metrics(tmp_path, "run") if "loss/train" in row]
    assert steps == [1, 2, 4, 6]


@pytest.mark.parametrize(
    ("request_", "code", "state"),
    [(Request.PREEMPT, Exit.PREEMPTED, "preempted"), (Request.INTERRUPT, Exit.INTERRUPTED, "interrupted")],
)
def test_a_signal_on_any_rank_saves_all_at_the_same_step(
    tmp_path: Path, request_: Request, code: Exit, state: str
) -> None:
    class AfterTwoSteps(Signals):
        asked = 0

        @property
        def request(self) -> Request:  # type: ignore[override]
            self.asked += 1
            return request_ if self.asked > 2 else Request.NOTHING

        @request.setter
        def request(self, value: Request) -> None:
            pass

    cfg = settings(checkpoint=CheckpointConfig())
    assert run(tmp_path, "run", 3, cfg, signals=lambda rank: AfterTwoSteps() if rank == 1 else Signals()) is code
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == (state, 3, code)
    run(tmp_path, "run", 2, cfg, resume=True)
    run(tmp_path, "whole", 1, cfg)
    assert_same(saved(tmp_path, "run", 6), saved(tmp_path, "whole", 6))


def test_a_signal_during_an_evaluation_gives_it_up_and_saves(tmp_path: Path) -> None:
    class InTheEvaluation(Signals):
        asked = 0

        @property
        def request(self) -> Request:  # type: ignore[override]
            self.asked += 1
            return Request.PREEMPT if self.asked > 4 else Request.NOTHING

        @request.setter
        def request(self, value: Request) -> None:
            pass

    cfg = settings(steps=50, eval=EvalConfig(every=3), checkpoint=CheckpointConfig())
    assert run(tmp_path, "run", 2, cfg, signals=lambda rank: InTheEvaluation()) is Exit.PREEMPTED
    assert [row for row in metrics(tmp_path, "run") if "loss/val" in row] == []
    assert json.loads((tmp_path / "run" / "status.json").read_text())["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("order", ["shuffled", "contiguous"])
def test_resume_goes_on_in_the_data_across_epochs(tmp_path: Path, order: str) -> None:
    from pipetrain.config import LrRuleConfig, TextConfig

    def cfg(steps: int) -> Any:
        rule = LrRuleConfig(name="cosine", warmup_steps=2, decay_steps=70)
        return settings(steps=steps, data=TextConfig(seq_len=8, order=order), lr_rule=rule, eval=EvalConfig())

    run(tmp_path, "whole", 1, cfg(75))
    run(tmp_path, "parts", 2, cfg(70))
    run(tmp_path, "parts", 3, cfg(75), resume=True)
    assert_same(saved(tmp_path, "parts", 75), saved(tmp_path, "whole", 75))


def test_nan_stops_the_run_names_the_layer_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_layers = Stage._run

    def poisoned(self: Stage, *args: Any, **options: Any) -> Any:
        if self.step == 4 and self.layers[0].name == "blocks.1":
            for parameter in self.layers[0].module.parameters():
                parameter.data[0] = float("nan")
        return run_layers(self, *args, **options)

    monkeypatch.setattr(Stage, "_run", poisoned)
    with pytest.raises(NonFiniteError) as caught:
        run(tmp_path, "run", 4, settings())
    text = str(caught.value)
    assert "step 5: NaN or infinity first appears in the output of layer blocks.1, stage 2, micro-batch 0" in text
    assert "The weights were not updated; the checkpoint of step 3 is kept" in text
    assert "Try a lower optimizer.lr (now 0.01)" in text
    assert (tmp_path / "run" / "checkpoints" / "step_00000003" / "manifest.json").exists()


def test_a_failure_names_stage_action_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = Stage.backward

    def fail(self: Stage, microbatch: int, gradients: Any, **options: Any) -> Any:
        if (self.index, microbatch, self.step) == (1, 2, 3):
            raise ValueError("boom")
        return backward(self, microbatch, gradients, **options)

    monkeypatch.setattr(Stage, "backward", fail)
    with pytest.raises(StageFailed, match=r"stage 1 \(rank 1\) failed at 1B2, step 4") as caught:
        run(tmp_path, "run", 3, settings())
    assert isinstance(caught.value.__cause__, ValueError)


def test_the_plan_is_kept(tmp_path: Path) -> None:
    run(tmp_path, "run", 2, settings(balance=[1, 3]))
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["balance"] == [1, 3]
    assert [stage["layers"] for stage in plan["stages"]] == [["embedding"], ["blocks.0", "blocks.1", "head"]]
    weights = {k: v for k, v in saved(tmp_path, "run", 6).items() if k.startswith("model/")}
    assert sum(stage["parameters"] for stage in plan["stages"]) == sum(v.numel() for v in weights.values())
    assert plan["bubble_fraction"] < 0.3


def test_evaluation_leaves_training_alone(tmp_path: Path) -> None:
    run(tmp_path, "with", 2, settings())
    run(tmp_path, "without", 2, settings(eval=EvalConfig()))
    assert_same(saved(tmp_path, "with", 6), saved(tmp_path, "without", 6))


def test_evaluation_covers_the_split_once_without_dropout(tmp_path: Path) -> None:
    """The mean over all windows, computed by plain PyTorch from the saved weights."""
    from reference import plain_model
    from runs import tokens_of

    from pipetrain.training.build import build_recipe
    from pipetrain.training.data import open_data

    cfg = settings(eval=EvalConfig(every=6))
    run(tmp_path, "run", 3, cfg)
    tokens = tokens_of(tmp_path)
    recipe = build_recipe(cfg, tokens)
    model = plain_model(recipe, seed=0).eval()
    weights = {k.removeprefix("model/"): v for k, v in saved(tmp_path, "run", 6).items() if k.startswith("model/")}
    model.load_state_dict({name.replace("blocks.", "blocks_"): value for name, value in weights.items()})
    data = open_data(cfg, tokens, "valid")
    total = count = 0.0
    with torch.no_grad():
        for index in range(data.num_batches):
            (inputs,), targets = data.batch(index)
            total += float(recipe.loss_sum(model(inputs), (targets,)))
            count += targets.numel()
    row = metrics(tmp_path, "run")[-1]
    assert row["loss/val"] == pytest.approx(total / count, rel=1e-5)
    assert row["val/bits_per_character"] == pytest.approx(total / count / 0.6931471805599453, rel=1e-5)
