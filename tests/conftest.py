"""Fixtures and small helpers that several test files share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import Command


def pytest_report_header() -> str:
    return f"torch {torch.__version__}"


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """One thread and a fixed seed: what a worker has by default."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tokenised texts are kept: once for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def command(tmp_path: Path, cache: Path) -> Command:
    """`pipetrain` in a folder of its own."""
    return Command(tmp_path, cache)
