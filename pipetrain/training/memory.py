"""What to tell a user whose stage ran out of memory."""

import torch

ADVICE = (
    "out of memory: use more partitions (devices=...), recompute=always, smaller micro-batches (a larger "
    "micro_batches=... or a smaller batch_size), or move layers to other stages (balance=[...])"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that there was no memory left."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def memory_advice(error: BaseException) -> str:
    """`": " + ADVICE` if the error means that there was no memory left, else nothing."""
    return f": {ADVICE}" if is_out_of_memory(error) else ""
