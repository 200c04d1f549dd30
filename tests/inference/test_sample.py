"""Drawing a token, and going on with a text."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipetrain.inference.incremental import Incremental
from pipetrain.inference.sample import Sampling, sample
from pipetrain.models import Recipe, build
from pipetrain.partition.split import take_stage

P = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
N = 1000


def shares(sampling: Sampling) -> list[float]:
    """How often each token comes, over chances that are spread evenly."""
    chances = (torch.arange(N) + 0.5) / N
    drawn = sampling.draw(P.log().expand(N, -1), chances)
    return (torch.bincount(drawn, minlength=4) / N).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(top_k=99), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(top_p=0.39), [0, 1, 0, 0]),
        (Sampling(top_p=0.41), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(top_p=0.8), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(top_k=3, top_p=0.5), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=0), [0, 1, 0, 0]),
        (Sampling(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
    ],
)
def test_tokens_come_as_often_as_they_should(sampling: Sampling, expected: list[float]) -> None:
    assert shares(sampling) == pytest.approx(expected, abs=2 / N)


def test_the_largest_chance_is_still_a_token() -> None:
    chance = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    for sampling in (Sampling(), Sampling(top_p=0.4), Sampling(top_k=1)):
        assert 0 <= int(sampling.draw(P.log()[None], chance)) < 4


def made(context: int) -> tuple[Recipe, list[nn.Module]]:
    settings: dict[str, Any] = {"layers": 2, "d_model": 8, "d_ff": 16, "heads": 2, "dropout": 0.0, "tied": False}
    settings |= {"positions": "learned", "init_scale": "none", "vocab_size": 11, "seq_len": context}
    recipe = build(name="transformer", **settings)
    built = take_stage(recipe, (len(recipe.layers),), 0, seed=3, device=torch.device("cpu"))
    modules = [layer.module.double().eval() for layer in built]
    with torch.no_grad():
        modules[-1].output.weight *= 8
    return recipe, modules


def test_a_text_depends_on_its_seed_alone() -> None:
    model = Incremental(*made(12))
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 2, 3]])
    together = sample(model, prompts, [7, 8, 9], 6, Sampling())
    for row, seed in enumerate([7, 8, 9]):
        assert torch.equal(sample(model, prompts[row : row + 1], [seed], 6, Sampling())[0], together[row])
    assert together[0].tolist() != together[2].tolist()


@torch.no_grad()
def plainly(text: list[int], number: int, context: int) -> list[int]:
    """The most probable token again and again; of a text longer than the context its end from some place on."""
    _, modules = made(context)
    model, start = nn.Sequential(*modules), 0
    for _ in range(number):
        if len(text) - start > context:
            start = len(text) - context // 2
        logits: Tensor = model(torch.tensor([text[start:]]))
        text = [*text, int(logits[0, -1].argmax())]
    return text


@pytest.mark.parametrize("prompt", [[5], [1, 2, 3], list(range(9))])
def test_a_long_text_goes_on_from_its_second_half(prompt: list[int]) -> None:
    found = sample(Incremental(*made(6)), torch.tensor([prompt]), [0], 20, Sampling(temperature=0))
    assert found[0].tolist() == plainly(prompt, 20, 6)
