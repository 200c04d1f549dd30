"""Adaptive softmax (Grave et al. 2017): a vocabulary in groups, the most frequent words first.

A softmax over all of V words is most of the work of a model with many. Here the first one is over the words of the
first group and one entry for each other group; a rarer word's probability is that of its group times that in it, and
only rows with such a target are multiplied with the group's part of the matrix. All groups have full width (div_val = 1
in the code of Dai et al. 2019), so the matrix is the one of a plain softmax, and may be tied to the embedding.

Letters of the shapes: B batch, T tokens, D width, V vocabulary, G groups behind the first one.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tensors = tuple[Tensor, ...]
Output = dict[str, Tensor]


class AdaptiveHead(nn.Module):
    """[B, T, D] -> what the loss needs: the same, and the weights, since which of them count depends on the targets."""

    def __init__(self, output: nn.Linear, groups: nn.Linear, dropout: float) -> None:
        """
        Args:
            output: to all words.
            groups: to an entry for each group behind the first one.
        """
        super().__init__()
        self.dropout, self.output, self.groups = nn.Dropout(dropout), output, groups

    def forward(self, x: Tensor) -> Output:
        weights = {
            "weight": self.output.weight,
            "bias": self.output.bias,
            "group_weight": self.groups.weight,
            "group_bias": self.groups.bias,
        }
        # Views, so that each of these is a value of this call and no parameter.
        return {"x": self.dropout(x), **{name: weight.view_as(weight) for name, weight in weights.items()}}


def adaptive_loss_sum(cutoffs: Sequence[int], vocab_size: int, ignored: int) -> Callable[[Output, Tensors], Tensor]:
    """The loss: sum of -log p(target) over the tokens that are not padding.

    Args:
        cutoffs: ends of all groups but the last one, ascending.
        ignored: the target of padding.
    """
    bounds = [0, *cutoffs, vocab_size]
    sizes = [end - start for start, end in pairwise(bounds)]

    def loss_sum(output: Output, targets: Tensors) -> Tensor:
        x, target = output["x"].flatten(0, 1), targets[0].flatten()
        weights, biases = output["weight"].split(sizes), output["bias"].split(sizes)
        first = _first(x, weights[0], biases[0], output)
        # In the first softmax a rarer word stands for its group.
        group = torch.bucketize(target, torch.tensor(bounds[1:-1], device=target.device), right=True)
        is_rare = group > 0
        entry = torch.where(is_rare, sizes[0] - 1 + group, target)
        loss = F.cross_entropy(first, entry, ignore_index=ignored, reduction="sum")
        for number in range(1, len(sizes)):
            rows = (group == number).nonzero().flatten()
            inner = F.linear(x[rows], weights[number], biases[number])
            loss = loss + F.cross_entropy(inner, target[rows] - bounds[number], reduction="sum")
        return loss

    return loss_sum


def adaptive_log_probs(cutoffs: Sequence[int], vocab_size: int) -> Callable[[Output], Tensor]:
    """log p of each word: [B, T, V].

    Args:
        cutoffs: see `adaptive_loss_sum`.
    """
    sizes = [end - start for start, end in pairwise([0, *cutoffs, vocab_size])]

    def log_probs(output: Output) -> Tensor:
        x, weights, biases = output["x"], output["weight"].split(sizes), output["bias"].split(sizes)
        first = _first(x, weights[0], biases[0], output).log_softmax(-1)
        words, groups = first.split([sizes[0], len(cutoffs)], dim=-1)
        inner = [F.linear(x, *parts).log_softmax(-1) for parts in zip(weights[1:], biases[1:], strict=True)]
        return torch.cat([words, *(groups[..., i, None] + its for i, its in enumerate(inner))], dim=-1)

    return log_probs


def _first(x: Tensor, weight: Tensor, bias: Tensor, output: Output) -> Tensor:
    """Logits of the words of the first group, and of the other groups."""
    return F.linear(x, torch.cat([weight, output["group_weight"]]), torch.cat([bias, output["group_bias"]]))
