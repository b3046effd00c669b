"""Dequantising with blocks in their places: the formula in float32, rounded once, to the bit (CPUs)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import reference
from reference import DTYPES, index
from smt_ext import ops

# Ragged, of an odd number of columns (rows that start within a byte), of more than one part.
SHAPES = ((70, 80), (33, 71), (1, 16), (40, 2500), (64, 1024))
PLACES = ((0, 0), (0, 2), (1, 1))


def places(shape: tuple[int, int]) -> tuple[list[int], list[int]]:
    grid = [-(-size // 16) for size in shape]
    chosen = sorted({(r % grid[0], c % grid[1]) for r, c in PLACES})
    chosen = sorted({*chosen, (grid[0] - 1, grid[1] - 1)})
    return [r for r, _ in chosen], [c for _, c in chosen]


def overlaid(values: Tensor, blocks: Tensor, rows: list[int], cols: list[int]) -> Tensor:
    reference.scatter_blocks_(values, blocks.to(values.dtype), rows, cols)
    return values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 64, 4096])
def test_4bit(shape: tuple[int, int], dtype: torch.dtype, group: int) -> None:
    count = shape[0] * shape[1]
    packed = torch.randint(0, 256, ((count + 1) // 2,), dtype=torch.uint8)
    nibbles = torch.stack([packed >> 4, packed & 15], 1).flatten()[:count].long()
    code, absmax = torch.randn(16), torch.randn(-(-count // group)).abs()
    values = (code[nibbles] * absmax.repeat_interleave(group)[:count]).view(shape).to(dtype)
    rows, cols = places(shape)
    for block_dtype in (torch.float32, dtype):
        blocks = torch.randn(len(rows), 16, 16).to(block_dtype)
        got = ops.dequantize_4bit_with_blocks(
            packed, absmax, code, group, shape, blocks,
            index(rows), index(cols), dtype,
        )  # fmt: skip
        assert torch.equal(got, overlaid(values.clone(), blocks, rows, cols))


@pytest.mark.parametrize("shape", [(2**62, 0), (0, 2**62), (0, 0)], ids=str)
def test_empty_weights_of_any_length(shape: tuple[int, int]) -> None:
    """Nothing is allocated by the row of the grid where there are no values."""
    none, blocks = index([]), torch.empty(0, 16, 16)
    packed = torch.empty(0, dtype=torch.uint8)
    got = ops.dequantize_4bit_with_blocks(
        packed, torch.empty(0), torch.empty(16), 64, shape, blocks, none, none, torch.float32
    )
    assert got.shape == shape


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8(shape: tuple[int, int], dtype: torch.dtype) -> None:
    q = torch.randint(-127, 128, shape, dtype=torch.int8)
    absmax = torch.randn(shape[0]).abs()
    values = (q.float() * absmax.mul(1.0 / 127.0).unsqueeze(1)).to(dtype)
    rows, cols = places(shape)
    blocks = torch.randn(len(rows), 16, 16)
    got = ops.dequantize_int8_with_blocks(
        q,
        absmax,
        blocks,
        index(rows),
        index(cols),
        dtype,
    )
    assert torch.equal(got, overlaid(values, blocks, rows, cols))


def test_any_storage_dtype() -> None:
    packed = torch.randint(0, 256, (64 * 32 // 2,), dtype=torch.uint8)
    rest = (
        torch.rand(32),
        torch.randn(16),
        64,
        (64, 32),
        torch.randn(1, 16, 16),
        index([1]),
        index([1]),
    )
    expected = ops.dequantize_4bit_with_blocks(packed, *rest, torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        got = ops.dequantize_4bit_with_blocks(packed.view(dtype), *rest, torch.float32)
        assert torch.equal(got, expected)


def test_without_blocks() -> None:
    q = torch.randint(-127, 128, (20, 30), dtype=torch.int8)
    none = torch.empty(0, 16, 16)
    got = ops.dequantize_int8_with_blocks(
        q, torch.ones(20), none, index([]), index([]), torch.float32
    )
    assert torch.equal(got, q.float() * torch.ones(20, 1).mul(1.0 / 127.0))


Q = torch.zeros(32, 32, dtype=torch.int8)
BLOCK, FIRST = torch.zeros(1, 16, 16), index([0])


def int8(q=Q, absmax=32, rows=FIRST, cols=FIRST):
    absmax = torch.ones(absmax) if isinstance(absmax, int) else absmax
    return ops.dequantize_int8_with_blocks(q, absmax, BLOCK, rows, cols, torch.float32)


def four_bit(packed=Q, absmax=16, code=16):
    return ops.dequantize_4bit_with_blocks(
        packed,
        torch.ones(absmax),
        torch.ones(code),
        64,
        (32, 32),
        BLOCK,
        FIRST,
        FIRST,
        torch.float32,
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: int8(q=Q.float()), TypeError, "q has dtype torch.float32"),
        (lambda: int8(absmax=torch.ones(32).half()), TypeError, "absmax has dtype"),
        (lambda: int8(absmax=31), ValueError, "absmax has 31 elements, expected 32"),
        (lambda: int8(rows=index([2])), RuntimeError, "rows: expected indices in"),
        (lambda: int8(cols=index([-1])), RuntimeError, "cols: expected indices in"),
        (lambda: four_bit(packed=Q[:8]), ValueError, "packed has 256 bytes, expected 512"),
        (lambda: four_bit(code=15), ValueError, "code has 15 elements, expected 16"),
        (lambda: four_bit(absmax=15), ValueError, "absmax has 15 elements, expected 16"),
    ],
)
def test_bad_arguments_are_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
