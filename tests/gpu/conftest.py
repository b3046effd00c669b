"""Tests that need a GPU: skipped where there is none, an error with --gpu (make test-gpu).

They import and collect everywhere. Not yet run on a GPU. What differs from the CPU is here (streams,
devices, graphs, memory, host synchronisation, autocast); the operators' values are those of
tests/ops, which run on the GPU with --gpu.
"""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture
def second_cuda() -> torch.device:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return torch.device("cuda", 1)
