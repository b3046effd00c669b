"""Budgets as text and numbers, and what they buy in a model."""

from __future__ import annotations

import pytest

import smt_ext
from models import mlp, tiny_llama
from smt_ext import PlanError
from smt_ext.planning.budget import Budget


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
    ["", "many", "5", "-1%", "0%", "101%", "0 blocks", "2.5 blocks", "3 blocks of model", 0, 1, 1.5, -1,
     True, None, "nan%", "--1%"],
)  # fmt: skip
def test_wrong_budgets_say_how_to_write_one(wrong):
    with pytest.raises(PlanError, match="expected"):
        Budget.parse(wrong)


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


@pytest.mark.parametrize("text", ["1234567 blocks", "0.123456789%", "12.3456789% of targets"])
def test_a_budget_as_text_is_the_same_budget(text):
    assert str(Budget.parse(text)) == text
    assert Budget.parse(str(Budget.parse(text))) == Budget.parse(text)


def test_a_budget_beyond_all_numbers_is_refused():
    with pytest.raises(PlanError, match="budget is"):
        Budget.parse("1" + "0" * 400 + " blocks")
