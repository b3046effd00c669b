"""Block gradients by the CUDA kernels, at any shape, stride, address and dtype."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from checked_cuda import Operators
from reference import DTYPES, assert_within, index
from shapes import examples, grids, in_two_orders, layouts, seeds, tokens
from smt_ext.nn.tiles import tiles_of


def check_block_grad(
    kernels: ModuleType,
    operands: tuple[Tensor, Tensor],
    blocks: tuple[list[int], list[int]],
    size: int,
    out_dtype: torch.dtype,
    accumulate: bool,
    tf32: bool,
    seed: int,
    *,
    shared_tiles: bool = False,
) -> None:
    dy, x_cols = operands
    rows, slots = blocks
    tiles, lone = tiles_of(rows, slots, size) if shared_tiles else (None, None)
    start = torch.randn(len(rows), size, size, dtype=torch.float64).to(out_dtype)

    def run(operators: Operators) -> Tensor:
        arguments = dy, x_cols, index(rows), index(slots), size
        if not accumulate:
            return operators.block_grad(*arguments, out_dtype, tf32, tiles, lone)
        into = start.clone()
        operators.block_grad_acc_(into, *arguments, tf32, tiles, lone)
        return into

    got = in_two_orders(kernels, seed, run)
    dense, bound = reference.dense_grad(dy, x_cols, tf32)
    exact, bound = (reference.gather_blocks(m, rows, slots, size) for m in (dense, bound))
    inside = reference.gather_blocks(torch.ones_like(dense), rows, slots, size).bool()
    if accumulate:
        exact = exact + start.double()
        bound = bound + 2 * reference.rounding(exact.abs() + start.double().abs(), out_dtype)
        assert torch.equal(got[~inside], start[~inside])
    else:
        bound = bound + reference.rounding(exact, out_dtype)
        assert not got[~inside].any()
    if accumulate or dy.shape[0] > 0:
        assert_within(got[inside], exact[inside], bound[inside])
    else:
        assert not got.any()


@pytest.mark.parametrize("dtype", DTYPES)
@examples(24)
@given(
    st.data(), layouts, layouts, grids(distinct=False), st.booleans(), st.booleans(),
    st.booleans(), seeds,
)  # fmt: skip
def test_block_grad(
    kernels: ModuleType,
    dtype: torch.dtype,
    data: Any,
    dy_layout: str,
    x_layout: str,
    grid: tuple[int, int, int, list[int], list[int]],
    wide: bool,
    accumulate: bool,
    tf32: bool,
    seed: int,
) -> None:
    n, k, size, rows, slots = grid
    t = tokens(data.draw, len(rows), size)
    torch.manual_seed(seed)
    operands = (
        reference.strided((t, n), dtype, dy_layout),
        reference.strided((t, k), dtype, x_layout),
    )
    check_block_grad(
        kernels,
        operands,
        (rows, slots),
        size,
        reference.accumulator(dtype) if wide else dtype,
        accumulate,
        tf32 and dtype == torch.float32,
        seed,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@examples(10)
@given(st.data(), layouts, st.sampled_from((16, 32, 64)), st.booleans(), st.booleans(),
       st.booleans(), seeds)  # fmt: skip
def test_blocks_that_share_tiles(
    kernels: ModuleType,
    dtype: torch.dtype,
    data: Any,
    layout: str,
    size: int,
    wide: bool,
    accumulate: bool,
    tf32: bool,
    seed: int,
) -> None:
    # High enough for a tall tile, or wide enough for squares; one multiprocessor rejects neither.
    down, across = (data.draw(st.integers(1, most // size + 1)) for most in (256, 192))
    kernels.config.multiprocessors = 1
    cells = st.tuples(st.integers(0, down - 1), st.integers(0, across - 1))
    blocks = sorted(data.draw(st.sets(cells, min_size=1)))
    # The last row and column of blocks may be ragged, at any place or at those that pieces allow.
    n, k = (
        full * size - data.draw(st.sampled_from((0, 1, 8, size - 8, size - 1)))
        for full in (down, across)
    )
    t = data.draw(st.sampled_from((0, 1, 17, 40)))
    torch.manual_seed(seed)
    check_block_grad(
        kernels,
        (reference.strided((t, n), dtype, layout), reference.strided((t, k), dtype, "rows")),
        ([row for row, _ in blocks], [column for _, column in blocks]),
        size,
        reference.accumulator(dtype) if wide else dtype,
        accumulate,
        tf32 and dtype == torch.float32,
        seed,
        shared_tiles=True,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@examples(8)
@given(st.data(), st.sampled_from((16, 32, 64, 128)), st.booleans(), st.booleans(), seeds)
def test_siblings(
    kernels: ModuleType, dtype: torch.dtype, data: Any, size: int, wide: bool, tf32: bool, seed: int
) -> None:
    """Each dy has its own width and strides, and its blocks are those of a call by itself."""
    heights = data.draw(st.lists(st.integers(1, 2 * 256 // size), min_size=2, max_size=4))
    across = data.draw(st.integers(1, 128 // size + 1))
    t = data.draw(st.sampled_from((1, 17, 40)))
    torch.manual_seed(seed)
    tf32 = tf32 and dtype == torch.float32
    out_dtype = reference.accumulator(dtype) if wide else dtype
    x_cols = torch.randn(t, across * size).to(dtype)
    first_rows = [0, *itertools.accumulate(heights)][:-1]
    dys = [
        reference.strided(
            (t, height * size - data.draw(st.sampled_from((0, 8, size - 1)))),
            dtype,
            data.draw(layouts),
        )
        for height in heights
    ]
    cells = st.tuples(st.integers(0, sum(heights) - 1), st.integers(0, across - 1))
    blocks = sorted(data.draw(st.sets(cells, min_size=1)))
    rows, slots = [row for row, _ in blocks], [slot for _, slot in blocks]
    tiles, lone = tiles_of(rows, slots, size, first_rows=first_rows)
    kernels.config.multiprocessors = data.draw(st.sampled_from((1, 108)))

    def run(operators: Operators) -> Tensor:
        return operators.block_grad_siblings(
            dys, x_cols, index(rows), index(slots), size, out_dtype, tf32, tiles, lone
        )

    got = in_two_orders(kernels, seed, run)
    for dy, first, height in zip(dys, first_rows, heights, strict=True):
        own = [s for s, row in enumerate(rows) if first <= row < first + height]
        where = [rows[s] - first for s in own], [slots[s] for s in own]
        dense, bound = reference.dense_grad(dy, x_cols, tf32)
        exact, bound = (reference.gather_blocks(m, *where, size) for m in (dense, bound))
        assert_within(got[own], exact, bound + reference.rounding(exact, out_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@examples(2)
@given(
    st.integers(2048, 2600), st.sampled_from((16, 17, 32)), st.integers(1, 2), layouts,
    st.booleans(), st.booleans(), seeds,
)  # fmt: skip
def test_block_grad_with_split_tokens(
    kernels: ModuleType,
    dtype: torch.dtype,
    t: int,
    size: int,
    count: int,
    layout: str,
    accumulate: bool,
    tf32: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    operands = (
        reference.strided((t, size + 8), dtype, layout),
        reference.strided((t, 2 * size), dtype, "rows"),
    )
    blocks = [0, 1][:count], [1, 1][:count]
    check_block_grad(
        kernels, operands, blocks, size, dtype, accumulate, tf32 and dtype == torch.float32, seed
    )
    # The sums of at least two parts, from a launch of their own.
    assert kernels.last_stats("block_grad").grid[0] >= 2 * count
    assert kernels.last_stats("block_grad_add").global_load.requests > 0
