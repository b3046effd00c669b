"""Quantised weights with blocks in their places, by the CUDA kernels: the formula, to the bit."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from reference import DTYPES, index
from shapes import dtypes, examples, grids, in_two_orders, seeds

Grid = tuple[int, int, int, list[int], list[int]]
skews = st.sampled_from((0, 0, 1, 4))


def skewed(tensor: Tensor, skew: int) -> Tensor:
    """The same values at an address that is no multiple of a vector."""
    return torch.cat([tensor.new_zeros(skew), tensor.flatten()])[skew:].view(tensor.shape)


def expected(values: Tensor, blocks: Tensor, rows: list[int], cols: list[int]) -> Tensor:
    reference.scatter_blocks_(values, blocks.to(values.dtype), rows, cols)
    return values


@pytest.mark.parametrize("dtype", DTYPES)
@examples(20)
@given(dtypes, grids(distinct=True), st.sampled_from((64, 32, 6, 4096)), skews, seeds)
def test_4bit(
    kernels: ModuleType, dtype: torch.dtype, block_dtype: torch.dtype, grid: Grid, group: int,
    skew: int, seed: int,
) -> None:  # fmt: skip
    n, k, size, rows, cols = grid
    torch.manual_seed(seed)
    count = n * k
    packed = torch.randint(0, 256, ((count + 1) // 2,), dtype=torch.uint8)
    nibbles = torch.stack([packed >> 4, packed & 15], 1).flatten()[:count].long()
    code, absmax = torch.randn(16), torch.randn(-(-count // group)).abs()
    values = (code[nibbles] * absmax.repeat_interleave(group)[:count]).view(n, k).to(dtype)
    blocks = torch.randn(len(rows), size, size).to(block_dtype)
    got = in_two_orders(
        kernels,
        seed,
        lambda o: o.dequantize_4bit_with_blocks(
            skewed(packed, skew), absmax, code, group, n, k, blocks, index(rows), index(cols), dtype
        ),
    )
    assert torch.equal(got, expected(values, blocks, rows, cols))


@pytest.mark.parametrize("dtype", DTYPES)
@examples(20)
@given(dtypes, grids(distinct=True), skews, seeds)
def test_int8(
    kernels: ModuleType, dtype: torch.dtype, block_dtype: torch.dtype, grid: Grid, skew: int, seed: int
) -> None:  # fmt: skip
    n, k, size, rows, cols = grid
    torch.manual_seed(seed)
    q = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    absmax = torch.randn(n).abs()
    values = (q.float() * absmax.mul(1.0 / 127.0).unsqueeze(1)).to(dtype)
    blocks = torch.randn(len(rows), size, size).to(block_dtype)
    got = in_two_orders(
        kernels,
        seed,
        lambda o: o.dequantize_int8_with_blocks(
            skewed(q, skew), absmax, blocks, index(rows), index(cols), dtype
        ),
    )
    assert torch.equal(got, expected(values, blocks, rows, cols))
