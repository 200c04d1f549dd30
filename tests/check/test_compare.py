"""The rows of the table: what counts as different, where, and in which units."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipetrain.check.compare import Recorded, Row, compare, compare_draws
from pipetrain.paths import RunPaths
from pipetrain.training.record import Recorder


def recorded(folder: Path, *ranks: dict[str, Tensor], norm: float = 1.0) -> Recorded:
    """A run of one step whose ranks have these weights, each with a gradient of twice itself, halved by clipping."""
    run = RunPaths(folder)
    run.root.mkdir()
    for rank, weights in enumerate(ranks):
        parameters = {name: nn.Parameter(value) for name, value in weights.items()}
        recorder = Recorder(lambda step, rank=rank: run.recorded(step, rank), [])  # type: ignore[misc]
        for parameter in parameters.values():
            parameter.grad = 2 * parameter.detach()
        recorder.before_clipping(parameters)
        for parameter in parameters.values():
            parameter.grad = parameter.detach().clone()
        recorder.after_clipping(parameters)
        recorder.write(1, loss=2.0, norm=norm, parameters=parameters, buffers={}, optimizer={})
    return Recorded(run)


def row(tmp_path: Path, ours: dict[str, Tensor], right: dict[str, Tensor]) -> Row:
    runs = recorded(tmp_path / "a", ours), recorded(tmp_path / "b", right)
    return compare("weights", "weight", "b", runs, [1], 0.0)


def test_equal_bits_hold_whatever_ranks_wrote_them(tmp_path: Path) -> None:
    a, b = torch.randn(3), torch.randn(2, 2)
    runs = recorded(tmp_path / "two", {"a": a}, {"b": b}), recorded(tmp_path / "one", {"a": a, "b": b})
    found = compare("weights", "weight", "one", runs, [1], 0.0)
    assert (found.difference, found.where, found.holds) == (0.0, "", True)


def test_the_largest_difference_is_a_share_of_the_largest_weight_and_has_a_name(tmp_path: Path) -> None:
    right = {"a": torch.tensor([1.0, 8.0]), "b": torch.tensor([2.0])}
    found = row(tmp_path, {"a": torch.tensor([1.5, 8.0]), "b": torch.tensor([4.0])}, right)
    assert (found.difference, found.where, found.holds) == (0.25, "b, step 1", False)


def test_one_bit_is_a_difference(tmp_path: Path) -> None:
    one = torch.ones(2)
    next_one = torch.nextafter(one, torch.tensor(2.0))
    assert not row(tmp_path, {"a": torch.stack([one, next_one])}, {"a": torch.stack([one, one])}).holds


@pytest.mark.parametrize("missing", ["ours", "right"])
def test_what_only_one_has_is_a_difference(tmp_path: Path, missing: str) -> None:
    both, more = {"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(3)}
    found = row(tmp_path, both, more) if missing == "ours" else row(tmp_path, more, both)
    assert found.where == "b, step 1"
    assert not found.holds


def test_nan_is_equal_only_to_nan(tmp_path: Path) -> None:
    broken = torch.tensor([math.nan, 1.0])
    assert row(tmp_path, {"a": broken}, {"a": torch.ones(2)}).difference == math.inf
    (tmp_path / "same").mkdir()
    assert row(tmp_path / "same", {"a": broken}, {"a": broken}).holds


def test_the_factor_of_clipping_is_measured_and_not_calculated(tmp_path: Path) -> None:
    runs = recorded(tmp_path / "a", {"a": torch.tensor([3.0])}), recorded(tmp_path / "b", {"a": torch.tensor([2.0])})
    assert compare("clip factor", "clip", "b", runs, [1], 0.0).holds
    assert runs[0].tensors(1, "clip") == {"a": 0.5}


def test_single_numbers_are_named_by_their_step(tmp_path: Path) -> None:
    runs = recorded(tmp_path / "a", {}, norm=1.0), recorded(tmp_path / "b", {}, norm=2.0)
    assert compare("gradient norm", "norm", "b", runs, [1], 0.0).where == "step 1"
    assert compare("loss", "loss", "b", runs, [1], 0.0).holds


def test_what_the_model_does_not_have_is_said(tmp_path: Path) -> None:
    runs = recorded(tmp_path / "a", {"a": torch.ones(1)}), recorded(tmp_path / "b", {"a": torch.ones(1)})
    found = compare("buffers", "buffer", "b", runs, [1], 0.0)
    assert (found.difference, found.where, found.holds) == (None, "the model has no buffers", True)
    assert compare_draws("b", runs, [1]).where == "no random layer"


def test_masks_are_compared_by_module(tmp_path: Path) -> None:
    seeds = {"right": (0, 1), "recomputed": (0, 1, 0, 1), "other": (0, 2)}
    for name, drawn in seeds.items():
        run = RunPaths(tmp_path / name)
        run.root.mkdir()
        drop = nn.Dropout(0.5)
        recorder = Recorder(lambda step, run=run: run.recorded(step, 0), [("drop", drop), ("none", nn.Dropout(0.0))])  # type: ignore[misc]
        for seed in drawn:
            torch.manual_seed(seed)
            drop(torch.ones(64))
        recorder.write(1, loss=0.0, norm=0.0, parameters={}, buffers={}, optimizer={})
    right = Recorded(RunPaths(tmp_path / "right"))
    assert compare_draws("right", (Recorded(RunPaths(tmp_path / "recomputed")), right), [1]).holds
    found = compare_draws("right", (Recorded(RunPaths(tmp_path / "other")), right), [1])
    assert (found.difference, found.where, found.holds) == (1.0, "drop, step 1", False)
