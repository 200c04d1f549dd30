"""Training on images: what is measured, that cuts and resuming change nothing, and what is refused before the start."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from runs import assert_same, losses, metrics, run, saved, settings

from pipetrain.config import AmoebaNetConfig, AnythingConfig, Config, EvalConfig, ImagesConfig
from pipetrain.errors import ConfigError, DataError
from pipetrain.launch import prepare
from pipetrain.paths import RunPaths


def digits(tmp_path: Path, **changes: Any) -> Config:
    model = AmoebaNetConfig(layers=3, filters=4, drop_path=0.2, drop_path_steps=4, **changes.pop("model", {}))
    data = ImagesConfig(**({"workers": 0, "size": 8, "cache_dir": str(tmp_path / "cache")} | changes.pop("data", {})))
    defaults = {"batch_size": 8, "micro_batches": 2, "steps": 4, "eval": EvalConfig(every=2, batches=3)}
    return settings(model=model, data=data, **(defaults | changes))


def photos(tmp_path: Path, classes: int = 2, number: int = 8) -> Path:
    for split in ("train", "val"):
        for place in range(classes):
            folder = tmp_path / "photos" / split / f"class{place}"
            folder.mkdir(parents=True)
            for n in range(number):
                Image.new("RGB", (12, 10 + n), (200 * place, 9 * n, 50)).save(folder / f"{n}.png")
    return tmp_path / "photos"


def test_losses_accuracies_and_weights_are_the_same_bits_on_1_2_and_4_stages(tmp_path: Path) -> None:
    cfg = digits(tmp_path)
    for stages in (1, 2, 4):
        run(tmp_path, f"on{stages}", stages, cfg)
    one = [row for row in metrics(tmp_path, "on1") if "val/accuracy" in row]
    assert len(one) == 3
    assert all(0 <= row["val/accuracy"] <= row["val/top5"] <= 1 for row in one)
    for other in ("on2", "on4"):
        assert losses(tmp_path, other) == losses(tmp_path, "on1")
        assert [row for row in metrics(tmp_path, other) if "val/accuracy" in row] == one
        assert_same(saved(tmp_path, other, 4), saved(tmp_path, "on1", 4))


def test_the_accuracy_is_that_of_all_validation_images(tmp_path: Path) -> None:
    """A model that looks at one pixel: the share of images whose class that is can be counted."""
    root = photos(tmp_path, number=5)
    model = AnythingConfig(factory=f"{__name__}:red_or_not")
    data = {"set": "folder", "path": str(root), "workers": 1, "augment": []}
    cfg = digits(tmp_path, data=data, steps=1, eval=EvalConfig(every=1))
    cfg.model = model
    cfg.optimizer.lr = 1e-30
    (root / "val" / "class0" / "red.png").write_bytes((root / "val" / "class1" / "0.png").read_bytes())
    run(tmp_path, "run", 2, cfg)
    values = next(row for row in metrics(tmp_path, "run") if "val/accuracy" in row)
    assert values["val/accuracy"] == pytest.approx(10 / 11)


def red_or_not() -> Any:
    """Two logits: minus the red, and the red, of the pixel in the middle."""
    import torch
    from torch import nn

    class Red(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([-1.0, 1.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :1, 4, 4] * self.weight

    return nn.Sequential(nn.Identity(), Red())


@pytest.mark.slow
def test_a_resumed_run_sees_the_images_that_one_without_a_break_sees(tmp_path: Path) -> None:
    run(tmp_path, "whole", 1, digits(tmp_path))
    run(tmp_path, "parts", 2, digits(tmp_path, steps=2))
    run(tmp_path, "parts", 1, digits(tmp_path, data={"workers": 1}), resume=True)
    assert_same(saved(tmp_path, "parts", 4), saved(tmp_path, "whole", 4))


def test_an_image_that_cannot_be_read_ends_the_run_by_its_name(tmp_path: Path) -> None:
    root = photos(tmp_path)
    (root / "train" / "class1" / "3.png").write_text("no image")
    cfg = digits(tmp_path, data={"set": "folder", "path": str(root)}, batch_size=16)
    with pytest.raises(DataError, match=r"class1/3.png cannot be read"):
        run(tmp_path, "fails", 2, cfg)
    cfg.data.on_error = "skip"
    cfg.batch_size = 15
    run(tmp_path, "goes_on", 2, cfg)
    assert metrics(tmp_path, "goes_on")[0]["data/skipped"] == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"num_classes": 9}}, "model.num_classes=9 is less than the 10 classes of the data; use"),
        ({"data": {"size": 4}}, "images of 4x4 are too small"),
        ({"data": {"set": "folder", "path": "/nowhere"}}, "data.path=/nowhere is no folder"),
        ({"batch_size": 2000}, "batch_size=2000 is more than"),
        ({"data": {"valid_fraction": 0.0}}, "no images for validation; use a larger data.valid_fraction; or train"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_worker_starts(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        prepare(digits(tmp_path, **changes), RunPaths(tmp_path / "run"), 0)
