"""Decoder-only Transformer language model, as a list of layers: embedding, blocks, head.

Letters of the shapes: B batch, T tokens of a sequence, D model width (`d_model`), F width inside the feed-forward layer
(`d_ff`), H attention heads, V vocabulary, L blocks.

Pre-norm blocks with biases everywhere, so that a block has 4D^2 + 4D (attention) + 2DF + F + D (feed-forward) + 4D
(norms) parameters. With untied embeddings and sinusoidal positions the model has L times that + 2VD + V + 2D, which is
every model of GPipe's Table 1 (Huang et al. 2019) at D = 2048, F = 8192, V = 32,000.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipetrain.models.past import Past, Place, causal_mask
from pipetrain.models.recipe import Generation, LayerRecipe, Recipe, Tensors

IGNORED_TARGET = -100  # targets with this value are padding: no loss, not counted


def transformer(
    *,
    layers: int,
    d_model: int,
    d_ff: int,
    heads: int,
    dropout: float,
    tied: bool,
    positions: str,
    init_scale: str,
    vocab_size: int,
    seq_len: int,
    logit_clip: float | None = None,
    logit_clip_kind: str = "hard",
) -> Recipe:
    """The recipe of a language model.

    Args:
        layers: number of blocks; the recipe has two layers more.
        seq_len: longest sequence, which learned positions need to know.
        logit_clip: see `clip_logits`.
    """
    ffn_scale = depth_scale(init_scale, layers)
    recipes = [
        LayerRecipe("embedding", partial(Embedding, vocab_size, d_model, seq_len, positions, dropout)),
        *(LayerRecipe(f"blocks.{i}", partial(Block, d_model, d_ff, heads, dropout, ffn_scale)) for i in range(layers)),
        LayerRecipe("head", partial(Head, d_model, vocab_size, logit_clip, logit_clip_kind)),
    ]
    ties = ((("embedding", "token.weight"), ("head", "output.weight")),) if tied else ()
    return Recipe(
        tuple(recipes),
        loss_sum=cross_entropy_sum,
        count=count_targets,
        ties=ties,
        generation=Generation(log_softmax, seq_len),
    )


def depth_scale(init_scale: str, num_blocks: int) -> float:
    """What the initial weights of the feed-forward layers are multiplied by.

    Source: Huang et al. 2019, section 5: "scale down the initialization of all transformer feed-forward layers by the
    number of layers", following Zhang et al. 2019 (Fixup). Read literally that is 1/L; Fixup itself and lingvo's
    `XavierWithFixupParams` with one layer a residual branch give L^(-1/2). Both are offered, none is the default.
    """
    factors: dict[str, float] = {
        "none": 1.0,
        "inverse_depth": 1 / num_blocks,
        "inverse_sqrt_depth": float(num_blocks) ** -0.5,
    }
    return factors[init_scale]


def clip_logits(logits: Tensor, limit: float | None, kind: str, training: bool) -> Tensor:
    """Bounds the softmax pre-activations.

    hard: clamps to +-limit while training; the gradient of a clamped logit is zero. soft: limit * tanh(x / limit),
    which bends all logits and is therefore part of the model, in evaluation too.

    Source: Huang et al. 2019, section 5, "we clip the logit predictions (softmax pre-activations) whenever their
    magnitude exceeds a certain value"; lingvo's `logits_abs_max` (training only) and `logits_soft_max`.
    """
    if limit is None:
        return logits
    if kind == "soft":
        return limit * torch.tanh(logits / limit)
    return logits.clamp(-limit, limit) if training else logits


def cross_entropy_sum(logits: Tensor, targets: Tensors) -> Tensor:
    """Sum of -log p(target) over the tokens that are not padding; logits [B, T, V], targets [B, T]."""
    (target,) = targets
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")


def log_softmax(logits: Tensor) -> Tensor:
    """log p of each word, [B, T, V], at least in float32."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def count_targets(targets: Tensors) -> int:
    """Tokens that are not padding."""
    return int((targets[0] != IGNORED_TARGET).sum())


class Embedding(nn.Module):
    """Token ids [B, T] -> token plus position [B, T, D]."""

    def __init__(self, vocab_size: int, d_model: int, seq_len: int, positions: str, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.token.weight, std=d_model**-0.5)
        if positions == "learned":
            self.position = nn.Parameter(torch.randn(seq_len, d_model) * d_model**-0.5)
        else:
            # The table has the amplitude of the token vectors, instead of these being multiplied by sqrt(D).
            self.register_buffer("position", sinusoids(seq_len, d_model) * d_model**-0.5, persistent=False)
        self.place, self.dropout = Place(), nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        return self.dropout(self.token(ids) + self.position[self.place(ids.shape[1])])  # type: ignore[no-any-return]


def sinusoids(seq_len: int, d_model: int) -> Tensor:
    """sin and cos of position / 10000^(2i/D): [T, D]. Source: Vaswani et al. 2017, section 3.5."""
    angle = torch.arange(seq_len)[:, None] * torch.exp(torch.arange(0, d_model, 2) * (-math.log(10_000) / d_model))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


class Attention(nn.Module):
    """Causal self-attention, [B, T, D] -> [B, T, D]."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = linear(d_model, 3 * d_model)
        self.output = linear(d_model, d_model)
        self.past = Past()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        k, v = self.past(k, v)
        if q.shape == k.shape:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, T, D/H]
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(q, k))
        return self.output(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to what came in: [B, T, D] -> [B, T, D]."""

    def __init__(self, d_model: int, d_ff: int, heads: int, dropout: float, ffn_scale: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = Attention(d_model, heads)
        self.norm2 = nn.LayerNorm(d_model)
        self.ffn = nn.Sequential(linear(d_model, d_ff, ffn_scale), nn.GELU(), linear(d_ff, d_model, ffn_scale))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.ffn(self.norm2(x)))  # type: ignore[no-any-return]


class Head(nn.Module):
    """Norm and output layer: [B, T, D] -> logits [B, T, V]."""

    def __init__(self, d_model: int, vocab_size: int, logit_clip: float | None, logit_clip_kind: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.output = nn.Linear(d_model, vocab_size)
        nn.init.normal_(self.output.weight, std=d_model**-0.5)
        nn.init.zeros_(self.output.bias)
        self.logit_clip = logit_clip
        self.logit_clip_kind = logit_clip_kind

    def forward(self, x: Tensor) -> Tensor:
        return clip_logits(self.output(self.norm(x)), self.logit_clip, self.logit_clip_kind, self.training)


def linear(num_in: int, num_out: int, scale: float = 1.0) -> nn.Linear:
    """A linear layer with Glorot's uniform weights, times `scale`, and no initial bias."""
    layer = nn.Linear(num_in, num_out)
    nn.init.xavier_uniform_(layer.weight, gain=scale)
    nn.init.zeros_(layer.bias)
    return layer
