"""Block scores by the CUDA kernels, at any shape, stride, address and dtype."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from reference import DTYPES, assert_within
from shapes import block_sizes, examples, in_two_orders, layouts, seeds, sizes, tokens
from smt_ext.ops import METRICS


@pytest.mark.parametrize("dtype", DTYPES)
@examples(20)
@given(layouts, sizes, sizes, block_sizes, st.sampled_from(METRICS), seeds)
def test_block_score(
    kernels: ModuleType,
    dtype: torch.dtype,
    layout: str,
    n: int,
    k: int,
    size: int,
    metric: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    g = reference.strided((n, k), dtype, layout)
    got = in_two_orders(kernels, seed, lambda o: o.block_score(g, size, metric))
    magnitude = reference.block_reduce(g.double().abs(), size, metric)
    # A thread adds at most 128 terms before it goes on in float64.
    bound = 130 * reference.unit(reference.accumulator(dtype)) * magnitude
    assert_within(got, reference.block_reduce(g, size, metric), bound)


@pytest.mark.parametrize("dtype", DTYPES)
@examples(14)
@given(
    st.data(), layouts, layouts, sizes, sizes, block_sizes, st.sampled_from(METRICS),
    st.booleans(), seeds,
)  # fmt: skip
def test_block_score_fused(
    kernels: ModuleType,
    dtype: torch.dtype,
    data: Any,
    dy_layout: str,
    x_layout: str,
    n: int,
    k: int,
    size: int,
    metric: str,
    tf32: bool,
    seed: int,
) -> None:
    tf32 = tf32 and dtype == torch.float32
    n, k = min(n, 4 * size), min(k, 4 * size)
    t = tokens(data.draw, -(-n // size) * -(-k // size), size)
    torch.manual_seed(seed)
    dy, x = reference.strided((t, n), dtype, dy_layout), reference.strided((t, k), dtype, x_layout)
    got = in_two_orders(kernels, seed, lambda o: o.block_score_fused(dy, x, size, metric, tf32))
    if t == 0:
        assert not got.any()
        return
    dense, error = reference.dense_grad(dy, x, tf32)
    # An entry's error goes into the score as the entry itself does.
    slack = reference.block_reduce(error, size, metric)
    magnitude = reference.block_reduce(dense.abs(), size, metric)
    bound = slack + 130 * reference.unit(reference.accumulator(dtype)) * magnitude
    assert_within(got, reference.block_reduce(dense, size, metric), bound)
