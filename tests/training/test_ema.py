"""The moving average of the weights: TensorFlow's formula, the same bits for every cut, and what evaluation sees."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same, losses, metrics, run, saved, settings, tokens_of
from torch import Tensor, nn

from pipetrain.config import AmoebaNetConfig, CheckpointConfig, EvalConfig, ImagesConfig
from pipetrain.training.ema import WeightAverage


def averages(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("ema/"): value for name, value in tensors.items() if name.startswith("ema/")}


def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}


def digits(tmp_path: Path, **changes: Any) -> Any:
    data = ImagesConfig(workers=0, size=8, cache_dir=str(tmp_path / "cache"))
    model = AmoebaNetConfig(layers=3, filters=4, bn_momentum=0.5)
    return settings(model=model, data=data, batch_size=8, micro_batches=2, ema=0.9, **changes)


def test_the_decay_warms_up_as_tensorflows_does() -> None:
    weight = nn.Parameter(torch.tensor([4.0, -8.0], dtype=torch.float64))
    average = WeightAverage(0.3, {"weight": weight})
    expected = weight.detach().clone()
    for number in range(1, 7):  # from 2 / 11 up to 0.3
        with torch.no_grad():
            weight.mul_(0.5)
        average.update(number)
        decay = min(0.3, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * weight.detach()
        torch.testing.assert_close(average.values["weight"], expected)


def test_weights_come_back_to_the_bit_also_after_a_failure() -> None:
    weight, frozen = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2), requires_grad=False)
    average = WeightAverage(0.9, {"weight": weight, "frozen": frozen})
    assert set(average.values) == {"weight"}
    with torch.no_grad():
        weight.add_(1)
    before, kept = weight.detach().clone(), average.values["weight"].clone()
    seen: list[Tensor] = []

    def evaluate() -> None:
        with average.as_weights():
            seen.append(weight.detach().clone())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        evaluate()
    assert torch.equal(seen[0], kept)
    assert torch.equal(weight, before)
    assert torch.equal(average.values["weight"], kept)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_same_bits_for_every_cut_and_after_a_resume(tmp_path: Path, tied: bool) -> None:
    run(tmp_path, "whole", 1, settings(tied=tied, ema=0.99))
    run(tmp_path, "halves", 4, settings(tied=tied, ema=0.99, steps=3))
    run(tmp_path, "halves", 2, settings(tied=tied, ema=0.99), resume=True)
    whole = saved(tmp_path, "whole", 6)
    assert_same(saved(tmp_path, "halves", 6), whole)
    assert losses(tmp_path, "halves")[-2:] == losses(tmp_path, "whole")[-2:]
    assert averages(whole).keys() == weights(whole).keys()
    assert ("head.output.weight" in averages(whole)) is not tied


def test_the_checkpoint_holds_the_average_of_all_steps(tmp_path: Path) -> None:
    run(tmp_path, "run", 2, settings(ema=0.5, steps=12, checkpoint=CheckpointConfig(every=1, keep=20)))
    steps = [saved(tmp_path, "run", step) for step in range(1, 13)]
    expected = averages(steps[0])
    for number in range(2, 13):
        decay = min(0.5, (1 + number) / (10 + number))
        now = weights(steps[number - 1])
        expected = {name: decay * value + (1 - decay) * now[name] for name, value in expected.items()}
    for name, value in averages(steps[-1]).items():
        torch.testing.assert_close(value, expected[name])


def test_training_is_what_it_is_without_an_average(tmp_path: Path) -> None:
    run(tmp_path, "with", 2, settings(ema=0.9, tied=True))
    run(tmp_path, "without", 2, settings(tied=True))
    assert_same(weights(saved(tmp_path, "with", 6)), weights(saved(tmp_path, "without", 6)))


def test_evaluation_sees_the_average(tmp_path: Path) -> None:
    """Plain PyTorch with the averages of the checkpoint gives the loss that was logged."""
    from reference import plain_model

    from pipetrain.training.build import build_recipe
    from pipetrain.training.data import open_data

    cfg = settings(ema=0.9, eval=EvalConfig(every=6))
    run(tmp_path, "run", 2, cfg)
    tokens = tokens_of(tmp_path)
    recipe = build_recipe(cfg, tokens)
    model = plain_model(recipe, seed=0).eval()
    names = {name.replace("blocks.", "blocks_"): value for name, value in averages(saved(tmp_path, "run", 6)).items()}
    model.load_state_dict(names)
    data = open_data(cfg, tokens, "valid")
    batches = [data.batch(index) for index in range(data.num_batches)]
    with torch.no_grad():
        total = sum(float(recipe.loss_sum(model(*inputs), (targets,))) for inputs, targets in batches)
    mean = total / sum(targets.numel() for _, targets in batches)
    assert metrics(tmp_path, "run")[-1]["loss/val"] == pytest.approx(mean, rel=1e-5)


def test_batchnorm_keeps_its_statistics_and_no_average_of_them(tmp_path: Path) -> None:
    for stages in (1, 3):
        run(tmp_path, f"on{stages}", stages, digits(tmp_path))
    one = saved(tmp_path, "on1", 6)
    assert_same(saved(tmp_path, "on3", 6), one)
    assert losses(tmp_path, "on3") == losses(tmp_path, "on1")
    assert any("running_mean" in name for name in weights(one))
    assert not any("running_" in name for name in averages(one))


def test_switched_on_for_a_resumed_run_it_starts_from_the_weights(tmp_path: Path) -> None:
    run(tmp_path, "run", 2, settings(steps=5))
    run(tmp_path, "run", 2, settings(steps=6, ema=0.9), resume=True)
    before, after = weights(saved(tmp_path, "run", 5)), saved(tmp_path, "run", 6)
    decay = 7 / 16
    for name, value in averages(after).items():
        torch.testing.assert_close(value, decay * before[name] + (1 - decay) * weights(after)[name])
