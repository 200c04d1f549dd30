"""Pipeline-parallel training with numbers that do not depend on the partitioning."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipetrain.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = ["Pipeline"]


def __getattr__(name: str) -> Any:
    """`pipetrain.Pipeline`, imported when it is asked for: torch takes seconds, and `pipetrain --help` needs none."""
    if name == "Pipeline":
        from pipetrain.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'pipetrain' has no attribute {name!r}")
