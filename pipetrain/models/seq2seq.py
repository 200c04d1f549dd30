"""Encoder-decoder Transformer for translation, T(L, H, A) of Huang et al. 2019, section 5, as a list of layers.

Letters of the shapes: B batch, S source tokens, T target tokens, D model width, H width inside the feed-forward layers,
A attention heads of C channels each, V vocabulary, L blocks of the encoder and as many of the decoder.

The list is encoder embedding, L blocks, decoder embedding, L blocks, head. The encoder's output goes to every block of
the decoder, and the mask of its padding to all blocks: wherever the cut is, they are skips.

Biases everywhere, as in `transformer`. Without them a block of the encoder has 4 D A C + 2 D H parameters, one of the
decoder 8 D A C + 2 D H; the paper's sizes, with D = 1024 and C = 64, come out with two matrices of 64,000 words (the
source's, and the target's, which is that of the output).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from pipetrain.models.past import Kept, Past, Place, causal_mask
from pipetrain.models.recipe import BATCH, Generation, LayerRecipe, Recipe, Tensors, Value
from pipetrain.models.transformer import (
    IGNORED_TARGET,
    clip_logits,
    count_targets,
    cross_entropy_sum,
    depth_scale,
    linear,
    log_softmax,
    sinusoids,
)

PADDING = 0  # the token behind the end of a sentence in a batch
NOTHING, OUTPUT, EVERYTHING = "none", "output", "all"  # of the embeddings are one matrix


def seq2seq(
    *,
    layers: int,
    d_model: int,
    d_ff: int,
    heads: int,
    head_width: int,
    dropout: float,
    embeddings: str,
    norm: str,
    init_scale: str,
    label_smoothing: float,
    vocab_size: int,
    max_tokens: int,
    logit_clip: float | None = None,
    logit_clip_kind: str = "hard",
) -> Recipe:
    """The recipe of a translation model: it takes source tokens [B, S] and target tokens [B, T], the latter moved on by
    one place, and is compared with the target tokens.

    Args:
        layers: L.
        embeddings: which matrices are one: none; output: the target's and the output's; all: the source's as well.
        norm: pre | post: in front of each part of a block, or behind its sum.
        max_tokens: longest sentence.
        logit_clip: see `clip_logits`.
    """
    size = Size(d_model, d_ff, heads, head_width, dropout, depth_scale(init_scale, layers), norm == "pre")
    embed = partial(Embedding, vocab_size, d_model, max_tokens, dropout)
    mask = Value("encoder.embedding", "mask")
    recipes = [LayerRecipe("encoder.embedding", partial(EncoderEmbedding, embed), (Value(BATCH, 0),))]
    last = Value("encoder.embedding", "x")
    for i in range(layers):
        name = f"encoder.blocks.{i}"
        recipes.append(LayerRecipe(name, partial(EncoderBlock, size, is_last=i == layers - 1), (last, mask)))
        last = Value(name)
    memory = last
    recipes.append(LayerRecipe("decoder.embedding", embed, (Value(BATCH, 1),)))
    last = Value("decoder.embedding")
    for i in range(layers):
        name = f"decoder.blocks.{i}"
        recipes.append(LayerRecipe(name, partial(DecoderBlock, size), (last, memory, mask)))
        last = Value(name)
    recipes.append(
        LayerRecipe("head", partial(Head, d_model, vocab_size, size.is_pre, logit_clip, logit_clip_kind), (last,))
    )
    return Recipe(
        tuple(recipes),
        loss_sum=smoothed_loss_sum(label_smoothing),
        count=count_targets,
        ties=_ties(embeddings),
        measures={"nll": cross_entropy_sum},
        generation=Generation(log_softmax, max_tokens),
    )


def _ties(embeddings: str) -> tuple[tuple[tuple[str, str], ...], ...]:
    source = ("encoder.embedding", "embedding.token.weight")
    target, output = ("decoder.embedding", "token.weight"), ("head", "output.weight")
    return {NOTHING: (), OUTPUT: ((target, output),), EVERYTHING: ((source, target, output),)}[embeddings]


def smoothed_loss_sum(smoothing: float) -> Callable[[Tensor, Tensors], Tensor]:
    """Cross-entropy with a share of each target spread over all words, summed over the tokens that are not padding.

    Source: Szegedy et al. 2016; 0.1 in Vaswani et al. 2017, section 5.4.
    """

    def loss_sum(logits: Tensor, targets: Tensors) -> Tensor:
        return F.cross_entropy(
            logits.flatten(0, 1),
            targets[0].flatten(),
            ignore_index=IGNORED_TARGET,
            reduction="sum",
            label_smoothing=smoothing,
        )

    return loss_sum


class Embedding(nn.Module):
    """Token ids [B, T] -> token plus sinusoid of the position [B, T, D]."""

    def __init__(self, vocab_size: int, d_model: int, max_tokens: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.token.weight, std=d_model**-0.5)
        # The table has the amplitude of the token vectors, instead of these being multiplied by sqrt(D).
        self.position: Tensor
        self.register_buffer("position", sinusoids(max_tokens, d_model) * d_model**-0.5, persistent=False)
        self.place, self.dropout = Place(), nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        return self.dropout(self.token(ids) + self.position[self.place(ids.shape[1])])  # type: ignore[no-any-return]


class EncoderEmbedding(nn.Module):
    """Token ids [B, S] -> x [B, S, D], and mask [B, S]: True where there is a token."""

    def __init__(self, embed: Callable[[], Embedding]) -> None:
        super().__init__()
        self.embedding = embed()

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"x": self.embedding(ids), "mask": ids != PADDING}


class Attention(nn.Module):
    """Some tokens look at others: [B, T, D] and [B, S, D] -> [B, T, D]."""

    def __init__(self, size: "Size") -> None:
        super().__init__()
        self.heads = size.heads
        self.query = linear(size.d_model, size.heads * size.head_width)
        self.key_value = linear(size.d_model, 2 * size.heads * size.head_width)
        self.output = linear(size.heads * size.head_width, size.d_model)

    def split_query(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, A, T, C]."""
        return self._split(self.query(x))

    def split_key_value(self, others: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, D] -> twice [B, A, S, C]."""
        key, value = self.key_value(others).chunk(2, dim=-1)
        return self._split(key), self._split(value)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **how: bool) -> Tensor:
        """
        Args:
            mask: True for what may be looked at, for all of them alike where it has no such dimension.
        """
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **how)
        return self.output(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        """[B, T, A C] -> [B, A, T, C]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # type: ignore[no-any-return]


class BothWays(Attention):
    """Each token looks at all others that are no padding."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.attend(self.split_query(x), *self.split_key_value(x), mask[:, None, None, :])


class Backwards(Attention):
    """Each token looks at itself and those before it."""

    def __init__(self, size: "Size") -> None:
        super().__init__(size)
        self.past = Past()

    def forward(self, y: Tensor) -> Tensor:
        query, (key, value) = self.split_query(y), self.past(*self.split_key_value(y))
        if query.shape == key.shape:
            return self.attend(query, key, value, None, is_causal=True)
        return self.attend(query, key, value, causal_mask(query, key))


class ToSource(Attention):
    """Each token of the target looks at all of the source that are no padding.

    While text is generated a source may have several targets, one behind the other, which are not told apart here.
    """

    def __init__(self, size: "Size") -> None:
        super().__init__(size)
        self.kept = Kept()

    def forward(self, y: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        key, value = self.kept(lambda: self.split_key_value(memory))
        of_source = y.reshape(len(memory), -1, y.shape[-1])
        return self.attend(self.split_query(of_source), key, value, mask[:, None, None, :]).view_as(y)


@dataclass(frozen=True)
class Size:
    """Of the blocks."""

    d_model: int
    d_ff: int
    heads: int
    head_width: int
    dropout: float
    ffn_scale: float
    is_pre: bool

    def residual(self, part: nn.Module) -> "Residual":
        return Residual(part, self)

    def ffn(self) -> nn.Module:
        first, second = linear(self.d_model, self.d_ff, self.ffn_scale), linear(self.d_ff, self.d_model, self.ffn_scale)
        return nn.Sequential(first, nn.ReLU(), second)


class Residual(nn.Module):
    """x + part(norm(x)), or norm(x + part(x))."""

    def __init__(self, part: nn.Module, size: Size) -> None:
        super().__init__()
        self.part, self.is_pre = part, size.is_pre
        self.norm, self.dropout = nn.LayerNorm(size.d_model), nn.Dropout(size.dropout)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """
        Args:
            others: further arguments of the part.
        """
        if self.is_pre:
            return x + self.dropout(self.part(self.norm(x), *others))  # type: ignore[no-any-return]
        return self.norm(x + self.dropout(self.part(x, *others)))  # type: ignore[no-any-return]


class EncoderBlock(nn.Module):
    """x [B, S, D] and the mask of its padding [B, S] -> [B, S, D]."""

    def __init__(self, size: Size, *, is_last: bool) -> None:
        super().__init__()
        self.attention, self.ffn = size.residual(BothWays(size)), size.residual(size.ffn())
        self.norm = nn.LayerNorm(size.d_model) if is_last and size.is_pre else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.norm(self.ffn(self.attention(x, mask)))  # type: ignore[no-any-return]


class DecoderBlock(nn.Module):
    """y [B, T, D], the encoder's output [B, S, D] and the mask of its padding [B, S] -> [B, T, D]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention = size.residual(Backwards(size))
        self.source_attention = size.residual(ToSource(size))
        self.ffn = size.residual(size.ffn())

    def forward(self, y: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        return self.ffn(self.source_attention(self.attention(y), memory, mask))  # type: ignore[no-any-return]


class Head(nn.Module):
    """[B, T, D] -> logits [B, T, V]."""

    def __init__(
        self, d_model: int, vocab_size: int, is_pre: bool, logit_clip: float | None, logit_clip_kind: str
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model) if is_pre else nn.Identity()
        self.output = nn.Linear(d_model, vocab_size)
        nn.init.normal_(self.output.weight, std=d_model**-0.5)
        nn.init.zeros_(self.output.bias)
        self.logit_clip, self.logit_clip_kind = logit_clip, logit_clip_kind

    def forward(self, y: Tensor) -> Tensor:
        return clip_logits(self.output(self.norm(y)), self.logit_clip, self.logit_clip_kind, self.training)
