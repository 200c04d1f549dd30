"""What to tell a user whose stage ran out of memory."""

import torch

ADVICE = (
    "out of memory: use more partitions (devices=...), recompute=always, smaller micro-batches (a larger "
    "micro_batches=... or a smaller batch_size), or move layers to other stages (balance=[...])"
)


def memory_advice(error: BaseException) -> str:
    """`": " + ADVICE` if the error means that there was no memory left, else nothing."""
    out = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    return f": {ADVICE}" if out else ""
