"""Stale schedules through the engine, bit for bit against the one-process oracle."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from pipeline import build_runtime
from stale_oracle import Make, StaleOracle, Versions
from torch import Tensor, nn
from torch.func import functional_call

from pipetrain import schedule
from pipetrain.data.share import Share
from pipetrain.engine.joint_update import JointUpdate
from pipetrain.engine.local import LocalTransport, run_ranks
from pipetrain.engine.minibatch import MiniBatch
from pipetrain.engine.report import SegmentReport
from pipetrain.engine.stage import Stage
from pipetrain.models import Recipe, build
from pipetrain.partition.split import build_layer
from pipetrain.schedule import LOCKED, STALE, Kind, Schedule, StaleFamily, joint_updates, staleness

POLICIES = ("stash", "replay", "current")
RECOMPUTE = {"stash": "never", "replay": "always", "current": "never"}


def tiny(layers: int = 4, *, tied: bool = False, dropout: float = 0.1) -> Recipe:
    return build(
        name="transformer",
        layers=layers,
        d_model=8,
        d_ff=16,
        heads=2,
        dropout=dropout,
        tied=tied,
        positions="learned",
        init_scale="none",
        vocab_size=11,
        seq_len=6,
        logit_clip=5.0,
    )


def some_batches(number: int, rows: int = 4) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    batches = [(torch.randint(11, (rows, 6)), torch.randint(11, (rows, 6))) for _ in range(number)]
    for step, (_, targets) in enumerate(batches):
        targets[0, : step % 5] = -100  # each mini-batch has another number of valid tokens
    return batches


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


@dataclass
class Trained:
    reports: list[SegmentReport]
    updates: list[list[JointUpdate]]
    parameters: list[dict[str, Tensor]]


def train(
    recipe: Recipe,
    balance: Sequence[int],
    orders: Sequence[Schedule],
    batches: Sequence[tuple[Tensor, Tensor]],
    policy: str,
    *,
    make: Make = adamw,
    before: Callable[[JointUpdate], None] = lambda update: None,
    dtype: torch.dtype = torch.float32,
    replicas: int = 1,
) -> Trained:
    """One segment after the other; what the first replica ended with."""

    def rank_main(transport: LocalTransport) -> tuple[list[SegmentReport], list[JointUpdate], dict[str, Tensor]]:
        placement = orders[0].placement
        each = orders[0].num_microbatches
        runtime = build_runtime(
            recipe,
            balance,
            transport,
            placement=placement,
            dtype=dtype,
            stale_weights=policy,
            replica_microbatches=each,
        )
        share = Share(transport.replicas.number, replicas, replicas * each)
        optimizer = make(list(runtime.own_parameters.values()))
        updates: list[JointUpdate] = []

        def update(joint: JointUpdate) -> None:
            updates.append(joint)
            optimizer.step()

        def batch(step: int) -> MiniBatch:
            inputs, targets = batches[step]
            own = share.rows(len(inputs))
            return MiniBatch((inputs[own],), (targets[own],), recipe.count((targets,)))

        reports, first = [], 0
        for order in orders:
            reports.append(runtime.train_segment(runtime.prepare(order), first, batch, update=update))
            first += order.num_steps
        return reports, updates, {n: p.detach().clone() for n, p in runtime.parameters.items()}

    length = max(orders[0].placement) + 1
    results = run_ranks(length * replicas, rank_main, replicas)
    for number, (_, _, parameters) in enumerate(results):
        assert all(torch.equal(p, results[number % length][2][name]) for name, p in parameters.items())
    results = results[:length]
    return Trained(results[0][0], [r[1] for r in results], [r[2] for r in results])


def versions_of(orders: Sequence[Schedule], replicas: int = 1) -> Versions:
    """Read off the schedules: joint updates of its rank before each action. All replicas run the same."""
    forward: dict[tuple[int, int, int], int] = {}
    backward: dict[tuple[int, int, int], int] = {}
    updates: list[list[tuple[tuple[int, int], ...]]] = [[] for _ in orders[0].actions]
    first = 0
    for order in orders:
        for rank, actions in enumerate(order.compute().actions):
            groups = {joint[-1]: joint for joint in joint_updates(actions)}
            for action in actions:
                each = range(action.microbatch, replicas * order.num_microbatches, order.num_microbatches)
                which = [(action.stage, first + action.step, m) for m in each]
                if action.kind is Kind.FORWARD:
                    forward |= dict.fromkeys(which, len(updates[rank]))
                elif action.kind is Kind.BACKWARD:
                    backward |= dict.fromkeys(which, len(updates[rank]))
                elif action in groups:
                    updates[rank].append(tuple((a.stage, first + a.step) for a in groups[action]))
        first += order.num_steps
    return Versions(orders[0].placement, forward, backward, updates, replicas * orders[0].num_microbatches)


def assert_same_as_oracle(
    recipe: Recipe,
    balance: Sequence[int],
    orders: Sequence[Schedule],
    policy: str,
    *,
    make: Make = adamw,
    dtype: torch.dtype = torch.float32,
) -> None:
    batches = some_batches(sum(order.num_steps for order in orders))
    trained = train(recipe, balance, orders, batches, policy, make=make, dtype=dtype)
    oracle = StaleOracle(recipe, balance, batches, versions_of(orders), policy, make, dtype=dtype)
    for rank, updates in enumerate(oracle._versions.updates):
        right = oracle.weights(rank, len(updates))
        for name, tensor in trained.parameters[rank].items():
            assert torch.equal(tensor, right[oracle._owner[name]]), (rank, name)
    last = len(balance) - 1
    number = orders[0].num_microbatches
    losses = [
        sum(float(oracle.activations(last, t, m)[1].detach().double()) for m in range(number))
        for t in range(len(batches))
    ]
    assert [loss for report in trained.reports for loss in report.loss_sums] == losses
    for order, report in zip(orders, trained.reports, strict=True):
        assert [list(row) for row in report.staleness] == staleness(order)


CASES = [
    *[("pipedream", STALE["pipedream"], k, 1) for k in (1, 2, 3, 5)],
    *[("bounded", STALE["bounded"], k, m) for k, m in ((2, 2), (4, 2), (3, 4))],
    *[("pipedream_2bw", STALE["pipedream_2bw"], k, k) for k in (1, 2, 4)],
    *[("ouroboros", STALE["ouroboros"], k, 1) for k in (1, 2, 3, 4)],
    *[("locked", LOCKED, k, 1) for k in (1, 2, 3, 4)],
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "family", "ranks", "number"), CASES, ids=lambda value: str(value)[:12])
def test_every_stale_schedule_is_its_definition(
    name: str, family: StaleFamily, ranks: int, number: int, policy: str
) -> None:
    """A tied matrix, where its uses share a rank; dropout; a drain in the middle, and synchronous steps before."""
    stages = family.num_stages(ranks)
    tied = stages == 1 or family.extra == 1
    recipe = tiny(tied=tied)
    balance = [1] * (stages - 1) + [6 - (stages - 1)]
    orders = [schedule.build_stale(family, ranks, number, n, recompute=RECOMPUTE[policy]) for n in (1, 1, 7, 3)]
    assert_same_as_oracle(recipe, balance, orders, policy)


@pytest.mark.parametrize("name", ["pipedream", "ouroboros"])
def test_a_recompute_sees_the_stashed_weights_and_draws_the_same(name: str) -> None:
    family, recipe, batches = STALE[name], tiny(), some_batches(6)
    balance = [1, 2, 3]
    ranks = 3 - family.extra
    runs = [
        train(recipe, balance, [schedule.build_stale(family, ranks, 1, 6, recompute=recompute)], batches, "stash")
        for recompute in ("always", "never")
    ]
    for ours, right in zip(*(run.parameters for run in runs), strict=True):
        assert all(torch.equal(ours[name], right[name]) for name in right)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def test_locked_ouroboros_is_the_papers_formula() -> None:
    """w_k(t+1) = w_k(t) - lr grad_k f(x(t-K+k); w(t-K+k)), and for the matrix V that modules 1 and K share
    V(t+1) = V(t) - lr (grad_Vo f(x(t); w(t)) + grad_Vi f(x(t-K+1); w(t-K+1))): Yang et al. 2019."""
    steps, last = 8, 4
    recipe, batches, balance = tiny(layers=4, tied=True, dropout=0.0), some_batches(8), [2, 1, 1, 2]
    order = schedule.build_stale(LOCKED, 3, 1, steps, recompute="never")
    trained = train(recipe, balance, [order], batches, "stash", make=sgd, dtype=torch.float64)
    module_of = [k + 1 for k, number in enumerate(balance) for _ in range(number)]
    layers = [build_layer(layer, 0).double() for layer in recipe.layers]
    weights = {
        layer.full_name(name): parameter.detach().clone()
        for layer, module in zip(recipe.layers, layers, strict=True)
        for name, parameter in module.named_parameters()
    }
    first, output = "embedding.token.weight", "head.output.weight"
    weights[output] = weights[first]
    gradients: list[dict[str, Tensor]] = []
    for t in range(steps + last - 1):
        if t < steps:
            inputs, targets = batches[t]
            value, leaves = inputs, {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
            for layer, module in zip(recipe.layers, layers, strict=True):
                own = {name: leaves[layer.full_name(name)] for name, _ in module.named_parameters()}
                value = functional_call(module, own, (value,))
            (recipe.loss_sum(value, (targets,)) / recipe.count((targets,))).backward()
            gradients.append({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
        change = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        for place, layer in enumerate(recipe.layers):
            of = t - last + module_of[place]
            if 0 <= of < steps:
                for name in (layer.full_name(name) for name, _ in layers[place].named_parameters()):
                    change[first if name == output else name] += gradients[of][name]
        weights = {name: tensor - 0.1 * change[name] for name, tensor in weights.items()}
        weights[output] = weights[first]
    for rank in trained.parameters:
        for name, tensor in rank.items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("policy", "versions"), [("stash", [4, 3, 2, 1]), ("replay", [1] * 4), ("current", [1] * 4)])
def test_versions_of_the_weights_that_are_alive(policy: str, versions: list[int]) -> None:
    """stash keeps K - k + 1 on module k, K = 4, and no other copies of them; the others keep one."""
    recipe, balance, seen = tiny(layers=6), [2, 2, 2, 2], [0] * 4
    order = schedule.build_stale(STALE["pipedream"], 4, 1, 9, recompute=RECOMPUTE[policy])

    def rank_main(transport: LocalTransport) -> None:
        runtime = build_runtime(recipe, balance, transport, stale_weights=policy)
        optimizer = adamw(list(runtime.own_parameters.values()))
        (stage,) = runtime.stages.values()

        def batch(step: int) -> MiniBatch:
            inputs, targets = some_batches(9)[step]
            return MiniBatch((inputs,), (targets,), recipe.count((targets,)))

        forward = stage.forward

        def watched(*args: object, **kwargs: object) -> object:
            found = forward(*args, **kwargs)  # type: ignore[arg-type]
            alive = {
                leaf.data_ptr()
                for leaves in runtime._versions._stages[stage.index].seen.values()
                for name, leaf in leaves.items()
                if name == next(iter(runtime.own_parameters))
            }
            alive.add(next(iter(runtime.own_parameters.values())).data_ptr())
            seen[transport.rank] = max(seen[transport.rank], len(alive))
            return found

        stage.forward = watched  # type: ignore[method-assign,assignment]
        runtime.train_segment(runtime.prepare(order), 0, batch, update=lambda joint: optimizer.step() and None)

    run_ranks(4, rank_main)
    assert seen == versions


def test_replay_keeps_the_inputs_of_K_minus_k_plus_1_micro_batches_and_no_graph() -> None:
    order = schedule.build_stale(STALE["ouroboros"], 3, 1, 9, recompute="always")

    def rank_main(transport: LocalTransport) -> dict[int, int]:
        placement = order.placement
        runtime = build_runtime(tiny(), [2, 1, 1, 2], transport, placement=placement, stale_weights="replay")
        optimizer = adamw(list(runtime.own_parameters.values()))
        most = dict.fromkeys(runtime.stages, 0)

        def watch(stage: Stage) -> None:
            forward = stage.forward

            def watched(*args: Any, **kwargs: Any) -> Any:
                found = forward(*args, **kwargs)
                most[stage.index] = max(most[stage.index], len(stage._in_flight))
                assert all(kept.inputs and not kept.graphs for kept in stage._in_flight.values())
                return found

            stage.forward = watched  # type: ignore[method-assign]

        for stage in runtime.stages.values():
            watch(stage)

        def batch(step: int) -> MiniBatch:
            inputs, targets = some_batches(9)[step]
            return MiniBatch((inputs,), (targets,), recipe_count(targets))

        runtime.train_segment(runtime.prepare(order), 0, batch, update=lambda joint: optimizer.step() and None)
        return most

    found = {stage: most for of_rank in run_ranks(3, rank_main) for stage, most in of_rank.items()}
    assert found == {0: 4, 1: 3, 2: 2, 3: 1}


@pytest.mark.parametrize(("policy", "moving"), [("stash", [True, True, False]), ("replay", [False] * 3)])
def test_weights_move_only_where_somebody_still_needs_them(policy: str, moving: list[bool]) -> None:
    order = schedule.build_stale(STALE["pipedream"], 3, 1, 5, recompute=RECOMPUTE[policy])

    def rank_main(transport: LocalTransport) -> bool:
        runtime = build_runtime(tiny(), [2, 2, 2], transport, stale_weights=policy)
        optimizer = adamw(list(runtime.own_parameters.values()))
        before = {name: p.data_ptr() for name, p in runtime.parameters.items()}

        def batch(step: int) -> MiniBatch:
            inputs, targets = some_batches(5)[step]
            return MiniBatch((inputs,), (targets,), recipe_count(targets))

        runtime.train_segment(runtime.prepare(order), 0, batch, update=lambda joint: optimizer.step() and None)
        return any(p.data_ptr() != before[name] for name, p in runtime.parameters.items())

    assert run_ranks(3, rank_main) == moving


def recipe_count(targets: Tensor) -> int:
    return int((targets != -100).sum())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "tied"), [("ouroboros", True), ("locked", True), ("pipedream", False)])
def test_replicas_take_the_micro_batches_of_one_mini_batch(name: str, tied: bool, policy: str) -> None:
    """Each has one of two: even the order of the sum is that of the oracle."""
    family = LOCKED if name == "locked" else STALE[name]
    recipe, balance = tiny(tied=tied), [2, 2, 2]
    ranks = 3 - family.extra
    recompute = RECOMPUTE[policy]
    orders = [schedule.build_stale(family, ranks, 1, n, recompute=recompute, reduces=True) for n in (7, 4)]
    batches = some_batches(11)
    trained = train(recipe, balance, orders, batches, policy, replicas=2)
    oracle = StaleOracle(recipe, balance, batches, versions_of(orders, 2), policy, adamw)
    for rank, updates in enumerate(oracle._versions.updates):
        right = oracle.weights(rank, len(updates))
        for parameter, tensor in trained.parameters[rank].items():
            assert torch.equal(tensor, right[oracle._owner[parameter]]), (rank, parameter)
    for order, report in zip(orders, trained.reports, strict=True):
        assert [list(row) for row in report.staleness] == staleness(order)


@pytest.mark.parametrize("name", ["bounded", "pipedream_2bw"])
def test_replicas_of_several_micro_batches_are_the_oracle_in_float64(name: str) -> None:
    recipe, balance = tiny(), [2, 2, 2]
    orders = [schedule.build_stale(STALE[name], 3, 3, n, recompute="never", reduces=True) for n in (6, 3)]
    batches = some_batches(9, rows=7)
    options: dict[str, Any] = {"make": partial(torch.optim.SGD, lr=0.1, momentum=0.9), "dtype": torch.float64}
    trained = train(recipe, balance, orders, batches, "stash", replicas=2, **options)
    versions = versions_of(orders, 2)
    oracle = StaleOracle(recipe, balance, batches, versions, "stash", **options)
    for rank, updates in enumerate(versions.updates):
        right = oracle.weights(rank, len(updates))
        for parameter, tensor in trained.parameters[rank].items():
            torch.testing.assert_close(tensor, right[parameter], rtol=1e-10, atol=1e-13)
