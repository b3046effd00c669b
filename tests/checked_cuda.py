"""smt_ext's operators computed by the CUDA kernels, on the CPU.

The kernels and their launchers run under the SIMT checker (tests/cpp/simt), which raises what a GPU
would punish. What this module does for each operator is what csrc/ops does on a GPU.
"""

from __future__ import annotations

import functools
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

import torch
from torch import Tensor

import build_cpp


@functools.cache
def load() -> ModuleType:
    """The module of tests/cpp/python, built if need be; raises BuildError with the way out."""
    folder = build_cpp.build("plain", "checked_cuda")
    path = folder / f"checked_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = spec_from_file_location("checked_cuda", path)
    if spec is None or spec.loader is None:
        raise build_cpp.BuildError(f"{path} is no Python module")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Operators:
    """The operators with the signatures of csrc/registration.cpp.

    Attributes:
        kernels: the module of tests/cpp/python.
        calls: how often each operator ran.
    """

    def __init__(self, kernels: ModuleType) -> None:
        self.kernels = kernels
        self.calls: Counter[str] = Counter()

    def gather_columns(
        self,
        x: Tensor,
        col_blocks: Tensor,
        block_size: int,
        width: int,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        out = x.new_empty((len(x), width), dtype=dtype)
        self.kernels.gather_columns(x, col_blocks, block_size, out)
        return out

    def block_grad(
        self,
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
        return self.block_grad_siblings(
            [dy], x_cols, rows, slots, block_size, out_dtype, allow_tf32, tiles, lone
        )

    def block_grad_siblings(
        self,
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
        out = x_cols.new_empty((len(rows), block_size, block_size), dtype=out_dtype)
        self.kernels.block_grad(
            dys, x_cols, rows, slots, out, accumulate=False, tf32=allow_tf32, tiles=tiles, lone=lone
        )
        return out

    def block_grad_acc_(
        self,
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
        self.kernels.block_grad(
            [dy], x_cols, rows, slots, out, accumulate=True, tf32=allow_tf32, tiles=tiles, lone=lone
        )

    def gather_blocks(
        self,
        w: Tensor,
        rows: Tensor,
        cols: Tensor,
        block_size: int,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        out = w.new_empty((len(rows), block_size, block_size), dtype=dtype)
        self.kernels.gather_blocks(w, out, rows, cols)
        return out

    def scatter_blocks_(self, w: Tensor, blocks: Tensor, rows: Tensor, cols: Tensor) -> None:
        self.kernels.scatter_blocks(w, blocks, rows, cols)

    def dequantize_4bit_with_blocks(
        self,
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
        out = packed.new_empty((n, k), dtype=dtype)
        packed = packed.flatten().view(torch.uint8)
        self.kernels.dequantize(packed, absmax, code, group, blocks, rows, cols, out)
        return out

    def dequantize_int8_with_blocks(
        self,
        q: Tensor,
        absmax: Tensor,
        blocks: Tensor,
        rows: Tensor,
        cols: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        out = q.new_empty(q.shape, dtype=dtype)
        self.kernels.dequantize(q, absmax, None, 0, blocks, rows, cols, out)
        return out

    def sparse_adamw_step_(self, *arguments: object) -> None:
        self.kernels.sparse_adamw(*arguments)

    def grad_norm(self, grads: Sequence[Tensor]) -> Tensor:
        out = grads[0].new_empty((), dtype=torch.float64)
        self.kernels.grad_norm(grads, out)
        return out

    def block_score(self, g: Tensor, block_size: int, metric: str) -> Tensor:
        score = _new_score(g, g.shape[0], g.shape[1], block_size)
        self.kernels.block_score(g, block_size, getattr(self.kernels.Metric, metric), score)
        return score

    def block_score_fused(
        self, dy: Tensor, x: Tensor, block_size: int, metric: str, allow_tf32: bool = False
    ) -> Tensor:
        score = _new_score(dy, dy.shape[1], x.shape[1], block_size)
        self.kernels.block_score_fused(
            dy, x, block_size, getattr(self.kernels.Metric, metric), score, tf32=allow_tf32
        )
        return score

    def counted(self, name: str) -> Callable[..., object]:
        """The operator of that name, counting its calls."""

        def call(*arguments: object) -> object:
            self.calls[name] += 1
            return getattr(self, name)(*arguments)

        return call


NAMES = [name for name in vars(Operators) if not name.startswith("_") and name != "counted"]


@contextmanager
def on_cuda_kernels(kernels: ModuleType, seed: int = 1) -> Iterator[Counter[str]]:
    """While this lasts, torch's dispatcher hands CPU tensors of smt_ext's operators to the kernels.

    Args:
        kernels: from :func:`load`.
        seed: of the order in which blocks, warps and lanes run.

    Yields:
        how often each operator ran.
    """
    operators = Operators(kernels)
    before, kernels.config.seed = kernels.config.seed, seed
    with torch.library._scoped_library("smt_ext", "IMPL") as library:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*\n.*Overriding a previously registered")
            for name in NAMES:
                library.impl(name, operators.counted(name), "CPU")
        try:
            yield operators.calls
        finally:
            kernels.config.seed = before


def _new_score(like: Tensor, n: int, k: int, block_size: int) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty((-(-n // block_size), -(-k // block_size)), dtype=dtype)
