"""Text by chance: each next token drawn from what the model says of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipetrain.inference.incremental import Incremental


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: what log p is divided by; 0 takes the most probable token.
        top_k: of the most probable tokens only so many; None is all.
        top_p: of these the fewest whose probabilities sum to so much. Holtzman et al. 2020, section 3.1.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def draw(self, log_probs: Tensor, chance: Tensor) -> Tensor:
        """One token for each row.

        Args:
            log_probs: [rows, vocabulary].
            chance: [rows], at least 0 and below 1. Tokens lie behind each other from 0 to 1, the most probable first.
        """
        if self.temperature == 0:
            return log_probs.argmax(1)
        top, tokens = (log_probs.double() / self.temperature).sort(dim=1, descending=True, stable=True)
        share = top[:, : self.top_k].softmax(1)
        before = share.cumsum(1) - share
        share = torch.where(before < self.top_p, share, 0.0)
        ends = share.cumsum(1)
        place = torch.searchsorted(ends, (chance.double() * ends[:, -1])[:, None], right=True)
        return tokens.gather(1, place.clamp(max=ends.shape[1] - 1)).squeeze(1)


@torch.inference_mode()
def sample(model: Incremental, prompts: Tensor, seeds: Sequence[int], number: int, sampling: Sampling) -> Tensor:
    """Goes on with each prompt for `number` tokens. What becomes of one depends on its seed and not on the others.

    A text that has become longer than the model's context goes on from the second half of what the model can see.

    Args:
        prompts: token ids, [rows, tokens], at least one token.
        seeds: one for each row.

    Returns:
        [rows, tokens + number]
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    texts, seen, start = prompts, 0, 0  # the model has seen the tokens from `start` to `seen`
    model.begin()
    for _ in range(number):
        length = texts.shape[1]
        if model.context is not None and length - start > model.context:
            model.begin()
            seen = start = length - max(1, model.context // 2)
        for piece in texts[:, seen:].split(model.piece or length, dim=1):
            log_probs = model.extend(piece)
        seen = length
        chance = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
        texts = torch.cat([texts, sampling.draw(log_probs, chance.to(texts.device))[:, None]], dim=1)
    model.end()
    return texts
