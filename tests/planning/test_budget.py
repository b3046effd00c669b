"""What a budget buys: percentages, blocks, quotas, uniform shares, ties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import smt_ext
from models import mlp, tiny_llama
from smt_ext import PlanError
from smt_ext.planning.budget import Budget, Scores, select_blocks

SHAPES = {"a.q_proj": (64, 96), "a.v_proj": (50, 64), "b.v_proj": (64, 64)}


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


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("0.84%", 0.84, "model"), ("0.84 % of model", 0.84, "model"), ("2% of targets", 2, "targets"),
        ("276 blocks", 276, "blocks"), ("1 block", 1, "blocks"), (0.0084, 0.84, "model"),
        ("1e-1%", 0.1, "model"),
    ],
)  # fmt: skip
def test_budgets_are_read(text, amount, unit):
    budget = Budget.parse(text)
    assert (budget.amount, budget.unit) == (pytest.approx(amount), unit)
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    "wrong",
    ["", "many", "5", "-1%", "0%", "101%", "0 blocks", "2.5 blocks", "3 blocks of model", 0, 1.5, -1,
     True, None, "nan%", "--1%"],
)  # fmt: skip
def test_wrong_budgets_say_how_to_write_one(wrong):
    with pytest.raises(PlanError, match="expected"):
        Budget.parse(wrong)


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


def test_uniform_gives_every_module_its_share():
    layers = select_blocks(
        scores_of(), Budget(50, "targets"), model_parameters=10**6, allocation="uniform"
    )
    for name, (n, k) in SHAPES.items():
        assert 0.5 * n * k - 32 * 32 < layers[name].num_parameters <= 0.5 * n * k


def test_quotas_split_the_budget_by_kind():
    layers = select_blocks(
        scores_of(), Budget(6, "blocks"), model_parameters=10**6, quotas={"v_proj": 0.5}
    )
    assert len(layers["a.q_proj"].blocks) == 3
    assert len(layers["a.v_proj"].blocks) + len(layers["b.v_proj"].blocks) == 3
    only = select_blocks(
        scores_of(), Budget(4, "blocks"), model_parameters=10**6, quotas={"v_proj": 1.0}
    )
    assert not only["a.q_proj"].blocks


@pytest.mark.parametrize(
    ("quotas", "message"),
    [
        ({"k_proj": 0.5}, "quota for 'k_proj': the targets are q_proj, v_proj"),
        ({"v_proj": 1.5}, "'v_proj' is 1.5, expected 0 to 1"),
        ({"v_proj": -0.5}, "expected 0 to 1"),
        ({"v_proj": 0.8, "q_proj": 0.5}, "quotas sum to 1.3"),
    ],
)
def test_wrong_quotas(quotas, message):
    with pytest.raises(PlanError, match=message):
        select_blocks(scores_of(), Budget(6, "blocks"), model_parameters=10**6, quotas=quotas)


def test_a_budget_too_small_says_what_a_block_costs():
    with pytest.raises(PlanError, match=r"buys no block: the smallest has 576 parameters, 0.0576%"):
        select_blocks(scores_of(), Budget(0.05, "model"), model_parameters=10**6)


def test_scores_must_be_finite():
    scores = scores_of()
    scores["a.v_proj"].values[0, 0] = np.nan
    with pytest.raises(PlanError, match=r"scores of 'a.v_proj' are not finite"):
        select_blocks(scores, Budget(1, "blocks"), model_parameters=10**6)


def test_an_unknown_allocation():
    with pytest.raises(PlanError, match="'even', expected 'global' or 'uniform'"):
        select_blocks(scores_of(), Budget(1, "blocks"), model_parameters=1, allocation="even")


def test_percent_of_the_model_counts_all_its_parameters():
    model = tiny_llama()
    plan = smt_ext.make_plan(model, budget="2%", metric="weight", block_size=16)
    total = sum(p.numel() for p in model.parameters())
    assert 0.02 * total - 256 < plan.num_parameters <= 0.02 * total
    assert plan.provenance["percent_of_model"] == pytest.approx(
        100 * plan.num_parameters / total, abs=1e-6
    )


def test_one_kind_alone_is_one_argument():
    for kind in ("q", "k", "v"):
        plan = smt_ext.make_plan(
            tiny_llama(), budget="2 blocks", metric="weight", block_size=16, targets=kind
        )
        assert {name.rpartition(".")[2] for name in plan.layers} == {f"{kind}_proj"}


def test_a_plan_by_weight_needs_no_batches():
    plan = smt_ext.make_plan(
        mlp(), budget="3 blocks", metric="weight", block_size=32, targets="all-linear"
    )
    assert plan.num_blocks == 3
    with pytest.raises(PlanError, match="metric 'mean_abs' needs batches"):
        smt_ext.make_plan(mlp(), budget="3 blocks", block_size=32, targets="all-linear")
