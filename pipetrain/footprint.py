"""What Hydra writes into a folder before a run starts, and how to take it back."""

import contextlib
import shutil
from pathlib import Path

from pipetrain.paths import RunPaths

_WRITTEN = (".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "multirun.yaml")


class Footprint:
    """Remembers a folder as it was, so that refused settings leave neither litter nor changed files behind."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._missing = [path for path in (folder, *folder.parents) if not path.exists()]
        self._before = {
            folder / name: (folder / name).read_bytes() if (folder / name).is_file() else None for name in _WRITTEN
        }

    def undo(self) -> None:
        """Restores the folder, or removes it if it is new. A new folder that holds more than Hydra's files stays."""
        shutil.rmtree(RunPaths(self._folder).check, ignore_errors=True)
        log = RunPaths(self._folder).log
        found = {path for path in self._folder.rglob("*") if path.is_file()}
        if self._missing and found - set(self._before) - {log}:
            return
        for path, content in self._before.items():
            if content is not None:
                path.write_bytes(content)
            elif path.parent.is_dir():
                path.unlink(missing_ok=True)
        if self._missing:
            log.unlink(missing_ok=True)
        for path in (self._folder / ".hydra", *self._missing):
            with contextlib.suppress(OSError):  # not empty, or never made
                path.rmdir()
