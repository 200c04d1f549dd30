"""Beam search against one that keeps no past and takes one source at a time, and against all targets there are."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from pipetrain.inference.beam import Hypothesis, Search, beam_search
from pipetrain.inference.incremental import Incremental
from pipetrain.models import Recipe, build
from pipetrain.partition.split import take_stage

PAD, UNKNOWN, BEGIN, END = range(4)
V, LONGEST = 9, 6
SOURCES = torch.tensor([[4, 5, 6, 7, END], [8, END, PAD, PAD, PAD], [7, 7, 4, END, PAD]])


def recipe(seed: int) -> tuple[Recipe, list[Any]]:
    made = build(
        name="seq2seq",
        layers=1,
        d_model=8,
        d_ff=16,
        heads=2,
        head_width=4,
        dropout=0.0,
        embeddings="none",
        norm="pre",
        init_scale="none",
        label_smoothing=0.0,
        vocab_size=V,
        max_tokens=LONGEST,
    )
    built = take_stage(made, (len(made.layers),), 0, seed=seed, device=torch.device("cpu"))
    modules = [layer.module.double().eval() for layer in built]
    with torch.no_grad():
        modules[-1].output.weight *= 6  # an untrained model finds all words alike
        modules[-1].output.bias[END] += 1
    return made, modules


class Plain:
    """log p of the next token, computed from the whole target each time."""

    def __init__(self, seed: int) -> None:
        _, (self.embed, self.encoder, self.begin, self.decoder, self.head) = recipe(seed)

    @torch.no_grad()
    def __call__(self, source: Tensor, target: tuple[int, ...]) -> list[float]:
        first = self.embed(source[None][:, source != PAD])
        memory = self.encoder(first["x"], first["mask"])
        y = self.decoder(self.begin(torch.tensor([[BEGIN, *target]])), memory, first["mask"])
        logits = self.head(y)[0, -1]
        return logits.log_softmax(0).tolist()  # type: ignore[no-any-return]


def search(beams: int, penalty: float) -> Search:
    return Search(beams, penalty, LONGEST, BEGIN, END, never=(PAD, BEGIN))


def divisor(length: int, penalty: float) -> float:
    return float(((5 + length) / 6) ** penalty)


def one_by_one(plain: Plain, source: Tensor, beams: int, penalty: float) -> Hypothesis:
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    finished: list[Hypothesis] = []
    for length in range(1, LONGEST + 1):
        continued = [
            (score + p, (*target, word))
            for score, target in live
            for word, p in enumerate(plain(source, target))
            if word not in (PAD, BEGIN)
        ]
        continued = sorted(continued, key=lambda pair: -pair[0])[: 2 * beams]
        ended = continued[:beams] if length == LONGEST else [pair for pair in continued[:beams] if pair[1][-1] == END]
        for score, target in ended:
            words = [word for word in target if word != END]
            finished.append(Hypothesis(words, score / divisor(length, penalty)))
        live = [pair for pair in continued if pair[1][-1] != END][:beams]
        best = max((h.score for h in finished), default=-torch.inf)
        if best >= live[0][0] / divisor(LONGEST, penalty) or (beams == 1 and finished):
            break
    return max(finished, key=lambda hypothesis: hypothesis.score)


@pytest.mark.parametrize("beams", [1, 2, 4])
@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", range(6))
def test_many_at_once_are_one_by_one(beams: int, penalty: float, seed: int) -> None:
    found = beam_search(Incremental(*recipe(seed)), search(beams, penalty), SOURCES)
    plain = Plain(seed)
    expected = [one_by_one(plain, source, beams, penalty) for source in SOURCES]
    assert [h.tokens for h in found] == [h.tokens for h in expected]
    assert [h.score for h in found] == pytest.approx([h.score for h in expected], abs=1e-6)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_with_room_for_all_it_finds_the_best_of_all(penalty: float, seed: int) -> None:
    longest = 3
    words = [word for word in range(V) if word not in (PAD, BEGIN, END)]
    plain, source = Plain(seed), SOURCES[0]
    scores: dict[tuple[int, ...], float] = {}
    for length in range(longest + 1):
        for target in itertools.product(words, repeat=length):
            steps = [(*target, END)[:i] for i in range(min(length + 1, longest))]
            ends = (*target, END)[: len(steps)]
            log_p = sum(plain(source, before)[word] for before, word in zip(steps, ends, strict=True))
            scores[target] = log_p / divisor(len(steps), penalty)
    wide = Search(len(words) ** longest, penalty, longest, BEGIN, END, never=(PAD, BEGIN))
    (found,) = beam_search(Incremental(*recipe(seed)), wide, source[None])
    best = max(scores, key=lambda target: scores[target])
    assert found.tokens == list(best)
    assert found.score == pytest.approx(scores[best], abs=1e-6)


def test_a_longer_penalty_gives_longer_targets() -> None:
    lengths = []
    for penalty in (0.0, 1.0, 3.0):
        found = [beam_search(Incremental(*recipe(seed)), search(4, penalty), SOURCES) for seed in range(8)]
        lengths.append(sum(len(h.tokens) for each in found for h in each))
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[2]
