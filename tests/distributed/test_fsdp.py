"""FSDP2 (fully_shard): frozen weights and blocks are sharded, results and files stay the same."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

import smt_ext
from models import llama_plan, stack, tiny_llama, token_batch
from processes import run_ranks
from smt_ext import CheckpointError, PatchError, PlanError
from smt_ext.distributed import sharding
from smt_ext.nn.patching import plan_of

STEPS = 4
LR = 1e-2


def patched():
    # 80 and 96 rows over 2 or 3 ranks: shards begin within blocks of 32, which then straddle two.
    model = stack()
    return smt_ext.patch(model, llama_plan(model, ("gate_proj", "up_proj", "down_proj")))


def shard(model, mesh=None):
    for layer in model.layers if hasattr(model, "layers") else model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def make_optimizer(model, kind="SparseAdamW"):
    if kind.startswith("SparseAdamW"):
        target = kind.partition(" to ")[2] or "base"
        return smt_ext.SparseAdamW(
            model, lr=LR, max_grad_norm=0.5, weight_decay=5.0, decay_to=target
        )
    blocks = [module.blocks for module in smt_ext.smt_modules(model).values()]
    return getattr(torch.optim, kind)(blocks, lr=LR)


def part_of(batch, rank, world):
    """This rank's rows of the global batch."""
    count = len(batch) // world
    return batch[rank * count : (rank + 1) * count]


def train(model, optimizer, steps=range(STEPS), rank=0, world=1):
    for step in steps:
        x = torch.randn(12, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(part_of(x, rank, world)).backward()
        optimizer.step()


def patched_llama(dtype, **config):
    model = tiny_llama(dtype, **config)
    return smt_ext.patch(model, llama_plan(model, ("q_proj", "v_proj", "down_proj")))


def train_llama(model, optimizer, steps, rank, world, length=16):
    for step in range(steps):
        ids = part_of(token_batch(seed=step, batch=2, length=length)["input_ids"], rank, world)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def whole_state(model):
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def one_process(kind="SparseAdamW"):
    model = patched()
    train(model, make_optimizer(model, kind))
    return whole_state(model)


def assert_close(state, expected):
    for name, value in expected.items():
        # See test_ddp: sums differ in order alone, and Adam magnifies that by 1e8 at most.
        torch.testing.assert_close(state[name], value, rtol=0, atol=STEPS * LR * 1e-8)


def train_rank(rank, world, kind, hybrid):
    if world == 3:
        sharding._BUCKET_BYTES = 30_000  # blocks are gathered in several goes
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("r", "s")) if hybrid else None
    model = shard(patched(), mesh)
    optimizer = make_optimizer(model, kind)
    train(model, optimizer, rank=rank, world=world)
    modules = smt_ext.smt_modules(model)
    norm = optimizer.last_grad_norm if kind.startswith("SparseAdamW") else None
    consistent = all(torch.equal(m.read_blocks(), m.blocks.full_tensor()) for m in modules.values())
    sharded = all(isinstance(m.weight, DTensor) for m in modules.values())
    return whole_state(model), norm, consistent and sharded


@pytest.mark.parametrize(
    ("world", "kind", "hybrid"),
    [(2, "SparseAdamW", False), (3, "SparseAdamW", False), (2, "AdamW", False), (4, "AdamW", True),
     (4, "SparseAdamW to base", True), (4, "SparseAdamW to zero", True)],
)  # fmt: skip
def test_equals_one_process(tmp_path, world, kind, hybrid):
    ranks = run_ranks(train_rank, world, tmp_path / "ranks", world, kind, hybrid)
    expected = one_process(kind)
    for state, norm, consistent in ranks:
        assert consistent
        assert norm == ranks[0][1]
        for name in expected:
            assert torch.equal(state[name], ranks[0][0][name])
        assert_close(state, expected)
    base = whole_state(patched())
    assert max(float((expected[n] - base[n]).abs().max()) for n in base) > LR


def stochastic_rank(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = tiny_llama(torch.bfloat16)
    smt_ext.patch(model, llama_plan(model), block_dtype=torch.bfloat16)
    optimizer = smt_ext.SparseAdamW(shard(model, mesh), lr=LR, stochastic_rounding=True)
    train_llama(model, optimizer, 3, rank % 2, 2)
    modules = smt_ext.smt_modules(model).values()
    assert all(torch.equal(m.read_blocks(), m.blocks.full_tensor()) for m in modules)
    return whole_state(model)


def test_replicas_round_alike(tmp_path):
    first, *others = run_ranks(stochastic_rank, 4, tmp_path / "ranks")
    for other in others:
        for name, value in first.items():
            assert torch.equal(value, other[name])


def faulty_replica_rank(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = shard(patched(), mesh)
    optimizer = make_optimizer(model)
    x = torch.ones(4, 96, dtype=torch.float64)
    for step in range(2):
        optimizer.zero_grad()
        model(x * (1 + rank)).backward()
        parts = [m.blocks.grad.to_local() for m in smt_ext.smt_modules(model).values()]
        if step == 1 and rank == 3:
            next(part for part in parts if part.numel()).view(-1)[0] = float("nan")
        optimizer.step()
    return optimizer.skipped_steps, whole_state(model)


def test_a_nan_in_one_replica_of_a_shard_skips_the_step_on_all(tmp_path):
    for skipped, state in (ranks := run_ranks(faulty_replica_rank, 4, tmp_path / "ranks")):
        assert skipped == 1
        assert all(torch.equal(state[name], value) for name, value in ranks[0][1].items())


def live_bytes():
    """Bytes of all distinct storages of tensors that this process holds."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not issubclass(type(thing), DTensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def memory_rank(rank, world):
    model = patched_llama(torch.float32, num_hidden_layers=16, intermediate_size=640)
    weights = sum(p.nbytes for n, p in model.named_parameters() if not n.endswith(".blocks"))
    blocks = smt_ext.status(model).block_bytes
    original = sum(m.original_blocks.nbytes for m in smt_ext.smt_modules(model).values())
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    shard(model)
    optimizer = make_optimizer(model)
    peak = 0

    def look(module, args, output):
        nonlocal peak
        peak = max(peak, live_bytes())

    for module in model.model.layers[::5]:
        module.mlp.register_forward_hook(look)
    train_llama(model, optimizer, 2, rank, world, length=4)
    optimizer.zero_grad()
    held = [p.to_local().nbytes for p in model.parameters()]
    state = sum(
        value.to_local().nbytes
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, DTensor)
    )
    return {
        "weights": weights, "blocks": blocks, "original": original, "layer": layer,
        "held": sum(held), "state": state, "after": live_bytes(), "peak": peak,
    }  # fmt: skip


def test_no_rank_holds_a_full_copy(tmp_path):
    world = 2
    for rank in run_ranks(memory_rank, world, tmp_path / "ranks", world):
        share = (rank["weights"] + rank["blocks"]) / world
        # Uneven shards differ by less than a row or a block of each parameter.
        assert rank["held"] <= 1.1 * share
        assert rank["state"] <= 1.3 * 2 * rank["blocks"] / world
        # Between steps: shards, moments, and the blocks' original values.
        fixed = rank["held"] + rank["state"] + rank["original"]
        assert rank["after"] <= fixed + 64e3
        # In forward: one layer at work and one on its way, each with the buffer that it is gathered
        # in, and the activations of 4 tokens. That is less than one full copy of the weights.
        assert rank["peak"] <= fixed + 4 * rank["layer"] + 1e6
        assert rank["peak"] < 0.9 * rank["weights"]


def resume_rank(rank, world, folder, stop, start):
    """Steps [0, stop), save; or load and steps [start, STEPS)."""
    model = shard(patched())
    optimizer = make_optimizer(model)
    if start is None:
        train(model, optimizer, range(stop), rank, world)
        smt_ext.save_training_state(folder, model, optimizer, step=stop)
        smt_ext.save_blocks(model, f"{folder}-blocks")
        train(model, optimizer, range(stop, STEPS), rank, world)
    else:
        assert smt_ext.load_training_state(folder, model, optimizer) == {"step": start}
        train(model, optimizer, range(start, STEPS), rank, world)
    return whole_state(model)


def test_saves_and_resumes_also_at_another_world_size(tmp_path):
    folder = tmp_path / "state"
    whole = run_ranks(resume_rank, 2, tmp_path / "ranks", 2, str(folder), 2, None)[0]
    same = run_ranks(resume_rank, 2, tmp_path / "ranks", 2, str(folder), None, 2)[0]
    for name in whole:
        assert torch.equal(same[name], whole[name])
    other = run_ranks(resume_rank, 3, tmp_path / "ranks", 3, str(folder), None, 2)[0]
    assert_close(other, whole)

    # One process, not sharded, goes on from the same files.
    model = patched()
    optimizer = make_optimizer(model)
    assert smt_ext.load_training_state(folder, model, optimizer) == {"step": 2}
    train(model, optimizer, range(2, STEPS))
    assert_close(whole_state(model), whole)

    loaded = smt_ext.load_blocks(stack(), f"{folder}-blocks")
    assert plan_of(loaded).fingerprint == plan_of(model).fingerprint


def odds_and_ends_rank(rank, world, folder, wrap):
    model, base = patched_llama(torch.bfloat16), tiny_llama(torch.bfloat16)
    wrap(model)
    optimizer = make_optimizer(model)
    train_llama(model, optimizer, 2, rank, world)
    found = {}
    batch = token_batch(seed=7)
    with torch.no_grad():
        trained = model(**batch).logits
        # Parameters that this forward has left gathered must not be what is written into.
        with smt_ext.original_weights(model):
            found["original"] = torch.equal(model(**batch).logits, base(**batch).logits)
        found["back"] = torch.equal(model(**batch).logits, trained)

    # A step right after a forward without backward.
    optimizer.zero_grad()
    model(**token_batch(seed=rank)).loss.backward()
    with torch.no_grad():
        model(**batch)
    optimizer.step()
    modules = smt_ext.smt_modules(model)
    sharding.reshard(model)
    found["rounded"] = all(
        torch.equal(m.read_blocks(), m.blocks.full_tensor().bfloat16()) for m in modules.values()
    )
    found["moved"] = not torch.equal(model(**batch).logits, trained)

    # An inf on one rank skips the step on all.
    before = whole_state(model)
    optimizer.zero_grad()
    model(**token_batch(seed=rank)).loss.backward()
    grads = [m.blocks.grad.to_local() for m in modules.values()]
    if rank == 1:
        next(g for g in grads if g.numel()).view(-1)[0] = float("inf")
    optimizer.step()
    after = whole_state(model)
    found["skipped"] = optimizer.skipped_steps
    found["unchanged"] = all(torch.equal(before[n], after[n]) for n in before)

    # Files: blocks load into this sharded model, and the exported model is an ordinary one.
    smt_ext.save_blocks(model, f"{folder}/blocks")
    smt_ext.export(model, f"{folder}/export")
    fresh = shard(patched_llama(torch.bfloat16))
    smt_ext.load_blocks(fresh, f"{folder}/blocks")
    loaded = whole_state(fresh)
    found["loaded"] = all(torch.equal(loaded[n], after[n]) for n in after)

    with pytest.raises(PatchError, match=r"sharded.*cannot be unpatched"):
        smt_ext.unpatch(model)
    plain = tiny_llama()
    fully_shard(plain)
    with pytest.raises(PatchError, match=r"sharded already.*Patch first"):
        smt_ext.patch(plain, llama_plan(tiny_llama()))
    with pytest.raises(PlanError, match="sharded already"):
        smt_ext.make_plan(plain, [token_batch()], budget="4 blocks", block_size=32)
    assert isinstance(model, FSDPModule)
    assert dist.get_world_size() == world
    return found, after


# Alone, the root's group holds the patched layers, and stays gathered after forward.
@pytest.mark.parametrize("wrap", [shard, fully_shard], ids=["layers", "root alone"])
def test_reference_weights_skipped_steps_files_and_refusals(tmp_path, wrap):
    ranks = run_ranks(odds_and_ends_rank, 2, tmp_path / "ranks", 2, str(tmp_path), wrap)
    for found, _ in ranks:
        assert found == {
            "original": True, "back": True, "rounded": True, "moved": True, "skipped": 1,
            "unchanged": True, "loaded": True,
        }  # fmt: skip
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    for name, value in ranks[0][1].items():
        if not name.endswith(".blocks"):
            assert torch.equal(exported[name], value), name


def out_of_memory_rank(rank, folder):
    model = shard(patched_llama(torch.float32))
    cpu, calls = torch.Tensor.cpu, []

    def fails(tensor):
        calls.append(tensor)
        if len(calls) == 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return cpu(tensor)

    if rank == 0:
        torch.Tensor.cpu = fails
    try:
        with pytest.raises((CheckpointError, RuntimeError), match="not enough memory"):
            smt_ext.export(model, f"{folder}/export")
    finally:
        torch.Tensor.cpu = cpu
    left = list(Path(folder).glob("*export*"))
    dist.barrier()
    smt_ext.export(model, f"{folder}/export")  # no rank is left within a gather
    return left, len(calls) >= 2


def test_an_export_that_runs_out_of_memory_fails_on_all_ranks(tmp_path):
    ranks = run_ranks(out_of_memory_rank, 2, tmp_path / "ranks", str(tmp_path), seconds=60)
    assert ranks == [([], True), ([], False)]
    assert (tmp_path / "export" / "config.json").exists()


def variants_rank(rank, world):
    """Accumulation without reduction, recomputed activations, mixed precision, a copied model."""
    found = {}
    x = torch.randn(8, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mine = part_of(x, rank, world)

    whole = shard(patched())
    whole(mine).backward()
    parts = shard(copy.deepcopy(patched()))
    parts.set_requires_gradient_sync(False)
    (parts(mine[:2]) / 2).backward()
    parts.set_requires_gradient_sync(True)
    (parts(mine[2:]) / 2).backward()
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad.to_local(), a.grad.to_local(), rtol=0, atol=1e-14)
            found[name] = float(a.grad.full_tensor().abs().max())

    outputs = []
    for checkpointing in (False, True):
        model = patched_llama(torch.float32)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = make_optimizer(shard(model))
        train_llama(model.train(), optimizer, 2, rank, world)
        outputs.append(whole_state(model))
    found["recomputed"] = all(torch.equal(outputs[0][n], outputs[1][n]) for n in outputs[0])

    mixed = patched_llama(torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in (*mixed.model.layers, mixed):
        fully_shard(part, mp_policy=policy)
    optimizer = make_optimizer(mixed)
    before = whole_state(mixed)
    train_llama(mixed, optimizer, 2, rank, world)
    after = whole_state(mixed)
    modules = smt_ext.smt_modules(mixed)
    found["mixed"] = all(
        torch.equal(m.read_blocks(), m.blocks.full_tensor()) for m in modules.values()
    )
    found["moved"] = any(not torch.equal(before[n], after[n]) for n in before)
    return found


def test_accumulation_checkpointing_and_mixed_precision(tmp_path):
    for found in run_ranks(variants_rank, 2, tmp_path / "ranks", 2):
        assert found.pop("recomputed")
        assert found.pop("mixed")
        assert found.pop("moved")
        assert min(found.values()) > 1e-3, "gradients of all blocks, far from zero"


def fsdp1_rank(rank):
    model = FullyShardedDataParallel(patched(), use_orig_params=True, device_id=torch.device("cpu"))
    for kind in ("SparseAdamW", "AdamW"):
        optimizer = make_optimizer(model, kind)
        model(torch.randn(4, 96, dtype=torch.float64)).backward()
        with pytest.raises(PatchError, match=r"FSDP1.*fully_shard"):
            optimizer.step()
    return True


def test_fsdp1_is_refused_by_name(tmp_path):
    assert run_ranks(fsdp1_rank, 2, tmp_path / "ranks") == [True, True]
