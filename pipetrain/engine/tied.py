"""Parameters that several layers share: a tied embedding and output matrix, for one.

Each use is a parameter of its own with its own gradient. Before an update the gradients of all uses are added in
ascending layer order and every stage that has a use gets that sum, so all copies take the same step and stay equal to
the last bit. On one stage it is the same: the uses share their memory there, but not their gradients. (One shared
gradient would be added to in the order in which backwards run, which depends on the cut.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipetrain.engine.message import Wire
from pipetrain.engine.structure import flat
from pipetrain.engine.transport import Posted, Sent, Transport

_TAG = 1 << 29  # above every tag of the schedule's messages


@dataclass(frozen=True)
class Tie:
    """The uses of one shared parameter: (full name, stage), in ascending layer order. The first is its owner."""

    uses: tuple[tuple[str, int], ...]


def share_memory(ties: Sequence[Tie], parameters: dict[str, nn.Parameter]) -> None:
    """Makes the uses that live in this process one tensor, with a gradient for each."""
    for tie in ties:
        here = [parameters[name] for name, _ in tie.uses if name in parameters]
        for other in here[1:]:
            other.data = here[0].data


def own_names(ties: Sequence[Tie], parameters: dict[str, nn.Parameter]) -> dict[str, str]:
    """Each name -> the one whose memory it has, which is the one that an optimizer steps: its first use here."""
    here = [[name for name, _ in tie.uses if name in parameters] for tie in ties]
    return {name: name for name in parameters} | {name: uses[0] for uses in here for name in uses}


def sum_gradients(
    ties: Sequence[Tie], parameters: dict[str, nn.Parameter], placement: Sequence[int], transport: Transport
) -> None:
    """Gives every use the sum of the gradients of all uses, or none if none has one; all ranks take part."""
    if not ties:
        return
    uses_here = [[parameters[name] for name, _ in tie.uses if name in parameters] for tie in ties]
    with_gradient = [float(any(use.grad is not None for use in uses)) for uses in uses_here]
    exists = transport.all_reduce(torch.tensor(with_gradient, dtype=torch.float64))
    sent: list[Sent] = []
    for number, (tie, here) in enumerate(zip(ties, uses_here, strict=True)):
        ranks = sorted({placement[stage] for _, stage in tie.uses})
        if transport.rank not in ranks or not exists[number]:
            continue
        shape, dtype = here[0].shape, here[0].dtype
        letters: dict[str, Posted] = {}
        own: dict[str, Tensor] = {}
        for use, (name, stage) in enumerate(tie.uses):
            tag = _TAG + number * 256 + use
            home = placement[stage]
            if home == transport.rank:
                parameter = parameters[name]
                own[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                sent += [transport.send(flat(own[name]), rank, tag) for rank in ranks if rank != home]
            else:
                letters[name] = transport.post(Wire(shape.numel(), dtype), home, tag)
        arrived = {name: letter.wait().as_strided(shape, here[0].stride()) for name, letter in letters.items()}
        gradients = [own[name] if name in own else arrived[name] for name, _ in tie.uses]
        total = gradients[0].clone()
        for gradient in gradients[1:]:
            total += gradient
        for message in sent:
            message.wait()
        sent.clear()
        for name in own:
            parameters[name].grad = total
