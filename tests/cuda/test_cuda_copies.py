"""Copies of columns and blocks by the CUDA kernels, at any shape, stride, address and dtype."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from checked_cuda import Operators
from reference import DTYPES, index
from shapes import block_sizes, dtypes, examples, grids, in_two_orders, layouts, seeds, sizes


@pytest.mark.parametrize("dtype", DTYPES)
@examples(20)
@given(st.data(), dtypes, layouts, sizes, block_sizes, seeds)
def test_gather_columns(
    kernels: ModuleType,
    dtype: torch.dtype,
    data: Any,
    out_dtype: torch.dtype,
    layout: str,
    k: int,
    size: int,
    seed: int,
) -> None:
    columns = -(-k // size)
    least = data.draw(st.sampled_from((1, 1, 1, 0)))
    col_blocks = sorted(data.draw(st.sets(st.integers(0, columns - 1), min_size=least)))
    t = data.draw(st.integers(0, max(1, min(130, 30_000 // k))))
    torch.manual_seed(seed)
    x = reference.strided((t, k), dtype, layout)
    exact = reference.gather_columns(x, col_blocks, size)
    got = in_two_orders(
        kernels,
        seed,
        lambda o: o.gather_columns(x, index(col_blocks), size, exact.shape[1], out_dtype),
    )
    assert torch.equal(got, exact.to(out_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@examples(20)
@given(dtypes, layouts, grids(distinct=True), seeds)
def test_gather_and_scatter_blocks(
    kernels: ModuleType,
    dtype: torch.dtype,
    block_dtype: torch.dtype,
    layout: str,
    grid: tuple[int, int, int, list[int], list[int]],
    seed: int,
) -> None:
    n, k, size, rows, cols = grid
    torch.manual_seed(seed)
    w = reference.strided((n, k), dtype, layout)
    got = in_two_orders(
        kernels, seed, lambda o: o.gather_blocks(w, index(rows), index(cols), size, block_dtype)
    )
    assert torch.equal(got, reference.gather_blocks(w, rows, cols, size).to(block_dtype))

    blocks = torch.randn(len(rows), size, size, dtype=torch.float64).to(block_dtype)
    base = w.clone()

    def scatter(operators: Operators) -> Tensor:
        w.copy_(base)
        operators.scatter_blocks_(w, blocks, index(rows), index(cols))
        return w.clone()

    got = in_two_orders(kernels, seed, scatter)
    reference.scatter_blocks_(base, blocks.to(dtype), rows, cols)
    assert torch.equal(got, base)
