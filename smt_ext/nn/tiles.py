"""Which small blocks of a weight the CUDA kernel multiplies together.

A tile of the kernel is 128 x 128 entries. Blocks of 16, 32 or 64 would leave most of it empty, or take
smaller tiles that read their operands over and over. So blocks of several block rows and block columns,
from any places, share a tile. Whole block columns fill theirs; those that would leave squares half empty
do better with tiles of 256 x 64 or 256 x 32 entries.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..ops import TILE_SHAPES

__all__ = ["tiles_of"]

# What a tile of a shape costs, by L, in blocks by themselves: what both read from L2, by which blocks by
# themselves are bound. A tile of 64 has 32 operations a byte, one of 32 (which a block of 16 takes too)
# has 16, and one of 128 has 64. Estimated for A100 and H100, not measured.
COST = {
    (128, 128): {64: 2.0, 32: 4.0, 16: 4.0},
    (256, 64): {64: 2.5, 32: 5.0, 16: 5.0},
    (256, 32): {32: 4.5, 16: 4.5},
}

Blocks = dict[int, dict[int, int]]  # line -> place in it -> number of the block


def tiles_of(
    rows: Sequence[int],
    slots: Sequence[int],
    block_size: int,
    *,
    tall: bool = True,
    first_rows: Sequence[int] = (0,),
) -> tuple[Tensor | None, Tensor | None]:
    """How :func:`smt_ext.ops.block_grad` shall take the blocks.

    Args:
        rows: (S,) block row of each block; slots: (S,) its position within the gathered columns.
        block_size: L.
        tall: whether tiles may be tall, which plain float32 products (without tf32) do not have.
        first_rows: the first row of each linear whose rows are counted, ascending: no tile holds
            blocks of two.

    Returns:
        tiles, lone: (n, r + c + r c) int32 with r and c the blocks down and across one of
        :data:`smt_ext.ops.TILE_SHAPES`, in each row r rows, c slots and the number of the block at each
        of their crossings, -1 for none; and (m,) int32, the numbers of the others. None and None where
        no blocks are to share a tile.
    """
    linears = [
        [s for s, row in enumerate(rows) if first <= row < end]
        for first, end in pairwise([*first_rows, max(rows, default=0) + 1])
    ]
    by_column = [_lines(slots, rows, numbers) for numbers in linears]
    by_row = [_lines(rows, slots, numbers) for numbers in linears]
    longest = max((len(places) for lines in by_column for places in lines.values()), default=0)
    most, tiles, down, across = 0.0, [], 0, 0
    for shape in TILE_SHAPES:
        if block_size not in COST[shape]:
            continue
        cost, (r, c) = COST[shape][block_size], (side // block_size for side in shape)
        if r > c and (not tall or longest < r):
            continue  # no column fills a tall tile
        gain, coverings = 0.0, []
        for columns, lines in zip(by_column, by_row, strict=True):
            found = [_cover(columns, c, r, cost)]
            if r == c:
                found.append([(b, a, n) for a, b, n in _cover(lines, r, c, cost)])
            gains = [sum(len(numbers) - cost for _, _, numbers in covering) for covering in found]
            gain += max(gains)
            coverings += found[gains.index(max(gains))]
        if gain > most:
            most, tiles, down, across = gain, coverings, r, c
    if not tiles:
        return None, None
    at = {(row, slot): s for s, (row, slot) in enumerate(zip(rows, slots, strict=True))}
    table = []
    for tile_slots, tile_rows, numbers in tiles:
        full_rows = [*tile_rows, *[-1] * (down - len(tile_rows))]
        full_slots = [*tile_slots, *[-1] * (across - len(tile_slots))]
        # A crossing may hold a block of another tile.
        own = set(numbers)
        crossings = (at.get((row, slot), -1) for row in full_rows for slot in full_slots)
        table.append([*full_rows, *full_slots, *(s if s in own else -1 for s in crossings)])
    together = {s for _, _, numbers in tiles for s in numbers}
    lone = [s for s in range(len(rows)) if s not in together]
    return torch.tensor(table, dtype=torch.int32), torch.tensor(lone, dtype=torch.int32)


def _lines(lines: Sequence[int], places: Sequence[int], numbers: Sequence[int]) -> Blocks:
    found: Blocks = {}
    for s in numbers:
        found.setdefault(lines[s], {})[places[s]] = s
    return found


def _cover(
    blocks: Blocks, most_lines: int, most_places: int, cost: float
) -> list[tuple[list[int], list[int], list[int]]]:
    """Tiles as (lines, places, numbers of blocks): greedy, from the line with the most blocks on."""
    # Places of a line as the bits of a number: overlaps of two lines are what costs time here.
    left = {line: sum(1 << place for place in places) for line, places in sorted(blocks.items())}
    tiles = []
    while left:
        seed = max(left, key=lambda line: left[line].bit_count())
        own = left[seed]
        overlaps = {line: (own & bits).bit_count() for line, bits in left.items() if line != seed}
        others = heapq.nlargest(most_lines - 1, overlaps, key=overlaps.__getitem__)
        lines = sorted([seed, *others])
        counts: Counter[int] = Counter()
        for line in lines:
            counts.update(place for place in blocks[line] if left[line] >> place & 1)
        places = sorted(counts, key=lambda place: (-counts[place], place))
        for begin in range(0, len(places), most_places):
            some = sorted(places[begin : begin + most_places])
            if sum(counts[place] for place in some) <= cost:
                break  # the next ones hold fewer still
            numbers = [blocks[line][p] for line in lines for p in some if left[line] >> p & 1]
            tiles.append((lines, some, numbers))
            taken = sum(1 << place for place in some)
            for line in lines:
                left[line] &= ~taken
        # What of the other lines is in no tile may still find a place with others.
        del left[seed]
        left = {line: bits for line, bits in left.items() if bits}
    return tiles
