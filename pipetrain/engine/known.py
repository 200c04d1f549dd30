"""Modules that need no watching: torch's own, and pipetrain's.

A user's module may draw from Python's generators, count in an attribute, or write into a buffer now and then. Of these
it is known that they draw from torch's generator only, that their attributes stay as they are, and that a buffer which
one forward in training leaves alone is left alone by all.
"""

from types import BuiltinFunctionType

from torch import nn

_OURS = ("pipetrain.models.", "pipetrain.segment_memory")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_torchs_own(part: nn.Module) -> bool:
    return type(part).__module__.startswith("torch.nn.")


def runs_known_code_only(module: nn.Module) -> bool:
    """Whether no part of a module is of a user's class, nor has it a hook or a function of the user's."""
    return all(map(_is_known, module.modules()))


def _is_known(part: nn.Module) -> bool:
    return (
        (is_torchs_own(part) or type(part).__module__.startswith(_OURS))
        and not any(getattr(part, hooks) for hooks in _HOOKS)
        and all(_is_torchs_function(value) for value in vars(part).values() if callable(value))
    )


def _is_torchs_function(value: object) -> bool:
    return isinstance(value, BuiltinFunctionType) or str(getattr(value, "__module__", "")).startswith("torch.")
