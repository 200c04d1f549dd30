"""What users of other pipeline engines reported, one test for each complaint, named by its symptom."""

import math
from typing import Any

import pytest
import torch
from pipeline import build_runtime, train
from reference import plain_step
from test_any_module import Add, D, assert_every_cut_is_plain, assert_same, chain, data, every_cut, linear, recipe_of
from torch import Tensor, nn

from pipetrain import Pipeline, schedule
from pipetrain.engine.local import LocalTransport, run_ranks
from pipetrain.engine.report import StepReport
from pipetrain.errors import ConfigError
from pipetrain.models import LayerRecipe, Recipe, Value
from pipetrain.models.capture import capture
from pipetrain.models.whole import Whole
from pipetrain.partition.split import take_stage

CPU = torch.device("cpu")


def test_gradients_are_scaled_by_the_number_of_micro_batches() -> None:
    """Another number of micro-batches is another order of summation, nothing else; and a second step starts anew."""
    recipe = chain(linear, nn.Tanh, linear)
    _, expected, _ = plain_step(recipe, *data((12,))[0], num_microbatches=1)
    for num_microbatches in (1, 2, 3, 5, 12):
        got = train(recipe, (1, 2), data((12,)), num_microbatches=num_microbatches, dtype=torch.float64)
        for name, gradient in expected.items():
            assert torch.allclose(got.gradients[name], gradient, rtol=1e-11, atol=1e-14), (num_microbatches, name)


def test_masked_tokens_are_averaged_by_micro_batch_instead_of_by_token() -> None:
    """One micro-batch is nearly all padding: a mean of means would weigh its few tokens too much."""

    def loss_sum(output: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
        return nn.functional.cross_entropy(output, targets[0], ignore_index=-100, reduction="sum")

    recipe = Recipe(chain(linear, linear).layers, loss_sum, lambda targets: int((targets[0] != -100).sum()))
    x, targets = torch.randn(8, D), torch.randint(0, D, (8,))
    targets[:3] = -100
    got = train(recipe, (1, 1), [(x, targets)], num_microbatches=2, dtype=torch.float64)
    model = nn.Sequential(*(layer.module for layer in take_stage(recipe, (2,), 0, seed=0, device=CPU))).double()
    loss = nn.functional.cross_entropy(model(x.double()), targets, ignore_index=-100)
    loss.backward()
    assert got.reports[0].loss_sum / got.reports[0].count == pytest.approx(float(loss.detach()), rel=1e-12)
    for (name, gradient), parameter in zip(got.gradients.items(), model.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-11, atol=1e-14), name


def test_replicas_diverge_when_another_wrapper_sums_their_gradients() -> None:
    """Such a wrapper acts at the first backward of a step, not at the last. There is no data parallelism here yet."""
    wrapped = nn.Module.__new__(nn.parallel.DistributedDataParallel)  # its own constructor wants a process group
    nn.Module.__init__(wrapped)
    wrapped.module = nn.Linear(D, D)
    for module in (wrapped, nn.Sequential(nn.DataParallel(nn.Linear(D, D)), nn.ReLU())):
        with pytest.raises(ConfigError, match=r"is wrapped in \w+, which .* give the module inside it"):
            capture(module, lambda module=module: module, 1)


def test_tied_weights_are_counted_twice_or_drift_apart() -> None:
    ties = ((("layer0", "weight"), ("layer2", "weight")),)
    recipe = recipe_of(*chain(linear, nn.Tanh, linear).layers, ties=ties)
    for balance in every_cut(3):
        got = train(recipe, balance, data((6, 6, 6)), num_microbatches=2)
        assert torch.equal(got.parameters["layer0.weight"], got.parameters["layer2.weight"])
        counted = {name: g for name, g in got.gradients.items() if name != "layer2.weight"}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in counted.values()))
        assert got.reports[-1].grad_norm == pytest.approx(norm, rel=1e-6)


def test_batch_norm_statistics_are_garbage_after_the_first_step() -> None:
    """Nothing but real micro-batches ever goes through the model, each once."""
    recipe = chain(linear, lambda: nn.BatchNorm1d(D), linear)
    got = train(recipe, (1, 2), data((8,)), num_microbatches=2, recompute=True)
    _, _, buffers = plain_step(recipe, *data((8,))[0], num_microbatches=2)
    assert got.buffers["layer1.num_batches_tracked"] == 1
    assert torch.allclose(got.buffers["layer1.running_mean"].double(), buffers["layer1.running_mean"], atol=1e-6)


def test_dropout_depends_on_the_number_of_partitions() -> None:
    recipe = chain(linear, lambda: nn.Dropout(0.5), linear, lambda: nn.Dropout(0.5), linear)
    one = train(recipe, (5,), data(), num_microbatches=3)
    for balance in every_cut(5):
        assert_same(train(recipe, balance, data(), num_microbatches=3), one, balance)


def test_layers_are_dropped_when_they_do_not_divide() -> None:
    recipe = chain(*[linear] * 7)
    whole = [layer.name for layer in recipe.layers]
    for balance in every_cut(7):
        stages = [take_stage(recipe, balance, s, seed=0, device=CPU) for s in range(len(balance))]
        assert [layer.name for stage in stages for layer in stage] == whole


def test_gradients_are_gone_after_an_evaluation() -> None:
    def rank_main(transport: LocalTransport) -> None:
        pipe = Pipeline(nn.Sequential(linear(), linear()), "mse", num_microbatches=2, transport=transport, device="cpu")
        x, y = data((4,))[0]
        pipe.train_step(x, y)
        before = [p.grad.clone() for p in pipe.parameters() if p.grad is not None]
        pipe.evaluate(x, y)
        after = [p.grad for p in pipe.parameters() if p.grad is not None]
        assert len(before) == 2
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    run_ranks(2, rank_main)


def test_outputs_meet_the_labels_of_another_batch() -> None:
    """Each sample is its own label: any mix-up gives a loss."""

    class Exact(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(D))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.weight

    recipe = chain(nn.Identity, Exact, nn.Identity)
    x = torch.arange(11.0)[:, None].expand(11, D)
    got = train(recipe, (1, 1, 1), [(x, x)], num_microbatches=4)
    assert got.reports[0].loss_sum == 0


def test_one_stage_skips_a_bad_step_and_another_does_not() -> None:
    """Every rank gets the same report, so all of them decide the same."""

    class Explode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(D))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.sqrt(self.weight)  # finite, with an infinite gradient

    def rank_main(transport: LocalTransport) -> list[StepReport]:
        runtime = build_runtime(chain(linear, Explode, linear), (1, 1, 1), transport)
        program = runtime.prepare(schedule.build("gpipe", 3, 2, recompute="always"))
        seen: list[StepReport] = []
        x, y = data((4,))[0]
        runtime.train_step(program, 0, (x,), (y,), total=y.numel(), update=seen.append)
        return seen

    reports = run_ranks(3, rank_main)
    assert len({repr(report) for report in reports}) == 1  # as text: NaN differs from itself
    assert reports[0][0].bad_stage == 1
    assert not math.isfinite(reports[0][0].grad_norm)


def test_clipping_uses_the_norm_of_one_stage() -> None:
    def rank_main(transport: LocalTransport) -> tuple[float, float]:
        torch.manual_seed(0)
        layers = nn.Sequential(linear(), linear(), linear())
        pipe = Pipeline(layers, "mse", num_microbatches=2, transport=transport, device="cpu")
        norm = pipe.train_step(*data((4,))[0]).grad_norm
        pipe.clip_gradients(norm / 2)
        return norm, sum(float(p.grad.square().sum()) for p in pipe.parameters() if p.grad is not None)

    for num_stages in (1, 2, 3):
        ranks = run_ranks(num_stages, rank_main)
        assert len({norm for norm, _ in ranks}) == 1
        assert math.sqrt(sum(squares for _, squares in ranks)) == pytest.approx(ranks[0][0] / 2, rel=1e-5)


def test_dicts_none_and_keyword_like_values_do_not_travel() -> None:
    class Start(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"x": x, "mask": None, "scale": 0.5}

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D)

        def forward(self, state: dict[str, Any]) -> dict[str, Any]:
            hidden = self.linear(state["x"]) * state["scale"]
            return {**state, "x": hidden if state["mask"] is None else hidden * state["mask"], "mask": hidden > 0}

    class End(nn.Module):
        def forward(self, state: dict[str, Any]) -> Tensor:
            return state["x"]  # type: ignore[no-any-return]

    assert_every_cut_is_plain(chain(Start, Block, Block, End))


def test_encoder_decoder_and_position_tables_cannot_be_cut() -> None:
    """Every decoder layer takes the encoder's output and a table without a gradient that the first layer makes."""

    class Table(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.arange(x.shape[1], dtype=x.dtype).cos().expand(x.shape)

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.cross = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor, memory: Tensor, table: Tensor) -> Tensor:
            return torch.tanh(self.own(x) + self.cross(memory) * table)

    recipe = recipe_of(
        LayerRecipe("table", Table),
        LayerRecipe("encoder", linear, takes=(Value("batch", 0),)),
        LayerRecipe("sum", Add, takes=(Value("encoder"), Value("table"))),
        *(
            LayerRecipe(f"decoder{i}", Decoder, takes=(Value(before), Value("sum"), Value("table")))
            for i, before in enumerate(["encoder", "decoder0", "decoder1"])
        ),
    )
    assert_every_cut_is_plain(recipe)


def test_a_short_last_batch_or_a_longer_sequence_needs_a_restart() -> None:
    recipe = chain(linear, nn.Tanh, linear)
    batches = [data((n,), (length, D))[0] for n, length in [(6, 3), (6, 3), (5, 3), (3, 8), (6, 3), (4, 1)]]
    one = train(recipe, (3,), batches, num_microbatches=3)
    for balance in every_cut(3):
        assert_same(train(recipe, balance, batches, num_microbatches=3), one, balance)


def test_the_tracer_fails_on_real_models() -> None:
    """Options, checks, masks made of sizes, a dict as output, and control flow that depends on the data."""

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often, self.seldom = linear(), linear()

        def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
            if hidden.mean() > 0:
                return hidden + self.often(hidden) * mask
            return hidden + self.seldom(hidden)  # type: ignore[no-any-return]

    class Real(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = linear(), linear()
            self.blocks = nn.ModuleList([Expert(), Expert(), Expert()])

        def forward(self, x: Tensor, mask: Tensor | None = None, return_dict: bool = True) -> Any:
            if x.dim() not in (2, 3) or not 1 < x.shape[-1] <= D:
                raise ValueError(f"{x.shape} is no batch of vectors")
            if mask is None:
                mask = torch.ones(x.shape[0], 1, dtype=x.dtype, device=x.device)
            hidden = self.embed(x)
            for block in self.blocks:
                hidden = block(hidden, mask)
            output = self.head(hidden)
            return {"output": output, "hidden": hidden, "attentions": None} if return_dict else (output, hidden)

    def loss_sum(output: dict[str, Tensor], targets: tuple[Tensor, ...]) -> Tensor:
        return (output["output"] - targets[0]).square().sum() + output["hidden"].square().sum()

    whole = Whole(Real, seed=1)
    layers, ties = capture(Real(), whole.module, 1)
    assert [layer.name for layer in layers] == ["embed", "blocks.0", "blocks.1", "blocks.2", "head"]
    count = lambda targets: targets[0].numel()  # noqa: E731
    assert_every_cut_is_plain(
        Recipe(tuple(layers), loss_sum, count, ties=tuple(ties), release=whole.release, whole=whole.module)
    )


def test_frozen_weights_and_adapters_waste_messages_or_fail() -> None:
    class Adapted(nn.Module):
        """A frozen matrix and a trained one of low rank beside it."""

        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(D, D).requires_grad_(False)
            self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]

    frozen = lambda: nn.Linear(D, D).requires_grad_(False)  # noqa: E731
    recipe = chain(frozen, frozen, Adapted, frozen, Adapted)
    assert_every_cut_is_plain(recipe)
    sent: list[int] = []

    def rank_main(transport: LocalTransport) -> None:
        send = transport.send
        transport.send = lambda tensor, to_rank, tag, kind="tensor": (  # type: ignore[method-assign]
            sent.append(transport.rank) if kind == "tensor" and to_rank < transport.rank else None,
            send(tensor, to_rank, tag, kind),
        )[1]
        runtime = build_runtime(recipe, (1, 1, 3), transport)
        x, y = data((4,))[0]
        program = runtime.prepare(schedule.build("gpipe", 3, 2, recompute="always"))
        runtime.train_step(program, 0, (x,), (y,), total=y.numel(), update=lambda report: None)

    run_ranks(3, rank_main)
    assert sent == [], "no gradient travels to stages that are frozen"


def test_only_the_last_rank_knows_the_loss() -> None:
    def rank_main(transport: LocalTransport) -> tuple[float, float]:
        torch.manual_seed(0)
        pipe = Pipeline(nn.Sequential(linear(), linear(), linear()), "mse", transport=transport, device="cpu")
        x, y = data((4,))[0]
        return pipe.train_step(x, y).loss, pipe.evaluate(x, y)

    ranks = run_ranks(3, rank_main)
    assert ranks == [ranks[0]] * 3
    assert ranks[0][0] > 0
