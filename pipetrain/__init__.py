"""Pipeline-parallel training with numbers that do not depend on the partitioning."""

__version__ = "0.1.0"
