"""Transformer-XL language model (Dai et al. 2019): attention to the segments before, by relative positions.

Letters of the shapes: B batch, T tokens of a segment, M remembered tokens, D model width, F feed-forward width,
H attention heads, V vocabulary. Post-norm; no biases in the attention but u and v.

A block has 5 D^2 (query, key, value, position, output) + 2DF + F + D (feed-forward) + 4D (norms) parameters, u and v
have D each, shared by all blocks or not, and the rest VD + V with tied embeddings. The authors' base model for enwik8
(12 blocks, D = 512, F = 2048, 204 characters, shared u and v) has 41,055,436, the one for WikiText-103 (16 blocks, D =
410, F = 2100, 267,735 words in four groups, which have D + 1 more for each but the first) 151,107,538.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipetrain.models.adaptive import AdaptiveHead, adaptive_log_probs, adaptive_loss_sum
from pipetrain.models.recipe import Generation, LayerRecipe, Recipe
from pipetrain.models.transformer import IGNORED_TARGET, clip_logits, count_targets, cross_entropy_sum, log_softmax
from pipetrain.segment_memory import SegmentMemory

_INITIAL_STD = 0.02


def transformer_xl(
    *,
    layers: int,
    d_model: int,
    d_ff: int,
    heads: int,
    dropout: float,
    attention_dropout: float,
    memory: int,
    evaluation_memory: int | None,
    tied: bool,
    shared_biases: bool,
    cutoffs: Sequence[int] = (),
    vocab_size: int,
    seq_len: int,
    logit_clip: float | None = None,
    logit_clip_kind: str = "hard",
) -> Recipe:
    """The recipe of a language model with memory.

    Args:
        memory: tokens before the segment that attention sees in training.
        evaluation_memory: the same in evaluation; None is as many.
        shared_biases: one u and one v for all blocks.
        cutoffs: ends of the groups of words of an adaptive softmax, without the last one; none is a plain softmax.
        seq_len: not used, positions are relative; the models for text all get it.
    """
    in_evaluation = memory if evaluation_memory is None else evaluation_memory

    def block() -> nn.Module:
        return Block(d_model, d_ff, heads, dropout, attention_dropout, SegmentMemory(memory, in_evaluation))

    def head() -> nn.Module:
        if not cutoffs:
            return Head(d_model, vocab_size, dropout, logit_clip, logit_clip_kind)
        return AdaptiveHead(_linear(d_model, vocab_size), _linear(d_model, len(cutoffs)), dropout)

    names = [f"blocks.{i}" for i in range(layers)]
    recipes = [
        LayerRecipe("embedding", lambda: Embedding(vocab_size, d_model, dropout)),
        *(LayerRecipe(name, block) for name in names),
        LayerRecipe("head", head),
    ]
    ties = [(("embedding", "token.weight"), ("head", "output.weight"))] if tied else []
    if shared_biases and layers > 1:
        ties += [
            tuple((name, f"attention.{bias}") for name in names)  # type: ignore[misc]
            for bias in ("content_bias", "position_bias")
        ]
    loss_sum = adaptive_loss_sum(cutoffs, vocab_size, IGNORED_TARGET) if cutoffs else cross_entropy_sum
    log_probs = adaptive_log_probs(cutoffs, vocab_size) if cutoffs else log_softmax
    return Recipe(
        tuple(recipes),
        loss_sum=loss_sum,
        count=count_targets,
        ties=tuple(ties),
        generation=Generation(log_probs, None),
    )


class Embedding(nn.Module):
    """Token ids [B, T] -> [B, T, D], scaled by sqrt(D)."""

    def __init__(self, vocab_size: int, d_model: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.token.weight, std=_INITIAL_STD)
        self.scale = math.sqrt(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        return self.dropout(self.token(ids) * self.scale)  # type: ignore[no-any-return]


class RelativeAttention(nn.Module):
    """Attention of T tokens to themselves and the M before: [B, T, D] and [B, M + T, D] -> [B, T, D].

    The score of query i and key j is ((q_i + u) k_j + (q_i + v) r_(i-j)) / sqrt(D / H), where r is a projection of the
    sinusoids of the distance. Source: Dai et al. 2019, section 3.3.
    """

    def __init__(self, d_model: int, heads: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.heads, self.attention_dropout = heads, attention_dropout
        self.query, self.position, self.output = (_linear(d_model, d_model, bias=False) for _ in range(3))
        self.key_value = _linear(d_model, 2 * d_model, bias=False)
        self.content_bias = nn.Parameter(torch.randn(d_model) * _INITIAL_STD)  # u
        self.position_bias = nn.Parameter(torch.randn(d_model) * _INITIAL_STD)  # v
        self.position_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, with_memory: Tensor) -> Tensor:
        num_queries, num_keys = x.shape[1], with_memory.shape[1]
        query = self.query(x)
        key, value = (self._split(part) for part in self.key_value(with_memory).chunk(2, dim=-1))
        distances = torch.arange(num_keys - 1, -1, -1, device=x.device, dtype=x.dtype)
        sinusoids = self.position_dropout(_sinusoids(distances, x.shape[-1]))
        position = self._split(self.position(sinusoids)[None])  # [1, H, M + T, D / H]
        scale = position.shape[-1] ** -0.5
        by_position = self._split(query + self.position_bias) @ position.mT * scale
        later = torch.ones(num_queries, num_keys, dtype=torch.bool, device=x.device).triu(1 + num_keys - num_queries)
        mixed = F.scaled_dot_product_attention(
            self._split(query + self.content_bias),
            key,
            value,
            attn_mask=_shifted(by_position).masked_fill(later, -math.inf),
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        return self.output(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, H, T, D / H]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # type: ignore[no-any-return]


def _shifted(scores: Tensor) -> Tensor:
    """From columns by distance, the farthest first, to columns by key: row i moves left by T - 1 - i.

    What comes in from the right is of no meaning: keys behind the query.
    """
    rows, columns = scores.shape[-2:]
    padded = F.pad(scores, (1, 0)).unflatten(-1, (columns + 1,)).flatten(-2)
    return padded[..., rows:].unflatten(-1, (rows, columns))  # type: ignore[no-any-return]


def _sinusoids(positions: Tensor, d_model: int) -> Tensor:
    """sin, then cos, of position / 10000^(2i/D): [positions, D]."""
    frequencies = 10_000 ** (-torch.arange(0, d_model, 2, device=positions.device, dtype=positions.dtype) / d_model)
    angle = positions[:, None] * frequencies
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Block(nn.Module):
    """Attention and feed-forward, each added to what came in and then normed: [B, T, D] -> [B, T, D]."""

    def __init__(
        self, d_model: int, d_ff: int, heads: int, dropout: float, attention_dropout: float, memory: SegmentMemory
    ) -> None:
        super().__init__()
        self.memory = memory
        self.attention = RelativeAttention(d_model, heads, dropout, attention_dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.ffn = nn.Sequential(_linear(d_model, d_ff), nn.ReLU(), nn.Dropout(dropout), _linear(d_ff, d_model))
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.attention(x, self.memory(x))))
        return self.norm2(x + self.dropout(self.ffn(x)))  # type: ignore[no-any-return]


class Head(nn.Module):
    """[B, T, D] -> logits [B, T, V]."""

    def __init__(
        self, d_model: int, vocab_size: int, dropout: float, logit_clip: float | None, logit_clip_kind: str
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.output = _linear(d_model, vocab_size)
        self.logit_clip, self.logit_clip_kind = logit_clip, logit_clip_kind

    def forward(self, x: Tensor) -> Tensor:
        return clip_logits(self.output(self.dropout(x)), self.logit_clip, self.logit_clip_kind, self.training)


def _linear(num_in: int, num_out: int, *, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(num_in, num_out, bias=bias)
    nn.init.normal_(layer.weight, std=_INITIAL_STD)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
