from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

import checked_cuda


@pytest.fixture(scope="session")
def kernels() -> ModuleType:
    """The CUDA kernels under the SIMT checker."""
    return checked_cuda.load()


@pytest.fixture(autouse=True)
def _device_as_before(kernels: ModuleType) -> Iterator[None]:
    config = kernels.config
    seed, multiprocessors = config.seed, config.multiprocessors
    yield
    config.seed, config.multiprocessors = seed, multiprocessors
