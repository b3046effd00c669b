"""What the checker finds reaches Python as an exception, and the process goes on."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import smt_ext
from checked_cuda import Operators, on_cuda_kernels
from models import mlp, mlp_plan
from reference import index
from smt_ext import ops


@pytest.mark.parametrize("bad", [2, -1])
def test_an_index_out_of_range_stops_the_kernel(kernels: ModuleType, bad: int) -> None:
    w, zero = torch.randn(64, 64), index([0])
    with on_cuda_kernels(kernels):
        for call in (
            lambda: ops.gather_columns(w, index([bad]), 32, width=32),
            lambda: ops.gather_blocks(w, index([bad]), zero, 32),
            lambda: ops.scatter_blocks_(w, torch.ones(1, 32, 32), zero, index([bad])),
            lambda: ops.block_grad(w, w, index([bad]), zero, 32),
            lambda: ops.block_grad(w, w, zero, index([bad]), 32),
        ):
            before = w.clone()
            with pytest.raises(kernels.Error, match=r"kernel \w+, block .*__trap.*\.cu:\d+"):
                call()
            assert torch.equal(w, before)
        assert torch.equal(ops.gather_columns(w, zero, 32), w[:, :32])


def test_an_error_in_backward_is_raised_by_backward(kernels: ModuleType) -> None:
    with on_cuda_kernels(kernels):
        model = smt_ext.patch(mlp(), mlp_plan())
        model.up_proj.block_rows.fill_(7)
        loss = model(torch.randn(3, 96)).sum()
        with pytest.raises(kernels.Error, match=r"kernel block_grad.*__trap"):
            loss.backward()
        model.up_proj.block_rows.fill_(0)
        model(torch.randn(3, 96)).sum().backward()


@pytest.mark.parametrize(
    ("use", "element", "write", "message"),
    [
        ("in_place", 0, True, None),
        ("in_place", 40 * 3 + 31, True, None),
        ("input", 0, False, None),
        ("input", 0, True, "the kernel wrote its input tensor"),
        ("input", 32, False, "reads bytes .* of tensor .*, not all of it ever written"),
        ("input", -1, False, "reads bytes .* of tensor .*, not all of it ever written"),
        ("in_place", 40 * 2 + 39, True, "wrote between the elements of tensor, a view"),
        ("in_place", 40 * 3 + 32, True, "out of bounds: store of 4 bytes"),
        ("in_place", -2, True, "out of bounds: store of 4 bytes"),
        ("output", 0, True, "unwritten output: byte 8 of tensor"),
        ("output", 0, False, "reads bytes .* of tensor .*, not all of it ever written"),
    ],
)
def test_kernels_that_leave_their_tensor(
    kernels: ModuleType, use: str, element: int, write: bool, message: str | None
) -> None:
    """The tensor is (4, 32), cut from rows of 40 at an odd address: 4 bytes after one of 64."""
    tensor = torch.zeros(161)[1:].view(4, 40)[:, :32]
    arguments = tensor, getattr(kernels.Use, use), element, write
    if message is None:
        kernels.touch(*arguments)
        assert tensor.sum() == write
        return
    with pytest.raises(kernels.Error, match=message):
        kernels.touch(*arguments)
    assert not tensor.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.int32}, "x: expected a floating-point tensor, got torch.int32"),
        ({"device": "meta"}, "x: expected a tensor on the CPU"),
    ],
)
def test_bad_tensors_are_named(kernels: ModuleType, change: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        kernels.gather_columns(torch.zeros(4, 32, **change), index([0]), 32, torch.empty(4, 32))


def test_layouts_that_a_kernel_does_not_take_are_refused(kernels: ModuleType) -> None:
    x = torch.randn(4, 32)
    with pytest.raises(ValueError, match="out: expected a contiguous tensor"):
        kernels.gather_columns(x, index([0]), 32, torch.empty(32, 4).T)
    with pytest.raises(TypeError, match=r"col_blocks: expected torch.int32, got torch.int64"):
        kernels.gather_columns(x, torch.tensor([0]), 32, torch.empty(4, 32))


def test_traffic_is_reported(kernels: ModuleType) -> None:
    torch.manual_seed(0)
    dy, x = torch.randn(64, 128).bfloat16(), torch.randn(64, 128).bfloat16()
    Operators(kernels).block_grad(dy, x, index([0]), index([0]), 128, torch.float32)
    stats = kernels.last_stats("block_grad")
    assert (stats.kernel, stats.grid, stats.block) == ("block_grad", (1, 1, 1), (128, 1, 1))
    assert stats.mma == 2 * 128 * 128 * 64 // (2 * 16 * 8 * 16)
    assert stats.ldmatrix.conflicts == stats.async_load.excess == stats.global_store.excess == 0
    assert stats.async_load.bytes == 2 * 64 * 128 * 2
    assert "ldmatrix" in repr(stats)
    with pytest.raises(kernels.Error, match="no launch of kernel 'none'"):
        kernels.last_stats("none")
