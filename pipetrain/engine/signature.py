"""What a message looks like before it arrives: shapes, dtypes and which parts want a gradient.

A signature is learned from the first real micro-batch of its kind, never from a made-up one. Kinds are told apart by
`key_of` the micro-batch that entered the first stage; every rank gets the keys at the start of a step.
"""

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from pipetrain.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of one tensor of a message, and whether its gradient comes back."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    needs_grad: bool

    def empty(self, device: torch.device) -> Tensor:
        """A buffer to receive such a tensor in."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


Signature = tuple[TensorSpec, ...]


def signature_of(tensors: tuple[Tensor, ...], needs_grad: tuple[bool, ...]) -> Signature:
    """The signature of a message that is at hand."""
    return tuple(TensorSpec(tuple(t.shape), t.dtype, n) for t, n in zip(tensors, needs_grad, strict=True))


def gradients_of(signature: Signature) -> Signature:
    """The signature of the message that comes back: one gradient for each tensor that wants one."""
    return tuple(spec for spec in signature if spec.needs_grad)


def key_of(inputs: tuple[Tensor, ...], training: bool) -> int:
    """A number that two micro-batches share exactly if all messages they cause look alike."""
    return derive_seed(str(training), *(f"{t.dtype}{tuple(t.shape)}" for t in inputs))


def encode(signature: Signature) -> Tensor:
    """The signature as bytes: uint8 [n]."""
    rows = [[list(spec.shape), str(spec.dtype).removeprefix("torch."), spec.needs_grad] for spec in signature]
    return torch.tensor(list(json.dumps(rows).encode()), dtype=torch.uint8)


def decode(data: Tensor) -> Signature:
    """The inverse of `encode`."""
    rows = json.loads(bytes(data.tolist()))
    return tuple(TensorSpec(tuple(shape), getattr(torch, dtype), needs_grad) for shape, dtype, needs_grad in rows)
