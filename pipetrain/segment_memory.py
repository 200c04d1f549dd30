"""What a layer remembers of the text before: hidden states of the last segments, without a gradient.

A model puts a `SegmentMemory` where its layer needs it; by itself it goes on from call to call, as in a plain loop over
one stream of text. The engine gives each micro-batch one of its own (`engine.segments`): its rows are other streams.
"""

import torch
from torch import Tensor, nn


class SegmentMemory(nn.Module):
    """Puts what it remembers in front of what comes, and remembers the end of that.

    Attributes:
        state: [batch, length, width], None where nothing came yet.
    """

    def __init__(self, length: int, length_in_evaluation: int) -> None:
        """
        Args:
            length: tokens that are remembered in training; none for 0.
            length_in_evaluation: the same in evaluation.
        """
        super().__init__()
        self.length, self.length_in_evaluation = length, length_in_evaluation
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] -> [batch, remembered + tokens, width]."""
        whole = x if self.state is None else torch.cat([self.state, x], dim=1)
        kept = min(whole.shape[1], self.length if self.training else self.length_in_evaluation)
        self.state = whole[:, whole.shape[1] - kept :].detach().clone() if kept else None
        return whole
