"""What one rank may ask of a sharded model by itself starts no collective: others may be elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import smt_ext
from models import llama_plan, stack
from processes import run_ranks
from smt_ext import PatchError
from smt_ext.distributed import sharding

X = torch.randn(4, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def patched():
    model = stack()
    return smt_ext.patch(model, llama_plan(model, ("gate_proj", "up_proj", "down_proj")))


def shard(model):
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def blocks_of(model):
    return [module.blocks for module in smt_ext.smt_modules(model).values()]


@torch.no_grad()
def halve(model):
    for blocks in blocks_of(model):
        blocks.mul_(0.5)


def state_of_one(model, rank):
    """The state dict, asked for by the last rank only: of three, the one that owns no block."""
    if rank == dist.get_world_size() - 1:
        assert all(not sharding.local(b.detach()).numel() for b in blocks_of(model))
        model.state_dict()
    dist.barrier()


def whole(model):
    return {n: sharding.full(v).detach().clone() for n, v in model.state_dict().items()}


def alone_rank(rank):
    model = shard(copy.deepcopy(patched()))
    state_of_one(model, rank)
    model.to(torch.float64)  # nothing to convert
    state_of_one(model, rank)
    blocks = blocks_of(model)
    for optimizer in (
        smt_ext.SparseAdamW(model),
        torch.optim.AdamW(blocks),
        torch.optim.SGD(blocks),
    ):
        model(X).backward()
        optimizer.step()
        state_of_one(model, rank)

    halve(model)
    if rank == 2:
        with pytest.raises(PatchError, match=r"'layers\.0\.gate_proj' have.*sync_weights"):
            model.state_dict()
        with pytest.raises(PatchError, match="sync_weights"):
            copy.copy(model.layers[0].gate_proj)
    dist.barrier()
    smt_ext.sync_weights(model)
    state_of_one(model, rank)

    # A conversion rounds the weight anew, from the blocks, when all ranks meet.
    model = shard(patched())
    halve(model)
    model.to(torch.float32)
    if rank == 1:
        with pytest.raises(PatchError, match="sync_weights"):
            model.state_dict()
    dist.barrier()
    model(X.float())
    state_of_one(model, rank)
    return whole(model)


def test_state_dicts_of_one_rank(tmp_path):
    expected = patched()
    halve(expected)
    state = expected.float().state_dict()
    for found in run_ranks(alone_rank, 3, tmp_path):
        assert all(torch.equal(found[name], value) for name, value in state.items())


def shard_root(model):
    return fully_shard(model)


def shard_ahead(model):
    shard(model).set_modules_to_forward_prefetch([model.layers[0]])
    return model


def before_rank(rank, wrap):
    """Blocks or weights that change between the last write and fully_shard."""
    found = []
    for change in CHANGES:
        for looks in (True, False):
            model = patched()
            change(model)
            wrap(model)
            if looks and change is nothing:
                model.state_dict()
            elif looks and rank == 0:
                with pytest.raises(PatchError, match="sync_weights"):
                    model.state_dict()
            losses = []
            for step in range(3):
                loss = model(X)
                losses.append(loss.item())
                if step:
                    loss.backward()
            grads = [sharding.full(b.grad) for b in blocks_of(model)]
            assert all(torch.equal(sharding.full(m.blocks), m.read_blocks())
                       for m in smt_ext.smt_modules(model).values())  # fmt: skip
            found.append((losses, grads))
    return found


def nothing(model):
    pass


@torch.no_grad()
def forget(model):
    """Weights that have lost the blocks' values."""
    for module in smt_ext.smt_modules(model).values():
        module.weight.zero_()


CHANGES = (nothing, halve, forget)


@pytest.mark.parametrize("wrap", [shard, shard_root, shard_ahead])
def test_changes_before_sharding_reach_forward_and_backward(tmp_path, wrap):
    expected = []
    for change in CHANGES:
        model = patched()
        change(model)
        loss = model(X)
        (2 * loss).backward()
        expected += [(loss.item(), [b.grad for b in blocks_of(model)])] * 2
    for ranks in run_ranks(before_rank, 2, tmp_path, wrap):
        for (losses, grads), (loss, wanted) in zip(ranks, expected, strict=True):
            assert losses == pytest.approx([loss] * 3, rel=1e-12)
            torch.testing.assert_close(grads, wanted, rtol=1e-9, atol=1e-12)
