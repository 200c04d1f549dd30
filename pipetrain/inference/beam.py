"""Beam search: of all targets of a source, one to which the model gives a high probability.

Letters of the shapes: N sources, K hypotheses of each, V vocabulary, T tokens of a target.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipetrain.inference.incremental import Incremental

_NEVER = -torch.inf


class Hypothesis(NamedTuple):
    """A finished target.

    Attributes:
        tokens: without begin and end.
        score: log p, with that of its end, divided by the penalty of its length.
    """

    tokens: list[int]
    score: float


@dataclass(frozen=True)
class Search:
    """What is looked for.

    Attributes:
        beams: K; one is greedy search.
        length_penalty: alpha of ((5 + length) / 6)^alpha, by which log p is divided: 0 is none, more is longer targets.
            Wu et al. 2016, equation 14, without its coverage penalty.
        max_tokens: longest target, with its end. One that has not ended there is cut.
        begin, end: the tokens before the first word and behind the last one.
        never: tokens that no target has.
    """

    beams: int
    length_penalty: float
    max_tokens: int
    begin: int
    end: int
    never: tuple[int, ...] = ()

    def penalty(self, length: int) -> float:
        return float(((5 + length) / 6) ** self.length_penalty)


class _Best:
    """The best finished target of each source."""

    def __init__(self, number: int, max_tokens: int, device: torch.device) -> None:
        self.score = torch.full((number,), _NEVER, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(number, max_tokens, dtype=torch.long, device=device)
        self.length = torch.zeros(number, dtype=torch.long, device=device)

    def add(self, sources: Tensor, scores: Tensor, tokens: Tensor) -> None:
        """
        Args:
            sources: [n]: which ones.
            scores: [n, c]: of their new targets; those of which it is minus infinity are none.
            tokens: [n, c, T].
        """
        score, place = scores.double().max(1)
        is_better = score > self.score[sources]
        which = sources[is_better]
        self.score[which] = score[is_better]
        self.tokens[which, : tokens.shape[2]] = tokens[is_better, place[is_better]]
        self.length[which] = tokens.shape[2]


@torch.inference_mode()
def beam_search(model: Incremental, search: Search, *sources: Tensor) -> list[Hypothesis]:
    """The best target that is found for each source.

    In each step the 2 K best continuations of the K live hypotheses are looked at. Those of the first K that have ended
    are finished; the first K others live on. A source is done when no live hypothesis can become better than its best
    target, and in greedy search when it has one. (To stop at K targets, as is common, leaves out long ones: where the
    model is sure, the second best continuations are early ends.)

    Args:
        sources: see `Incremental.begin`; no row may depend on the padding of the others.
    """
    model.begin(*sources)
    device, number, beams = sources[0].device, len(sources[0]), search.beams
    best = _Best(number, search.max_tokens, device)
    going = torch.arange(number, device=device)  # the sources that are not done, [N]
    last = torch.full((number, 1), search.begin, device=device)
    scores = torch.zeros(number, 1, device=device)  # [N, K]; at first there is one hypothesis
    tokens = torch.zeros(number, 1, 0, dtype=torch.long, device=device)  # [N, K, T]
    never = torch.tensor(search.never, dtype=torch.long, device=device)
    for length in range(1, search.max_tokens + 1):
        log_probs = model.extend(last)
        log_probs[:, never] = _NEVER
        vocabulary = log_probs.shape[1]
        total = (scores.flatten()[:, None] + log_probs).view(len(going), -1)  # [N, K V]
        top, index = total.topk(min(2 * beams, total.shape[1]), dim=1)
        parent, word = index // vocabulary, index % vocabulary
        has_ended = word == search.end
        if length == search.max_tokens:  # all that lives is cut here
            words = torch.cat([_of(tokens, parent[:, :beams]), word[:, :beams, None]], dim=2)
            best.add(going, top[:, :beams] / search.penalty(length), words)
            break
        ended = torch.where(has_ended, top, _NEVER)[:, :beams] / search.penalty(length)
        best.add(going, ended, _of(tokens, parent[:, :beams]))
        # The first K that live on, in their order.
        places = (has_ended * top.shape[1] + torch.arange(top.shape[1], device=device)).argsort(dim=1)[:, :beams]
        alive = torch.where(has_ended, _NEVER, top).gather(1, places)
        word, parent = word.gather(1, places), parent.gather(1, places)
        # log p only falls from here on, and the penalty of the longest target is the largest.
        limit = alive[:, 0] / search.penalty(search.max_tokens)
        is_done = best.score[going] >= (limit if beams > 1 else torch.finfo(torch.float64).min)
        stay = (~is_done).nonzero().flatten()
        if not len(stay):
            break
        rows = (stay[:, None] * scores.shape[1] + parent[stay]).flatten()
        some_are_done = len(stay) < len(going)
        model.select(rows, stay if some_are_done else None)
        tokens = torch.cat([_of(tokens, parent), word[:, :, None]], dim=2)[stay]
        scores, last, going = alive[stay], word[stay].view(-1, 1), going[stay]
    model.end()
    return [
        Hypothesis([t for t in row[:length] if t != search.end], score)
        for row, length, score in zip(best.tokens.tolist(), best.length.tolist(), best.score.tolist(), strict=True)
    ]


def _of(tokens: Tensor, parents: Tensor) -> Tensor:
    """The hypotheses that some are made of: [N, K, T] and [N, c] -> [N, c, T]."""
    return tokens.gather(1, parents[:, :, None].expand(-1, -1, tokens.shape[2]))
