"""The operators again, in plain torch and float64, and how far a kernel may be from them.

Bounds are derived: a sum of T products in any order is off by at most about T roundings of the
accumulator times the sum of magnitudes (Higham, Accuracy and Stability, section 3.1); the result is
rounded once more to its dtype.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# T, N, K, L, as GoogleTest includes them.
PRODUCTS: list[tuple[int, ...]] = [
    tuple(map(int, numbers.split(",")))
    for numbers in re.findall(
        r"^{(.*)}", Path(__file__).with_name("products.inc").read_text(), re.M
    )
]
assert PRODUCTS, "pytest passes over a test without parameters"


def unit(dtype: torch.dtype) -> float:
    """Unit roundoff of a dtype."""
    return torch.finfo(dtype).eps / 2


def rounding(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The most that rounding to a dtype moves a value, below the smallest normal number too.

    One percent more, for values that are themselves not quite ``exact``.
    """
    return 1.01 * unit(dtype) * exact.abs().clamp(min=torch.finfo(dtype).tiny)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of a dtype are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def index(values: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def gather_columns(x: Tensor, col_blocks: list[int], block_size: int) -> Tensor:
    parts = [x[:, c * block_size : (c + 1) * block_size] for c in col_blocks]
    return torch.cat(parts, 1) if parts else x[:, :0]


def gather_blocks(w: Tensor, rows: list[int], cols: list[int], block_size: int) -> Tensor:
    out = w.new_zeros(len(rows), block_size, block_size)
    for block, row, col in zip(out, rows, cols, strict=True):
        part = _block(w, row, col, block_size)
        block[: part.shape[0], : part.shape[1]] = part
    return out


def scatter_blocks_(w: Tensor, blocks: Tensor, rows: list[int], cols: list[int]) -> None:
    for block, row, col in zip(blocks, rows, cols, strict=True):
        part = _block(w, row, col, blocks.shape[1])
        part.copy_(block[: part.shape[0], : part.shape[1]])


def dense_grad(dy: Tensor, x: Tensor, tf32: bool = False) -> tuple[Tensor, Tensor]:
    """dW = dy^T x in float64, and the bound of the error of sums kept in the accumulator.

    tf32 rounds each operand to 11 bits on top.
    """
    exact = dy.double().T @ x.double()
    magnitude = dy.double().abs().T @ x.double().abs()
    relative = 2 * (dy.shape[0] + 2) * unit(accumulator(dy.dtype))
    return exact, (relative + (2.01 * 2.0**-11 if tf32 else 0)) * magnitude


def block_reduce(g: Tensor, block_size: int, metric: str) -> Tensor:
    """Scores of all blocks in float64."""
    grid = [-(-size // block_size) for size in g.shape]
    out = torch.empty(*grid, dtype=torch.float64)
    for row in range(grid[0]):
        for col in range(grid[1]):
            block = _block(g.double(), row, col, block_size)
            out[row, col] = {
                "mean_abs": lambda b: b.abs().mean(),
                "mean": lambda b: b.mean(),
                "l1": lambda b: b.abs().sum(),
                "l2": lambda b: b.square().sum().sqrt(),
            }[metric](block)
    return out


def adamw(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    u: float,
    *,
    step: float,
    lr: float,
    grad_scale: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    origin: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """One AdamW step in float64: (exact, bound) of p, m and v, for arithmetic of unit roundoff u."""
    p, grad, m, v = (t.double() for t in (p, grad, m, v))
    g = grad * grad_scale
    new_m = m + (1 - beta1) * (g - m)
    new_v = beta2 * v + (1 - beta2) * g * g
    per_m = lr / (1 - beta1**step) / (new_v.sqrt() / (1 - beta2**step) ** 0.5 + eps)
    update = per_m * new_m
    to = torch.zeros_like(p) if origin is None else origin.double()
    new_p = p - lr * weight_decay * (p - to) - update
    # m: the scaled gradient, two differences and a product round once each, as do the factors.
    m_bound = 4 * u * (m.abs() + g.abs())
    # The update: that of m, and at most 10 roundings of the quotient (3 of them v's, by its root);
    # then the factor of p (or of its distance), its product and the differences.
    p_bound = per_m * m_bound + 10 * u * update.abs() + 4 * u * (p.abs() + to.abs() + update.abs())
    return (new_p, p_bound), (new_m, m_bound), (new_v, 6 * u * new_v)


def strided(shape: tuple[int, int], dtype: torch.dtype, layout: str) -> Tensor:
    """Normal numbers in rows, in columns, with gaps, in padded rows, or at an odd address."""
    rows, cols = shape
    if layout == "columns":
        return torch.randn(cols, rows, dtype=torch.float64).to(dtype).T
    if layout == "gaps":
        return torch.randn(rows, 2 * cols + 1, dtype=torch.float64).to(dtype)[:, 1::2]
    if layout == "padded":
        return torch.randn(rows, cols + 16, dtype=torch.float64).to(dtype)[:, :cols]
    if layout == "odd":
        return torch.randn(rows, cols + 1, dtype=torch.float64).to(dtype)[:, 1:]
    return torch.randn(rows, cols, dtype=torch.float64).to(dtype)


def on(device: str, tensor: Tensor) -> Tensor:
    """The tensor on a device, with the same strides, gaps and offset."""
    if device == "cpu":
        return tensor
    memory = tensor.as_strided(
        (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0
    )
    return memory.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def assert_within(got: Tensor, exact: Tensor, bound: Tensor | float) -> None:
    """``|got - exact| <= bound`` everywhere, and the reference is no zero that any bug would meet."""
    if exact.numel():
        assert exact.abs().max() > 0
    error = (got.double().cpu() - exact).abs()
    assert not torch.isnan(error).any()
    excess = (error - bound).max() if error.numel() else torch.tensor(0.0)
    assert excess <= 0, f"error {error.max():.3e} exceeds its bound by {excess:.3e}"


def _block(w: Tensor, row: int, col: int, size: int) -> Tensor:
    return w[row * size : (row + 1) * size, col * size : (col + 1) * size]


def sample(dtype: torch.dtype, device: str = "cpu") -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Operator name -> the overload and arguments of one call."""

    def randn(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device).to(like)

    def scalar(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=device)

    ops = torch.ops.smt_ext
    rows, cols = index([0, 1, 2], device), index([1, 0, 2], device)
    moment = torch.float64 if dtype == torch.float64 else torch.float32
    blocks, grad = randn(3, 32, 32), randn(3, 32, 32)
    m, v = randn(3, 32, 32, like=moment), randn(3, 32, 32, like=moment).abs()
    adamw = ([randn(70, 80)], [blocks], [grad], [m], [v], [], [rows], [cols], scalar(1), scalar(0.1),
             scalar(1), scalar(0), 0.9, 0.99, 1e-8, 0.1, -1, [])  # fmt: skip
    return {
        "gather_columns": (ops.gather_columns, (randn(20, 80), index([0, 2], device), 32, 48, None)),
        "block_grad": (ops.block_grad, (randn(20, 70), randn(20, 80), rows, cols, 32, None)),
        "block_grad_siblings": (
            ops.block_grad_siblings,
            ([randn(20, 40), randn(20, 30)], randn(20, 80), rows, cols, 32, None),
        ),
        "block_grad_acc_": (
            ops.block_grad_acc_, (blocks, randn(20, 70), randn(20, 80), rows, cols, 32)
        ),
        "gather_blocks": (ops.gather_blocks, (randn(70, 80), rows, cols, 32, None)),
        "scatter_blocks_": (ops.scatter_blocks_, (randn(70, 80), blocks, rows, cols)),
        "sparse_adamw_step_": (ops.sparse_adamw_step_, adamw),
        "dequantize_4bit_with_blocks": (
            ops.dequantize_4bit_with_blocks,
            (torch.randint(0, 256, (70 * 80 // 2, 1), device=device, dtype=torch.uint8),
             randn(-(-70 * 80 // 64), like=torch.float32), randn(16, like=torch.float32), 64, 70, 80,
             blocks, rows, cols, dtype),
        ),
        "dequantize_int8_with_blocks": (
            ops.dequantize_int8_with_blocks,
            (torch.randint(-127, 128, (70, 80), device=device, dtype=torch.int8),
             randn(70, like=torch.float32), blocks, rows, cols, dtype),
        ),
        "grad_norm": (ops.grad_norm, ([grad, blocks],)),
        "block_score": (ops.block_score, (randn(70, 80), 32, "mean_abs")),
        "block_score_fused": (ops.block_score_fused, (randn(20, 70), randn(20, 80), 32, "l2")),
    }  # fmt: skip
