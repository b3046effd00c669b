"""Which units a budget buys: ranks, shares, whole columns and rows, ties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smt_ext import PlanError
from smt_ext.planning.budget import Budget, Scores
from smt_ext.planning.selection import ALLOCATIONS, UNITS, select_blocks

SHAPES = {"a.q_proj": (64, 96), "a.v_proj": (50, 64), "b.v_proj": (64, 64)}
WIDE = {"a.down_proj": (96, 256), "a.k_proj": (48, 96), "a.q_proj": (96, 96), "b.k_proj": (48, 96)}


def scores_of(seed=0, shapes=SHAPES, size=32):
    draw = np.random.default_rng(seed)
    return {
        name: Scores((n, k), size, draw.random((-(-n // size), -(-k // size))))
        for name, (n, k) in shapes.items()
    }


def chosen(layers):
    return {(name, block) for name, layer in layers.items() for block in layer.blocks}


def spent(layers):
    return sum(layer.num_parameters for layer in layers.values())


@pytest.mark.parametrize("count", [1, 2, 7, 14])
def test_a_number_of_blocks_takes_the_best_over_all_modules(count):
    scores = scores_of()
    layers = select_blocks(scores, Budget(count, "blocks"), model_parameters=10**6)
    ranked = sorted(
        ((-s.values[i], name, i) for name, s in scores.items() for i in np.ndindex(s.values.shape))
    )
    assert chosen(layers) == {(name, tuple(map(int, i))) for _, name, i in ranked[:count]}


def test_more_blocks_than_there_are_takes_all():
    layers = select_blocks(scores_of(), Budget(1000, "blocks"), model_parameters=10**6)
    assert sum(len(layer.blocks) for layer in layers.values()) == 6 + 4 + 4


@given(percent=st.floats(6, 100), seed=st.integers(0, 5))
def test_a_percentage_is_never_exceeded_and_is_used_up(percent, seed):
    total = sum(n * k for n, k in SHAPES.values())
    layers = select_blocks(scores_of(seed), Budget(percent, "targets"), model_parameters=10 * total)
    limit = total * percent / 100
    assert spent(layers) <= limit
    # What is left buys none of the blocks that are left.
    left = [
        s_area
        for name, s in scores_of(seed).items()
        for r, c in np.ndindex(s.values.shape)
        if (name, (r, c)) not in chosen(layers)
        and (s_area := layers[name].area((r, c))) <= limit - spent(layers) - 1
    ]
    assert not left


def test_a_ragged_block_is_priced_by_what_it_holds():
    # The only block that 600 parameters buy is a lower edge, 18 x 32.
    layers = select_blocks(scores_of(), Budget.parse("0.06%"), model_parameters=10**6)
    ((name, (row, _)),) = chosen(layers)
    assert (name, row, spent(layers)) == ("a.v_proj", 1, 18 * 32)


def test_equal_scores_go_by_name_row_and_column():
    flat = {
        name: Scores(s.shape, s.block_size, np.ones_like(s.values))
        for name, s in reversed(scores_of().items())
    }
    layers = select_blocks(flat, Budget(8, "blocks"), model_parameters=10**6)
    assert layers["a.q_proj"].blocks == ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2))
    assert layers["a.v_proj"].blocks == ((0, 0), (0, 1))
    assert layers["b.v_proj"].blocks == ()


def test_shares_split_the_budget_by_kind():
    layers = select_blocks(
        scores_of(), Budget(6, "blocks"), model_parameters=10**6, allocation={"v_proj": 0.5}
    )
    assert len(layers["a.q_proj"].blocks) == 3
    assert len(layers["a.v_proj"].blocks) + len(layers["b.v_proj"].blocks) == 3
    only = select_blocks(
        scores_of(), Budget(4, "blocks"), model_parameters=10**6, allocation={"v_proj": 1.0}
    )
    assert not only["a.q_proj"].blocks


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"k_proj": 0.5}, "share for 'k_proj': the targets are q_proj, v_proj"),
        ({"v_proj": 1.5}, "'v_proj' is 1.5, expected 0 to 1"),
        ({"v_proj": -0.5}, "expected 0 to 1"),
        ({"v_proj": 0.8, "q_proj": 0.5}, "shares sum to 1.3"),
    ],
)
def test_wrong_shares(shares, message):
    with pytest.raises(PlanError, match=message):
        select_blocks(scores_of(), Budget(6, "blocks"), model_parameters=10**6, allocation=shares)


def test_a_budget_too_small_says_what_a_block_costs():
    with pytest.raises(PlanError, match=r"buys no block: the smallest has 576 parameters, 0.0576%"):
        select_blocks(scores_of(), Budget(0.05, "model"), model_parameters=10**6)


def test_scores_must_be_finite():
    scores = scores_of()
    scores["a.v_proj"].values[0, 0] = np.nan
    with pytest.raises(PlanError, match=r"scores of 'a.v_proj' are not finite"):
        select_blocks(scores, Budget(1, "blocks"), model_parameters=10**6)


def test_an_unknown_allocation():
    with pytest.raises(PlanError, match="'even', expected one of global, uniform, dims, or shares"):
        select_blocks(scores_of(), Budget(1, "blocks"), model_parameters=1, allocation="even")


def test_an_unknown_unit():
    with pytest.raises(PlanError, match="'head', expected one of block, column, row"):
        select_blocks(scores_of(), Budget(1, "blocks"), model_parameters=1, unit="head")


def whole_units(layer, unit):
    """The columns or rows that a layer's blocks make up; fails where one is not whole."""
    axis, length = (1, layer.grid[0]) if unit == "column" else (0, layer.grid[1])
    indices = [block[axis] for block in layer.blocks]
    assert all(indices.count(index) == length for index in indices)
    return sorted(set(indices))


@pytest.mark.parametrize("unit", ["column", "row"])
def test_the_best_units_are_those_of_the_highest_mean(unit):
    scores = scores_of(shapes=WIDE)  # units of two to eight blocks
    axis = 0 if unit == "column" else 1
    ranked = sorted(
        (-value, name, index)
        for name, s in scores.items()
        for index, value in enumerate(s.values.mean(axis))
    )
    blocks = {name: s.values.shape[axis] for name, s in scores.items()}
    count = sum(blocks[name] for _, name, _ in ranked[:3])
    layers = select_blocks(scores, Budget(count, "blocks"), model_parameters=10**6, unit=unit)
    found = {(name, i) for name, layer in layers.items() for i in whole_units(layer, unit)}
    assert found == {(name, index) for _, name, index in ranked[:3]}


@given(
    percent=st.floats(5, 100), seed=st.integers(0, 3), unit=st.sampled_from(UNITS),
    allocation=st.sampled_from([*ALLOCATIONS, {"q_proj": 0.5}]), size=st.sampled_from([16, 32, 48]),
)  # fmt: skip
def test_no_unit_or_allocation_exceeds_the_budget(percent, seed, unit, allocation, size):
    scores = scores_of(seed, WIDE, size)
    total = sum(n * k for n, k in WIDE.values())
    settings = {"model_parameters": 10 * total, "allocation": allocation, "unit": unit}
    share = 0.5 if isinstance(allocation, dict) else 1.0  # a unit must fit into a half
    for budget, limit in (
        (Budget(percent, "targets"), total * percent / 100),
        (Budget(round(percent), "blocks"), None),
    ):
        bought = share * (budget.amount if limit is None else limit)
        if bought < (16 if limit is None else 96 * 48):
            continue  # may buy nothing
        layers = select_blocks(scores, budget, **settings)
        for layer in layers.values():
            if unit != "block":
                whole_units(layer, unit)
        blocks = sum(len(layer.blocks) for layer in layers.values())
        assert spent(layers) <= limit if limit is not None else blocks <= budget.amount
        backwards = {name: scores[name] for name in reversed(scores)}
        assert chosen(select_blocks(backwards, budget, **settings)) == chosen(layers)


@pytest.mark.parametrize(("allocation", "weight"), [("uniform", np.prod), ("dims", sum)])
@pytest.mark.parametrize("unit", UNITS)
def test_shares_are_met_to_one_unit(allocation, weight, unit):
    scores = scores_of(0, WIDE, 16)
    layers = select_blocks(
        scores, Budget(40, "targets"), model_parameters=10**6, allocation=allocation, unit=unit
    )
    total = 0.4 * sum(n * k for n, k in WIDE.values())
    whole = sum(weight(shape) for shape in WIDE.values())
    for name, (n, k) in WIDE.items():
        one = {"block": 16 * 16, "column": 16 * n, "row": 16 * k}[unit]
        share = total * weight(WIDE[name]) / whole
        assert abs(layers[name].num_parameters - share) <= one
    # Nothing that is left would buy another unit.
    smallest = {"block": 256, "column": 16 * 48, "row": 16 * 96}[unit]
    assert total - spent(layers) < smallest


def test_the_two_shares_differ():
    """By entries the widest matrix gets more than by dimensions."""
    counts = [
        len(
            select_blocks(
                scores_of(0, WIDE, 16), Budget(50, "blocks"), model_parameters=10**6,
                allocation=allocation,
            )["a.down_proj"].blocks
        )
        for allocation in ("uniform", "dims")
    ]  # fmt: skip
    assert counts == [29, 21]


@pytest.mark.parametrize("allocation", ["uniform", "dims"])
def test_every_module_gets_a_unit_before_one_gets_its_second(allocation):
    # By size k_proj's share of 5 blocks would be half a block.
    scores = scores_of(0, WIDE, 16)
    layers = select_blocks(
        scores, Budget(5, "blocks"), model_parameters=10**6, allocation=allocation
    )
    assert sorted(len(layer.blocks) for layer in layers.values()) == [1, 1, 1, 2]
    assert len(layers["a.down_proj"].blocks) == 2
    for name, layer in layers.items():
        best = np.unravel_index(scores[name].values.argmax(), scores[name].values.shape)
        assert tuple(map(int, best)) in layer.blocks


def test_where_not_all_can_have_one_the_best_do():
    scores = scores_of(0, WIDE, 16)
    layers = select_blocks(scores, Budget(2, "blocks"), model_parameters=10**6, allocation="dims")
    best = sorted(scores, key=lambda name: -scores[name].values.max())[:2]
    assert [name for name in WIDE if layers[name].blocks] == [n for n in WIDE if n in best]


def test_equal_scores_go_by_name_and_index_in_every_unit():
    flat = {
        name: Scores(s.shape, s.block_size, np.ones_like(s.values))
        for name, s in reversed(scores_of(shapes=WIDE).items())
    }
    for unit in ("column", "row"):
        layers = select_blocks(
            flat, Budget(20, "blocks"), model_parameters=10**6, unit=unit, allocation="uniform"
        )
        assert all(whole_units(layer, unit)[0] == 0 for layer in layers.values())


def test_a_budget_below_a_column_says_what_one_costs():
    with pytest.raises(
        PlanError, match=r"buys no block column: the smallest has 1,600 parameters in 2 blo"
    ):
        select_blocks(scores_of(), Budget(1, "blocks"), model_parameters=10**6, unit="column")
