"""Blocks that share a tile of the CUDA kernel: each is taken once, and tiles are full enough."""

from __future__ import annotations

import copy
import random
from bisect import bisect
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import smt_ext
from smt_ext import BlockPlan, LayerPlan
from smt_ext.nn.tiles import COST, tiles_of
from smt_ext.ops import TILE_SHAPES

TILE = 128
SIZES = [64, 32, 16]


def blocks_of(tiles: torch.Tensor, block_size: int) -> tuple[int, int]:
    """Blocks down and across a tile of this list, of which no two shapes have the same width."""
    shapes = [(rows // block_size, columns // block_size) for rows, columns in TILE_SHAPES]
    (found,) = [(r, c) for r, c in shapes if c and tiles.shape[1] == r + c + r * c]
    return found


def columns_read(tiles: torch.Tensor, block_size: int) -> int:
    """Columns of dy and x that the tiles read."""
    down, across = blocks_of(tiles, block_size)
    return int((tiles[:, : down + across] >= 0).sum()) * block_size


def slots_of(blocks: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    columns = sorted({column for _, column in blocks})
    return [row for row, _ in blocks], [columns.index(column) for _, column in blocks]


@given(
    size=st.sampled_from(SIZES),
    blocks=st.sets(st.tuples(st.integers(0, 12), st.integers(0, 9)), min_size=1, max_size=130),
)
def test_every_block_is_taken_once(size: int, blocks: set[tuple[int, int]]) -> None:
    rows, slots = slots_of(sorted(blocks))
    tiles, lone = tiles_of(rows, slots, size)
    if tiles is None:
        assert lone is None
        return
    assert lone is not None
    down, across = blocks_of(tiles, size)
    taken = lone.tolist()
    for line in tiles.tolist():
        tile_rows, tile_slots = line[:down], line[down : down + across]
        held = []
        for at, s in enumerate(line[down + across :]):
            if s >= 0:
                assert (rows[s], slots[s]) == (tile_rows[at // across], tile_slots[at % across])
                held.append(s)
        assert len(held) > COST[down * size, across * size][size]
        taken += held
    assert sorted(taken) == list(range(len(rows)))


@given(
    size=st.sampled_from(SIZES),
    blocks=st.sets(st.tuples(st.integers(0, 19), st.integers(0, 5)), min_size=1, max_size=120),
    firsts=st.sets(st.integers(1, 19), max_size=3),
)
def test_no_tile_holds_blocks_of_two_linears(
    size: int, blocks: set[tuple[int, int]], firsts: set[int]
) -> None:
    rows, slots = slots_of(sorted(blocks))
    first_rows = [0, *sorted(firsts)]
    tiles, lone = tiles_of(rows, slots, size, first_rows=first_rows)
    alone = [
        tiles_of(*zip(*own, strict=True), size)
        for first, end in pairwise([*first_rows, 20])
        if (own := [(r, s) for r, s in zip(rows, slots, strict=True) if first <= r < end])
    ]
    # One linear that has tiles is enough; one shape may then do for all.
    assert (tiles is None) == all(own is None for own, _ in alone)
    if tiles is None or lone is None:
        return
    down, across = blocks_of(tiles, size)
    taken = lone.tolist()
    for line in tiles.tolist():
        of = {bisect(first_rows, row) for row in line[:down] if row >= 0}
        assert len(of) == 1
        assert line[0] >= 0, "the first row says whose the tile is"
        taken += [s for s in line[down + across :] if s >= 0]
    assert sorted(taken) == list(range(len(rows)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("by_row", [False, True])
def test_whole_columns_and_rows_are_one_dense_product(size: int, by_row: bool) -> None:
    group, lines = TILE // size, random.Random(size).sample(range(40), 2 * TILE // size)
    blocks = sorted((i, line) for i in range(4 * group) for line in lines)
    rows, slots = slots_of(blocks)
    if by_row:
        rows, slots = slots, rows
    tiles, lone = tiles_of(rows, slots, size)
    assert tiles is not None
    assert lone is not None
    assert len(tiles) == 4 * 2
    assert (tiles >= 0).all()
    assert len(lone) == 0
    assert columns_read(tiles, size) == 8 * 2 * TILE


@pytest.mark.parametrize(
    ("size", "columns", "shape"),
    [(64, 1, (256, 64)), (32, 2, (256, 64)), (32, 1, (256, 32)), (16, 4, (256, 64)), (16, 2, (256, 32)),
     (64, 2, (128, 128)), (32, 4, (128, 128)), (16, 8, (128, 128)),
     (64, 3, (256, 64)), (64, 5, (128, 128)), (64, 31, (128, 128))],
)  # fmt: skip
def test_few_whole_columns_take_tall_tiles(size: int, columns: int, shape: tuple[int, int]) -> None:
    """Those that fit side by side read at most 1.3 times what a matrix product of the whole would."""
    rows, slots = slots_of([(i, 3 * j) for i in range(2048 // size) for j in range(columns)])
    tiles, lone = tiles_of(rows, slots, size)
    assert tiles is not None
    assert lone is not None
    assert blocks_of(tiles, size) == (shape[0] // size, shape[1] // size)
    assert (tiles >= 0).all()
    assert len(lone) == columns * size % shape[1] // size * (2048 // size)
    if columns * size == shape[1] < 128:
        assert columns_read(tiles, size) <= 1.3 * (2048 + columns * size)


def test_plain_float32_takes_no_tall_tiles() -> None:
    rows, slots = slots_of([(i, j) for i in range(128) for j in range(12)])
    tiles, _ = tiles_of(rows, slots, 16)
    squares, _ = tiles_of(rows, slots, 16, tall=False)
    assert tiles is not None
    assert squares is not None
    assert blocks_of(tiles, 16) == (16, 4)
    assert blocks_of(squares, 16) == (8, 8)


@pytest.mark.parametrize("size", SIZES)
def test_a_plan_with_strong_rows_and_columns_reads_little_more(size: int) -> None:
    """Scores as those of gradients: some inputs and some outputs matter, the rest is chance."""
    chance = random.Random(0)
    lines = 2048 // size
    row_of, column_of = ([chance.gauss(0, 1) for _ in range(lines)] for _ in range(2))
    scores = {
        (r, c): row_of[r] + column_of[c] + chance.gauss(0, 0.3)
        for r in range(lines) for c in range(lines)
    }  # fmt: skip
    blocks = sorted(sorted(scores, key=scores.__getitem__)[-(lines**2) // 10 :])
    rows, slots = slots_of(blocks)
    tiles, lone = tiles_of(rows, slots, size)
    assert tiles is not None
    assert lone is not None
    read = columns_read(tiles, size) + 2 * size * len(lone)
    # A dense product of as many entries, by tiles that are full; each block by itself.
    dense, alone = 2 * TILE * len(blocks) * size * size / TILE**2, 2 * size * len(blocks)
    assert read <= {64: 1.3, 32: 1.4, 16: 1.7}[size] * dense
    assert read < 0.7 * alone


def test_lone_blocks_and_other_sizes_stay_alone() -> None:
    diagonal = list(range(20))
    for size in (64, 32):
        assert tiles_of(diagonal, diagonal, size) == (None, None)
    for size in (17, 48, 96, 128, 256):
        assert tiles_of([0, 0, 1, 1], [0, 1, 0, 1], size) == (None, None)


def column_model() -> nn.Module:
    """Two whole block columns of one weight, and a block by itself."""
    model = nn.Sequential(nn.Linear(128, 96))
    blocks = tuple(sorted([*((row, col) for row in range(6) for col in (1, 4)), (3, 7)]))
    plan = BlockPlan(layers={"0": LayerPlan(shape=(96, 128), block_size=16, blocks=blocks)})
    smt_ext.patch(model, plan)
    return model


def test_a_layer_keeps_its_tiles_and_lets_them_go() -> None:
    model = column_model()
    before = set(dict(nn.Sequential(nn.Linear(128, 96)).named_buffers()))
    (module,) = smt_ext.smt_modules(model).values()
    assert module._block_tiles is None, "no kernel of a CPU asks for them"
    module.plan_tiles_()
    tiles, lone = module._block_tiles, module._lone_blocks
    assert tiles is not None
    assert lone is not None
    held = [s for s in tiles[:, 2 * TILE // module.block_size :].flatten().tolist() if s >= 0]
    assert sorted([*held, *lone.tolist()]) == list(range(13))
    assert not any("tiles" in key or "lone" in key for key in model.state_dict())
    copied = copy.deepcopy(model)
    assert set(dict(copied.named_buffers())) == set(dict(model.named_buffers()))
    smt_ext.unpatch(model)
    assert set(dict(model.named_buffers())) == before
