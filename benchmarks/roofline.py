"""What the CUDA kernels can reach at best: predicted, not measured.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --gpu H100 --tokens 8192 --model Llama-3-8B

Per kernel, layer, number of tokens and GPU: bytes and operations, the floor (the larger of bytes over
bandwidth and operations over the tensor cores' rate, both from the data sheet, each operand moved
once), and what the launch leaves of it:

- a multiprocessor works through its share of the blocks, so that the busiest decides (waves), and too
  few blocks at once leave its tensor cores waiting (an estimate, that of schedule.cuh);
- how many blocks a multiprocessor holds is limited by registers too (make cuda-report);
- tensor-core kernels reach what mma.sync reaches on that GPU, not what wgmma does;
- what tiles read again comes from L2, whose bandwidth is finite;
- bandwidth needs bytes in flight (Little's law): blocks that fit on a multiprocessor at once, times
  what one of them asks for before it waits;
- splitting the tokens costs parts that are written and read again, and a second launch.

Not in it: clocks under load, instruction issue, everything else that only a measurement shows. Nothing
here has been compared with a GPU. Blocks of the plan are drawn at random.

    python benchmarks/roofline.py --schedules     block_grad before and after its tokens are split by the
                                                  busiest multiprocessor
    python benchmarks/roofline.py --columns       whole block columns by themselves and by tall tiles
    python benchmarks/roofline.py --siblings      q, k and v by a launch each and by one

The second table is the linear part of one layer in a training step, all seven linears: matrix products
at the data sheet's rate; full fine-tuning's dW and optimizer; LoRA on all seven, its extra passes at
their floor; SMT with the paper's budget (0.84 % of the model, in q, k and v), its kernels as predicted.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator
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
        l2_bandwidth: 5120 bytes a clock (A100 whitepaper; taken for H100 and H200 as well), on the RTX
            4090 64 bytes a clock and multiprocessor, at boost clocks, and of that three quarters.
        shared_bytes, threads: of a multiprocessor (CUDA C++ Programming Guide, compute capabilities).
    """

    name: str
    source: str
    multiprocessors: int
    flops: float
    mma_share: float
    bandwidth: float
    l2_bandwidth: float
    l2_bytes: int
    shared_bytes: int
    threads: int


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", "NVIDIA A100 80GB SXM data sheet; GA100 whitepaper",
            108, 312e12, 1.0, 2.039e12, 5.4e12, 40 << 20, 164 << 10, 2048),
        Gpu("H100", "NVIDIA H100 SXM data sheet; H100 whitepaper",
            132, 989e12, 0.63, 3.35e12, 6.7e12, 50 << 20, 228 << 10, 2048),
        Gpu("H200", "NVIDIA H200 SXM data sheet",
            132, 989e12, 0.63, 4.8e12, 6.7e12, 50 << 20, 228 << 10, 2048),
        Gpu("RTX 4090", "NVIDIA Ada GPU architecture whitepaper, appendix A",
            128, 165.2e12, 1.0, 1.008e12, 15.4e12, 72 << 20, 100 << 10, 1536),
    )
}  # fmt: skip

# From asking to receiving under load; microbenchmarks of these GPUs find 0.5 to 0.8 us.
MEMORY_LATENCY = 0.7e-6
LAUNCH_GAP = 2e-6  # between two launches that wait for each other
SHARED_BYTES_RESERVED = 1024  # a block, by the system (CUDA C++ Programming Guide)

# ---- the launchers' choices: tests/benchmarks/test_roofline.py holds them to csrc/kernels/cuda -----


@dataclass(frozen=True)
class Tile:
    """MmaTile of tile_product.cuh."""

    rows: int
    columns: int
    threads: int
    blocks: int  # of a multiprocessor at least, by __launch_bounds__
    registers: (
        int  # of a thread, given by eights: the most that make cuda-report shows (sm_80, sm_90)
    )

    @property
    def entries(self) -> int:
        return self.rows * self.columns

    @property
    def panel_bytes(self) -> int:
        """Of both operands."""
        return PANEL_TOKENS * (self.rows + self.columns) * BF16

    @property
    def shared_bytes(self) -> int:
        return STAGES * self.panel_bytes

    def resident(self, gpu: Gpu) -> int:
        """Blocks that a multiprocessor holds."""
        by_shared = gpu.shared_bytes // (self.shared_bytes + SHARED_BYTES_RESERVED)
        by_registers = REGISTERS // (self.registers * self.threads)
        return min(gpu.threads // self.threads, by_shared, by_registers, MOST_BLOCKS)


REGISTERS, MOST_BLOCKS = 65536, 32  # of a multiprocessor (16 or 24 blocks on some; never reached)
STAGES, PANEL_TOKENS = 3, 32
TILES = {
    128: Tile(128, 128, 128, 2, 256),
    64: Tile(64, 64, 128, 4, 120),
    32: Tile(32, 32, 32, 7, 144),
}
TALL_TILES = {64: Tile(256, 64, 256, 1, 176), 32: Tile(256, 32, 128, 1, 192)}  # by columns
LEAST_TOKENS, SPLIT_GRANULE = 128, 64  # of a split
PART_TOKENS = 256
PRODUCTS_OF_AN_ELEMENT = 92  # from L2, of an H100
ADD_THREADS = 256
ROW_THREADS, ROWS = 256, 4  # of the copying kernels
ADAMW_THREADS, ADAMW_CHUNK = 256, 4096
NORM_THREADS, NORM_CHUNK, NORM_UNROLL = 256, 16384, 4
SCORE_THREADS, SCORE_SMALL_THREADS, SCORE_LARGE, SCORE_UNROLL = 256, 64, 128, 4
BF16, F32 = 2, 4  # bytes


def busy(entries: int) -> float:
    """Blocks of such tiles from which on a multiprocessor's tensor cores are busy."""
    return 1.25 if entries >= 128 * 128 else 1.5 if entries >= 64 * 64 else 6.0


def tile_of(block_size: int) -> Tile:
    """The smallest tile that holds a block, at most the largest."""
    return TILES[128 if block_size > 64 else 64 if block_size > 32 else 32]


@dataclass(frozen=True)
class Split:
    """Tiles, each cut into ``splits`` blocks of ``tokens``."""

    tiles: int
    splits: int
    tokens: int

    @property
    def blocks(self) -> int:
        return self.tiles * self.splits

    @property
    def parts(self) -> int:
        return self.blocks if self.splits > 1 else 0


@dataclass(frozen=True)
class Schedule:
    """schedule.cuh: tiles of up to three levels, each cut finer than the one before."""

    levels: tuple[Split, ...]

    @property
    def tiles(self) -> int:
        return sum(level.tiles for level in self.levels)

    @property
    def blocks(self) -> int:
        return sum(level.blocks for level in self.levels)

    @property
    def parts(self) -> int:
        return sum(level.parts for level in self.levels)

    def busiest(self, entries: int, resident: int, multiprocessors: int) -> float:
        """Tokens that the busiest multiprocessor works off, waiting included."""
        shares = [-(-level.blocks // multiprocessors) for level in self.levels]
        top, left = self.levels[0], shares[0] % resident
        rest = list(zip(shares[1:], self.levels[1:], strict=True))
        longest = top.tokens if left else next((level.tokens for n, level in rest if n), 0)
        work = left * top.tokens + sum(n * level.tokens for n, level in rest)
        full = shares[0] // resident * max(resident, busy(entries)) * top.tokens
        return full + max(work, busy(entries) * longest)

    def cost(self, entries: int, resident: int, multiprocessors: int) -> float:
        cost = self.busiest(entries, resident, multiprocessors)
        if self.parts:
            share = -(-self.parts // multiprocessors)
            cost += share * PART_TOKENS + 300 * (128 * 128 // entries)
        return cost


def evenly(tiles: int, splits: int, tokens: int) -> Split:
    if splits == 1:
        return Split(tiles, 1, tokens)
    each = math.ceil(math.ceil(tokens / splits) / SPLIT_GRANULE) * SPLIT_GRANULE
    return Split(tiles, -(-tokens // each), each)


def schedules(tokens: int, tiles: int, resident: int, processors: int) -> Iterator[Schedule]:
    """Those that schedule_of of schedule.cuh considers, in its order."""
    most = max(1, tokens // LEAST_TOKENS)
    yield Schedule((Split(tiles, 1, tokens),))
    tops = [min(most, turn * processors // tiles) for turn in range(1, resident + 1)]
    for top in (*range(1, 9), *tops):
        if not 1 <= top <= most:
            continue
        yield Schedule((evenly(tiles, top, tokens),))
        whole = tiles * top // processors * processors // top
        rest = tiles - whole
        if not (whole and rest):
            continue
        first = evenly(whole, top, tokens)
        for turn, more in itertools.product((1, 2), (0, 1)):
            second = min(most, turn * processors // rest + more)
            if second <= top:
                continue
            yield Schedule((first, evenly(rest, second, tokens)))
            middle = rest * second // processors * processors // second
            last = rest - middle
            if middle and last and (third := min(most, processors // last)) > second:
                lower = evenly(middle, second, tokens), evenly(last, third, tokens)
                yield Schedule((first, *lower))


def schedule_of(tokens: int, tiles: int, tile: Tile, gpu: Gpu) -> Schedule:
    """What schedule_of of schedule.cuh chooses."""
    resident, processors = tile.resident(gpu), gpu.multiprocessors
    best, *others = schedules(tokens, tiles, resident, processors)
    least = best.cost(tile.entries, resident, processors)
    least -= min(least / 8, tokens / 2)
    for found in others:
        cost = found.cost(tile.entries, resident, processors)
        if found.parts <= processors * resident and cost < least:
            best, least = found, cost
    return best


def schedule_before(tokens: int, tiles: int, tile: Tile, gpu: Gpu) -> Schedule:
    """What was chosen before: as many equal splits as fit at once, of 512 tokens at least."""
    room = gpu.multiprocessors * tile.blocks
    splits = min(max(room // tiles, 1), max(1, tokens // 512))
    return Schedule((evenly(tiles, splits, tokens),))


# ---- kernels -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One launch: what it does in all, and what it is cut into.

    Attributes:
        bytes: moved from and to memory, each operand once.
        flops: on the tensor cores, padding of tiles included.
        cache_bytes: what the blocks ask of L2, operands counted as often as tiles read them.
        blocks, threads, shared_bytes: the launch configuration.
        most_resident: blocks that a multiprocessor holds.
        flight_bytes: what a block asks for before it waits.
        schedule, tile: of a product of tiles.
    """

    bytes: float
    flops: float
    cache_bytes: float
    blocks: int
    threads: int
    shared_bytes: int
    most_resident: int
    flight_bytes: float
    schedule: Schedule | None = None
    tile: Tile | None = None

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
        rate = gpu.flops * gpu.mma_share / gpu.multiprocessors
        computing = 0.0
        if self.schedule and self.tile:
            entries = self.tile.entries
            busiest = self.schedule.busiest(entries, self.resident(gpu), gpu.multiprocessors)
            # While all are at work they share L2, whose bytes may take longer than their products.
            # What the busiest does beyond its even share it does with L2 to itself.
            shared = min(busiest, self.flops / (2 * entries) / gpu.multiprocessors)
            computing = busiest * 2 * entries / rate
            from_cache = self.cache_bytes / gpu.l2_bandwidth
            computing += max(0.0, from_cache - shared * 2 * entries / rate)
        wave = self.resident(gpu) * gpu.multiprocessors
        waves, rest = divmod(self.blocks, wave)
        moving = waves * self._moving(wave, gpu) + self._moving(rest, gpu)
        return max(computing, moving, self.cache_bytes / gpu.l2_bandwidth)

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
        return sum(launch.seconds(gpu) for launch in self.launches) + LAUNCH_GAP * (
            len(self.launches) - 1
        )


def streaming(name: str, shape: str, size: float, blocks: int, threads: int, each: int) -> Kernel:
    """A kernel that moves ``size`` bytes and computes next to nothing; ``each``: of a thread, before
    it waits."""
    launch = Launch(size, 0.0, size, blocks, threads, 0, 2048 // threads, threads * each)
    return Kernel(name, shape, size, 0.0, (launch,))


def tile_product(
    tile: Tile, schedule: Schedule, tokens: int, gpu: Gpu, read: float, written: float
) -> Launch:
    """Tiles of dy^T x, as scheduled."""
    parts = schedule.parts * tile.entries * F32
    return Launch(
        read + written,
        2.0 * tokens * schedule.tiles * tile.entries,
        schedule.tiles * tokens * (tile.rows + tile.columns) * BF16 + written + parts,
        schedule.blocks,
        tile.threads,
        tile.shared_bytes,
        tile.resident(gpu),
        (STAGES - 1) * tile.panel_bytes,
        schedule,
        tile,
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
    shape: str,
    tokens: int,
    rows: int,
    columns: int,
    count: int,
    block_size: int,
    gpu: Gpu,
    choose: Callable[[int, int, Tile, Gpu], Schedule] = schedule_of,
) -> Kernel:
    """S blocks, each by itself, that read ``rows`` columns of dy and ``columns`` columns of x."""
    tile = tile_of(block_size)
    tiles = count * (-(-block_size // tile.rows)) ** 2
    schedule = choose(tokens, tiles, tile, gpu)
    entries = count * block_size**2
    return block_grad_by(shape, tokens, rows, columns, entries, tile, schedule, gpu)


def block_columns(
    shape: str, tokens: int, rows: int, columns: int, block_size: int, gpu: Gpu, *, tall: bool
) -> Kernel:
    """A whole block column of ``columns`` inputs: by tall tiles, or each of its blocks by itself."""
    count = -(-rows // block_size) * (columns // block_size)
    alone = block_grad(shape, tokens, rows, columns, count, block_size, gpu)
    if not tall:
        return alone
    tile, lone_tile = TALL_TILES[columns], tile_of(block_size)
    schedule, lone_schedule = (
        schedule_of(tokens, tiles, kind, gpu)
        for tiles, kind in ((-(-rows // tile.rows), tile), (count, lone_tile))
    )
    work, lone_work = (
        max(
            kind.entries * found.cost(kind.entries, kind.resident(gpu), gpu.multiprocessors),
            PRODUCTS_OF_AN_ELEMENT
            * found.tiles
            * tokens
            * (kind.rows + kind.columns)
            / gpu.multiprocessors,
        )
        for kind, found in ((tile, schedule), (lone_tile, lone_schedule))
    )
    if 5 * lone_work < 4 * work:  # too_few of block_grad.cu
        return alone
    return block_grad_by(shape, tokens, rows, columns, rows * columns, tile, schedule, gpu)


def block_grad_by(
    shape: str, tokens: int, rows: int, columns: int, entries: int,
    tile: Tile, schedule: Schedule, gpu: Gpu,
) -> Kernel:  # fmt: skip
    """``entries`` of the weight by these tiles; float32 out."""
    read = float(tokens * (rows + columns) * BF16)
    out = float(entries * F32)
    launches = [tile_product(tile, schedule, tokens, gpu, read, out)]
    if schedule.parts:
        split = sum(level.tiles for level in schedule.levels if level.splits > 1)
        pieces = tile.entries // (ADD_THREADS * 4)
        size = float(schedule.parts * tile.entries * F32)  # from L2
        launches.append(
            Launch(
                0.0,
                0.0,
                size,
                split * pieces,
                ADD_THREADS,
                0,
                2048 // ADD_THREADS,
                ADD_THREADS * 16,
            )
        )
    flops = 2.0 * tokens * entries
    return Kernel("block_grad", shape, read + out, flops, tuple(launches))


def block_score_fused(shape: str, tokens: int, n: int, k: int, block_size: int, gpu: Gpu) -> Kernel:
    """All blocks of dy^T x, reduced; planning. Small blocks share tiles."""
    tile, size = TILES[128], max(block_size, 128)
    tiles = -(-n // size) * -(-k // size) * (-(-size // tile.rows)) ** 2
    read = float(tokens * (n + k) * BF16)
    launch = tile_product(tile, Schedule((Split(tiles, 1, tokens),)), tokens, gpu, read, 0.0)
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
    rows = sum(len({row for row, _ in blocks}) for blocks in plan.values()) * block_size
    count = sum(map(len, plan.values()))
    shape = f"{' '.join(plan)}: {' + '.join(str(len(blocks)) for blocks in plan.values())} blocks"
    yield block_grad(shape, tokens, rows, union, count, block_size, gpu)


def planning_kernels(model: Model, tokens: int, block_size: int, gpu: Gpu) -> Iterator[Kernel]:
    for kind in ("v", "up"):
        n, k = model.linears[kind]
        yield block_score_fused(f"{kind}: {n}x{k}", tokens, n, k, block_size, gpu)


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


def schedule_rows(
    gpu: Gpu, counts: Iterable[int], tokens: Iterable[int]
) -> Iterator[dict[str, Any]]:
    """block_grad, L = 256: before and after its tokens are split by the busiest multiprocessor."""
    for t, count in itertools.product(tokens, counts):
        made = [
            block_grad("", t, 256 * count, 256 * count, count, 256, gpu, choose)
            for choose in (schedule_before, schedule_of)
        ]
        before, after = (kernel.seconds(gpu) for kernel in made)
        chosen = made[1].launches[0].schedule
        assert chosen is not None
        ideal = made[0].flops / (gpu.flops * gpu.mma_share)
        yield {
            "GPU": gpu.name, "T": t, "S": count, "tiles": 4 * count,
            "before us": round(1e6 * before, 1), "after us": round(1e6 * after, 1),
            "gain": round(before / after, 2),
            "schedule": " + ".join(f"{part.tiles}/{part.splits}" for part in chosen.levels),
            "parts": chosen.parts,
            "mma.sync %": round(100 * ideal / after),
        }  # fmt: skip


def column_rows(
    gpu: Gpu, models: Iterable[Model], tokens: Iterable[int]
) -> Iterator[dict[str, Any]]:
    """One whole block column of down_proj: its blocks by themselves, and tall tiles."""
    for model, t, (size, columns) in itertools.product(
        models, tokens, ((64, 64), (32, 64), (32, 32))
    ):
        n = model.linears["down"][0]
        before, after = (
            block_columns("", t, n, columns, size, gpu, tall=tall) for tall in (False, True)
        )
        seconds = before.seconds(gpu), after.seconds(gpu)
        yield {
            "GPU": gpu.name, "model": model.name, "T": t, "L": size, "columns": columns,
            "before MB": round(before.launches[0].cache_bytes / 1e6, 1),
            "after MB": round(after.launches[0].cache_bytes / 1e6, 1),
            "before us": round(1e6 * seconds[0], 1), "after us": round(1e6 * seconds[1], 1),
            "gain": round(seconds[0] / seconds[1], 2),
            "floor/after %": round(100 * after.floor(gpu) / seconds[1]),
        }  # fmt: skip


def sibling_rows(
    gpu: Gpu, counts: Iterable[int], tokens: Iterable[int]
) -> Iterator[dict[str, Any]]:
    """q, k and v with S blocks each, apart: a launch for each, and one for all."""
    for size, t, count in itertools.product((256, 64), tokens, counts):
        each, one = (
            block_grad("", t, size * n, size * n, n, size, gpu).seconds(gpu)
            for n in (count, 3 * count)
        )
        yield {
            "GPU": gpu.name, "L": size, "T": t, "S": count,
            "three us": round(3e6 * each, 1), "one us": round(1e6 * one, 1),
            "gain": round(3 * each / one, 2),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", nargs="+", default=list(GPUS), choices=list(GPUS))
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--block-size", type=int, default=256, choices=[32, 64, 128, 256])
    parser.add_argument(
        "--record", action="store_true", help="write benchmarks/records/roofline.json"
    )
    parser.add_argument("--schedules", action="store_true", help="block_grad, before and after")
    parser.add_argument("--columns", action="store_true", help="whole block columns, likewise")
    parser.add_argument("--siblings", action="store_true", help="q, k, v by three launches or one")
    options = parser.parse_args()
    if options.columns:
        print(f"block_grad of a whole block column of down_proj, bfloat16; MB through L2: {LABEL}")
        models = [MODELS[name] for name in options.model]
        for gpu in (GPUS[name] for name in options.gpu):
            rows = list(column_rows(gpu, models, options.tokens))
            print_table(rows, list(rows[0]))
        return
    if options.siblings:
        print(f"block_grad of q, k and v, S blocks each, bfloat16, columns apart: {LABEL}")
        for gpu in (GPUS[name] for name in options.gpu):
            rows = list(sibling_rows(gpu, (9, 34, 50, 67, 100), options.tokens))
            print_table(rows, list(rows[0]))
        return
    if options.schedules:
        counts = (9, 20, 34, 40, 50, 66, 67, 80, 100)
        print(f"block_grad, L = 256, bfloat16, columns apart: {LABEL}")
        for gpu in (GPUS[name] for name in options.gpu):
            rows = list(schedule_rows(gpu, counts, (512, 2048, *options.tokens)))
            print_table(rows, list(rows[0]))
        return
    size = options.block_size
    rows, steps = [], []
    for gpu in (GPUS[name] for name in options.gpu):
        for model in (MODELS[name] for name in options.model):
            for tokens in options.tokens:
                kernels = [
                    *step_kernels(model, tokens, size, gpu),
                    *planning_kernels(model, tokens, size, gpu),
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
