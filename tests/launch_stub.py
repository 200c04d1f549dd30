"""A stand-in for `pipetrain.launch`, for tests of the command line that start no training."""

import logging
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.hydra import Hydra

from pipetrain.config import Config

_real_get_mode = Hydra.get_mode


class Launch:
    """Stands in for `pipetrain.launch`: remembers its calls and answers with `result`."""

    def __init__(self) -> None:
        self.calls: list[tuple[Config, Path]] = []
        self.result: int | Exception | Callable[[Config, Path], int] = 0

    def __call__(self, cfg: Config, folder: Path) -> int:
        self.calls.append((cfg, folder))
        if isinstance(self.result, Exception):
            raise self.result
        return self.result(cfg, folder) if callable(self.result) else self.result

    @property
    def cfg(self) -> Config:
        return self.calls[-1][0]

    @property
    def folder(self) -> Path:
        return self.calls[-1][1]


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Launch]:
    stub, module = Launch(), types.ModuleType("pipetrain.launch")
    module.launch = stub  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pipetrain.launch", module)
    monkeypatch.chdir(tmp_path)
    for name in ("PIPETRAIN_CONF", "RANK", "WORLD_SIZE", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Hydra, "get_mode", _get_mode)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield stub
    for handler in root.handlers[:]:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def _get_mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """Saves half of the time: Hydra composes everything once more, just to see whether a file sets hydra.mode."""
    return _real_get_mode(self, config_name, overrides) if "experiment=scaling" in overrides else None


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
