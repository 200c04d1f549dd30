"""Folders that are whole wherever they exist: written aside, synced, and renamed into place."""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
ABANDONED_S = 24 * 3600.0  # what a killed process left unfinished is removed after so long
ASIDE = ".pipetrain-"  # begins the name of a folder that is not finished


def finished_folder(folder: Path, load: Callable[[Path], T | None], fill: Callable[[Path], None]) -> T:
    """What is in a folder, which is made if it is not there or not whole. Several processes may do so at once.

    Args:
        load: reads the folder; None where it is missing or damaged.
        fill: writes everything into an empty folder.

    Raises:
        OSError: if it cannot be written.
    """
    found = load(folder)
    if found is not None:
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    aside = folder.with_name(f"{ASIDE}{folder.name}-{uuid.uuid4().hex}")
    aside.mkdir()
    try:
        fill(aside)
        _publish(aside, folder, load)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    made = load(folder)
    if made is None:
        raise OSError(f"{folder} was changed from outside while it was written")
    return made


def write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _publish(aside: Path, folder: Path, load: Callable[[Path], T | None]) -> None:
    """Renames into place. Where another process was first, its folder stays; a damaged one makes way."""
    if load(folder) is None:
        with contextlib.suppress(FileNotFoundError):
            damaged = aside.with_name(f"{aside.name}-damaged")
            folder.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)
    try:
        aside.rename(folder)
    except OSError:
        if load(folder) is None:
            raise


def _remove_abandoned(root: Path) -> None:
    for folder in root.glob(f"{ASIDE}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(folder)
