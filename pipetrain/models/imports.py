"""Objects of the user's own files, by `package.module:name`."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipetrain.errors import ConfigError
from pipetrain.suggest import did_you_mean

_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent)


def import_object(key: str, name: str) -> Callable[..., Any]:
    """A function or class by `package.module:name`; files of the current directory come first.

    Raises:
        ConfigError: naming the setting `key`, if there is no such module or object, or its import fails.
    """
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise ConfigError(f"{key}={name} must name a module and something in it, such as {key}=my_models:build")
    _look_in_current_directory()
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            beside = [path.stem for path in sorted(Path.cwd().glob("*.py"))]
            raise ConfigError(
                f"{key}={name}: there is no module {error.name}, neither installed nor as a file below {Path.cwd()}."
                + did_you_mean(module_name, beside)
            ) from error
        raise ConfigError(f"{key}={name}: {module_name} imports {error.name}, which is not installed") from error
    except Exception as error:
        raise ConfigError(f"{key}={name}: importing {module_name} fails: {shown(error)}") from error
    for step in path.split("."):
        if not hasattr(found, step):
            known = [word for word in vars(found) if not word.startswith("_")] if hasattr(found, "__dict__") else []
            raise ConfigError(f"{key}={name}: {module_name} has no {path}.{did_you_mean(path, known)}")
        found = getattr(found, step)
    if not callable(found):
        raise ConfigError(f"{key}={name} is a {type(found).__name__}, not a function or class that can be called")
    return found  # type: ignore[no-any-return]


def shown(error: Exception) -> str:
    """An exception in one line, with the last line of the user's code on the way to it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_users(frame.filename)]
    where = f" ({frames[-1].filename}:{frames[-1].lineno}, `{frames[-1].line}`)" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def is_users(file: str) -> bool:
    """Whether code of this file is neither torch's nor ours nor made while running."""
    return not file.startswith((_TORCH, _OURS, "<"))


def _look_in_current_directory() -> None:
    """The console script does not, unlike `python -m`. It stays so: a model may import more when it is built."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
