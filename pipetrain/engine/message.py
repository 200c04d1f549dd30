"""A message between two stages: many values in one tensor, or none.

A single tensor goes as it is. Several tensors, and numbers, are laid side by side in one buffer of bytes: a message of
its own for each would cost more than the copy. Both ends compute the same layout from the same structures.
"""

import struct
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pipetrain.engine.structure import ALIGNMENT_BYTES, ConstantSpec, LeafKind, NumberSpec, TensorSpec, flat, same_kind

ValueId = tuple[int, int]  # (layer, leaf of its output)
Values = dict[ValueId, Any]

_NUMBER = TensorSpec((1,), (1,), torch.int64, False)


@dataclass(frozen=True, slots=True)
class Wire:
    """The flat tensor that travels: its number of elements and their type."""

    numel: int
    dtype: torch.dtype

    def empty(self, device: torch.device) -> Tensor:
        """A buffer to receive it in."""
        return torch.empty(self.numel, dtype=self.dtype, device=device)

    def zeros(self, device: torch.device) -> Tensor:
        """The message when there is nothing to say."""
        return torch.zeros(self.numel, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Layout:
    """What a message carries, in order.

    Attributes:
        narrow: floating-point tensors of more than two bytes an element travel as bfloat16.
    """

    parts: tuple[tuple[ValueId, LeafKind], ...]
    narrow: bool = False

    @cached_property
    def _travelling(self) -> list[tuple[ValueId, TensorSpec]]:
        return [
            (value, _NUMBER if isinstance(kind, NumberSpec) else self._as_sent(kind))
            for value, kind in self.parts
            if not isinstance(kind, ConstantSpec)
        ]

    def _as_sent(self, kind: TensorSpec) -> TensorSpec:
        is_wide = kind.dtype.is_floating_point and kind.dtype.itemsize > torch.bfloat16.itemsize
        return replace(kind, dtype=torch.bfloat16) if self.narrow and is_wide else kind

    @cached_property
    def _numbers(self) -> dict[ValueId, type]:
        return {value: kind.type for value, kind in self.parts if isinstance(kind, NumberSpec)}

    @cached_property
    def _is_one_tensor(self) -> bool:
        return len(self._travelling) == 1 and not self._numbers

    @cached_property
    def wire(self) -> Wire | None:
        """The one tensor that travels; None if nothing does."""
        if self._is_one_tensor:
            spec = self._travelling[0][1]
            return Wire(spec.numel, spec.dtype) if spec.numel else None
        size = sum(_padded(spec.num_bytes) for _, spec in self._travelling)
        return Wire(size, torch.uint8) if size else None

    def pack(self, values: Values, device: torch.device) -> Tensor | None:
        """The message. Tensors that are missing travel as zeros: see `missing`.

        Raises:
            RuntimeError: if a tensor is not what the layout says.
        """
        for value, kind in self.parts:
            if value in values and isinstance(kind, TensorSpec) and not same_kind(values[value], kind):
                raise RuntimeError(f"a value of layer {value[0]} is {tuple(values[value].shape)}, not {kind.shape}")
        if self.wire is None:
            return None
        if self._is_one_tensor and self._travelling[0][0] in values:
            value, spec = self._travelling[0]
            return flat(spec.conform(values[value].to(spec.dtype)))
        buffer, start = self.wire.zeros(device) if self.missing(values) else self.wire.empty(device), 0
        for value, spec in self._travelling:
            if value in values:
                tensor = _bits_of(values[value]) if value in self._numbers else values[value].to(spec.dtype)
                _part(buffer, start, spec).copy_(flat(spec.conform(tensor)))
            start += _padded(spec.num_bytes)
        return buffer

    def missing(self, values: Values) -> frozenset[int]:
        """The places of the parts that are not among the values: gradients that do not exist."""
        return frozenset(place for place, (value, _) in enumerate(self.parts) if value not in values)

    def unpack(self, message: Tensor | None, device: torch.device) -> Values:
        """The values of a message; a device among them becomes that of the receiver."""
        values: Values = {}
        if self._is_one_tensor:
            value, spec = self._travelling[0]
            values[value] = spec.shaped(Wire(0, spec.dtype).empty(device) if message is None else message)
        elif self._travelling:
            message, start = Wire(0, torch.uint8).empty(device) if message is None else message, 0
            for value, spec in self._travelling:
                tensor = spec.shaped(_part(message, start, spec))
                values[value] = _number_of(tensor, self._numbers[value]) if value in self._numbers else tensor
                start += _padded(spec.num_bytes)
        for value, kind in self.parts:
            if isinstance(kind, TensorSpec) and self.narrow:
                values[value] = values[value].to(kind.dtype)
            if isinstance(kind, ConstantSpec):
                values[value] = device if isinstance(kind.value, torch.device) else kind.value
        return values


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _part(buffer: Tensor, start: int, spec: TensorSpec) -> Tensor:
    return buffer[start : start + spec.num_bytes].view(spec.dtype)


def _bits_of(number: float) -> Tensor:
    """An int or bool as itself, a float by its bits: int64 [1]."""
    bits = struct.unpack("q", struct.pack("d", number))[0] if isinstance(number, float) else int(number)
    return torch.tensor([bits])


def _number_of(bits: Tensor, kind: type) -> Any:
    return struct.unpack("d", struct.pack("q", int(bits)))[0] if kind is float else kind(int(bits))
