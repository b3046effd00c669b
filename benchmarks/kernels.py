"""Each operator against the best torch expression of the same work and against its floor.

The floor is the rate of a large torch.mm for block_grad and block_score_fused, and the bandwidth of
a torch copy for the others, by bytes read and written, measured in the same run:

    python benchmarks/kernels.py --threads 2
    python benchmarks/kernels.py --device cuda     (not yet run on a GPU)

ratio = rate of the operator / rate of the floor; vs torch = time of the torch expression / time of
the operator. The bars are those that the project has set itself for the CPU; rows below them stay.

On a GPU one linear layer, forward and backward, follows: SMT beside the reference-style layer,
PEFT's LoRA and DoRA, and full fine-tuning. There the floor is the same layer with a frozen weight.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from common import (
    Timing,
    dtype_of,
    keeps_records,
    print_table,
    require_device,
    save_record,
    side_by_side,
)
from torch import Tensor, nn

import smt_ext
from smt_ext import ops
from smt_ext.quantization import Scheme, packed_weight

COLUMNS = ("op", "dtype", "shape", "rate", "floor", "ratio", "bar", "met", "vs torch")
LAYER_COLUMNS = ("layer", "dtype", "shape", "seconds", "p20", "p80", "x floor", "trainable")


@dataclass(frozen=True)
class Sizes:
    """What is measured on a device: (L, S) of block gradients, (T, K, L, every nth) of copies."""

    device: str
    side: int  # of the weights and of the floor's matrices
    tokens: tuple[int, ...]
    blocks: tuple[tuple[int, int], ...]
    scored_tokens: int
    scored_blocks: tuple[int, ...]
    copies: tuple[tuple[int, int, int, int], ...]
    score_rows: int  # of bfloat16; half as many of float32
    score_columns: int
    adamw: tuple[int, int, int, int]  # layers, N = K, L, S
    layer: tuple[int, int, int, int, int] | None  # T, N = K, L, S, rank of LoRA
    quick: bool = False


SIZES = {
    "cpu": Sizes(
        "cpu", 2048, (1024, 4096), ((256, 8), (128, 16), (64, 32), (32, 64)), 1024, (256, 64),
        ((1024, 576, 64, 1), (1024, 4096, 64, 4), (1024, 4096, 256, 4), (4096, 4096, 256, 4),
         (16384, 4096, 256, 4)),
        16384, 4096, (60, 576, 64, 11), None,
    ),
    "cuda": Sizes(
        "cuda", 4096, (4096, 16384), ((256, 9), (256, 64), (128, 36), (64, 144), (32, 256)),
        4096, (256, 128, 64),
        ((4096, 4096, 256, 4), (16384, 4096, 256, 4), (16384, 4096, 64, 4), (16384, 14336, 256, 4),
         (32768, 4096, 256, 1)),
        16384, 4096, (96, 4096, 256, 9), (16384, 4096, 256, 9, 16),
    ),
}  # fmt: skip
# A trial in a second or two, whose numbers mean nothing.
QUICK = {
    device: Sizes(
        device, 64, (16,), ((32, 2), (16, 3)), 16, (32,), ((16, 64, 16, 2),), 64, 64,
        (2, 64, 16, 2), (16, 64, 16, 2, 2), quick=True,
    )
    for device in SIZES
}  # fmt: skip


def index(values: list[int], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


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


def timed(contestants: Mapping[str, Callable[[], Any]], sizes: Sizes) -> dict[str, Timing]:
    if sizes.quick:
        return side_by_side(contestants, device=sizes.device, samples=2, seconds=0.0)
    return side_by_side(contestants, device=sizes.device)


def bar_of(sizes: Sizes, value: float | None) -> float | None:
    return value if sizes.device == "cpu" else None


def block_grads(dtype: torch.dtype, sizes: Sizes) -> list[dict[str, Any]]:
    size, device = sizes.side, sizes.device
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    rows = []
    for tokens in sizes.tokens:
        dy = torch.randn(tokens, size, device=device).to(dtype)
        for block_size, count in sizes.blocks:
            grid = (size // block_size, size // block_size)
            blocks = random_blocks(count, grid)
            columns = sorted({col for _, col in blocks})
            slots = [columns.index(col) for _, col in blocks]
            x_cols = torch.randn(tokens, len(columns) * block_size, device=device).to(dtype)
            indices = index([r for r, _ in blocks], device), index(slots, device)

            def ours(dy=dy, x_cols=x_cols, indices=indices, L=block_size) -> None:
                ops.block_grad(dy, x_cols, *indices, L, torch.float32)

            def theirs(dy=dy, x_cols=x_cols, blocks=blocks, slots=slots, L=block_size) -> None:
                out = torch.empty(len(blocks), L, L, device=device)
                for i, ((r, _), s) in enumerate(zip(blocks, slots, strict=True)):
                    out[i] = dy[:, r * L : (r + 1) * L].T @ x_cols[:, s * L : (s + 1) * L]

            times = timed({"ours": ours, "torch": theirs, "floor": lambda: torch.mm(a, b)}, sizes)
            flops = 2.0 * tokens * block_size**2 * count
            bar = bar_of(sizes, {256: 0.9, 64: 0.75}.get(block_size))
            rows.append(row("block_grad", dtype, f"T={tokens} L={block_size} S={count}",
                            (flops, 2.0 * size**3), "GFLOP/s", times, bar))  # fmt: skip
    return rows


def fused_scores(dtype: torch.dtype, sizes: Sizes) -> list[dict[str, Any]]:
    tokens, size, device = sizes.scored_tokens, sizes.side, sizes.device
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    dy, x = (torch.randn(tokens, size, device=device).to(dtype) for _ in range(2))
    rows = []
    for block_size in sizes.scored_blocks:

        def theirs(L: int = block_size) -> Tensor:
            blocks = (dy.T @ x).view(size // L, L, size // L, L)
            return blocks.abs().mean((1, 3))

        times = timed({
            "ours": lambda L=block_size: ops.block_score_fused(dy, x, L),
            "torch": theirs,
            "floor": lambda: torch.mm(a, b),
        }, sizes)  # fmt: skip
        rows.append(row("block_score_fused", dtype, f"T={tokens} L={block_size} {size}x{size}",
                        (2.0 * tokens * size**2, 2.0 * size**3), "GFLOP/s", times, None))  # fmt: skip
    return rows


def copies(dtype: torch.dtype, sizes: Sizes) -> list[dict[str, Any]]:
    device, rows = sizes.device, []
    for tokens, width, block_size, every in sizes.copies:
        x = torch.randn(tokens, width, device=device).to(dtype)
        chosen = list(range(0, width // block_size, every))
        columns, used = index(chosen, device), len(chosen) * block_size
        wide = torch.tensor([c * block_size + j for c in chosen for j in range(block_size)])
        wide = wide.to(device)
        flat = torch.randn(tokens, used, device=device).to(dtype)
        times = timed({
            "ours": lambda x=x, c=columns, L=block_size, u=used: ops.gather_columns(x, c, L, width=u),
            "torch": lambda x=x, wide=wide: x.index_select(1, wide),
            "floor": flat.clone,  # into fresh memory, like the operator
        }, sizes)  # fmt: skip
        moved = 2.0 * flat.nbytes
        rows.append(row("gather_columns", dtype, f"T={tokens} {used} of {width}, L={block_size}",
                        (moved, moved), "GB/s", times, bar_of(sizes, 0.8)))  # fmt: skip
    # As many bytes in every dtype.
    n, k = sizes.score_rows * 16 // torch.finfo(dtype).bits, sizes.score_columns
    g = torch.randn(n, k, device=device).to(dtype)
    target = torch.empty(n, k, dtype=dtype, device=device)
    for block_size in sizes.scored_blocks:

        def theirs(L: int = block_size) -> Tensor:
            return g.view(n // L, L, k // L, L).abs().float().mean((1, 3))

        times = timed({
            "ours": lambda L=block_size: ops.block_score(g, L),
            "torch": theirs,
            "floor": lambda: target.copy_(g),
        }, sizes)  # fmt: skip
        work = float(g.nbytes), 2.0 * g.nbytes
        shape = f"{n}x{k} L={block_size}"
        rows.append(row("block_score", dtype, shape, work, "GB/s", times, bar_of(sizes, 0.8)))
    return rows


def optimizer_steps(dtype: torch.dtype, sizes: Sizes) -> list[dict[str, Any]]:
    """Float32 blocks of weights of ``dtype``, all layers in one step."""
    device, (layers, width, size, count) = sizes.device, sizes.adamw
    weights = [torch.randn(width, width, device=device).to(dtype) for _ in range(layers)]
    chosen = [random_blocks(count, (width // size, width // size)) for _ in weights]
    rows = [index([r for r, _ in blocks], device) for blocks in chosen]
    cols = [index([c for _, c in blocks], device) for blocks in chosen]
    blocks = [ops.gather_blocks(w, r, c, size, torch.float32)
              for w, r, c in zip(weights, rows, cols, strict=True)]  # fmt: skip
    grads = [torch.randn_like(b) for b in blocks]
    moments = [[torch.zeros_like(b) for b in blocks] for _ in range(2)]
    one, rate, zero = (
        torch.tensor(v, dtype=torch.float64, device=device) for v in (1.0, 1e-3, 0.0)
    )

    def ours() -> None:
        ops.sparse_adamw_step_(weights, blocks, grads, *moments, [], rows, cols, one, rate, one, zero,
                               0.9, 0.99, 1e-8, 0.0)  # fmt: skip

    params = [nn.Parameter(b.clone()) for b in blocks]
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
    source = torch.randn(int(moved / 8), device=device)
    target = torch.empty_like(source)
    times = timed({"ours": ours, "torch": theirs, "floor": lambda: target.copy_(source)}, sizes)
    return [row("sparse_adamw_step_", dtype, f"{layers} layers, {entries:,} entries",
                (moved, moved), "GB/s", times, bar_of(sizes, 0.8))]  # fmt: skip


def dequantised(dtype: torch.dtype, sizes: Sizes) -> list[dict[str, Any]]:
    """A quantised weight as numbers with blocks on it; torch is bitsandbytes' pass, then a scatter."""
    from quantized import quantized_linear

    device, rows = sizes.device, []
    width, size = sizes.side, sizes.scored_blocks[-1]
    chosen = random_blocks(max(1, (width // size) ** 2 // 50), (width // size, width // size))
    at = index([r for r, _ in chosen], device), index([c for _, c in chosen], device)
    blocks = torch.randn(len(chosen), size, size, device=device)
    for base in ("nf4", "int8"):
        linear = quantized_linear(nn.Linear(width, width, bias=False, device=device), base)
        packed = packed_weight(linear)
        assert packed is not None
        scheme, tensors = packed.scheme, packed.tensors

        def theirs(scheme: Scheme = scheme, tensors: Any = tensors) -> Tensor:
            return Scheme.overlaid(scheme, tensors, dtype, blocks, *at)

        def ours(scheme: Scheme = scheme, tensors: Any = tensors) -> Tensor:
            return scheme.overlaid(tensors, dtype, blocks, *at)

        assert torch.equal(ours(), theirs())
        moved = float(packed.num_bytes + width * width * dtype.itemsize)
        source = torch.randn(int(moved / 8), device=device)
        times = timed({"ours": ours, "torch": theirs, "floor": source.clone}, sizes)
        shape, work = f"{width}x{width} L={size} S={len(chosen)}", (moved, moved)
        rows.append(row(f"dequantize_{base}_with_blocks", dtype, shape, work, "GB/s", times, None))
    return rows


class OneLinear(nn.Module):
    """What patching and PEFT expect around a linear layer."""

    def __init__(self, width: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x)
        return out


def layer_steps(dtype: torch.dtype, sizes: Sizes) -> list[dict[str, Any]]:
    """Forward and backward of one linear layer whose input needs its gradient."""
    from peers.reference_style import patch_reference_style
    from peft import LoraConfig, get_peft_model

    assert sizes.layer is not None
    (tokens, width, size, count, rank), device = sizes.layer, sizes.device
    layer = smt_ext.LayerPlan(
        shape=(width, width),
        block_size=size,
        blocks=tuple(random_blocks(count, (width // size, width // size))),
    )
    plan = smt_ext.BlockPlan(layers={"proj": layer})

    def frozen(model: OneLinear) -> nn.Module:
        return model.requires_grad_(False)

    def smt(model: OneLinear) -> nn.Module:
        return smt_ext.patch(model, plan)

    def reference_style(model: OneLinear) -> nn.Module:
        patch_reference_style(model, plan)
        return model

    def adapter(model: OneLinear, dora: bool) -> nn.Module:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=dora, target_modules=["proj"])
        wrapped: nn.Module = get_peft_model(model, config)
        return wrapped

    methods: dict[str, Callable[[OneLinear], nn.Module]] = {
        "frozen weight (floor)": frozen,
        f"SMT, {count} blocks": smt,
        f"reference-style SMT, {count} blocks": reference_style,
        f"LoRA r={rank}": lambda model: adapter(model, False),
        f"DoRA r={rank}": lambda model: adapter(model, True),
        "full": lambda model: model,
    }
    models = {
        name: change(OneLinear(width, dtype, device)).train() for name, change in methods.items()
    }
    x = torch.randn(1, tokens, width, device=device).to(dtype).requires_grad_()
    dy = torch.randn(1, tokens, width, device=device).to(dtype)

    def run(model: nn.Module) -> None:
        x.grad = None
        model.zero_grad(set_to_none=True)
        model(x).backward(dy)

    times = timed({name: lambda model=model: run(model) for name, model in models.items()}, sizes)
    floor = times["frozen weight (floor)"].median
    return [
        {
            "layer": name,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": f"T={tokens} {width}x{width} L={size}",
            "seconds": timing.median,
            "p20": timing.percentile(20),
            "p80": timing.percentile(80),
            "x floor": round(timing.median / floor, 3),
            "trainable": sum(p.numel() for p in models[name].parameters() if p.requires_grad),
            "samples": timing.samples,
        }
        for name, timing in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, no record: a trial")
    options = parser.parse_args()
    require_device(options.device)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = (QUICK if options.quick else SIZES)[options.device]
    rows: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    suites: list[Callable[[torch.dtype, Sizes], list[dict[str, Any]]]] = [
        block_grads, fused_scores, copies, optimizer_steps, dequantised,
    ]  # fmt: skip
    for dtype in map(dtype_of, options.dtype):
        for suite in suites:
            rows += suite(dtype, sizes)
        if sizes.layer:
            layers += layer_steps(dtype, sizes)
    print_table(rows, COLUMNS)
    if layers:
        print()
        print_table(layers, LAYER_COLUMNS)
    if keeps_records(options.quick):
        name = "kernels" if options.device == "cpu" else f"kernels_{options.device}"
        print(f"record: {save_record(name, vars(options), [*rows, *layers])}")


if __name__ == "__main__":
    main()
