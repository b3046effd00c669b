"""Planning on several ranks: one plan, from all ranks' batches; no rank is left waiting."""

from __future__ import annotations

import pytest
import torch

import smt_ext
from models import tiny_llama, token_batch
from processes import run_ranks
from smt_ext import DataError, PlanError

SETTINGS = {"budget": "50% of targets", "block_size": 32, "progress": False}


def plan_rank(rank, metric, counts):
    first = sum(counts[:rank])
    batches = [token_batch(seed=seed) for seed in range(first, first + counts[rank])]
    return smt_ext.make_plan(tiny_llama(), batches, metric=metric, **SETTINGS).to_json()


@pytest.mark.parametrize("metric", ["mean_abs", "abs_mean", "l2", "activation", "wanda", "random"])
def test_every_rank_gets_the_plan_of_all_batches(tmp_path, metric):
    counts = (3, 1)  # ranks need not have the same number
    plans = run_ranks(plan_rank, 2, tmp_path / "ranks", metric, counts)
    batches = [token_batch(seed=seed) for seed in range(4)]
    alone = smt_ext.make_plan(tiny_llama(), batches, metric=metric, **SETTINGS)
    assert plans[0] == plans[1]
    plan = smt_ext.BlockPlan.from_json(plans[0])
    assert plan == alone
    assert plan.provenance["num_batches"] == 4
    assert len(plan.input_groups) > 0


def test_a_rank_without_batches_takes_part(tmp_path):
    plans = run_ranks(plan_rank, 2, tmp_path / "ranks", "mean_abs", (0, 2))
    alone = smt_ext.make_plan(tiny_llama(), [token_batch(seed=s) for s in range(2)], **SETTINGS)
    assert [smt_ext.BlockPlan.from_json(plan) for plan in plans] == [alone, alone]


def fail_rank(rank):
    """What each rank is told when rank 1 fails, when none has a batch, and when arguments differ."""
    told = []
    batch = token_batch()
    broken = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    for batches, settings in (
        ([broken] if rank == 1 else [batch], SETTINGS),
        ([], SETTINGS),
        ([batch], {**SETTINGS, "block_size": 32 + 16 * rank}),
    ):
        try:
            smt_ext.make_plan(tiny_llama(), batches, **settings)
        except (DataError, PlanError) as error:
            told.append(f"{type(error).__name__}: {error}")
    # Alone, one rank may do as it likes.
    if rank == 0:
        smt_ext.make_plan(tiny_llama(), [batch], distributed=False, **SETTINGS)
    return told


def test_errors_are_raised_on_all_ranks(tmp_path):
    first, second = run_ranks(fail_rank, 2, tmp_path / "ranks")
    assert first[0].startswith("PlanError: failed on rank 1: DataError: batch 0 has no label")
    assert second[0].startswith("DataError: batch 0 has no label")
    for told in (first, second):
        assert told[1].startswith("DataError: planning saw no batch")
        assert "distributed=False" in told[2]
