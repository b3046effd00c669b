"""The compiled operators: contracts, checks of what users pass, and shapes for tracing.

Letters: T tokens, N out_features, K in_features, L block size, S selected blocks of one weight, C
and U the number of distinct column blocks and columns that are gathered. Dtypes are float32,
bfloat16, float16 and float64; sums are kept in float32 (float64 for float64). Index tensors are
int32, (S,) or (C,), on the device of the data. On the CPU all results have the same bits at any
number of threads.

Block tensors (S, L, L) are zero padded where a block at a ragged edge is smaller than L x L.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

try:
    from . import _C  # noqa: F401  (loading it registers the operators)
except ImportError as error:  # pragma: no cover - depends on the installation
    raise ImportError(
        "smt_ext's compiled operators are missing or were built for another torch. Build them with "
        "`pip install --no-build-isolation .` in the source tree, with torch>=2.10 installed."
    ) from error

__all__ = [
    "MAX_SIBLINGS",
    "METRICS",
    "TILE_SHAPES",
    "block_grad",
    "block_grad_acc_",
    "block_grad_siblings",
    "block_score",
    "block_score_fused",
    "columns_width",
    "cpu_capability",
    "cuda_archs",
    "dequantize_4bit_with_blocks",
    "dequantize_int8_with_blocks",
    "gather_blocks",
    "gather_columns",
    "grad_norm",
    "scatter_blocks_",
    "sparse_adamw_step_",
]

METRICS = ("mean_abs", "mean", "l1", "l2")
MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 16, 512
# Of tiles that several small blocks share on CUDA: rows and columns, in entries. The same list as
# csrc/kernels/common/limits.h.
TILE_SHAPES = ((128, 128), (256, 64), (256, 32))
# Linears whose block gradients one call computes; csrc/kernels/common/limits.h has the same.
MAX_SIBLINGS = 4

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ops = torch.ops.smt_ext

_CAPABILITIES = ("avx512_bf16", "avx512", "avx2", "generic")
if (_cap := os.environ.get("SMT_EXT_CPU", "")) and _cap not in _CAPABILITIES:
    raise ValueError(
        f"SMT_EXT_CPU is {_cap!r}, expected one of {', '.join(_CAPABILITIES)}, or unset"
    )


def cpu_capability() -> str:
    """The instruction set of the CPU's product kernels: avx512_bf16, avx512, avx2 or generic.

    The environment variable ``SMT_EXT_CPU`` holds it down to one of these, to measure what another
    CPU would do. Loops that only move or sum numbers are chosen by the loader and stay as they are.
    """
    return str(_ops.cpu_capability())


def cuda_archs() -> str:
    """Architectures of the CUDA kernels compiled in, such as "80;90;120+PTX"; "" for none."""
    return str(_ops.cuda_archs())


def columns_width(col_blocks: Tensor, block_size: int, in_features: int) -> int:
    """U, the number of columns in the given column blocks of a (T, K) input; reads the indices."""
    starts = (block * block_size for block in col_blocks.tolist())
    return sum(min(block_size, in_features - start) for start in starts)


def gather_columns(
    x: Tensor,
    col_blocks: Tensor,
    block_size: int,
    dtype: torch.dtype | None = None,
    *,
    width: int | None = None,
) -> Tensor:
    """Owned copy of the selected column blocks of ``x``, side by side (SMT paper, section 3.2).

    Args:
        x: (T, K), any strides.
        col_blocks: (C,) int32, strictly increasing column-block indices.
        block_size: L.
        dtype: of the result; default that of ``x``.
        width: U where the caller knows it; else it is computed from ``col_blocks`` on the host.

    Returns:
        (T, U) contiguous. Slot s starts at column s * L; only the last can be narrower than L.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype.
    """
    _check_gather_columns(x, col_blocks, block_size, dtype)
    if width is None:
        width = columns_width(col_blocks, block_size, x.shape[1])
    return _ops.gather_columns(x, col_blocks, block_size, width, dtype)


def block_grad(
    dy: Tensor,
    x_cols: Tensor,
    rows: Tensor,
    slots: Tensor,
    block_size: int,
    out_dtype: torch.dtype | None = None,
    *,
    tiles: Tensor | None = None,
    lone: Tensor | None = None,
) -> Tensor:
    """Gradients of the selected blocks: ``out[s] = dy[:, block row].T @ x_cols[:, slot]``.

    Args:
        dy: (T, N), any strides.
        x_cols: (T, U) of the same dtype, from :func:`gather_columns`.
        rows: (S,) block row of each block; slots: (S,) its position within ``x_cols``.
        block_size: L.
        out_dtype: default that of ``dy``; float32 keeps the sums' precision.
        tiles, lone: from :func:`smt_ext.nn.tiles.tiles_of`; on CUDA small blocks are computed
            together. The CPU kernel does without.

    On CUDA, float32 operands use tf32 where ``torch.backends.cuda.matmul.fp32_precision`` is "tf32".

    Returns:
        (S, L, L).
    """
    _check_block_grad(dy, x_cols, rows, slots, block_size, out_dtype, tiles, lone)
    return _ops.block_grad(
        dy, x_cols, rows, slots, block_size, out_dtype, _allow_tf32(dy), tiles, lone
    )


def block_grad_siblings(
    dys: Sequence[Tensor],
    x_cols: Tensor,
    rows: Tensor,
    slots: Tensor,
    block_size: int,
    out_dtype: torch.dtype | None = None,
    *,
    tiles: Tensor | None = None,
    lone: Tensor | None = None,
) -> Tensor:
    """:func:`block_grad` of several linears that read the same input, on CUDA by one launch.

    Args:
        dys: (T, N) each, N and strides of its own; at most :data:`MAX_SIBLINGS`.
        x_cols: (T, U), the columns that any of them selects.
        rows: (S,) for the blocks of all. The ceil(N / L) block rows of the first are counted first,
            then those of the second, and so on. slots: (S,).
        block_size, out_dtype: as in :func:`block_grad`.
        tiles, lone: as there, with these rows; the blocks of a tile are all of one linear.

    Returns:
        (S, L, L).
    """
    _check_block_grad_siblings(dys, x_cols, rows, slots, block_size, out_dtype, tiles, lone)
    return _ops.block_grad_siblings(
        dys, x_cols, rows, slots, block_size, out_dtype, _allow_tf32(x_cols), tiles, lone
    )


def block_grad_acc_(
    out: Tensor,
    dy: Tensor,
    x_cols: Tensor,
    rows: Tensor,
    slots: Tensor,
    block_size: int,
    *,
    tiles: Tensor | None = None,
    lone: Tensor | None = None,
) -> None:
    """``out += block_grad(...)`` in one pass, for gradient accumulation; out (S, L, L)."""
    _check_block_grad_acc(out, dy, x_cols, rows, slots, block_size, tiles, lone)
    _ops.block_grad_acc_(out, dy, x_cols, rows, slots, block_size, _allow_tf32(dy), tiles, lone)
    increment_version(out)


def gather_blocks(
    w: Tensor, rows: Tensor, cols: Tensor, block_size: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Copy blocks out of a weight: w (N, K), any strides -> (S, L, L)."""
    _check_blocks_copy(w, rows, cols, block_size, dtype)
    return _ops.gather_blocks(w, rows, cols, block_size, dtype)


def scatter_blocks_(
    w: Tensor, blocks: Tensor, rows: Tensor, cols: Tensor, *, bump_version: bool = True
) -> None:
    """Write blocks (S, L, L) into w (N, K) in place, rounded to its dtype; padding is ignored.

    Args:
        bump_version: False hides the change from autograd. Only for a caller that brings the
            very same bits back before backward can read them.
    """
    blocks = blocks.contiguous()
    _check_scatter_blocks(w, blocks, rows, cols)
    _ops.scatter_blocks_(w, blocks, rows, cols)
    # A tensor made in inference mode has no version; the compiler cannot ask whether one was.
    if bump_version and (torch.compiler.is_compiling() or not w.is_inference()):
        increment_version(w)


def sparse_adamw_step_(
    weights: Sequence[Tensor],
    blocks: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    rows: Sequence[Tensor],
    cols: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    grad_scale: Tensor,
    found_inf: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int = -1,
    origins: Sequence[Tensor] = (),
) -> None:
    """One AdamW step over the blocks of all layers, written into the weights in the same pass.

    The formula of ``torch.optim.AdamW``, computed in the dtype of the moments. Nothing is written
    if ``found_inf`` is not zero.

    Args:
        weights: (N, K) each, or without elements where no weight holds the blocks.
        blocks, grads: (S, L, L) each, of one dtype a layer.
        exp_avgs, exp_avg_sqs: (S, L, L), float32 (float64 for float64 blocks).
        masters: empty, or float32 (S, L, L) each: the values of half-precision blocks.
        rows, cols: (S,) block indices of each layer.
        step: 0-dim float64 like the next three; the number of this update, the first is 1.
        lr: learning rate. grad_scale: factor of every gradient. found_inf: not 0 skips the step.
        seed: >= 0 rounds bfloat16 blocks without master stochastically, reproducibly from
            (seed, step, layer, element); -1 rounds to nearest even.
        origins: empty, or (S, L, L) each, float32 or narrower (float64 for float64 blocks): what
            ``weight_decay`` pulls the blocks towards, in place of zero.
    """
    for name, tensors in (("grads", grads), ("weights", weights), ("rows", rows), ("cols", cols)):
        if len(tensors) != len(blocks):
            raise ValueError(
                f"{name} has {len(tensors)} tensors, expected {len(blocks)}, one a layer"
            )
    _ops.sparse_adamw_step_(
        weights,
        blocks,
        [grad.contiguous() for grad in grads],
        exp_avgs,
        exp_avg_sqs,
        masters,
        rows,
        cols,
        step,
        lr,
        grad_scale,
        found_inf,
        beta1,
        beta2,
        eps,
        weight_decay,
        seed,
        origins,
    )
    for tensors in (weights, blocks, exp_avgs, exp_avg_sqs, masters):
        for tensor in tensors:
            increment_version(tensor)


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """L2 norm over all elements of all gradients, 0-dim float64; non-finite iff some element is."""
    grads = [grad.contiguous() for grad in grads]
    _check_grad_norm(grads)
    return _ops.grad_norm(grads)


def block_score(g: Tensor, block_size: int, metric: str = "mean_abs") -> Tensor:
    """Score of every block of a gradient: g (N, K), any strides -> (R, C) float32 (or float64).

    Args:
        metric: ``mean_abs`` (SMT paper, section 3.1), ``mean`` (signed), ``l1`` or ``l2``. Means divide
            by the true area of a ragged block.
    """
    _check_block_score(g, block_size, metric)
    return _ops.block_score(g, block_size, metric)


def block_score_fused(dy: Tensor, x: Tensor, block_size: int, metric: str = "mean_abs") -> Tensor:
    """``block_score(dy.T @ x)`` without ever holding that (N, K) gradient.

    Args:
        dy: (T, N), any strides; x: (T, K), any strides, of the same dtype.
        block_size: L.
        metric: as in :func:`block_score`.
    """
    _check_block_score_fused(dy, x, block_size, metric)
    return _ops.block_score_fused(dy, x, block_size, metric, _allow_tf32(dy))


def dequantize_4bit_with_blocks(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    group: int,
    shape: tuple[int, int],
    blocks: Tensor,
    rows: Tensor,
    cols: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """A 4-bit weight as numbers, with blocks in their places, in one pass.

    Outside the blocks value i of the flat weight is ``code[nibble i] * absmax[i // group]``, a
    float32 product rounded to ``dtype``: the bits of bitsandbytes.

    Args:
        packed: at least N * K / 2 bytes, the first of two neighbours in the high nibble.
        absmax: (N * K / group,), rounded up, float32. code: (16,) float32.
        group: values that share a scale, even.
        shape: (N, K).
        blocks: (S, L, L); rows, cols: (S,) their places.

    Returns:
        (N, K).
    """
    _check_4bit(packed, absmax, code, group, *shape, blocks, rows, cols, dtype)
    return _ops.dequantize_4bit_with_blocks(
        packed, absmax, code, group, *shape, blocks, rows, cols, dtype
    )


def dequantize_int8_with_blocks(
    q: Tensor, absmax: Tensor, blocks: Tensor, rows: Tensor, cols: Tensor, dtype: torch.dtype
) -> Tensor:
    """An 8-bit weight as numbers, with blocks in their places, in one pass.

    Outside the blocks row n is ``q[n] * (absmax[n] / 127)``, a float32 product rounded to ``dtype``.

    Args:
        q: (N, K) int8. absmax: (N,) float32.
        blocks: (S, L, L); rows, cols: (S,) their places.

    Returns:
        (N, K).
    """
    _check_int8(q, absmax, blocks, rows, cols, dtype)
    return _ops.dequantize_int8_with_blocks(q, absmax, blocks, rows, cols, dtype)


def _allow_tf32(like: Tensor) -> bool:
    """Whether float32 products on CUDA may use tf32: torch's own setting for its matmuls."""
    if like.device.type != "cuda" or like.dtype != torch.float32:
        return False
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# What the kernels require (csrc/ops/checks.h), by the name of the argument: checked before a call, and
# by the fakes, so that a graph that is traced is refused as one that runs. Index values are checked
# where they are read.


def _check_gather_columns(
    x: Tensor, col_blocks: Tensor, block_size: int, dtype: torch.dtype | None
) -> None:
    _check_float("x", x)
    _check_dim("x", x, 2)
    _check_index("col_blocks", col_blocks, x)
    _check_block_size(block_size)
    _check_dtype("dtype", dtype)


def _check_block_grad(
    dy: Tensor,
    x_cols: Tensor,
    rows: Tensor,
    slots: Tensor,
    block_size: int,
    out_dtype: torch.dtype | None,
    tiles: Tensor | None,
    lone: Tensor | None,
    name: str = "dy",
) -> None:
    _check_pair(name, dy, "x_cols", x_cols)
    _check_index("rows", rows, dy)
    _check_index("slots", slots, dy, len(rows))
    _check_block_size(block_size)
    _check_dtype("out_dtype", out_dtype)
    if out_dtype is not None and (out_dtype == torch.float64) != (dy.dtype == torch.float64):
        raise TypeError(
            f"gradients have dtype {out_dtype}, and {name} has {dy.dtype}: float64 goes with float64 "
            "alone"
        )
    if (tiles is None) != (lone is None):
        raise ValueError("tiles and lone go together: expected both of them or neither")
    if tiles is None or lone is None:
        return
    if block_size not in (16, 32, 64):
        raise ValueError(f"tiles: expected None for blocks of {block_size}, not 16, 32 or 64")
    _check_dtype_is("tiles", tiles, torch.int32)
    widths = [
        rows // block_size + columns // block_size + rows // block_size * (columns // block_size)
        for rows, columns in TILE_SHAPES
        if columns >= block_size
    ]
    if tiles.dim() != 2 or tiles.shape[1] not in widths:
        expected = " or ".join(f"(n, {width})" for width in widths)
        raise ValueError(f"tiles has shape {tuple(tiles.shape)}, expected {expected}")
    _check_contiguous("tiles", tiles)
    _check_device("tiles", tiles, dy)
    _check_index("lone", lone, dy)


def _check_block_grad_siblings(
    dys: Sequence[Tensor], x_cols: Tensor, rows: Tensor, slots: Tensor, block_size: int,
    out_dtype: torch.dtype | None, tiles: Tensor | None, lone: Tensor | None,
) -> None:  # fmt: skip
    if not 1 <= len(dys) <= MAX_SIBLINGS:
        raise ValueError(f"dys has {len(dys)} tensors, expected 1 to {MAX_SIBLINGS}")
    for dy in dys:
        _check_block_grad(dy, x_cols, rows, slots, block_size, out_dtype, tiles, lone, "dys")


def _check_block_grad_acc(
    out: Tensor, dy: Tensor, x_cols: Tensor, rows: Tensor, slots: Tensor, block_size: int,
    tiles: Tensor | None, lone: Tensor | None,
) -> None:  # fmt: skip
    _check_block_grad(dy, x_cols, rows, slots, block_size, out.dtype, tiles, lone)
    _check_blocks("out", out, len(rows), block_size, dy)


def _check_blocks_copy(
    w: Tensor, rows: Tensor, cols: Tensor, block_size: int, dtype: torch.dtype | None = None
) -> None:
    _check_float("w", w)
    _check_dim("w", w, 2)
    _check_index("rows", rows, w)
    _check_index("cols", cols, w, len(rows))
    _check_block_size(block_size)
    _check_dtype("dtype", dtype)


def _check_scatter_blocks(w: Tensor, blocks: Tensor, rows: Tensor, cols: Tensor) -> None:
    _check_dim("blocks", blocks, 3)
    _check_blocks_copy(w, rows, cols, blocks.shape[1])
    _check_blocks("blocks", blocks, len(rows), blocks.shape[1], w)


def _check_adamw(
    weights: Sequence[Tensor],
    blocks: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    rows: Sequence[Tensor],
    cols: Sequence[Tensor],
    *scalars: Tensor,
    origins: Sequence[Tensor],
) -> None:
    lists = {"weights": weights, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs,
             "rows": rows, "cols": cols}  # fmt: skip
    optional = {"masters": masters or blocks, "origins": origins or blocks}
    for name, tensors in {**lists, **optional}.items():
        if len(tensors) != len(blocks):
            raise ValueError(
                f"{name} has {len(tensors)} tensors, expected {len(blocks)}, one a layer"
            )
    for i, block in enumerate(blocks):
        _check_dim("blocks", block, 3)
        count, size = block.shape[0], block.shape[1]
        _check_block_size(size)
        _check_blocks("blocks", block, count, size, blocks[0])
        _check_float("weights", weights[i])
        _check_dim("weights", weights[i], 2)
        _check_device("weights", weights[i], block)
        _check_index("rows", rows[i], block, count)
        _check_index("cols", cols[i], block, count)
        moment = torch.float64 if block.dtype == torch.float64 else torch.float32
        values = {"grads": (grads[i], block.dtype), "exp_avgs": (exp_avgs[i], moment),
                  "exp_avg_sqs": (exp_avg_sqs[i], moment)}  # fmt: skip
        if masters:
            _check_half("masters", block)
            values["masters"] = masters[i], torch.float32
        if origins:
            _check_float("origins", origins[i])
            if origins[i].dtype == torch.float64 != block.dtype:
                raise TypeError("origins is float64, expected float32 or narrower")
            values["origins"] = origins[i], origins[i].dtype
        for name, (tensor, dtype) in values.items():
            _check_blocks(name, tensor, count, size, block)
            _check_dtype_is(name, tensor, dtype)
    for name, tensor in zip(("step", "lr", "grad_scale", "found_inf"), scalars, strict=True):
        _check_dtype_is(name, tensor, torch.float64)
        if tensor.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected one number")


def _check_grad_norm(grads: Sequence[Tensor]) -> None:
    if not grads:
        raise ValueError("grads is empty, expected at least one gradient")
    for grad in grads:
        _check_float("grads", grad)
        _check_contiguous("grads", grad)
        _check_device("grads", grad, grads[0])


def _check_block_score(g: Tensor, block_size: int, metric: str) -> None:
    _check_float("g", g)
    _check_dim("g", g, 2)
    _check_block_size(block_size)
    _check_metric(metric)


def _check_block_score_fused(dy: Tensor, x: Tensor, block_size: int, metric: str) -> None:
    _check_pair("dy", dy, "x", x)
    _check_block_size(block_size)
    _check_metric(metric)


def _check_4bit(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    group: int,
    n: int,
    k: int,
    blocks: Tensor,
    rows: Tensor,
    cols: Tensor,
    dtype: torch.dtype,
) -> None:
    _check_overlay("packed", packed, blocks, rows, cols, dtype)
    if n < 0 or k < 0:
        raise ValueError(f"shape is {(n, k)}, expected sizes")
    if group < 2 or group % 2:
        raise ValueError(f"group is {group}, expected an even number")
    if packed.numel() * packed.element_size() < (n * k + 1) // 2:
        raise ValueError(
            f"packed has {packed.numel() * packed.element_size()} bytes, expected {(n * k + 1) // 2}"
        )
    _check_table("absmax", absmax, -(-n * k // group), packed)
    _check_table("code", code, 16, packed)


def _check_int8(
    q: Tensor, absmax: Tensor, blocks: Tensor, rows: Tensor, cols: Tensor, dtype: torch.dtype
) -> None:
    _check_dtype_is("q", q, torch.int8)
    _check_dim("q", q, 2)
    _check_overlay("q", q, blocks, rows, cols, dtype)
    _check_table("absmax", absmax, q.shape[0], q)


def _check_overlay(
    name: str, q: Tensor, blocks: Tensor, rows: Tensor, cols: Tensor, dtype: torch.dtype
) -> None:
    _check_contiguous(name, q)
    _check_dim("blocks", blocks, 3)
    _check_block_size(blocks.shape[1])
    _check_blocks("blocks", blocks, blocks.shape[0], blocks.shape[1], q)
    _check_index("rows", rows, q, blocks.shape[0])
    _check_index("cols", cols, q, blocks.shape[0])
    _check_dtype("dtype", dtype)


def _check_pair(a_name: str, a: Tensor, b_name: str, b: Tensor) -> None:
    for name, tensor in ((a_name, a), (b_name, b)):
        _check_float(name, tensor)
        _check_dim(name, tensor, 2)
    _check_device(b_name, b, a)
    if a.dtype != b.dtype:
        raise TypeError(f"{b_name} has dtype {b.dtype}, expected {a.dtype} as {a_name}")
    if a.shape[0] != b.shape[0]:
        raise ValueError(
            f"{b_name} has {b.shape[0]} rows, expected {a.shape[0]} as {a_name} has (tokens)"
        )


def _check_float(name: str, tensor: Tensor) -> None:
    _check_dtype(name, tensor.dtype)


def _check_dtype(name: str, dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in _DTYPES:
        raise TypeError(f"{name} has dtype {dtype}, expected float32, bfloat16, float16 or float64")


def _check_dtype_is(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {dtype}")


def _check_half(name: str, block: Tensor) -> None:
    if block.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"{name} are of blocks in {block.dtype}, expected bfloat16 or float16")


def _check_dim(name: str, tensor: Tensor, dim: int) -> None:
    if tensor.dim() != dim:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {dim} dimensions")


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {like.device} as the data")


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, expected a contiguous tensor")


def _check_index(name: str, index: Tensor, like: Tensor, count: int | None = None) -> None:
    _check_dtype_is(name, index, torch.int32)
    if index.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(index.shape)}, expected one dimension")
    if count is not None and len(index) != count:
        raise ValueError(f"{name} has {len(index)} indices, expected {count}, one a block")
    _check_contiguous(name, index)
    _check_device(name, index, like)


def _check_block_size(block_size: int) -> None:
    if not MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE:
        raise ValueError(
            f"block_size is {block_size}, expected {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}"
        )


def _check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}, expected one of {', '.join(METRICS)}")


def _check_blocks(name: str, blocks: Tensor, count: int, block_size: int, like: Tensor) -> None:
    _check_float(name, blocks)
    if blocks.shape != (count, block_size, block_size):
        raise ValueError(
            f"{name} has shape {tuple(blocks.shape)}, expected {(count, block_size, block_size)}"
        )
    _check_contiguous(name, blocks)
    _check_device(name, blocks, like)


def _check_table(name: str, tensor: Tensor, count: int, like: Tensor) -> None:
    _check_dtype_is(name, tensor, torch.float32)
    if tensor.numel() != count:
        raise ValueError(f"{name} has {tensor.numel()} elements, expected {count}")
    _check_contiguous(name, tensor)
    _check_device(name, tensor, like)


# Shapes and dtypes for FakeTensor, torch.compile and the meta device.


@torch.library.register_fake("smt_ext::gather_columns")
def _gather_columns_fake(
    x: Tensor, col_blocks: Tensor, block_size: int, width: int, dtype: torch.dtype | None = None
) -> Tensor:
    _check_gather_columns(x, col_blocks, block_size, dtype)
    return x.new_empty((x.shape[0], width), dtype=dtype)


@torch.library.register_fake("smt_ext::block_grad")
def _block_grad_fake(
    dy: Tensor,
    x_cols: Tensor,
    rows: Tensor,
    slots: Tensor,
    block_size: int,
    out_dtype: torch.dtype | None = None,
    allow_tf32: bool = False,
    tiles: Tensor | None = None,
    lone: Tensor | None = None,
) -> Tensor:
    _check_block_grad(dy, x_cols, rows, slots, block_size, out_dtype, tiles, lone)
    return dy.new_empty((rows.shape[0], block_size, block_size), dtype=out_dtype)


@torch.library.register_fake("smt_ext::block_grad_siblings")
def _block_grad_siblings_fake(
    dys: Sequence[Tensor],
    x_cols: Tensor,
    rows: Tensor,
    slots: Tensor,
    block_size: int,
    out_dtype: torch.dtype | None = None,
    allow_tf32: bool = False,
    tiles: Tensor | None = None,
    lone: Tensor | None = None,
) -> Tensor:
    _check_block_grad_siblings(dys, x_cols, rows, slots, block_size, out_dtype, tiles, lone)
    return x_cols.new_empty((rows.shape[0], block_size, block_size), dtype=out_dtype)


@torch.library.register_fake("smt_ext::block_grad_acc_")
def _block_grad_acc_fake(
    out: Tensor,
    dy: Tensor,
    x_cols: Tensor,
    rows: Tensor,
    slots: Tensor,
    block_size: int,
    allow_tf32: bool = False,
    tiles: Tensor | None = None,
    lone: Tensor | None = None,
) -> None:
    _check_block_grad_acc(out, dy, x_cols, rows, slots, block_size, tiles, lone)


@torch.library.register_fake("smt_ext::gather_blocks")
def _gather_blocks_fake(
    w: Tensor, rows: Tensor, cols: Tensor, block_size: int, dtype: torch.dtype | None = None
) -> Tensor:
    _check_blocks_copy(w, rows, cols, block_size, dtype)
    return w.new_empty((rows.shape[0], block_size, block_size), dtype=dtype)


@torch.library.register_fake("smt_ext::scatter_blocks_")
def _scatter_blocks_fake(w: Tensor, blocks: Tensor, rows: Tensor, cols: Tensor) -> None:
    _check_scatter_blocks(w, blocks, rows, cols)


@torch.library.register_fake("smt_ext::sparse_adamw_step_")
def _sparse_adamw_step_fake(*args: Any) -> None:
    _check_adamw(*args[:12], origins=args[17])


@torch.library.register_fake("smt_ext::dequantize_4bit_with_blocks")
def _dequantize_4bit_fake(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    group: int,
    n: int,
    k: int,
    blocks: Tensor,
    rows: Tensor,
    cols: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    _check_4bit(packed, absmax, code, group, n, k, blocks, rows, cols, dtype)
    return packed.new_empty((n, k), dtype=dtype)


@torch.library.register_fake("smt_ext::dequantize_int8_with_blocks")
def _dequantize_int8_fake(
    q: Tensor, absmax: Tensor, blocks: Tensor, rows: Tensor, cols: Tensor, dtype: torch.dtype
) -> Tensor:
    _check_int8(q, absmax, blocks, rows, cols, dtype)
    return q.new_empty(q.shape, dtype=dtype)


@torch.library.register_fake("smt_ext::grad_norm")
def _grad_norm_fake(grads: Sequence[Tensor]) -> Tensor:
    _check_grad_norm(grads)
    return grads[0].new_empty((), dtype=torch.float64)


def _score_shape(like: Tensor, n: int, k: int, block_size: int) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty((-(-n // block_size), -(-k // block_size)), dtype=dtype)


@torch.library.register_fake("smt_ext::block_score")
def _block_score_fake(g: Tensor, block_size: int, metric: str) -> Tensor:
    _check_block_score(g, block_size, metric)
    return _score_shape(g, g.shape[0], g.shape[1], block_size)


@torch.library.register_fake("smt_ext::block_score_fused")
def _block_score_fused_fake(
    dy: Tensor, x: Tensor, block_size: int, metric: str, allow_tf32: bool = False
) -> Tensor:
    _check_block_score_fused(dy, x, block_size, metric)
    return _score_shape(dy, dy.shape[1], x.shape[1], block_size)
