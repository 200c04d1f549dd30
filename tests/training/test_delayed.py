"""The one-process stand-in for the pipeline in convergence studies, against the pipeline."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from ouroboros.delayed import DelayedTraining
from pipeline import build_runtime
from runs import settings
from torch import Tensor, nn

from pipetrain import models, schedule
from pipetrain.config import Config, LrRuleConfig, MuonConfig, NadamConfig, RotatedAdamConfig, SgdConfig, StaleConfig
from pipetrain.engine.joint_update import JointUpdate
from pipetrain.engine.local import LocalTransport, run_ranks
from pipetrain.engine.minibatch import MiniBatch
from pipetrain.models import Recipe
from pipetrain.schedule import LOCKED, STALE, Schedule
from pipetrain.training.build import outer_parameters
from pipetrain.training.optim import build_optimizer
from pipetrain.training.stale import UpdateRule

STEPS, WARMUP = 12, 2


def tiny(dtype: torch.dtype = torch.float32) -> Recipe:
    return models.build(
        name="transformer",
        layers=4,
        d_model=8,
        d_ff=16,
        heads=2,
        dropout=0.0,
        tied=True,
        positions="learned",
        init_scale="none",
        vocab_size=11,
        seq_len=6,
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(11, (4, 6), generator=generator), torch.randint(11, (4, 6), generator=generator)


def pipelined(cfg: Config, balance: Sequence[int], orders: Sequence[Schedule]) -> dict[str, Tensor]:
    recipe = tiny()
    last = len(balance) - 1

    def rank_main(transport: LocalTransport) -> dict[str, Tensor]:
        runtime = build_runtime(recipe, balance, transport, placement=orders[0].placement)
        names = {s: [name for name, _ in stage.named_parameters()] for s, stage in runtime.stages.items()}
        stage_of = {name: s for s in names for name in names[s]}
        tied = {"embedding.token.weight", "head.output.weight"} if last else set()
        optimizer = build_optimizer(
            cfg.optimizer,
            runtime.own_parameters,
            stage_of={name: None if name in tied else s for name, s in stage_of.items()},
            outer=outer_parameters(recipe, runtime.own_parameters),
        )
        rule = UpdateRule(cfg, optimizer, runtime.own_parameters, len(balance))

        def fetch(step: int) -> MiniBatch:
            inputs, targets = batch(step)
            return MiniBatch((inputs,), (targets,), targets.numel())

        first = 0
        for order in orders:
            runtime.train_segment(runtime.prepare(order), first, fetch, update=rule.apply)
            first += order.num_steps
        return {name: p.detach() for name, p in runtime.parameters.items()}

    merged: dict[str, Tensor] = {}
    for found in run_ranks(max(orders[0].placement) + 1, rank_main):
        merged |= found
    return merged


CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "error_feedback": {"stale": StaleConfig(warmup_steps=WARMUP, correctors=["error_feedback"])},
    "pipemare": {"stale": StaleConfig(warmup_steps=WARMUP, correctors=["pipemare"], anneal_steps=8)},
    "nadam": {"optimizer": NadamConfig(name="nadam", betas=[0.99, 0.999])},
    "rotated_adam": {"optimizer": RotatedAdamConfig(name="rotated_adam", refresh=3, weight_decay=0.1)},
    "muon": {"optimizer": MuonConfig(name="muon", weight_decay=0.1)},
    "spike_compensation": {
        "optimizer": SgdConfig(name="sgd", lr=0.1, momentum=0.9),
        "stale": StaleConfig(warmup_steps=WARMUP, correctors=["spike_compensation"]),
    },
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("balance", [(3, 3), (2, 2, 2), (1, 1, 1, 1, 2)], ids=str)
def test_the_stand_in_has_the_bits_of_the_pipeline(balance: tuple[int, ...], case: str) -> None:
    cfg = settings(stale=StaleConfig(warmup_steps=WARMUP), grad_clip=0.5)
    cfg = settings(**{"stale": cfg.stale, "grad_clip": 0.5, **CASES[case]})
    ranks = len(balance) - 1
    lengths = [1] * WARMUP + [STEPS - WARMUP]
    orders = [schedule.build_stale(LOCKED, ranks, 1, n, recompute="never") for n in lengths]
    right = pipelined(cfg, balance, orders)
    training = DelayedTraining(tiny(), balance, cfg, [len(balance) - 1 - s for s in range(len(balance))])
    training.train(batch, STEPS)
    for name, tensor in training.weights().items():
        assert torch.equal(tensor, right[name]), name


def test_a_synchronous_stand_in_is_a_drain_after_every_step() -> None:
    cfg = settings(grad_clip=None)  # there each device clips what it has
    orders = [schedule.build_stale(STALE["ouroboros"], 2, 1, 1, recompute="never")] * STEPS
    right = pipelined(cfg, (2, 2, 2), orders)
    training = DelayedTraining(tiny(), (2, 2, 2), cfg, [0, 0, 0])
    training.train(batch, STEPS)
    assert all(torch.equal(tensor, right[name]) for name, tensor in training.weights().items())


def test_each_update_is_clipped_to_its_stages_share_and_has_the_learning_rate_of_its_mini_batch() -> None:
    cfg = settings(grad_clip=2.0, optimizer=SgdConfig(name="sgd", lr=1.0), lr_rule=LrRuleConfig(warmup_steps=10))
    weight, other = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))
    weight.grad, other.grad = torch.full((4,), 3.0), torch.full((1,), 8.0)
    parameters = {"a": weight, "b": other}
    rule = UpdateRule(cfg, build_optimizer(cfg.optimizer, parameters, stage_of={"a": 0, "b": 3}), parameters, 4)
    rule.apply(JointUpdate({0: 1, 3: 4}, {0: 3, 3: 0}, {"a": 0, "b": 3}, {0: 36.0, 3: 64.0}, None))
    limit = 2.0 * (2 / 4) ** 0.5  # two stages of four
    torch.testing.assert_close(weight.detach(), torch.full((4,), -3.0 * limit / 10 * 2 / 10))
    torch.testing.assert_close(other.detach(), torch.full((1,), -8.0 * limit / 10 * 5 / 10))
