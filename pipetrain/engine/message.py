"""A message between two stages: many values in one tensor, or none.

A single tensor goes as it is. Several tensors, and numbers, are laid side by side in one buffer of bytes: a message of
its own for each would cost more than the copy. Both ends compute the same layout from the same structures.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pipetrain.engine.structure import ConstantSpec, LeafKind, NumberSpec, TensorSpec

ValueId = tuple[int, int]  # (layer, leaf of its output)
Values = dict[ValueId, Any]

_ALIGNMENT = 16  # bytes; a view of a buffer as another type must start at a multiple of that type's size


@dataclass(frozen=True)
class Layout:
    """What a message carries, in order."""

    parts: tuple[tuple[ValueId, LeafKind], ...]

    @cached_property
    def _travelling(self) -> list[tuple[ValueId, TensorSpec]]:
        return [
            (value, TensorSpec((1,), torch.int64, False) if isinstance(kind, NumberSpec) else kind)
            for value, kind in self.parts
            if not isinstance(kind, ConstantSpec)
        ]

    @cached_property
    def _numbers(self) -> dict[ValueId, type]:
        return {value: kind.type for value, kind in self.parts if isinstance(kind, NumberSpec)}

    @cached_property
    def _is_one_tensor(self) -> bool:
        return len(self._travelling) == 1 and not self._numbers

    @cached_property
    def wire(self) -> TensorSpec | None:
        """The one tensor that travels; None if nothing does."""
        if self._is_one_tensor:
            return self._travelling[0][1]
        size = sum(_padded(spec.num_bytes) for _, spec in self._travelling)
        return TensorSpec((size,), torch.uint8, False) if size else None

    def pack(self, values: Values, device: torch.device) -> Tensor | None:
        """The message.

        Raises:
            RuntimeError: if a tensor is not what the layout says.
        """
        for value, kind in self.parts:
            if isinstance(kind, TensorSpec) and (values[value].shape, values[value].dtype) != (kind.shape, kind.dtype):
                raise RuntimeError(f"a value of layer {value[0]} is {tuple(values[value].shape)}, not {kind.shape}")
        if self._is_one_tensor:
            tensor: Tensor = values[self._travelling[0][0]]
            return tensor
        if self.wire is None:
            return None
        buffer, start = self.wire.empty(device), 0
        for value, spec in self._travelling:
            tensor = _bits_of(values[value]) if value in self._numbers else values[value]
            _view(buffer, start, spec).copy_(tensor)
            start += _padded(spec.num_bytes)
        return buffer

    def unpack(self, message: Tensor | None, device: torch.device) -> Values:
        """The values of a message; a device among them becomes that of the receiver."""
        values: Values = {}
        if self._is_one_tensor:
            values[self._travelling[0][0]] = message
        elif message is not None:
            start = 0
            for value, spec in self._travelling:
                tensor = _view(message, start, spec)
                values[value] = _number_of(tensor, self._numbers[value]) if value in self._numbers else tensor
                start += _padded(spec.num_bytes)
        for value, kind in self.parts:
            if isinstance(kind, ConstantSpec):
                values[value] = device if isinstance(kind.value, torch.device) else kind.value
        return values


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _view(buffer: Tensor, start: int, spec: TensorSpec) -> Tensor:
    return buffer[start : start + spec.num_bytes].view(spec.dtype).view(spec.shape)


def _bits_of(number: float) -> Tensor:
    """An int or bool as itself, a float by its bits: int64 [1]."""
    bits = struct.unpack("q", struct.pack("d", number))[0] if isinstance(number, float) else int(number)
    return torch.tensor([bits])


def _number_of(bits: Tensor, kind: type) -> Any:
    return struct.unpack("d", struct.pack("q", int(bits)))[0] if kind is float else kind(int(bits))


def gradients_of(parts: Sequence[tuple[ValueId, LeafKind]]) -> Layout:
    """The layout of the gradients that come back for some values."""
    return Layout(tuple((v, kind) for v, kind in parts if isinstance(kind, TensorSpec) and kind.needs_grad))
