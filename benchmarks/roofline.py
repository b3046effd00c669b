"""What the CUDA kernels can reach at best: predicted, not measured.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --gpu H100 --tokens 8192 --model Llama-3-8B

Per kernel, layer, number of tokens and GPU: bytes and operations, the floor (the larger of bytes over
bandwidth and operations over the tensor cores' rate, both from the data sheet, each operand moved
once), and what the launch leaves of it:

- a multiprocessor works through its share of equal blocks, so that the slowest decides (waves);
- tensor-core kernels reach what mma.sync reaches on that GPU, not what wgmma does;
- bandwidth needs bytes in flight (Little's law): blocks that fit on a multiprocessor at once, times
  what one of them asks for before it waits;
- splitting the tokens costs a second launch that adds the parts. (No split is so large that its parts
  would not stay in the L2 cache; a test holds that.)

Not in it: launch latency, L2 bandwidth (the table shows how much a kernel asks of it), clocks under
load, registers (make cuda-report). Blocks of the plan are drawn at random.

The second table is the linear part of one layer in a training step, all seven linears: matrix products
at the data sheet's rate; full fine-tuning's dW and optimizer; LoRA on all seven, its extra passes at
their floor; SMT with the paper's budget (0.84 % of the model, in q, k and v), its kernels as predicted.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from common import print_table, save_record

LABEL = "predicted, not measured"
COLUMNS = (
    "GPU", "model", "T", "kernel", "shape", "MB", "GFLOP", "bound", "floor us", "blocks",
    "occupancy %", "waves", "predicted us", "floor/predicted %", "L2 TB/s",
)  # fmt: skip

# ---- GPUs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """Data sheet numbers; flops are of dense bfloat16 with float32 sums.

    Attributes:
        mma_share: of flops, what mma.sync reaches (Luo et al., Benchmarking and Dissecting the
            Nvidia Hopper GPU Architecture via Microbenchmarking, 2024: 63 % on Hopper, where only
            wgmma reaches all; all before).
        shared_bytes, threads: of a multiprocessor (CUDA C++ Programming Guide, compute capabilities).
    """

    name: str
    source: str
    multiprocessors: int
    flops: float
    mma_share: float
    bandwidth: float
    l2_bytes: int
    shared_bytes: int
    threads: int


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", "NVIDIA A100 80GB SXM data sheet; GA100 whitepaper",
            108, 312e12, 1.0, 2.039e12, 40 << 20, 164 << 10, 2048),
        Gpu("H100", "NVIDIA H100 SXM data sheet; H100 whitepaper",
            132, 989e12, 0.63, 3.35e12, 50 << 20, 228 << 10, 2048),
        Gpu("H200", "NVIDIA H200 SXM data sheet",
            132, 989e12, 0.63, 4.8e12, 50 << 20, 228 << 10, 2048),
        Gpu("RTX 4090", "NVIDIA Ada GPU architecture whitepaper, appendix A",
            128, 165.2e12, 1.0, 1.008e12, 72 << 20, 100 << 10, 1536),
    )
}  # fmt: skip

# From asking to receiving under load; microbenchmarks of these GPUs find 0.5 to 0.8 us.
MEMORY_LATENCY = 0.7e-6
SHARED_BYTES_RESERVED = 1024  # a block, by the system (CUDA C++ Programming Guide)

# ---- the launchers' choices: tests/benchmarks/test_roofline.py holds them to csrc/kernels/cuda -----


@dataclass(frozen=True)
class Tile:
    """MmaTile of tile_product.cuh."""

    side: int
    threads: int
    blocks: int  # of a multiprocessor, by __launch_bounds__
    shared_bytes: int


STAGES, PANEL_TOKENS = 3, 32
TILES = {
    side: Tile(side, 32 * warps * warps, blocks, STAGES * 2 * PANEL_TOKENS * side * 2)
    for side, warps, blocks in ((128, 2, 2), (64, 2, 4), (32, 1, 7))
}  # fmt: skip
LEAST_TOKENS = 512  # of a split
SPLIT_GRANULE = 64
ADD_THREADS = 256
ROW_THREADS, ROWS = 256, 4  # of the copying kernels
ADAMW_THREADS, ADAMW_CHUNK = 256, 4096
NORM_THREADS, NORM_CHUNK, NORM_UNROLL = 256, 16384, 4
SCORE_THREADS, SCORE_SMALL_THREADS, SCORE_LARGE, SCORE_UNROLL = 256, 64, 128, 4
BF16, F32 = 2, 4  # bytes


def tile_of(block_size: int) -> Tile:
    """The smallest tile that holds a block, at most the largest."""
    return TILES[128 if block_size > 64 else 64 if block_size > 32 else 32]


def splits_of(tokens: int, blocks: int, tile: Tile, gpu: Gpu) -> int:
    """How often block_grad splits the tokens for a grid of ``blocks`` tiles."""
    room = gpu.multiprocessors * tile.blocks
    count = min(max(room // max(1, blocks), 1), max(1, tokens // LEAST_TOKENS))
    part = math.ceil(math.ceil(tokens / count) / SPLIT_GRANULE) * SPLIT_GRANULE
    return max(1, -(-tokens // max(1, part)))


# ---- kernels -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One launch: what it does in all, and what it is cut into.

    Attributes:
        bytes: moved from and to memory, each operand once.
        flops: on the tensor cores, padding of tiles included.
        cache_bytes: what the blocks ask of L2, operands counted as often as tiles read them.
        blocks, threads, shared_bytes: the launch configuration.
        most_resident: blocks of a multiprocessor, by __launch_bounds__.
        flight_bytes: what a block asks for before it waits.
    """

    bytes: float
    flops: float
    cache_bytes: float
    blocks: int
    threads: int
    shared_bytes: int
    most_resident: int
    flight_bytes: float

    def resident(self, gpu: Gpu) -> int:
        """Blocks that a multiprocessor holds at once."""
        by_shared = gpu.shared_bytes // (self.shared_bytes + SHARED_BYTES_RESERVED)
        return max(1, min(gpu.threads // self.threads, by_shared, self.most_resident))

    def occupancy(self, gpu: Gpu) -> float:
        return self.resident(gpu) * self.threads / gpu.threads

    def waves(self, gpu: Gpu) -> float:
        return self.blocks / (self.resident(gpu) * gpu.multiprocessors)

    def seconds(self, gpu: Gpu) -> float:
        """Predicted."""
        share = math.ceil(self.blocks / gpu.multiprocessors)  # of the busiest multiprocessor
        rate = gpu.flops * gpu.mma_share / gpu.multiprocessors
        computing = share * (self.flops / self.blocks) / rate
        wave = self.resident(gpu) * gpu.multiprocessors
        waves, rest = divmod(self.blocks, wave)
        moving = waves * self._moving(wave, gpu) + self._moving(rest, gpu)
        return max(computing, moving)

    def _moving(self, blocks: int, gpu: Gpu) -> float:
        """Seconds that blocks at work at once need to move what is theirs."""
        in_flight = blocks * self.flight_bytes / MEMORY_LATENCY
        rate = min(gpu.bandwidth, in_flight)
        return blocks * (self.bytes / self.blocks) / rate if blocks else 0.0


@dataclass(frozen=True)
class Kernel:
    """What is asked for, and the launches that do it."""

    name: str
    shape: str
    bytes: float
    flops: float
    launches: tuple[Launch, ...]

    def floor(self, gpu: Gpu) -> float:
        return max(self.bytes / gpu.bandwidth, self.flops / gpu.flops)

    def seconds(self, gpu: Gpu) -> float:
        """Predicted."""
        return sum(launch.seconds(gpu) for launch in self.launches)


def streaming(name: str, shape: str, size: float, blocks: int, threads: int, each: int) -> Kernel:
    """A kernel that moves ``size`` bytes and computes next to nothing; ``each``: of a thread, before
    it waits."""
    launch = Launch(size, 0.0, size, blocks, threads, 0, 2048 // threads, threads * each)
    return Kernel(name, shape, size, 0.0, (launch,))


def tile_product(
    tile: Tile, tiles: int, splits: int, tokens: int, read: float, written: float
) -> Launch:
    """Tiles of dy^T x, each split among ``splits`` blocks."""
    panel = 2 * PANEL_TOKENS * tile.side * BF16  # of both operands
    return Launch(
        read + written,
        2.0 * tokens * tiles * tile.side**2,
        tiles * tokens * 2 * tile.side * BF16 + written,
        tiles * splits,
        tile.threads,
        tile.shared_bytes,
        tile.blocks,
        (STAGES - 1) * panel,
    )


def gather_columns(shape: str, tokens: int, columns: int) -> Kernel:
    """Columns of a (T, K) input, copied; bfloat16."""
    vectors = columns * BF16 // 16
    across = min(32, 1 << max(0, vectors - 1).bit_length())
    height = ROW_THREADS // across * ROWS
    blocks = -(-vectors // across) * -(-tokens // height)
    size = 2.0 * tokens * columns * BF16
    return streaming("gather_columns", shape, size, blocks, ROW_THREADS, ROWS * 16)


def block_grad(
    shape: str, tokens: int, rows: int, columns: int, count: int, block_size: int, gpu: Gpu
) -> Kernel:
    """S blocks that read ``rows`` columns of dy and ``columns`` columns of x; float32 out."""
    tile = tile_of(block_size)
    tiles = count * (-(-block_size // tile.side)) ** 2
    splits = splits_of(tokens, tiles, tile, gpu)
    read = float(tokens * (rows + columns) * BF16)
    out = float(count * block_size**2 * F32)
    if splits == 1:
        launches = [tile_product(tile, tiles, 1, tokens, read, out)]
    else:
        adding = streaming("", "", out, math.ceil(out / (ADD_THREADS * 16)), ADD_THREADS, 16)
        launches = [tile_product(tile, tiles, splits, tokens, read, 0.0), *adding.launches]
    flops = 2.0 * tokens * count * block_size**2
    return Kernel("block_grad", shape, read + out, flops, tuple(launches))


def block_score_fused(shape: str, tokens: int, n: int, k: int, block_size: int) -> Kernel:
    """All blocks of dy^T x, reduced; planning."""
    tile = tile_of(block_size)
    tiles = -(-n // block_size) * -(-k // block_size) * (-(-block_size // tile.side)) ** 2
    read = float(tokens * (n + k) * BF16)
    launch = tile_product(tile, tiles, 1, tokens, read, 0.0)
    return Kernel("block_score_fused", shape, read, 2.0 * tokens * n * k, (launch,))


def block_score(shape: str, n: int, k: int, block_size: int) -> Kernel:
    """Scores of a stored bfloat16 gradient."""
    threads = SCORE_THREADS if block_size >= SCORE_LARGE else SCORE_SMALL_THREADS
    blocks = -(-n // block_size) * -(-k // block_size)
    return streaming("block_score", shape, n * k * BF16, blocks, threads, SCORE_UNROLL * 16)


def sparse_adamw(shape: str, counts: list[int], block_size: int) -> Kernel:
    """All layers; float32 blocks of bfloat16 weights: reads 16 bytes an entry, writes 12 + 2."""
    entries = sum(counts) * block_size**2
    rows = ADAMW_CHUNK // block_size
    chunks = sum(-(-count * block_size // rows) for count in counts)
    return streaming("sparse_adamw", shape, 30 * entries, chunks, ADAMW_THREADS, 4 * 16)


def grad_norm(shape: str, counts: list[int], block_size: int) -> Kernel:
    """All layers; float32 gradients. (The sum of the chunks' sums is left out.)"""
    chunks = sum(-(-count * block_size**2 // NORM_CHUNK) for count in counts)
    size = sum(counts) * block_size**2 * F32
    return streaming("grad_norm", shape, size, chunks, NORM_THREADS, NORM_UNROLL * 16)


def dense_grad(shape: str, tokens: int, n: int, k: int) -> Kernel:
    """What full fine-tuning computes instead: the whole dW, by cuBLAS. A floor, no launch of ours."""
    size = float((tokens * (n + k) + n * k) * BF16)
    return Kernel("dense dW (cuBLAS)", shape, size, 2.0 * tokens * n * k, ())


# ---- models --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A Llama: widths of its linears, and how many parameters it has in all."""

    name: str
    hidden: int
    mlp: int
    kv: int
    layers: int
    parameters: float

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Kind -> (N, K)."""
        h = self.hidden
        return {
            "q": (h, h), "k": (self.kv, h), "v": (self.kv, h), "o": (h, h),
            "gate": (self.mlp, h), "up": (self.mlp, h), "down": (h, self.mlp),
        }  # fmt: skip


MODELS = {
    model.name: model
    for model in (
        Model("LLaMA-7B", 4096, 11008, 4096, 32, 6.738e9),
        Model("LLaMA-13B", 5120, 13824, 5120, 40, 13.016e9),
        Model("Llama-3-8B", 4096, 14336, 1024, 32, 8.030e9),
    )
}
TOKENS = (4096, 8192, 16384, 32768)
BUDGET, TARGETS = 0.0084, ("q", "k", "v")  # the paper's


def plan_of(model: Model, block_size: int) -> dict[str, list[tuple[int, int]]]:
    """Blocks (row, column) of one layer by kind: the budget, drawn at random over q, k and v."""
    grids = [
        (kind, row, column)
        for kind in TARGETS
        for row in range(-(-model.linears[kind][0] // block_size))
        for column in range(-(-model.linears[kind][1] // block_size))
    ]
    count = min(len(grids), round(BUDGET * model.parameters / model.layers / block_size**2))
    plan: dict[str, list[tuple[int, int]]] = {kind: [] for kind in TARGETS}
    for kind, row, column in sorted(random.Random(0).sample(grids, count)):
        plan[kind].append((row, column))
    return plan


def step_kernels(model: Model, tokens: int, block_size: int, gpu: Gpu) -> Iterator[Kernel]:
    """What SMT adds to forward and dX in one layer; time grows with T."""
    plan = plan_of(model, block_size)
    union = len({column for blocks in plan.values() for _, column in blocks}) * block_size
    yield gather_columns(f"q k v: {union} of {model.hidden}", tokens, union)
    for kind, blocks in plan.items():
        n, k = model.linears[kind]
        rows = len({row for row, _ in blocks}) * block_size
        columns = len({column for _, column in blocks}) * block_size
        shape = f"{kind}: {len(blocks)} of {n}x{k}"
        yield block_grad(shape, tokens, rows, columns, len(blocks), block_size, gpu)


def planning_kernels(model: Model, tokens: int, block_size: int) -> Iterator[Kernel]:
    for kind in ("v", "up"):
        n, k = model.linears[kind]
        yield block_score_fused(f"{kind}: {n}x{k}", tokens, n, k, block_size)


def dense_kernels(model: Model, tokens: int) -> Iterator[Kernel]:
    for kind in ("q", "up"):
        n, k = model.linears[kind]
        yield dense_grad(f"{kind}: {n}x{k}", tokens, n, k)


def optimizer_kernels(model: Model, block_size: int) -> Iterator[Kernel]:
    """Of all layers at once."""
    counts = [len(b) for b in plan_of(model, block_size).values() if b] * model.layers
    shape = f"all layers: {sum(counts)} blocks"
    yield sparse_adamw(shape, counts, block_size)
    yield grad_norm(shape, counts, block_size)


def row_of(gpu: Gpu, model: Model, tokens: int | str, kernel: Kernel) -> dict[str, Any]:
    floor = kernel.floor(gpu)
    row = {
        "GPU": gpu.name,
        "model": model.name,
        "T": tokens,
        "kernel": kernel.name,
        "shape": kernel.shape,
        "MB": round(kernel.bytes / 1e6, 2),
        "GFLOP": round(kernel.flops / 1e9, 2),
        "bound": "compute" if floor > kernel.bytes / gpu.bandwidth else "memory",
        "floor us": round(floor * 1e6, 2),
    }
    if not kernel.launches:
        return row
    first, seconds = kernel.launches[0], kernel.seconds(gpu)
    return {
        **row,
        "blocks": first.blocks,
        "occupancy %": round(100 * first.occupancy(gpu)),
        "waves": round(first.waves(gpu), 2),
        "predicted us": round(seconds * 1e6, 2),
        "floor/predicted %": round(100 * floor / seconds),
        "L2 TB/s": round(first.cache_bytes / first.seconds(gpu) / 1e12, 1),
    }


# ---- one layer of a training step ----------------------------------------------------------------

RANK = 16


def step_of(model: Model, tokens: int, block_size: int, gpu: Gpu) -> dict[str, Any]:
    """Seconds of the linear part of one layer: forward, backward, optimizer."""
    weights = sum(n * k for n, k in model.linears.values())
    product = 2.0 * tokens * weights / gpu.flops
    # Mixed precision: reads master, moments and gradient, writes master, moments and weight.
    full = 3 * product + weights * 28 / gpu.bandwidth
    # Down and up product, forward, to the input, and of both factors' gradients. Forward reads x and
    # adds to y, backward reads dy and x and adds to dx.
    lora = 2 * product
    for n, k in model.linears.values():
        flops = 6.0 * tokens * RANK * (n + k)
        moved = BF16 * tokens * (4 * k + 3 * n)
        lora += max(flops / gpu.flops, moved / gpu.bandwidth)
        lora += RANK * (n + k) * 28 / gpu.bandwidth
    added = sum(kernel.seconds(gpu) for kernel in step_kernels(model, tokens, block_size, gpu))
    optimizer = sum(kernel.seconds(gpu) for kernel in optimizer_kernels(model, block_size))
    smt = 2 * product + added + optimizer / model.layers
    return {
        "GPU": gpu.name,
        "model": model.name,
        "T": tokens,
        "forward + dX ms": round(2e3 * product, 3),
        "full ms": round(1e3 * full, 3),
        f"LoRA r={RANK} all ms": round(1e3 * lora, 3),
        "SMT 0.84 % qkv ms": round(1e3 * smt, 3),
        "SMT / full": round(smt / full, 3),
        "SMT / LoRA": round(smt / lora, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", nargs="+", default=list(GPUS), choices=list(GPUS))
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--block-size", type=int, default=256, choices=[32, 64, 128, 256])
    parser.add_argument(
        "--record", action="store_true", help="write benchmarks/records/roofline.json"
    )
    options = parser.parse_args()
    size = options.block_size
    rows, steps = [], []
    for gpu in (GPUS[name] for name in options.gpu):
        for model in (MODELS[name] for name in options.model):
            for tokens in options.tokens:
                kernels = [
                    *step_kernels(model, tokens, size, gpu),
                    *planning_kernels(model, tokens, size),
                    *dense_kernels(model, tokens),
                ]
                rows += [row_of(gpu, model, tokens, kernel) for kernel in kernels]
                steps.append(step_of(model, tokens, size, gpu))
            up = model.linears["up"]
            once = block_score(f"up: {up[0]}x{up[1]}", *up, size), *optimizer_kernels(model, size)
            rows += [row_of(gpu, model, "any", kernel) for kernel in once]
    print(f"kernels, L = {options.block_size}, bfloat16: {LABEL}")
    print_table(rows, COLUMNS)
    print(f"\nthe linear part of one layer, forward to optimizer: {LABEL}")
    print_table(steps, list(steps[0]))
    if options.record:
        sources = {name: GPUS[name].source for name in options.gpu}
        settings = {**vars(options), "label": LABEL, "sources": sources}
        record = save_record("roofline", settings, [*rows, *steps], row_a_line=True)
        print(f"record: {record}")


if __name__ == "__main__":
    main()
