"""`Pipeline`: a user's own loop, in as many processes as there are, gives the numbers of plain PyTorch."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipetrain import Pipeline
from pipetrain.engine.local import LocalTransport, run_ranks
from pipetrain.errors import ConfigError, LayerError, StageFailed

DOCS = Path(__file__).parent.parent / "docs" / "python.md"


class Residual(nn.Module):
    """Needs capturing: a skip, and a parameter used at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(6, 8, bias=False)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        return self.drop(h + self.body(h)) @ self.embedding.weight


def model() -> nn.Module:
    torch.manual_seed(4)
    return Residual()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(n, 6, generator=generator), torch.randint(0, 6, (n,), generator=generator)) for n in (7, 3, 8)]


def run(num_stages: int, **options: Any) -> tuple[list[tuple[float, float]], dict[str, Tensor], float]:
    def rank_main(transport: LocalTransport) -> Any:
        pipe = Pipeline(model(), "cross_entropy", num_microbatches=4, transport=transport, device="cpu", **options)
        optimizer = torch.optim.SGD(pipe.parameters(), lr=0.5)
        results = []
        for inputs, targets in batches():
            result = pipe.train_step(inputs, targets)
            pipe.clip_gradients(0.5)
            optimizer.step()
            results.append((result.loss, result.grad_norm))
        return results, pipe.state_dict(), pipe.evaluate(*batches()[0])

    ranks = run_ranks(num_stages, rank_main)
    state = {name: tensor for _, part, _ in ranks for name, tensor in part.items()}
    assert all(results == ranks[0][0] for results, _, _ in ranks)
    assert all(loss == ranks[0][2] for _, _, loss in ranks)
    return ranks[0][0], state, ranks[0][2]


def plain() -> tuple[list[tuple[float, float]], dict[str, Tensor], float]:
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    results = []
    for inputs, targets in batches():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(inputs), targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        results.append((float(loss.detach()), float(norm)))
    inputs, targets = batches()[0]
    return results, module.state_dict(), float(nn.functional.cross_entropy(module(inputs), targets).detach())


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_a_loop_of_ones_own_gives_plain_pytorchs_numbers(num_stages: int) -> None:
    results, state, loss = run(num_stages)
    expected, expected_state, expected_loss = plain()
    for got, wanted in zip(results, expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, tensor in expected_state.items():
        assert torch.allclose(state[name], tensor, rtol=1e-4, atol=1e-6), name


def test_the_numbers_do_not_depend_on_the_number_of_processes() -> None:
    one, state, loss = run(1)
    for num_stages in (2, 3):
        other, other_state, other_loss = run(num_stages)
        assert (other, other_loss) == (one, loss)
        for name, tensor in state.items():
            assert torch.equal(other_state[name], tensor), name


def test_a_balance_and_a_state_of_ones_own() -> None:
    def rank_main(transport: LocalTransport) -> dict[str, Tensor]:
        layers = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
        pipe = Pipeline(layers, "mse", balance=[1, 2], transport=transport)
        pipe.load_state_dict({name: torch.full_like(t, int(name[0])) for name, t in layers.state_dict().items()})
        return pipe.state_dict()

    first, second = run_ranks(2, rank_main)
    assert set(first) == {"0.weight", "0.bias"}
    assert set(second) == {"1.weight", "1.bias", "2.weight", "2.bias"}
    assert second["2.weight"].tolist() == [[2, 2], [2, 2]]


def test_the_state_has_the_names_of_the_whole_model_also_for_a_module_that_is_used_twice() -> None:
    def rank_main(transport: LocalTransport) -> dict[str, Tensor]:
        torch.manual_seed(0)
        same = nn.Linear(2, 2)
        layers = nn.Sequential(same, nn.Tanh(), same)
        pipe = Pipeline(layers, "mse", balance=[1, 2], transport=transport, device="cpu")
        pipe.load_state_dict({name: torch.ones_like(t) for name, t in layers.state_dict().items()})
        return pipe.state_dict()

    for part in run_ranks(2, rank_main):
        assert set(part) == {"0.weight", "0.bias"}
        assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in part.values())


def test_what_is_frozen_must_stay_frozen_and_a_batch_must_have_a_target() -> None:
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def rank_main(transport: LocalTransport) -> None:
        pipe = Pipeline(layers, "cross_entropy", num_microbatches=2, transport=transport, device="cpu")
        with pytest.raises(StageFailed, match="the mini-batch has no valid target"):
            pipe.train_step(torch.randn(4, 2), torch.full((4,), -100))
        pipe.train_step(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))
        layers[0].requires_grad_(False)
        with pytest.raises(LayerError, match=r"requires_grad of 0.weight has changed"):
            pipe.train_step(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))

    run_ranks(1, rank_main)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"balance": [1, 1]}, r"balance=\[1, 1\] must have 1 numbers of at least 1, one for each stage, that sum to"),
        ({"schedule": "gpip"}, "schedule=gpip: no such schedule. Did you mean 'gpipe'"),
        ({"recompute": "nver"}, "recompute=nver: no such policy. Did you mean 'never'"),
        (
            {"schedule": "zb_v", "partitions": 3},
            "partitions=3: schedule=zb_v cannot have so many on 1 processes; use 2",
        ),
        ({"loss": "crossentropy"}, "Did you mean 'cross_entropy'"),
    ],
)
def test_mistakes_are_explained(options: dict[str, Any], error: str) -> None:
    def rank_main(transport: LocalTransport) -> None:
        Pipeline(model(), **({"loss": "mse", "transport": transport} | options))

    with pytest.raises(ConfigError, match=error):
        run_ranks(1, rank_main)


def test_more_processes_than_layers_are_refused() -> None:
    def rank_main(transport: LocalTransport) -> None:
        Pipeline(nn.Sequential(nn.Linear(2, 2)), "mse", transport=transport)

    with pytest.raises(ConfigError, match="2 stages are more than the 1 layers of the module"):
        run_ranks(2, rank_main)


@pytest.mark.dist
def test_the_example_of_the_docs_runs_alone_and_under_torchrun(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    script = tmp_path / "train.py"
    script.write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    lines = []
    for command in ([sys.executable, str(script)], torchrun):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        lines.append(done.stdout.strip())
    assert lines[0].startswith("1 stages, loss 0.")
    assert lines[1] == lines[0].replace("1 stages", "2 stages")
