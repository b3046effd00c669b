"""Data parallel training: the same result as one process, and only block gradients travel."""

from __future__ import annotations

import json
import random
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import smt_ext
from models import llama_plan, stack, tiny_llama, token_batch
from processes import run_ranks
from smt_ext import CheckpointError, PatchError, PlanError
from smt_ext.nn import modules
from smt_ext.nn.modules import SMTLinear

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


def siblings_rank(rank, together, unused, **options):
    modules._gains_by_one_launch = lambda x: together  # as on CUDA
    model = patched()
    if unused:
        # A sibling that no forward calls, as in layers that share keys and values.
        for layer in model.layers:
            layer.forward = lambda x, layer=layer: (
                x + layer.down_proj(torch.tanh(layer.gate_proj(x)))
            )
    wrapped = DistributedDataParallel(model, **options)
    train(wrapped, make_optimizer(model, "SparseAdamW"), slice(4 * rank, 4 * rank + 4))
    grads = [module.blocks.grad for module in smt_ext.smt_modules(model).values()]
    return grads, model.state_dict()


@pytest.mark.parametrize("unused", [False, True])
def test_siblings_that_launch_together(tmp_path, unused):
    options = {"find_unused_parameters": unused}
    one, alone = (
        run_ranks(partial(siblings_rank, **options), 2, tmp_path / str(together), together, unused)
        for together in (True, False)
    )
    for (grads, state), (expected_grads, expected) in zip(one, alone, strict=True):
        for name, value in expected.items():
            assert torch.equal(state[name], value), name
        for mine, grad in zip(grads, expected_grads, strict=True):
            assert (mine is None) == (grad is None)
            if grad is not None:
                assert torch.equal(mine, grad)


def accumulate_rank(rank, in_place):
    model = patched()
    for module in smt_ext.smt_modules(model).values():
        module.accumulate_in_place = in_place
    wrapped = DistributedDataParallel(model)
    x = torch.randn(4, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    with wrapped.no_sync():
        wrapped(x[:2]).backward()
    wrapped(x[2:]).backward()
    return [module.blocks.grad for module in smt_ext.smt_modules(model).values()]


def test_gradients_accumulated_in_place_are_averaged_too(tmp_path):
    first, second = run_ranks(accumulate_rank, 2, tmp_path / "in_place", True)
    usual, _ = run_ranks(accumulate_rank, 2, tmp_path / "usual", False)
    for mine, other, expected in zip(first, second, usual, strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-15)


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
    return all(type(module) is not SMTLinear for module in model.modules())


def test_wrapping_before_patching_is_refused(tmp_path):
    assert run_ranks(wrap_then_patch, 1, tmp_path / "ranks") == [True]


def dropout_run(wrapped, optimizer, steps):
    """Losses of a rank: every rank has the same tokens, and random numbers of its own."""
    losses = []
    for step in steps:
        noise = 1 + 0.1 * random.random() + 0.1 * np.random.rand()
        loss = wrapped(**token_batch(step)).loss * noise
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def resume_rank(rank, folder, resumes):
    seed = 10 * resumes + rank
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    before = torch.get_rng_state()
    model = tiny_llama(attention_dropout=0.2)
    model = smt_ext.patch(model, llama_plan(model)).train()
    torch.set_rng_state(before)  # tiny_llama has set the same seed on all ranks
    wrapped = DistributedDataParallel(model)
    optimizer = smt_ext.SparseAdamW(model, lr=LR)
    told = ""
    if resumes:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert smt_ext.load_training_state(folder, model, optimizer) == {"step": 2}
        told = "; ".join(str(w.message) for w in caught)
        own = torch.equal(torch.get_rng_state(), before)
    else:
        dropout_run(wrapped, optimizer, range(2))
        smt_ext.save_training_state(folder, wrapped, optimizer, step=2)
        own = False
    return dropout_run(wrapped, optimizer, range(2, STEPS)), model.state_dict(), told, own


def test_dropout_resumes_bit_exact_on_every_rank(tmp_path):
    folder = str(tmp_path / "state")
    straight = run_ranks(resume_rank, 2, tmp_path / "ranks", folder, False)
    again = run_ranks(resume_rank, 2, tmp_path / "ranks", folder, True)
    assert straight[0][0] != straight[1][0], "the ranks' random numbers differ"
    for (losses, state, _, _), (same_losses, same, told, _) in zip(straight, again, strict=True):
        assert same_losses == losses
        assert told == ""
        for name, value in state.items():
            assert torch.equal(same[name], value), name

    # More ranks: the third keeps the random state that it has. Rank 0 says so.
    three = run_ranks(resume_rank, 3, tmp_path / "ranks", folder, True)
    assert [own for *_, own in three] == [False, False, True]
    assert "random states of 2 ranks, and 3 resume" in three[0][2]
    assert "The random states of ranks 2 to 2 stay as they are" in three[0][2]
    assert three[1][2] == three[2][2] == ""
    assert len({tuple(losses) for losses, *_ in three}) == 3
    (alone,) = run_ranks(resume_rank, 1, tmp_path / "ranks", folder, True)
    assert "random states of 2 ranks, and 1 resume" in alone[2]
    assert alone[0][0] == straight[0][0][0], "the first forward is that of rank 0"


def odd_states_rank(rank, folder):
    """A file with one random state, as an earlier version or one rank alone writes it; an error."""
    model = patched()
    optimizer = smt_ext.SparseAdamW(model, lr=LR)
    torch.manual_seed(rank)
    own = torch.get_rng_state()
    if rank == 0:
        smt_ext.save_training_state(f"{folder}/alone", model, optimizer, distributed=False)
    torch.distributed.barrier()
    torch.rand(3)
    moved = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        smt_ext.load_training_state(f"{folder}/alone", model, optimizer)
    assert torch.equal(torch.get_rng_state(), own if rank == 0 else moved)
    # Rank 0 alone writes, and its failure is everybody's: no rank waits for ever.
    with pytest.raises(CheckpointError, match=r"'state/extra/data' of type set") as told:
        smt_ext.save_training_state(f"{folder}/none", model, optimizer, data={1})
    return str(told.value)


def test_one_rank_may_save_alone_and_an_error_reaches_all(tmp_path):
    first, second = run_ranks(odd_states_rank, 2, tmp_path / "ranks", str(tmp_path))
    assert second == f"failed on rank 0: CheckpointError: {first}"
    assert not (tmp_path / "none").exists()
    with (tmp_path / "alone" / "training_state.json").open() as file:
        assert "random_of_ranks" not in dict(json.load(file)["state"]["map"])


def faulty_rank(rank, folder, agree):
    """A NaN that appears on one rank after the gradients were reduced."""
    model = patched()
    wrapped = DistributedDataParallel(model)
    group = torch.distributed.group.WORLD if agree else None
    optimizer = smt_ext.SparseAdamW(model, lr=LR, max_grad_norm=0.5, process_group=group)
    for step in range(3):
        optimizer.zero_grad()
        wrapped(torch.ones(4, 96, dtype=torch.float64) * (1 + rank + step)).backward()
        if step == 1 and rank == 1:
            next(iter(smt_ext.smt_modules(model).values())).blocks.grad[0, 3, 3] = float("nan")
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # no gradient anywhere: nothing to do, and nobody waits
    told = None
    try:
        smt_ext.save_training_state(folder, model, optimizer)
    except CheckpointError as error:
        told = str(error)
    return optimizer.skipped_steps, model.state_dict(), told


@pytest.mark.parametrize("agree", [True, False])
def test_a_nan_on_one_rank_alone_skips_the_step_on_all_or_is_named_when_saving(tmp_path, agree):
    (first, state, told), (second, other, told_too) = run_ranks(
        faulty_rank, 2, tmp_path / "ranks", str(tmp_path / "state"), agree
    )
    assert all(torch.equal(state[n], other[n]) for n in state) == agree
    assert all(torch.isfinite(value).all() for value in (*state.values(), *other.values()))
    if agree:
        assert (first, second, told, told_too) == (1, 1, None, None)
    else:
        assert (first, second) == (0, 1)
        assert "ranks have skipped different numbers of steps ([0, 1])" in told
        assert told == told_too
