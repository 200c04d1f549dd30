"""Asks a trained run for something, in this process."""

import dataclasses
import io
import sys
from pathlib import Path
from typing import Any

import pytest

from pipetrain.config import Config, GenerateConfig


def give(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def asked(cfg: Config, root: Path, name: str = "run", **generation: Any) -> tuple[Config, Path]:
    folder = root / name
    return dataclasses.replace(
        cfg, action="generate", resume=str(folder), generate=GenerateConfig(**generation)
    ), folder
