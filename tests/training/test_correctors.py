"""Correctors and the optimizers that bear staleness, against their formulas."""

import pytest
import torch
from runs import assert_same, run, saved, settings
from torch import Tensor, nn

from pipetrain.config import (
    AdamConfig,
    MuonConfig,
    NadamConfig,
    OptimizerConfig,
    RotatedAdamConfig,
    SgdConfig,
    StaleConfig,
)
from pipetrain.rules.stale import CORRECTORS
from pipetrain.training.correctors import build_correctors
from pipetrain.training.optim import build_optimizer
from pipetrain.training.optimizers import Composite, RotatedAdam


def some_gradients(*shape: int, number: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(number)]


def corrected(
    cfg: OptimizerConfig, correctors: list[str], late: int, gradients: list[Tensor], feedback: float = 1.0
) -> Tensor:
    weight = nn.Parameter(torch.ones_like(gradients[0]))
    optimizer = build_optimizer(cfg, {"w": weight})
    corrector = build_correctors(StaleConfig(correctors=correctors, feedback=feedback))
    for gradient in gradients:
        weight.grad = gradient.clone()
        with corrector.update(optimizer, {weight: late}):
            optimizer.step()
    return weight.detach()


def test_error_feedback_is_twice_the_update_less_the_one_before() -> None:
    gradients = some_gradients(3)
    found = corrected(SgdConfig(name="sgd", lr=0.1), ["error_feedback"], 1, gradients)
    expected, before = torch.ones(3, dtype=torch.float64), gradients[0]
    for gradient in gradients:
        expected -= 0.1 * (2 * gradient - before)
        before = gradient
    torch.testing.assert_close(found, expected)


def test_feedback_that_takes_out_all_lag_leaves_the_newest_gradient() -> None:
    """c = m / (1 - m) under an exponential mean m of gradients, as Adam has it."""
    gradients, m = some_gradients(3), 0.8
    cfg = SgdConfig(name="sgd", lr=0.1 * (1 - m), momentum=m)  # torch's momentum is that mean over 1 - m
    found = corrected(cfg, ["error_feedback"], 3, gradients, feedback=m / (1 - m))
    expected = 1 - 0.1 * ((1 - m) * gradients[0] + sum(gradients[1:], torch.zeros(3, dtype=torch.float64)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("late", [1, 3])
def test_spike_compensation_is_its_papers_formula(late: int) -> None:
    gradients, m = some_gradients(3), 0.8
    found = corrected(SgdConfig(name="sgd", lr=0.1, momentum=m), ["spike_compensation"], late, gradients)
    w, v = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for gradient in gradients:
        v = m * v + gradient
        w = w - 0.1 * (m**late * v + (1 - m**late) / (1 - m) * gradient)
    torch.testing.assert_close(found, w)


@pytest.mark.parametrize("corrector", ["error_feedback", "spike_compensation", "pipemare"])
def test_what_is_not_late_is_left_alone(corrector: str) -> None:
    cfg = SgdConfig(name="sgd", lr=0.1, momentum=0.9)
    assert torch.equal(corrected(cfg, [corrector], 0, some_gradients(3)), corrected(cfg, [], 0, some_gradients(3)))
    assert build_correctors(StaleConfig(correctors=[corrector])).learning_rate(0.1, 0, 5) == 0.1


def test_every_corrector_that_the_rules_allow_is_there() -> None:
    for name in CORRECTORS:
        build_correctors(StaleConfig(correctors=[name]))


def test_pipemare_gives_late_stages_less_at_first() -> None:
    rate = build_correctors(StaleConfig(correctors=["pipemare"], anneal_steps=100)).learning_rate
    assert rate(1.0, 4, 0) == pytest.approx(1 / 4)
    assert rate(1.0, 4, 50) == pytest.approx(1 / 2)
    assert rate(1.0, 4, 100) == rate(1.0, 4, 5000) == rate(1.0, 1, 0) == 1.0


def steps_of(optimizer: torch.optim.Optimizer, weight: nn.Parameter, gradients: list[Tensor]) -> Tensor:
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def test_rotated_adam_without_a_side_to_rotate_is_adamw() -> None:
    ends = []
    for kind in (torch.optim.AdamW, lambda *a, **k: RotatedAdam(*a, largest=1, **k)):
        weight = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
        optimizer = kind([weight], lr=0.1, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.1)
        ends.append(steps_of(optimizer, weight, some_gradients(3, 4)))
    torch.testing.assert_close(*ends)


def test_rotated_adam_is_its_formula() -> None:
    gradients, b1, b2 = some_gradients(3, 4, number=7), 0.8, 0.9
    weight = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    optimizer = RotatedAdam([weight], lr=0.1, betas=(b1, b2), eps=1e-8, weight_decay=0.2, refresh=3)
    found = steps_of(optimizer, weight, gradients)
    w = torch.ones(3, 4, dtype=torch.float64)
    m, s, left, right = (torch.zeros(shape, dtype=torch.float64) for shape in ((3, 4), (3, 4), (3, 3), (4, 4)))
    u, v = torch.eye(3, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    for t, g in enumerate(gradients, 1):
        m, left, right = b1 * m + (1 - b1) * g, b2 * left + (1 - b2) * g @ g.T, b2 * right + (1 - b2) * g.T @ g
        if t in (1, 3, 6):
            u, v = torch.linalg.qr(left @ u).Q, torch.linalg.qr(right @ v).Q
        s = b2 * s + (1 - b2) * (u.T @ g @ v) ** 2
        turned = (u.T @ m @ v / (1 - b1**t)) / ((s / (1 - b2**t)).sqrt() + 1e-8)
        w = w - 0.1 * 0.2 * w - 0.1 * u @ turned @ v.T
    torch.testing.assert_close(found, w)


def test_muon_leaves_embedding_output_and_vectors_to_adamw() -> None:
    parameters = {name: nn.Parameter(torch.ones(4, 4)) for name in ("embedding.w", "inner.w", "head.w")}
    parameters["inner.bias"] = nn.Parameter(torch.ones(4))
    optimizer = build_optimizer(MuonConfig(name="muon"), parameters, outer=["embedding.w", "head.w"])
    assert isinstance(optimizer, Composite)
    muon, adam = optimizer._parts
    assert [p is parameters["inner.w"] for group in muon.param_groups for p in group["params"]] == [True]
    assert sum(len(group["params"]) for group in adam.param_groups) == 3
    optimizer.param_groups[0]["lr"] = 7.0  # the whole and its parts are the same
    assert muon.param_groups[0]["lr"] == 7.0


@pytest.mark.parametrize(
    "cfg", [NadamConfig(name="nadam"), MuonConfig(name="muon"), RotatedAdamConfig(name="rotated_adam")]
)
def test_each_trains_and_resumes_on_another_number_of_stages(cfg: AdamConfig, tmp_path) -> None:  # type: ignore[no-untyped-def]
    cfg.lr = 1e-2
    run(tmp_path, "whole", 1, settings(optimizer=cfg))
    run(tmp_path, "halves", 2, settings(optimizer=cfg, steps=3))
    run(tmp_path, "halves", 1, settings(optimizer=cfg), resume=True)
    assert_same(saved(tmp_path, "halves", 6), saved(tmp_path, "whole", 6))
