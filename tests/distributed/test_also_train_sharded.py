"""Parameters that train whole beside the blocks: sharded or replicated, as in one process."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import smt_ext
from models import llama_plan, stack
from processes import run_ranks

STEPS, LR = 3, 1e-2
BESIDE = ("layers.0.gate_proj.bias", "layers.2.gate_proj.bias", "head.bias")


def patched():
    model = stack()
    plan = llama_plan(model, ("gate_proj", "down_proj"))
    shapes = {name: tuple(model.get_parameter(name).shape) for name in BESIDE}
    return smt_ext.patch(model, dataclasses.replace(plan, also_train=shapes))


def train(model, optimizer, rank=0, world=1):
    for step in range(STEPS):
        x = torch.randn(12, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x[rank * 12 // world : (rank + 1) * 12 // world]).backward()
        optimizer.step()


def whole(model):
    named = model.named_parameters()
    return {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in named
    }


def optimizer_of(model):
    return smt_ext.SparseAdamW(model, lr=LR, also_lr=2 * LR, max_grad_norm=0.5)


def rank_of(rank, world, kind):
    model = patched()
    if kind == "ddp":
        inner = model
        model = DistributedDataParallel(model)
    else:
        for layer in model.layers:
            fully_shard(layer)
        inner = model = fully_shard(model)
    optimizer = optimizer_of(inner)
    train(model, optimizer, rank, world)
    trained = whole(inner)
    with smt_ext.original_weights(inner):
        x = torch.ones(2, 96, dtype=torch.float64)
        reference = inner(x)
        before = {n: p for n, p in whole(inner).items() if n in BESIDE}
    held = sum(optimizer.state[p]["exp_avg"].numel() for p in optimizer.param_groups[1]["params"])
    after = whole(inner)
    dist.barrier()
    return trained, before, after, reference.detach(), optimizer.last_grad_norm, held


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_equals_one_process(tmp_path, kind):
    base = {n: p.detach() for n, p in stack().named_parameters()}
    model = patched()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    expected = whole(model)
    for trained, before, after, reference, norm, held in run_ranks(rank_of, 2, tmp_path, 2, kind):
        assert norm == pytest.approx(optimizer.last_grad_norm, rel=1e-9)
        assert held == sum(base[name].numel() for name in BESIDE)
        for name, value in expected.items():
            # See test_ddp: sums differ in order alone, and Adam magnifies that by 1e8 at most.
            torch.testing.assert_close(trained[name], value, rtol=0, atol=STEPS * LR * 2e-8)
            assert torch.equal(after[name], trained[name])
        for name in BESIDE:
            assert not torch.equal(trained[name], base[name])
            assert torch.equal(before[name], base[name])
        x = torch.ones(2, 96, dtype=torch.float64)
        torch.testing.assert_close(reference, stack()(x).detach())
