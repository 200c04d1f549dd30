"""Training a module that knows nothing of pipelines."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import assert_same, losses, metrics, run, saved, settings, tokens_of
from torch import Tensor, nn

from pipetrain.config import AnythingConfig, Config, EvalConfig, SyntheticConfig, TextConfig
from pipetrain.errors import ConfigError
from pipetrain.launch import prepare
from pipetrain.paths import RunPaths

HERE = __name__


class Net(nn.Module):
    """BatchNorm, a skip, dropout as a module and as a function, a module that is called twice, a frozen parameter."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.twice = nn.Conv2d(width, width, 3, padding=1)
        self.drop = nn.Dropout(0.2)
        self.frozen = nn.Parameter(torch.ones(width, 1, 1), requires_grad=False)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.norm(self.first(x)), inplace=True)
        y = first
        for _ in range(2):
            y = self.drop(F.relu(self.twice(y))) * self.frozen
        y = F.dropout(y, 0.1, self.training) + first
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


class Language(nn.Module):
    def __init__(self, vocabulary: int = 256) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(vocabulary, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.block(self.embed(ids))))  # type: ignore[no-any-return]


class Short(Language):
    """Takes at most 4 tokens."""

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > 4:
            raise ValueError("too long")
        return super().forward(ids)


def images(**changes: Any) -> Config:
    model = AnythingConfig(factory=f"{HERE}:Net", arguments={"width": 6})
    data = SyntheticConfig(shape=[3, 6, 6], classes=4, samples=40)
    return settings(**{"model": model, "data": data, **changes})


@pytest.mark.parametrize("recompute", ["always", "never"])
def test_the_same_bits_on_1_2_and_4_stages(tmp_path: Path, recompute: str) -> None:
    for stages in (1, 2, 4):
        run(tmp_path, f"{stages}", stages, images(recompute=recompute))
    for stages in (2, 4):
        assert losses(tmp_path, f"{stages}") == losses(tmp_path, "1")
        assert_same(saved(tmp_path, f"{stages}", 6), saved(tmp_path, "1", 6))


def test_resumes_on_another_number_of_stages(tmp_path: Path) -> None:
    run(tmp_path, "whole", 2, images())
    run(tmp_path, "halves", 4, images(steps=3))
    run(tmp_path, "halves", 1, images(), resume=True)
    assert_same(saved(tmp_path, "halves", 6), saved(tmp_path, "whole", 6))


def test_what_is_saved_has_the_names_of_the_module(tmp_path: Path) -> None:
    run(tmp_path, "run", 2, images())
    tensors = saved(tmp_path, "run", 6)
    weights = {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}
    plain = Net(6)
    plain.load_state_dict({name: value for name, value in weights.items() if "@" not in name})
    assert int(plain.norm.num_batches_tracked) == 6
    assert torch.equal(plain.frozen, torch.ones(6, 1, 1))


@pytest.mark.slow
def test_it_learns_what_synthetic_data_teaches(tmp_path: Path) -> None:
    cfg = images(steps=60, batch_size=10, eval=EvalConfig(every=60))
    run(tmp_path, "run", 2, cfg)
    rows = metrics(tmp_path, "run")
    assert rows[-1]["loss/val"] < 0.8  # chance is 1.39
    assert "speed/samples_per_s" in rows[0]
    assert not {"speed/tokens_per_s", "val/perplexity", "val/bits_per_character"} & set().union(*rows)


def test_a_language_model_of_the_user_on_text(tmp_path: Path) -> None:
    model = AnythingConfig(factory=f"{HERE}:Language")
    for stages in (1, 3):
        run(tmp_path, f"{stages}", stages, settings(model=model, data=TextConfig(seq_len=8)))
    assert losses(tmp_path, "3") == losses(tmp_path, "1")
    assert_same(saved(tmp_path, "3", 6), saved(tmp_path, "1", 6))
    assert "val/bits_per_character" in metrics(tmp_path, "1")[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": SyntheticConfig(shape=[2, 6, 6])}, r"layer first fails on float32 \[1, 2, 6, 6\]: RuntimeError"),
        ({"data": TextConfig(seq_len=8)}, "a micro-batch of 1 from data=text: layer first fails on int64"),
        ({"devices": 9}, "makes 9 stages, but the model has only 7 layers.*made of smaller sub-modules, or a list"),
        ({"model": AnythingConfig(factory=f"{HERE}:Nte")}, "has no Nte. Did you mean 'Net'"),
        ({"data": SyntheticConfig(shape=[3, 6, 6], samples=3)}, "data.samples=3 do not fill one batch of batch_size=4"),
    ],
)
def test_what_cannot_work_is_found_before_a_worker_starts(tmp_path: Path, changes: Any, message: str) -> None:
    data = changes.get("data")
    if isinstance(data, TextConfig):
        tokens_of(tmp_path)
        data.path, data.cache_dir = str(tmp_path / "text.txt"), str(tmp_path / "cache")
    cfg = images()
    for key, value in {"devices": 1, **changes}.items():
        setattr(cfg, key, value)
    with pytest.raises(ConfigError, match=message):
        prepare(cfg, RunPaths(tmp_path / "run"), num_gpus=0)


@pytest.mark.parametrize(
    ("factory", "shape", "failure"),
    [
        ("resnet18", [3, 8, 8], "Expected more than 1 value per channel"),
        ("alexnet", [3, 8, 8], "Output size is too small"),
        ("alexnet", [1, 64, 64], r"layer features.0 fails on float32 \[1, 1, 64, 64\].*to have 3 channels"),
    ],
)
def test_images_of_a_wrong_shape_name_the_key_to_change(
    tmp_path: Path, factory: str, shape: list[int], failure: str
) -> None:
    cfg = images(model=AnythingConfig(factory=factory), data=SyntheticConfig(shape=shape), devices=1)
    told = rf"data.shape=\[{','.join(map(str, shape))}\], type them: data.shape=\[3,224,224\]"
    with pytest.raises(ConfigError, match=f"{failure}.*{told}"):
        prepare(cfg, RunPaths(tmp_path / "run"), num_gpus=0)


def test_text_of_a_wrong_length_names_the_key_to_change(tmp_path: Path) -> None:
    tokens_of(tmp_path)
    text = TextConfig(path=str(tmp_path / "text.txt"), cache_dir=str(tmp_path / "cache"), seq_len=8)
    cfg = settings(model=AnythingConfig(factory=f"{HERE}:Short"), data=text, devices=1)
    with pytest.raises(ConfigError, match=r"layer embed fails on int64 \[1, 8\].*type another data.seq_len"):
        prepare(cfg, RunPaths(tmp_path / "run"), num_gpus=0)


def test_too_many_devices_hide_no_other_mistake(tmp_path: Path) -> None:
    cfg = images(devices=9)
    cfg.data = SyntheticConfig(shape=[2, 6, 6])
    with pytest.raises(ConfigError) as caught:
        prepare(cfg, RunPaths(tmp_path / "run"), num_gpus=0)
    first, second = str(caught.value).splitlines()
    assert "layer first fails on float32 [1, 2, 6, 6]" in first  # whether the model runs at all comes first
    assert "devices=9 makes 9 stages, but the model has only 7 layers" in second
