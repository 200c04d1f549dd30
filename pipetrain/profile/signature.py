"""What tells layers apart that may cost different times: two with one signature are measured once."""

import functools
import hashlib
import inspect
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

_OF_EVERY_MODULE = frozenset(nn.Module().__dict__) - {"training"}
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_unknown = count()


def signature(module: nn.Module) -> str:
    """A hash of a module's classes, their source files, its plain attributes, and the shapes of its parameters.

    Whatever cannot be compared makes it one of a kind.
    """
    parts = [f"{name}: {_of_part(part)}" for name, part in module.named_modules()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _of_part(part: nn.Module) -> str:
    kind: Any = type(part)
    own = {name: value for name, value in part.__dict__.items() if name not in _OF_EVERY_MODULE}
    tensors = {**part._parameters, **part._buffers}
    hooks = [name for name in _OF_EVERY_MODULE if "_hooks" in name and part.__dict__.get(name)]
    mark = f"hooks {next(_unknown)}" if hooks else ""
    return f"{kind.__module__}.{kind.__qualname__} {_source(kind)} {shown(own)} {shown(tensors)} {mark}"


@functools.cache
def _source(kind: Any) -> str:
    """A hash of the file that a class is defined in: an edited class is another one."""
    try:
        return hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()[:16]
    except (OSError, TypeError):
        return ""


def shown(value: Any) -> str:
    """Equal texts for values that make no difference in cost."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.requires_grad}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{shown(key)}: {shown(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple | set | frozenset):
        return f"{type(value).__name__}({', '.join(map(shown, value))})"
    if isinstance(value, nn.Module):
        return f"({', '.join(f'{name}: {_of_part(part)}' for name, part in value.named_modules())})"
    if isinstance(value, functools.partial):
        return f"partial({shown(value.func)}, {shown(value.args)}, {shown(value.keywords)})"
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return f"function({_of_code(value.__code__)}, {shown(value.__defaults__)}, {shown(cells)})"
    if isinstance(value, type) or inspect.isbuiltin(value):
        return f"{value.__module__}.{value.__qualname__}"
    text = repr(value)
    return f"{type(value).__qualname__} {next(_unknown)}" if " at 0x" in text else f"{type(value).__qualname__} {text}"


def _of_code(code: CodeType) -> str:
    constants = [_of_code(each) if isinstance(each, CodeType) else repr(each) for each in code.co_consts]
    return hashlib.sha256(repr((code.co_code, code.co_names, constants)).encode()).hexdigest()[:16]
