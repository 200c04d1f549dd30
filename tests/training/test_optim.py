import math

import pytest
import torch
from torch import nn

from pipetrain.config import AdafactorConfig, AdamConfig, LrRuleConfig, OptimizerConfig, RmspropConfig, SgdConfig
from pipetrain.training.optim import build_optimizer, clip_gradients, learning_rate


@pytest.mark.parametrize(
    ("cfg", "kind"),
    [
        (AdamConfig(name="adamw", weight_decay=0.1), torch.optim.AdamW),
        (AdamConfig(name="adam"), torch.optim.Adam),
        (SgdConfig(name="sgd", momentum=0.9, nesterov=True), torch.optim.SGD),
        (AdafactorConfig(name="adafactor"), torch.optim.Adafactor),
        (RmspropConfig(name="rmsprop"), torch.optim.RMSprop),
    ],
)
def test_each_name_is_torchs_optimizer(cfg: OptimizerConfig, kind: type) -> None:
    layer = nn.Linear(3, 2)
    optimizer = build_optimizer(cfg, dict(layer.named_parameters()))
    assert type(optimizer) is kind
    layer(torch.ones(1, 3)).sum().backward()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(layer.weight, before)


def test_matrices_are_decayed_and_vectors_are_not() -> None:
    layer = nn.Linear(3, 2)
    optimizer = build_optimizer(AdamConfig(name="adamw", weight_decay=0.1), dict(layer.named_parameters()))
    decayed, plain = optimizer.param_groups
    assert [p is layer.weight for p in decayed["params"]] == [True]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_rmsprop_is_the_formula_with_these_values() -> None:
    """m <- decay m + (1 - decay) g^2; b <- momentum b + g / (sqrt(m) + eps); w <- w - lr b."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    cfg = RmspropConfig(name="rmsprop", lr=0.1, decay=0.8, momentum=0.5, eps=0.3, weight_decay=9.0)  # none for vectors
    optimizer = build_optimizer(cfg, {"weight": weight})
    expected, moment, momentum = weight.detach().clone(), torch.zeros(2), torch.zeros(2)
    for gradient in (torch.tensor([0.5, 4.0]), torch.tensor([-1.0, 0.0]), torch.tensor([2.0, 1.0])):
        weight.grad = gradient.double()
        optimizer.step()
        moment = 0.8 * moment + 0.2 * gradient.double() ** 2
        momentum = 0.5 * momentum + gradient.double() / (moment.sqrt() + 0.3)
        expected -= 0.1 * momentum
        torch.testing.assert_close(weight.detach(), expected)


def test_frozen_parameters_and_stages_without_parameters_are_fine() -> None:
    layer = nn.Linear(3, 2).requires_grad_(False)
    build_optimizer(AdamConfig(name="adamw"), dict(layer.named_parameters())).step()


def rates(rule: LrRuleConfig, steps: list[int]) -> list[float]:
    return [learning_rate(2.0, rule, step) for step in steps]


def test_warm_up_then_constant() -> None:
    assert rates(LrRuleConfig(name="constant", warmup_steps=4), [0, 1, 3, 4, 1000]) == [0.5, 1.0, 2.0, 2.0, 2.0]


def test_linear_and_cosine_end_where_they_are_told_to() -> None:
    linear = LrRuleConfig(name="linear", warmup_steps=2, decay_steps=12, end_fraction=0.1)
    assert rates(linear, [1, 2, 7, 12, 99]) == pytest.approx([2.0, 2.0, 1.1, 0.2, 0.2])
    cosine = LrRuleConfig(name="cosine", decay_steps=10)
    assert rates(cosine, [0, 5, 10, 99]) == pytest.approx([2.0, 1.0, 0.0, 0.0])


def test_exponential_goes_down_in_stairs_to_its_floor() -> None:
    rule = LrRuleConfig(name="exponential", warmup_steps=4, decay_factor=0.5, decay_every=3, end_fraction=0.2)
    steps = [0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 9999]
    assert rates(rule, steps) == [0.5, 1.0, 2.0, 2.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.4, 0.4]


def test_inverse_square_root_reaches_the_peak_at_the_end_of_the_warm_up() -> None:
    """Vaswani et al. 2017: proportional to min(step^-0.5, step * warmup^-1.5), steps counted from 1."""
    rule = LrRuleConfig(name="inverse_sqrt", warmup_steps=100)
    for step in (0, 50, 99, 100, 5000):
        paper = min((step + 1) ** -0.5, (step + 1) * 100**-1.5)
        assert learning_rate(2.0, rule, step) == pytest.approx(2.0 * math.sqrt(100) * paper)


def test_clipping_is_torchs() -> None:
    ours, theirs = [nn.Parameter(torch.zeros(5)) for _ in range(3)], [nn.Parameter(torch.zeros(5)) for _ in range(3)]
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn(5)
        b.grad = a.grad.clone()
    norm = nn.utils.clip_grad_norm_(theirs, 0.7)
    clip_gradients(ours, float(norm), 0.7)
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=1e-6)


def test_small_gradients_are_left_alone() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([0.3, 0.4])
    clip_gradients([parameter], 0.5, 0.5)
    clip_gradients([parameter], 0.5, None)
    assert torch.equal(parameter.grad, torch.tensor([0.3, 0.4]))
