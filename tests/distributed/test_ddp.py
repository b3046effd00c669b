"""Data parallel training: the same result as one process, and only block gradients travel."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import smt_ext
from models import llama_plan, stack, tiny_llama, token_batch
from processes import run_ranks
from smt_ext import PatchError, PlanError

STEPS = 4
LR = 1e-2


def patched():
    model = stack()
    return smt_ext.patch(model, llama_plan(model, ("gate_proj", "up_proj", "down_proj")))


def train(model, optimizer, part=slice(None)):
    for step in range(STEPS):
        x = torch.randn(8, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x[part]).backward()
        optimizer.step()


def make_optimizer(model, kind):
    blocks = [module.blocks for module in smt_ext.smt_modules(model).values()]
    if kind == "SparseAdamW":
        return smt_ext.SparseAdamW(model, lr=LR, max_grad_norm=0.5)
    return getattr(torch.optim, kind)(blocks, lr=LR)


def train_rank(rank, kind):
    model = patched()
    wrapped = DistributedDataParallel(model)
    train(wrapped, make_optimizer(model, kind), slice(4 * rank, 4 * rank + 4))
    return model.state_dict()


@pytest.mark.parametrize("kind", ["SparseAdamW", "AdamW"])
def test_two_ranks_equal_one_process_with_the_doubled_batch(tmp_path, kind):
    ranks = run_ranks(train_rank, 2, tmp_path / "ranks", kind)
    model = patched()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, make_optimizer(model, kind))
    moved = 0.0
    for name, value in model.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        # The sums over the batch differ in order alone: 1e-16 each. Adam divides by the root of a
        # second moment, never less than 1e-8, so what a step moves differs by 1e-8 lr at most.
        torch.testing.assert_close(ranks[0][name], value, rtol=0, atol=STEPS * LR * 1e-8)
        moved = max(moved, float((value - before[name]).abs().max()))
    assert moved > LR


def count_rank(rank):
    model = patched()
    wrapped = DistributedDataParallel(model)
    reduced = []

    def hook(group, bucket):
        reduced.append(bucket.buffer().nbytes)
        return allreduce_hook(group, bucket)

    wrapped.register_comm_hook(None, hook)
    optimizer = smt_ext.SparseAdamW(model, lr=LR)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        train(wrapped, optimizer)
    events = {event.key for event in profiled.key_averages()}
    return sum(reduced), smt_ext.status(model).block_bytes, events


def test_only_block_gradients_travel(tmp_path):
    for reduced, block_bytes, events in run_ranks(count_rank, 2, tmp_path / "ranks"):
        assert reduced == STEPS * block_bytes
        # Beside gradients only DDP's own broadcast of buffers runs (the indices of the blocks).
        collectives = {event for event in events if event.startswith("c10d::")}
        assert collectives == {"c10d::allreduce_", "c10d::broadcast_"}


def wrap_then_patch(rank):
    model = DistributedDataParallel(tiny_llama())
    with pytest.raises(PatchError, match="Patch first, then wrap"):
        smt_ext.patch(model, llama_plan(model))
    with pytest.raises(PlanError, match="Plan and patch first"):
        smt_ext.make_plan(model, [token_batch()], budget="4 blocks", block_size=32)
    return all(type(module) is not smt_ext.SMTLinear for module in model.modules())


def test_wrapping_before_patching_is_refused(tmp_path):
    assert run_ranks(wrap_then_patch, 1, tmp_path / "ranks") == [True]
