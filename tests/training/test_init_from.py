"""Fine-tuning: the weights of another run where they fit, the usual ones elsewhere, on any number of stages."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same, run, saved, settings, tokens_of
from torch import Tensor

from pipetrain.config import AmoebaNetConfig, AnythingConfig, Config, EvalConfig, SyntheticConfig, TextConfig
from pipetrain.engine.local import run_ranks
from pipetrain.errors import CheckpointError, ConfigError
from pipetrain.launch import prepare
from pipetrain.paths import RunPaths
from pipetrain.training.loop import Signals, train


def images(model: Any = None, classes: int = 3, **changes: Any) -> Config:
    data = SyntheticConfig(shape=[3, 8, 8], classes=classes, samples=40)
    model = model or AmoebaNetConfig(layers=3, filters=4)
    return settings(model=model, data=data, batch_size=8, micro_batches=2, **({"eval": EvalConfig()} | changes))


def text(tmp_path: Path, **changes: Any) -> Config:
    tokens_of(tmp_path)
    cfg = settings(**changes)
    cfg.data = TextConfig(
        seq_len=8,
        path=str(tmp_path / "text.txt"),
        cache_dir=str(tmp_path / "cache"),
        valid_fraction=0.1,
        test_fraction=0.1,
    )
    return cfg


def first_weights(tmp_path: Path, name: str, stages: int, cfg: Config, said: list[str] | None = None) -> Any:
    """What a run starts with: its checkpoint after one step that is too small to change a bit of a weight."""
    cfg.steps, cfg.optimizer.lr, cfg.optimizer.weight_decay, cfg.devices = 1, 1e-30, 0.0, stages
    job = prepare(cfg, RunPaths(tmp_path / name), 0, say=(said if said is not None else []).append)
    run(tmp_path, name, stages, cfg, start=job.start)
    return {key: value for key, value in saved(tmp_path, name, 1).items() if key.startswith("model/")}


def of_kind(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"model/{k.removeprefix(prefix)}": v for k, v in tensors.items() if k.startswith(prefix)}


def trained(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if "running" not in name and "tracked" not in name}


@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_run_starts_from_the_weights_or_their_average(tmp_path: Path, ema: float | None) -> None:
    run(tmp_path, "old", 3, text(tmp_path, tied=True, ema=ema))
    old = saved(tmp_path, "old", 6)
    said: list[str] = []
    new = first_weights(tmp_path, "new", 2, text(tmp_path, tied=True, init_from=str(tmp_path / "old")), said)
    assert_same(new, of_kind(old, "ema/" if ema else "model/"))
    assert said == [
        f"init_from={tmp_path / 'old'}: step 6{', the average of its weights' if ema else ''}; 29 of 29 tensors fit"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 3])
def test_a_new_head_is_initialised_as_usual_and_the_rest_with_its_statistics_is_taken(
    tmp_path: Path, stages: int
) -> None:
    run(tmp_path, "old", 2, images(ema=0.5))
    old = saved(tmp_path, "old", 6)
    said: list[str] = []
    new = first_weights(tmp_path, "new", stages, images(classes=5, init_from=str(tmp_path / "old"), ema=0.5), said)
    usual = first_weights(tmp_path, "usual", stages, images(classes=5))
    averages = of_kind(old, "ema/")
    heads = {name for name in averages if new[name].shape != averages[name].shape}
    assert heads
    for name, value in trained(new).items():
        expected = usual[name] if name in heads else averages[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-20, msg=name)  # a bias of zero moved by 1e-30
    running = next(name for name in new if name.endswith("running_var"))
    count = running.replace("running_var", "num_batches_tracked")
    assert int(new[count]) == 7, "six steps there and one here"
    torch.testing.assert_close(new[running], old[running], rtol=0.5, atol=0.2)
    assert not torch.allclose(new[running], usual[running])
    assert "tensors fit" in said[0]
    assert said[1].startswith("  initialised as usual: ")
    assert "classifier.output.weight [5, 64] (there [3, 64])" in said[1]


def test_any_module_and_what_is_there_but_not_here(tmp_path: Path) -> None:
    def cfg(width: int, depth: int, **changes: Any) -> Config:
        model = AnythingConfig(factory=f"{__name__}:blocks", arguments={"width": width, "depth": depth})
        return images(model, **changes)

    run(tmp_path, "old", 2, cfg(6, 3))
    said: list[str] = []
    new = first_weights(tmp_path, "new", 2, cfg(6, 2, init_from=str(tmp_path / "old")), said)
    old = of_kind(saved(tmp_path, "old", 6), "model/")
    fits = {name for name in new if name in old and new[name].shape == old[name].shape}
    assert fits < new.keys()
    assert all(torch.equal(new[name], old[name]) for name in fits)
    assert any(line.startswith("  there, but not in this model: ") for line in said)


def blocks(width: int, depth: int) -> Any:
    from torch import nn

    middle = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(192, width), *middle, nn.Linear(width, 3))


def test_every_cut_gives_the_same_run_and_a_resume_does_not_need_the_other_one(tmp_path: Path) -> None:
    run(tmp_path, "old", 2, text(tmp_path))
    cfg = text(tmp_path, seed=7, init_from=str(tmp_path / "old"))
    start = prepare(cfg, RunPaths(tmp_path / "whole"), 0).start
    run(tmp_path, "whole", 1, cfg, start=start)
    run(tmp_path, "halves", 4, text(tmp_path, seed=7, init_from=str(tmp_path / "old"), steps=3), start=start)
    shutil.rmtree(tmp_path / "old")
    resumed = text(tmp_path, seed=7, init_from=str(tmp_path / "old"), resume=str(tmp_path / "halves"))
    assert prepare(resumed, RunPaths(tmp_path / "halves"), 0).start is None
    run(tmp_path, "halves", 2, resumed, resume=True)
    assert_same(saved(tmp_path, "halves", 6), saved(tmp_path, "whole", 6))


def test_another_model_and_what_is_no_run_are_refused(tmp_path: Path) -> None:
    run(tmp_path, "old", 1, text(tmp_path))
    with pytest.raises(ConfigError) as caught:
        prepare(images(init_from=str(tmp_path / "old")), RunPaths(tmp_path / "new"), 0)
    assert "no parameter there has the name and shape of one of this model" in str(caught.value)
    assert "type the model settings of that run (its model=transformer, see" in str(caught.value)
    for given in ("", str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(ConfigError, match="is no run folder with checkpoints; give one that an earlier"):
            prepare(text(tmp_path, init_from=given), RunPaths(tmp_path / "new"), 0)
    (tmp_path / "old" / "checkpoints" / "step_00000006" / "stage_0.safetensors").write_bytes(b"torn")
    said: list[str] = []
    assert prepare(
        text(tmp_path, init_from=str(tmp_path / "old")), RunPaths(tmp_path / "new"), 0, say=said.append
    ).start
    assert "skipped a checkpoint: step_00000006" in said[0]
    assert ": step 3; " in said[1]
    shutil.rmtree(tmp_path / "old" / "checkpoints" / "step_00000003")
    with pytest.raises(CheckpointError, match="no usable checkpoint in"):
        prepare(text(tmp_path, init_from=str(tmp_path / "old")), RunPaths(tmp_path / "new"), 0)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    """Also where the sizes are the same: the words have other numbers."""

    def pieces(name: str, text: str) -> Config:
        (tmp_path / f"{name}.txt").write_text(text * 200)
        data = TextConfig(
            seq_len=8, path=str(tmp_path / f"{name}.txt"), tokenizer="sentencepiece", vocab_size=280,
            cache_dir=str(tmp_path / "cache"),
        )  # fmt: skip
        return settings(data=data)

    old, new = pieces("old", "what was learned of these words\n"), pieces("new", "is not known of any of the others\n")
    job = prepare(old, RunPaths(tmp_path / "run"), 0)
    (tmp_path / "run").mkdir()
    run_ranks(1, lambda transport: train(job, transport, torch.device("cpu"), Signals()))
    new.init_from = str(tmp_path / "run")
    own = tmp_path / "run" / "tokenizer.model"
    with pytest.raises(ConfigError, match=rf"was trained with another vocabulary.*data.tokenizer={own}"):
        prepare(new, RunPaths(tmp_path / "next"), 0)
    new.data = TextConfig(seq_len=8, path=str(tmp_path / "new.txt"), tokenizer=str(own), cache_dir=str(tmp_path))
    assert prepare(new, RunPaths(tmp_path / "next"), 0).start is not None
