"""What a layer's output looks like, before it arrives: its pytree, and for each leaf what it is.

A structure is learned from the first real micro-batch of its kind, never from a made-up one. Kinds are told apart by
`key_of` the micro-batch that entered the first stage; every rank gets the keys at the start of a step.

Leaves are tensors, numbers (int, float, bool: they travel with every message) and constants (None, strings, dtypes, a
shape, ...: part of the structure, equal for all micro-batches of a kind).
"""

import enum
import math
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pipetrain.seeds import derive_seed

ALIGNMENT_BYTES = 64  # of the memory that torch allocates


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape, strides and dtype of a tensor without gaps, and whether its gradient comes back.

    Strides travel, too: a sum over other strides can give other bits, and dropout draws in the order of the memory.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    needs_grad: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def shaped(self, flat: Tensor) -> Tensor:
        """The tensor whose memory is `flat`, [numel]."""
        return flat.as_strided(self.shape, self.stride, flat.storage_offset())

    def conform(self, tensor: Tensor) -> Tensor:
        """The tensor with these strides; itself where it has them."""
        return with_strides(tensor, self.stride)


def with_strides(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The tensor itself, or a copy of it that lies in memory like this."""
    return tensor if tensor.stride() == stride else tensor.new_empty_strided(tensor.shape, stride).copy_(tensor)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers; those without memory (on the meta device) hold none."""
    return a.is_meta or torch.equal(a, b)


def flat(tensor: Tensor) -> Tensor:
    """The memory of a tensor without gaps: [numel]."""
    return tensor.as_strided((tensor.numel(),), (1,))


def without_gaps(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where its memory has gaps or overlaps, as after a slice or an expand, or is not
    aligned."""
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_contiguous():
        return aligned(tensor)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return aligned(tensor) if tensor.permute(order).is_contiguous() else tensor.contiguous()


def aligned(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy of the same strides where it begins in the middle of somebody else's memory.

    MKL computes products of matrices with other instructions, so with other last bits, where they are not aligned. What
    has travelled is; so must be what has not.
    """
    return tensor if tensor.data_ptr() % ALIGNMENT_BYTES == 0 else tensor.clone()


@dataclass(frozen=True, slots=True)
class NumberSpec:
    """An int, float or bool, whose value may differ from micro-batch to micro-batch."""

    type: type


@dataclass(frozen=True, slots=True)
class ConstantSpec:
    """Any other plain value."""

    value: Any


LeafKind = TensorSpec | NumberSpec | ConstantSpec
_CONSTANTS = (
    type(None), str, bytes, complex, torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, slice,
    range, type(...), enum.Enum,
)  # fmt: skip
_LEAF = tree_flatten(0)[1]


@dataclass(frozen=True)
class Structure:
    """The pytree of a layer's output and the kinds of its leaves."""

    spec: TreeSpec
    leaves: tuple[LeafKind, ...]

    def elements(self) -> list[tuple[int | str | None, TreeSpec, int]]:
        """(place or key, its pytree, its first leaf) of each element; an output that is one leaf has none."""
        if self.spec.is_leaf():
            return []
        children = self.spec.children()
        keys = self.spec.context if self.spec.type in (dict, OrderedDict) else range(len(children))
        starts = [0]
        for child in children:
            starts.append(starts[-1] + child.num_leaves)
        return list(zip(keys, children, starts, strict=False))

    def select(self, element: int | str | None) -> tuple[TreeSpec, range]:
        """The pytree and the leaves of one element; None is everything.

        Raises:
            KeyError: if there is no such element.
        """
        if element is None:
            return self.spec, range(len(self.leaves))
        for key, child, start in self.elements():
            if key == element:
                return child, range(start, start + child.num_leaves)
        raise KeyError(element)


def flatten(output: object) -> tuple[list[Any], TreeSpec]:
    """The leaves of a layer's output and its pytree."""
    if isinstance(output, Tensor):
        return [output], _LEAF
    return tree_flatten(output)


def structure_of(leaves: Sequence[Any], spec: TreeSpec, needs_grad: Sequence[bool]) -> Structure:
    """The structure of an output that is at hand.

    Raises:
        TypeError: if a leaf is of a type that cannot travel.
    """
    return Structure(spec, tuple(kind_of(leaf, need) for leaf, need in zip(leaves, needs_grad, strict=True)))


def kind_of(leaf: object, needs_grad: bool) -> LeafKind:
    """What a leaf is."""
    if isinstance(leaf, Tensor):
        return TensorSpec(tuple(leaf.shape), leaf.stride(), leaf.dtype, needs_grad)
    if type(leaf) in (int, float, bool):
        return NumberSpec(type(leaf))
    if isinstance(leaf, _CONSTANTS):
        return ConstantSpec(leaf)
    raise TypeError(
        f"a {type(leaf).__qualname__} cannot go from layer to layer; return tensors, numbers, strings or None, in "
        "tuples, lists or dicts (or register the class with torch.utils._pytree.register_pytree_node)"
    )


def same_kind(leaf: object, kind: LeafKind) -> bool:
    """Whether a leaf is what its structure says, but for its strides."""
    if isinstance(kind, TensorSpec):
        return isinstance(leaf, Tensor) and leaf.shape == kind.shape and leaf.dtype == kind.dtype
    if isinstance(kind, NumberSpec):
        return type(leaf) is kind.type
    return type(leaf) is type(kind.value) and leaf == kind.value


def describe(leaves: Sequence[LeafKind]) -> str:
    """A few words for each leaf: for messages."""
    return ", ".join(map(_describe_one, leaves))


def _describe_one(kind: LeafKind) -> str:
    if isinstance(kind, TensorSpec):
        return f"a {str(kind.dtype).removeprefix('torch.')} tensor {list(kind.shape)}"
    return f"a number ({kind.type.__name__})" if isinstance(kind, NumberSpec) else repr(kind.value)


def key_of(inputs: tuple[Tensor, ...], training: bool) -> int:
    """A number that two micro-batches share exactly if all messages they cause look alike."""
    return derive_seed(str(training), *(f"{t.dtype}{tuple(t.shape)}" for t in inputs))


def encode(structures: dict[int, Structure]) -> Tensor:
    """The structures of some layers as bytes: uint8 [n]."""
    pytrees = {n: (tree_unflatten(range(len(s.leaves)), s.spec), s.leaves) for n, s in structures.items()}
    return torch.frombuffer(bytearray(pickle.dumps(pytrees)), dtype=torch.uint8)


def decode(data: Tensor) -> dict[int, Structure]:
    """The inverse of `encode`; the bytes come from another rank of this run, nowhere else."""
    pytrees = pickle.loads(data.numpy().tobytes())
    return {number: Structure(tree_flatten(pytree)[1], leaves) for number, (pytree, leaves) in pytrees.items()}
