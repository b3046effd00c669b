"""What callers of the operators rely on: schemas, fakes, errors, versions, compilation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from reference import DTYPES, index, sample
from smt_ext import ops
from smt_ext.plan import MAX_BLOCK_SIZE, MIN_BLOCK_SIZE

NAMES = list(sample(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, dtype: torch.dtype, device: str) -> None:
    if device != "cpu" and name.startswith("dequantize"):
        pytest.skip("has a CPU kernel alone")
    op, arguments = sample(dtype, device)[name]
    torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_on_a_cuda_device_without_one(name: str) -> None:
    with FakeTensorMode():
        op, arguments = sample(torch.bfloat16, "cuda")[name]
        out = op(*arguments)
    real = sample(torch.bfloat16)[name]
    expected = real[0](*real[1])
    if expected is None:
        assert out is None
    else:
        assert out.device.type == "cuda"
        assert (out.shape, out.dtype, out.stride()) == (
            expected.shape, expected.dtype, expected.stride(),
        )  # fmt: skip


def test_every_operator_is_sampled() -> None:
    registered = {name for name in dir(ops) if name in ops.__all__ and callable(getattr(ops, name))}
    assert registered - {"columns_width", "cpu_capability", "cuda_archs"} == set(NAMES)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    def step(x: torch.Tensor, dy: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        rows, cols = index([0, 1]), index([1, 0])
        x_cols = ops.gather_columns(x, index([0, 1]), 32, width=64)
        grad = ops.block_grad(dy, x_cols, rows, cols, 32)
        ops.block_grad_acc_(grad, dy, x_cols, rows, cols, 32)
        ops.scatter_blocks_(w, grad, rows, cols)
        return ops.gather_blocks(w, rows, cols, 32).sum() + ops.block_score(w, 32).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for t in (8, 20):
        arguments = torch.randn(t, 64), torch.randn(t, 64), torch.randn(64, 64)
        expected_w = arguments[2].clone()
        expected = step(arguments[0], arguments[1], expected_w)
        assert torch.equal(compiled(*arguments), expected)
        assert torch.equal(arguments[2], expected_w)


def test_in_place_operators_tell_autograd() -> None:
    w, blocks = torch.randn(64, 64), torch.randn(1, 32, 32)
    zero = index([0])
    before = w._version
    ops.scatter_blocks_(w, blocks, zero, zero)
    assert w._version > before
    ops.scatter_blocks_(w, blocks, zero, zero, bump_version=False)
    before = blocks._version
    ops.block_grad_acc_(blocks, torch.randn(4, 64), torch.randn(4, 64), zero, zero, 32)
    assert blocks._version > before
    x = torch.randn(3, 64, requires_grad=True)
    y = x @ w
    ops.scatter_blocks_(w, blocks, zero, zero)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


X, DY = torch.randn(5, 64), torch.randn(5, 64)
ZERO = index([0])
BLOCK = torch.zeros(1, 32, 32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.gather_columns(X.int(), ZERO, 32), TypeError, "x has dtype torch.int32"),
        (lambda: ops.gather_columns(X[0], ZERO, 32), ValueError, r"x has shape \(64,\), expected 2"),
        (lambda: ops.gather_columns(X, ZERO.long(), 32), TypeError, "col_blocks has dtype torch.int64"),
        (lambda: ops.gather_columns(X, ZERO, 8), ValueError, "block_size is 8, expected 16 to 512"),
        (lambda: ops.gather_columns(X, index([2]), 32), (ValueError, RuntimeError), "col_blocks"),
        (lambda: ops.gather_columns(X, index([-1]), 32), (ValueError, RuntimeError), "col_blocks"),
        (lambda: ops.gather_columns(X, index([1, 0]), 32), (ValueError, RuntimeError), "col_blocks"),
        (lambda: ops.block_grad(DY[:4], X, ZERO, ZERO, 32), ValueError, "5 rows, expected 4 as dy"),
        (lambda: ops.block_grad(DY.half(), X, ZERO, ZERO, 32), TypeError, "expected torch.float16"),
        (lambda: ops.block_grad(DY, X, ZERO, index([0, 1]), 32), ValueError, "slots has 2 indices"),
        (lambda: ops.block_grad(DY, X, index([2]), ZERO, 32), RuntimeError, "rows"),
        (lambda: ops.block_grad(DY, X, ZERO, index([9]), 32), RuntimeError, "slots"),
        (lambda: ops.block_grad_siblings([], X, ZERO, ZERO, 32), ValueError, "dys has 0 tensors"),
        (lambda: ops.block_grad_siblings([DY] * 5, X, ZERO, ZERO, 32), ValueError, "expected 1 to 4"),
        (lambda: ops.block_grad_siblings([DY, DY[:4]], X, ZERO, ZERO, 32), ValueError, "4 as dys"),
        (lambda: ops.block_grad_siblings([DY, DY], X, index([4]), ZERO, 32), RuntimeError, "rows"),
        (lambda: ops.block_grad_acc_(BLOCK[0], DY, X, ZERO, ZERO, 32), ValueError, "out has shape"),
        (lambda: ops.gather_blocks(X, ZERO, index([2]), 32), RuntimeError, "cols"),
        (lambda: ops.scatter_blocks_(X, BLOCK, index([1]), ZERO), RuntimeError, "rows"),
        (lambda: ops.scatter_blocks_(X, BLOCK[0], ZERO, ZERO), ValueError, "blocks has shape"),
        (lambda: ops.block_score(X, 32, "max"), ValueError, "metric is 'max', expected one of"),
        (lambda: ops.block_score_fused(DY, X, 513), ValueError, "block_size is 513"),
        (lambda: ops.grad_norm([]), ValueError, "grads is empty"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        call()
    assert re.search(message, str(caught.value)), caught.value


def test_tiles_are_checked_on_every_device() -> None:
    """By the Python function and, for those who call it, by the operator."""
    rows, slots = [0, 1, 2, 3], [0, 0, 0, 0]
    dy, x = torch.randn(5, 128), torch.randn(5, 32)
    given = (dy, x, index(rows), index(slots), 32)
    tiles = torch.full((1, 24), -1, dtype=torch.int32)
    lone = index([0, 1, 2, 3])
    operator = torch.ops.smt_ext.block_grad
    want = ops.block_grad(*given)
    assert torch.equal(ops.block_grad(*given, tiles=tiles, lone=lone), want)
    assert torch.equal(operator(*given, None, False, tiles, lone), want)
    for bad_tiles, bad_lone, name in (
        (tiles, None, "lone"), (None, lone, "tiles"), (tiles[:, 1:], lone, "tiles"),
        (tiles[0], lone, "tiles"), (tiles.long(), lone, "tiles"), (tiles, lone[None], "lone"),
        (torch.cat([tiles, tiles], 1)[:, ::2], lone, "tiles"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=name):
            ops.block_grad(*given, tiles=bad_tiles, lone=bad_lone)
        with pytest.raises(RuntimeError, match=name):
            operator(*given, None, False, bad_tiles, bad_lone)
    with pytest.raises(ValueError, match="tiles: expected None for blocks of 48"):
        ops.block_grad(dy, x, ZERO, ZERO, 48, tiles=tiles, lone=lone)


def test_siblings_are_checked_by_the_operator_too() -> None:
    operator = torch.ops.smt_ext.block_grad_siblings
    right = operator([DY] * ops.MAX_SIBLINGS, X, index([7]), ZERO, 32)
    assert torch.equal(right, ops.block_grad(DY, X, index([1]), ZERO, 32))
    for dys, message in (
        ([DY] * (ops.MAX_SIBLINGS + 1), "dys: expected 1 to 4 tensors, got 5"),
        ([DY, DY[:4]], "dys: expected 5 rows each, got 4"),
        ([DY, DY.double()], "dys: expected one dtype"),
        ([DY, DY[0]], "dys: expected 2 dimensions"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(dys, X, ZERO, ZERO, 32)


def test_block_sizes_have_the_same_limits_in_kernels_and_plans() -> None:
    g = torch.ones(600, 600)
    for size in (MIN_BLOCK_SIZE, MAX_BLOCK_SIZE):
        torch.ops.smt_ext.block_score(g, size, "l1")
    for size in (MIN_BLOCK_SIZE - 1, MAX_BLOCK_SIZE + 1):
        with pytest.raises(RuntimeError, match=f"{MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}, got {size}"):
            torch.ops.smt_ext.block_score(g, size, "l1")


def test_bad_optimizer_arguments_are_named() -> None:
    _, arguments = sample(torch.float32)["sparse_adamw_step_"]
    for position, bad, message in (
        (2, [], "grads has 0 tensors, expected 1"),
        (2, [torch.zeros(3, 32, 31)], "grads"),
        (3, [torch.zeros(3, 32, 32, dtype=torch.float64)], "exp_avgs"),
        (6, [index([0, 1, 5])], "rows"),
        (8, torch.tensor(1.0), "step"),
    ):
        changed = list(arguments)
        changed[position] = bad
        with pytest.raises((ValueError, RuntimeError), match=message):
            ops.sparse_adamw_step_(*changed)


@pytest.mark.parametrize("cap", ["generic", "avx2"])
def test_kernels_can_be_held_down_to_a_lesser_cpu(cap):
    best = ops.cpu_capability()
    if best == "generic" and cap != best:
        pytest.skip("this CPU has no AVX2")
    code = (
        "import torch; from smt_ext import ops; print(ops.cpu_capability(), "
        "ops.block_score_fused(torch.ones(8, 16), torch.full((8, 16), 2.0), 16).item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "SMT_EXT_CPU": cap},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [cap, "16.0"]


def test_an_unknown_cpu_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", "from smt_ext import ops"],
        env={**os.environ, "SMT_EXT_CPU": "avx3"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "SMT_EXT_CPU is 'avx3', expected one of avx512_bf16, avx512, avx2" in done.stderr
