"""Fixtures and small helpers that several test files share."""

from collections.abc import Iterator

import pytest
import torch


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
