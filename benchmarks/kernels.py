"""Each operator against the best torch expression of the same work and against its floor.

The floor is the rate of a large torch.mm for block_grad and block_score_fused, and the bandwidth of
a torch copy for the others, by bytes read and written, measured in the same run:

    python benchmarks/kernels.py --threads 2

ratio = rate of the operator / rate of the floor; vs torch = time of the torch expression / time of
the operator. The bars are those that the project has set itself; rows below them stay.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import Timing, dtype_of, print_table, save_record, side_by_side
from torch import Tensor

from smt_ext import ops

COLUMNS = ("op", "dtype", "shape", "rate", "floor", "ratio", "bar", "met", "vs torch")


def index(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def random_blocks(count: int, grid: tuple[int, int]) -> list[tuple[int, int]]:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(grid[0] * grid[1], generator=generator)[:count]
    return sorted(divmod(i, grid[1]) for i in chosen.tolist())


def row(
    op: str, dtype: torch.dtype, shape: str, work: tuple[float, float], unit: str,
    times: dict[str, Timing], bar: float | None,
) -> dict[str, Any]:  # fmt: skip
    """A row of the table; ``work`` is that of the operator and of the floor."""
    rate, floor = work[0] / times["ours"].median, work[1] / times["floor"].median
    ratio = rate / floor
    return {
        "op": op,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": shape,
        "rate": f"{rate / 1e9:.1f} {unit}",
        "floor": f"{floor / 1e9:.1f} {unit}",
        "ratio": round(ratio, 3),
        "bar": "" if bar is None else bar,
        "met": "" if bar is None else "yes" if ratio >= bar else "NO",
        "vs torch": round(times["torch"].median / times["ours"].median, 2),
        "p20": times["ours"].percentile(20),
        "p80": times["ours"].percentile(80),
        "samples": {name: timing.samples for name, timing in times.items()},
    }


def block_grads(dtype: torch.dtype) -> list[dict[str, Any]]:
    size = 2048
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    rows = []
    for tokens in (1024, 4096):
        dy = torch.randn(tokens, size).to(dtype)
        for block_size, count in ((256, 8), (128, 16), (64, 32), (32, 64)):
            grid = (size // block_size, size // block_size)
            blocks = random_blocks(count, grid)
            columns = sorted({col for _, col in blocks})
            slots = [columns.index(col) for _, col in blocks]
            x_cols = torch.randn(tokens, len(columns) * block_size).to(dtype)
            indices = index([r for r, _ in blocks]), index(slots)

            def ours(dy=dy, x_cols=x_cols, indices=indices, L=block_size) -> None:
                ops.block_grad(dy, x_cols, *indices, L, torch.float32)

            def theirs(dy=dy, x_cols=x_cols, blocks=blocks, slots=slots, L=block_size) -> None:
                out = torch.empty(len(blocks), L, L)
                for i, ((r, _), s) in enumerate(zip(blocks, slots, strict=True)):
                    out[i] = dy[:, r * L : (r + 1) * L].T @ x_cols[:, s * L : (s + 1) * L]

            times = side_by_side({"ours": ours, "torch": theirs, "floor": lambda: torch.mm(a, b)})
            flops = 2.0 * tokens * block_size**2 * count
            bar = {256: 0.9, 64: 0.75}.get(block_size)
            rows.append(row("block_grad", dtype, f"T={tokens} L={block_size} S={count}",
                            (flops, 2.0 * size**3), "GFLOP/s", times, bar))  # fmt: skip
    return rows


def fused_scores(dtype: torch.dtype) -> list[dict[str, Any]]:
    tokens, size = 1024, 2048
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    dy, x = torch.randn(tokens, size).to(dtype), torch.randn(tokens, size).to(dtype)
    rows = []
    for block_size in (256, 64):

        def theirs(L: int = block_size) -> Tensor:
            blocks = (dy.T @ x).view(size // L, L, size // L, L)
            return blocks.abs().mean((1, 3))

        times = side_by_side({
            "ours": lambda L=block_size: ops.block_score_fused(dy, x, L),
            "torch": theirs,
            "floor": lambda: torch.mm(a, b),
        })  # fmt: skip
        rows.append(row("block_score_fused", dtype, f"T={tokens} L={block_size} {size}x{size}",
                        (2.0 * tokens * size**2, 2.0 * size**3), "GFLOP/s", times, None))  # fmt: skip
    return rows


def copies(dtype: torch.dtype) -> list[dict[str, Any]]:
    rows = []
    for tokens, width, block_size, every in (
        (1024, 576, 64, 1), (1024, 4096, 64, 4), (1024, 4096, 256, 4), (4096, 4096, 256, 4),
        (16384, 4096, 256, 4),
    ):  # fmt: skip
        x = torch.randn(tokens, width).to(dtype)
        chosen = list(range(0, width // block_size, every))
        columns, used = index(chosen), len(chosen) * block_size
        wide = torch.tensor([c * block_size + j for c in chosen for j in range(block_size)])
        flat = torch.randn(tokens, used).to(dtype)
        times = side_by_side({
            "ours": lambda x=x, c=columns, L=block_size, u=used: ops.gather_columns(x, c, L, width=u),
            "torch": lambda x=x, wide=wide: x.index_select(1, wide),
            "floor": flat.clone,  # into fresh memory, like the operator
        })  # fmt: skip
        moved = 2.0 * flat.nbytes
        rows.append(row("gather_columns", dtype, f"T={tokens} {used} of {width}, L={block_size}",
                        (moved, moved), "GB/s", times, 0.8))  # fmt: skip
    n, k = 8192 * 4 // torch.finfo(dtype).bits * 8, 4096  # as many bytes in every dtype
    g, target = torch.randn(n, k).to(dtype), torch.empty(n, k, dtype=dtype)
    for block_size in (256, 64):

        def theirs(L: int = block_size) -> Tensor:
            return g.view(n // L, L, k // L, L).abs().float().mean((1, 3))

        times = side_by_side({
            "ours": lambda L=block_size: ops.block_score(g, L),
            "torch": theirs,
            "floor": lambda: target.copy_(g),
        })  # fmt: skip
        rows.append(row("block_score", dtype, f"{n}x{k} L={block_size}",
                        (float(g.nbytes), 2.0 * g.nbytes), "GB/s", times, 0.8))  # fmt: skip
    return rows


def optimizer_steps(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Float32 blocks of weights of ``dtype``, in 60 layers of 576 x 576."""
    size, layers, count = 64, 60, 11
    weights = [torch.randn(576, 576).to(dtype) for _ in range(layers)]
    chosen = [random_blocks(count, (9, 9)) for _ in weights]
    rows = [index([r for r, _ in blocks]) for blocks in chosen]
    cols = [index([c for _, c in blocks]) for blocks in chosen]
    blocks = [ops.gather_blocks(w, r, c, size, torch.float32)
              for w, r, c in zip(weights, rows, cols, strict=True)]  # fmt: skip
    grads = [torch.randn_like(b) for b in blocks]
    moments = [[torch.zeros_like(b) for b in blocks] for _ in range(2)]
    one, rate, zero = (torch.tensor(v, dtype=torch.float64) for v in (1.0, 1e-3, 0.0))

    def ours() -> None:
        ops.sparse_adamw_step_(weights, blocks, grads, *moments, [], rows, cols, one, rate, one, zero,
                               0.9, 0.99, 1e-8, 0.0)  # fmt: skip

    params = [torch.nn.Parameter(b.clone()) for b in blocks]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    adamw = torch.optim.AdamW(params, lr=1e-3, fused=True)

    def theirs() -> None:
        adamw.step()
        for w, p, r, c in zip(weights, params, chosen, chosen, strict=True):
            for block, (row_at, _), (_, col_at) in zip(p.detach(), r, c, strict=True):
                w[row_at * size : (row_at + 1) * size, col_at * size : (col_at + 1) * size] = block

    entries = sum(b.numel() for b in blocks)
    moved = entries * (16.0 + 12.0 + weights[0].element_size())
    source = torch.randn(int(moved / 8))
    target = torch.empty_like(source)
    times = side_by_side({"ours": ours, "torch": theirs, "floor": lambda: target.copy_(source)})
    return [row("sparse_adamw_step_", dtype, f"{layers} layers, {entries:,} entries",
                (moved, moved), "GB/s", times, 0.8)]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    suites: list[Callable[[torch.dtype], list[dict[str, Any]]]] = [
        block_grads, fused_scores, copies, optimizer_steps,
    ]  # fmt: skip
    for dtype in map(dtype_of, options.dtype):
        for suite in suites:
            rows += suite(dtype)
    print_table(rows, COLUMNS)
    print(f"record: {save_record('kernels', vars(options), rows)}")


if __name__ == "__main__":
    main()
