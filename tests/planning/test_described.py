"""Plans for devices that are not here."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import DESCRIBED as DEVICE
from runs import settings, tokens_of
from torch import Tensor, nn

from pipetrain import rules
from pipetrain.config import PlanConfig, TransformerConfig
from pipetrain.errors import ConfigError
from pipetrain.launch import prepare
from pipetrain.models import LayerRecipe, Recipe
from pipetrain.paths import RunPaths
from pipetrain.planning.described import described_profile, kernel_time
from pipetrain.preview import preview
from pipetrain.profile.bench import signatures_of
from pipetrain.training.build import build_recipe
from pipetrain.training.job import Job


def job_of(tmp_path: Path) -> Job:
    cfg = settings(action="plan", plan=PlanConfig(device=DEVICE))
    return Job(cfg, RunPaths(tmp_path / "run"), tokens_of(tmp_path), ("X",) * 2, None)


def test_an_operation_takes_its_arithmetic_or_its_memory() -> None:
    seconds = kernel_time(DEVICE, "fp32")
    assert seconds(1e12, 1e3) == pytest.approx(5e-6 + 2.0)
    assert seconds(1e3, 1e11) == pytest.approx(5e-6 + 2.0)
    assert kernel_time(DEVICE, "bf16")(1e12, 1e3) == pytest.approx(5e-6 + 0.5)


def test_a_product_of_matrices_costs_what_it_computes(tmp_path: Path) -> None:
    """[4 x 8, 16] times [16, 16], twice as much backwards: 2 n m k operations each."""
    job = job_of(tmp_path)
    device = dataclasses.replace(DEVICE, kernel_us=1e-9, memory_gb_per_s=1e9)
    job = dataclasses.replace(job, cfg=dataclasses.replace(job.cfg, plan=PlanConfig(device=device)))
    recipe = Recipe(
        (
            LayerRecipe("embed", partial(nn.Embedding, 256, 16)),
            LayerRecipe("square", partial(nn.Linear, 16, 16, bias=False)),
            LayerRecipe("last", partial(nn.Linear, 16, 16, bias=False)),
        ),
        lambda output, targets: output.sum(),
        lambda targets: targets[0].numel(),
    )
    layer = described_profile(job, recipe, signatures_of(recipe), [4]).costs[4].layers[1]
    once_s = 2 * (4 * 8) * 16 * 16 / 0.5e12
    assert layer.forward_s == pytest.approx(once_s, rel=1e-3)
    assert layer.backward_s == pytest.approx(2 * once_s, rel=1e-3)
    assert layer.input_s == pytest.approx(once_s, rel=1e-3)
    assert layer.weight_s == pytest.approx(once_s, rel=1e-3)


def test_no_layer_gets_memory(tmp_path: Path) -> None:
    """A model of a terabyte."""
    job = job_of(tmp_path)
    model = TransformerConfig(layers=2, d_model=65536, heads=2, d_ff=4 * 65536)
    recipe = build_recipe(dataclasses.replace(job.cfg, model=model), job.data)
    cost = described_profile(job, recipe, signatures_of(recipe), [1]).costs[1]
    assert sum(layer.parameter_bytes for layer in cost.layers) > 2**38


class LooksAtValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float() if bool(x.sum() > 0) else x.float() * 2


def test_a_layer_that_looks_at_values_is_named(tmp_path: Path) -> None:
    recipe = Recipe(
        (LayerRecipe("looks", LooksAtValues), LayerRecipe("last", partial(nn.Linear, 8, 8))),
        lambda output, targets: output.sum(),
        lambda targets: targets[0].numel(),
    )
    with pytest.raises(ConfigError, match=r"layer looks cannot be planned for plan\.device=X, since it cannot run"):
        described_profile(job_of(tmp_path), recipe, signatures_of(recipe), [2])


def test_a_plan_for_each_number_of_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = PlanConfig(device=DEVICE, devices=[1, 2, 9])
    assert preview(settings(action="plan", balance="auto", plan=plan), tmp_path) == 0
    shown = capsys.readouterr().out
    problem = "plan.devices=[1,2,9] makes 9 stages, but the model has only 4 layers and every stage needs one"
    assert f"9 devices\n{problem}; use plan.devices=4 or fewer" in shown
    plans = json.loads((tmp_path / "plan.json").read_text())
    assert list(plans) == ["1", "2", "9"]
    assert plans["9"]["problem"].startswith(problem)
    assert plans["1"]["prediction"]["step_s"] > plans["2"]["prediction"]["step_s"]
    assert [stage["device"] for stage in plans["2"]["stages"]] == ["X", "X"]
    assert not torch.distributed.is_initialized()


def test_where_no_number_of_devices_has_a_plan(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="makes 9 stages"):
        preview(settings(action="plan", plan=PlanConfig(device=DEVICE, devices=[9])), tmp_path / "run")
    small = PlanConfig(device=dataclasses.replace(DEVICE, memory_gib=1e-6), devices=[2])
    with pytest.raises(ConfigError, match="no plan fits"):
        preview(settings(action="plan", plan=small), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("devices", [[0], [-1, 2], []])
def test_numbers_of_devices_must_be_such(tmp_path: Path, devices: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"must be numbers of devices, such as plan.devices=\[8,128\]"):
        preview(settings(action="plan", plan=PlanConfig(device=DEVICE, devices=devices)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_devices_than_layers_with_everything_open(tmp_path: Path) -> None:
    plan = PlanConfig(device=DEVICE)
    with pytest.raises(ConfigError, match="devices=9 makes 9 stages, but the model has only 4 layers"):
        prepare(
            settings(action="plan", schedule="auto", partitions="auto", devices=9, plan=plan), RunPaths(tmp_path), 0
        )


def test_float64_takes_twice_the_memory(tmp_path: Path) -> None:
    bytes_of = {}
    for precision in ("fp32", "fp64"):
        cfg = settings(action="plan", devices=1, precision=precision, plan=PlanConfig(device=DEVICE))
        assert preview(cfg, tmp_path / precision) == 0
        plan = json.loads((tmp_path / precision / "plan.json").read_text())
        bytes_of[precision] = plan["prediction"]["stages"][0]["memory"]
    assert bytes_of["fp64"]["weights"] == 2 * bytes_of["fp32"]["weights"]
    assert sum(bytes_of["fp64"].values()) > 1.9 * sum(bytes_of["fp32"].values())


def test_a_description_is_not_called_as_a_device_of_this_machine() -> None:
    device = dataclasses.replace(DEVICE, name="cuda:0")
    with pytest.raises(ConfigError, match=r"plan.device.name=cuda:0 would be a device of this machine"):
        rules.check(settings(action="plan", plan=PlanConfig(device=device)), 0)
