"""Watches every operation of torch while a layer runs: what it computes, what it moves, and what is alive."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# (operations, bytes read and written) of one kernel -> its seconds
KernelTime = Callable[[float, float], float]


def no_time(flops: float, num_bytes: float) -> float:
    """Where only bytes are wanted."""
    return 0.0


class Watch(TorchDispatchMode):
    """While it is active it counts; tensors may be without memory (on the meta device).

    Attributes:
        seconds: what all kernels took, by `time_of`.
        peak_bytes: the most that was alive at once of what came into being since `restart`.
    """

    def __init__(self, existing: Iterable[Tensor], time_of: KernelTime = no_time) -> None:
        """
        Args:
            existing: the tensors that are there before: they are not counted.
            time_of: seconds of a kernel.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._time_of = time_of
        self._existing = {storage_id(tensor) for tensor in existing}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.restart()

    def restart(self) -> None:
        """Forgets what was counted. What is alive counts as there before."""
        self._sweep()
        self._base = self._total
        self.seconds, self.peak_bytes = 0.0, 0

    def alive_bytes(self, *, without: Iterable[Tensor] = ()) -> int:
        """What came into being and is alive now, some tensors left out."""
        self._sweep()
        left_out = {storage_id(tensor) for tensor in without}
        return sum(size for key, (_, size) in self._alive.items() if key not in left_out)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not _is_view(func):
            used = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
            count = flop_registry.get(func._overloadpacket)
            flops = float(count(*args, **(kwargs or {}), out_val=out)) if count is not None else 0.0
            self.seconds += self._time_of(flops, float(sum(map(_num_bytes, [*used, *tensors]))))
        for tensor in tensors:
            storage, key = tensor.untyped_storage(), storage_id(tensor)
            if key not in self._existing and key not in self._alive:
                self._alive[key] = StorageWeakRef(storage), storage.nbytes()
        self._sweep()
        self.peak_bytes = max(self.peak_bytes, self._total - self._base)
        return out

    def _sweep(self) -> None:
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        self._total = sum(size for _, size in self._alive.values())


def storage_id(tensor: Tensor) -> int:
    """Two tensors with one memory have the same, for as long as they live."""
    return int(tensor.untyped_storage()._cdata)


def _is_view(func: Any) -> bool:
    """Whether an operation only looks at the memory of its input in another way."""
    returns = func._schema.returns
    return any(one.alias_info is not None and not one.alias_info.is_write for one in returns)


def _num_bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.dtype.itemsize, tensor.untyped_storage().nbytes())
