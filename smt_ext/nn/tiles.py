"""Which small blocks of a weight the CUDA kernel multiplies together.

A tile of the kernel is 128 x 128 entries. Blocks of 16, 32 or 64 would leave most of it empty, or take
smaller tiles that read their operands over and over. So blocks of up to 128 / L block rows and as many
block columns, from any places, share a tile. Whole block columns fill theirs.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["tiles_of"]

TILE = 128
# Blocks from which on one tile is cheaper than each by itself. By themselves they are bound by what
# they read from L2: a tile of 64 has 32 operations a byte, one of 32 (which a block of 16 takes too) has
# 16, and one of 128 has 64. Estimated for A100 and H100, not measured.
LEAST = {64: 3, 32: 5, 16: 5}

Blocks = dict[int, dict[int, int]]  # line -> place in it -> number of the block


def tiles_of(
    rows: Sequence[int], slots: Sequence[int], block_size: int
) -> tuple[Tensor | None, Tensor | None]:
    """How :func:`smt_ext.ops.block_grad` shall take the blocks.

    Args:
        rows: (S,) block row of each block; slots: (S,) its position within the gathered columns.
        block_size: L.

    Returns:
        tiles, lone: (n, 2 g + g g) int32 with g = 128 / L, in each row g rows, g slots and the number of
        the block at each of their crossings, -1 for none; and (m,) int32, the numbers of the others.
        None and None where no blocks are to share a tile.
    """
    if block_size not in LEAST:
        return None, None
    group = TILE // block_size
    by_column, by_row = _lines(slots, rows), _lines(rows, slots)
    columns, row_wise = (_cover(blocks, group, LEAST[block_size]) for blocks in (by_column, by_row))
    # The fuller covering: more blocks for each tile's worth of blocks by themselves.
    gains = [sum(len(tile[2]) - LEAST[block_size] + 1 for tile in c) for c in (columns, row_wise)]
    tiles = columns if gains[0] >= gains[1] else [(b, a, n) for a, b, n in row_wise]
    if not tiles:
        return None, None
    at = {(row, slot): s for s, (row, slot) in enumerate(zip(rows, slots, strict=True))}
    table = []
    for tile_slots, tile_rows, numbers in tiles:
        full_rows, full_slots = (
            [*part, *[-1] * (group - len(part))] for part in (tile_rows, tile_slots)
        )
        # A crossing may hold a block of another tile.
        own = set(numbers)
        crossings = (at.get((row, slot), -1) for row in full_rows for slot in full_slots)
        table.append([*full_rows, *full_slots, *(s if s in own else -1 for s in crossings)])
    together = {s for _, _, numbers in tiles for s in numbers}
    lone = [s for s in range(len(rows)) if s not in together]
    return torch.tensor(table, dtype=torch.int32), torch.tensor(lone, dtype=torch.int32)


def _lines(lines: Sequence[int], places: Sequence[int]) -> Blocks:
    found: Blocks = {}
    for s, (line, place) in enumerate(zip(lines, places, strict=True)):
        found.setdefault(line, {})[place] = s
    return found


def _cover(blocks: Blocks, group: int, least: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Tiles as (lines, places, numbers of blocks): greedy, from the line with the most blocks on."""
    # Places of a line as the bits of a number: overlaps of two lines are what costs time here.
    left = {line: sum(1 << place for place in places) for line, places in sorted(blocks.items())}
    tiles = []
    while left:
        seed = max(left, key=lambda line: left[line].bit_count())
        own = left[seed]
        overlaps = {line: (own & bits).bit_count() for line, bits in left.items() if line != seed}
        others = heapq.nlargest(group - 1, overlaps, key=overlaps.__getitem__)
        lines = sorted([seed, *others])
        counts: Counter[int] = Counter()
        for line in lines:
            counts.update(place for place in blocks[line] if left[line] >> place & 1)
        places = sorted(counts, key=lambda place: (-counts[place], place))
        for begin in range(0, len(places), group):
            some = sorted(places[begin : begin + group])
            if sum(counts[place] for place in some) < least:
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
