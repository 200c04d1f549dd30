"""Adaptive softmax against its definition, against torch's own, and through the pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same, losses, run, saved
from test_memory_of_segments import xl
from torch import Tensor, nn

from pipetrain import rules
from pipetrain.data.text import TokenFolder
from pipetrain.errors import ConfigError
from pipetrain.models.adaptive import AdaptiveHead, adaptive_loss_sum
from pipetrain.training.build import build_recipe

V, D = 23, 6
CUTOFFS = [5, 9, 14]


def head(cutoffs: list[int]) -> AdaptiveHead:
    torch.manual_seed(0)
    return AdaptiveHead(nn.Linear(D, V).double(), nn.Linear(D, len(cutoffs)).double(), 0.0)


def probabilities(of: AdaptiveHead, cutoffs: list[int], x: Tensor) -> Tensor:
    """Of all words, written out: [tokens, V]."""
    weight, bias = of.output.weight, of.output.bias
    first = torch.cat([x @ weight[: cutoffs[0]].T + bias[: cutoffs[0]], of.groups(x)], dim=-1).softmax(-1)
    found = [first[:, : cutoffs[0]]]
    for number, (start, end) in enumerate(zip(cutoffs, [*cutoffs[1:], V], strict=True)):
        inner = (x @ weight[start:end].T + bias[start:end]).softmax(-1)
        found.append(first[:, cutoffs[0] + number, None] * inner)
    return torch.cat(found, dim=-1)


@pytest.mark.parametrize("cutoffs", [[5], CUTOFFS, [1, 22]])
def test_the_loss_is_that_of_probabilities_which_sum_to_one(cutoffs: list[int]) -> None:
    model, x = head(cutoffs), torch.randn(2, 30, D, dtype=torch.float64)
    target = torch.randint(V, (2, 30))
    target[0, :7] = -100
    wanted = probabilities(model, cutoffs, x.flatten(0, 1))
    torch.testing.assert_close(wanted.sum(-1), torch.ones(60, dtype=torch.float64))
    right = -sum(wanted[row, t].log() for row, t in enumerate(target.flatten().tolist()) if t != -100)
    found = adaptive_loss_sum(cutoffs, V, -100)(model(x), (target,))
    torch.testing.assert_close(found, right, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (found, right)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_it_is_torchs_adaptive_softmax_where_that_projects_nothing() -> None:
    theirs = nn.AdaptiveLogSoftmaxWithLoss(D, V, CUTOFFS, div_value=1.0, head_bias=True).double()
    ours = head(CUTOFFS)
    with torch.no_grad():
        ours.output.bias.zero_()
        ours.output.bias[: CUTOFFS[0]] = theirs.head.bias[: CUTOFFS[0]]
        ours.output.weight[: CUTOFFS[0]] = theirs.head.weight[: CUTOFFS[0]]
        ours.groups.weight.copy_(theirs.head.weight[CUTOFFS[0] :])
        ours.groups.bias.copy_(theirs.head.bias[CUTOFFS[0] :])
        for start, end, tail in zip(CUTOFFS, [*CUTOFFS[1:], V], theirs.tail, strict=True):
            tail[0].weight.copy_(torch.eye(D))
            ours.output.weight[start:end] = tail[1].weight
    x, target = torch.randn(1, 40, D, dtype=torch.float64), torch.randint(V, (1, 40))
    right = -theirs(x[0], target[0]).output.sum()
    torch.testing.assert_close(adaptive_loss_sum(CUTOFFS, V, -100)(ours(x), (target,)), right)


def test_a_group_without_a_target_has_a_gradient_of_zero() -> None:
    """And not none: what exists may not differ between micro-batches."""
    model = head(CUTOFFS)
    adaptive_loss_sum(CUTOFFS, V, -100)(model(torch.randn(1, 4, D).double()), (torch.zeros(1, 4).long(),)).backward()
    assert model.output.weight.grad is not None
    assert not model.output.weight.grad[CUTOFFS[0] :].any()
    assert model.output.weight.grad[: CUTOFFS[0]].any()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_runs_are_the_same_bits_for_every_cut(tmp_path: Path, precision: str) -> None:
    options: dict[str, Any] = {"model": {"cutoffs": [40, 100, 130]}, "precision": precision}
    run(tmp_path, "1", 1, xl(**options))
    run(tmp_path, "2", 2, xl(**options, recompute="never", schedule="zb_h1"))
    run(tmp_path, "4", 4, xl(**options, schedule="1f1b"))
    for name in ("2", "4"):
        assert losses(tmp_path, name) == losses(tmp_path, "1")
        assert_same(saved(tmp_path, name, 6), saved(tmp_path, "1", 6))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": {"cutoffs": [4, 4]}}, "model.cutoffs=[4,4] must be numbers above 0 that ascend"),
        ({"model": {"cutoffs": [4]}, "logit_clip": 5.0}, "logit_clip=5.0 is not there for an adaptive softmax"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rules.check(xl(**changes), num_gpus=0)
    assert text in str(caught.value)


def test_groups_beyond_the_vocabulary_are_refused() -> None:
    tokens = TokenFolder(folder="", tokenizer="bytes", vocab_size=256, num_tokens={}, num_bytes={})
    with pytest.raises(ConfigError, match="must end below the 256 tokens of the text's vocabulary"):
        build_recipe(xl(model={"cutoffs": [20, 256]}), tokens)
