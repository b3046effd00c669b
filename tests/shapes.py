"""What hypothesis draws of the CUDA kernels' inputs, sized for the SIMT checker.

Every example runs in two orders of blocks, warps and lanes, and must give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from checked_cuda import Operators
from reference import DTYPES

LAYOUTS = ("rows", "columns", "gaps", "padded", "odd")
HALF = (torch.bfloat16, torch.float16)

dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(LAYOUTS)
# The largest is seldom drawn: every entry of a block costs the checker about a microsecond.
block_sizes = st.sampled_from((32, 64, 16, 128) * 4 + (256, 256, 512)) | st.integers(16, 160)
# Whole vectors of 16 bytes as often as not.
sizes = st.integers(1, 40).map(lambda n: 8 * n) | st.integers(1, 300)
seeds = st.integers(0, 2**32)


def examples(count: int) -> Callable[[Any], Any]:
    return settings(max_examples=count)


@st.composite
def grids(draw: Any, distinct: bool) -> tuple[int, int, int, list[int], list[int]]:
    """N, K, L and the rows and columns of some blocks, few enough for the checker."""
    size = draw(block_sizes)
    # An edge that the block size divides, or any.
    n, k = (draw(st.integers(1, 3).map(lambda i: i * min(size, 100)) | sizes) for _ in range(2))
    grid = [(r, c) for r in range(-(-n // size)) for c in range(-(-k // size))]
    most = max(1, min(12, 70_000 // size**2))
    count = min(most, draw(st.sampled_from((3, 1, 2, 5, 12, 0))))
    count = min(count, len(grid)) if distinct else count
    cells = st.sampled_from(grid)
    blocks = draw(st.lists(cells, min_size=count, max_size=count, unique=distinct))
    return n, k, size, [r for r, _ in blocks], [c for _, c in blocks]


def tokens(draw: Any, blocks: int, size: int) -> int:
    """T: none, one, odd, or as many as the checker multiplies in a fraction of a second."""
    entries = max(1, blocks) * max(64, size) ** 2  # a kernel's tile has at least 64 x 64
    most = max(2, min(100, 1_500_000 // entries))
    return draw(
        st.integers(2, most) | st.sampled_from((17, 32, 33, 64, 1, 0)).map(lambda t: min(t, most))
    )


def in_two_orders(kernels: ModuleType, seed: int, call: Callable[[Operators], Any]) -> Any:
    """What ``call`` returns, with equal bits in two orders."""
    results = []
    for order in (seed, seed + 1):
        kernels.config.seed = order
        results.append(call(Operators(kernels)))
    first, second = ([r] if isinstance(r, Tensor) else r for r in results)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    return results[0]
