"""Law 6: training that is stopped and resumed goes on bit for bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import smt_ext
from models import llama_plan, tiny_llama, token_batch
from smt_ext import CheckpointError, PatchError


def make(dtype, optimizer_of):
    model = tiny_llama(dtype, attention_dropout=0.1)
    smt_ext.patch(model, llama_plan(model))
    model.train()
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=12)
    return model, optimizer, scheduler


def sparse(model, **options):
    return smt_ext.SparseAdamW(model, lr=1e-2, weight_decay=0.01, max_grad_norm=1.0, **options)


def foreign(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def step(model, optimizer, scheduler, number):
    loss = model(**token_batch(number)).loss + 0.01 * random.random() + 0.01 * np.random.rand()
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("optimizer_of", [
    sparse,
    lambda m: sparse(m, master_dtype=torch.float32),
    lambda m: sparse(m, stochastic_rounding=True),
    foreign,
], ids=["SparseAdamW", "master", "stochastic", "torch.optim.AdamW"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stopped_at_any_step(tmp_path, dtype, optimizer_of):
    parts = make(dtype, optimizer_of)
    losses = []
    for number in range(6):
        smt_ext.save_training_state(tmp_path / str(number), *parts, step=number, note="x")
        losses.append(step(*parts, number))
    final = {k: v.clone() for k, v in parts[0].state_dict().items()}
    for number in (0, 1, 4):
        torch.manual_seed(99)
        random.seed(99)
        np.random.seed(99)
        again = make(dtype, optimizer_of)
        extra = smt_ext.load_training_state(tmp_path / str(number), *again)
        assert extra == {"step": number, "note": "x"}
        assert [step(*again, n) for n in range(number, 6)] == losses[number:]
        for name, value in again[0].state_dict().items():
            assert torch.equal(value, final[name]), name


def test_in_a_fresh_process_the_state_needs_no_pickle(tmp_path):
    parts = make(torch.float32, sparse)
    step(*parts, 0)
    smt_ext.save_training_state(tmp_path / "state", *parts)
    names = sorted(p.name for p in (tmp_path / "state").iterdir())
    assert names == ["smt_files.json", "training_state.json", "training_state.safetensors"]


def test_another_plan_or_base_is_refused_and_nothing_changes(tmp_path):
    parts = make(torch.float32, sparse)
    step(*parts, 0)
    smt_ext.save_training_state(tmp_path / "state", *parts)

    model = tiny_llama()
    smt_ext.patch(model, llama_plan(model, kinds=("v_proj",)))
    with pytest.raises(CheckpointError, match="saved with another plan"):
        smt_ext.load_training_state(tmp_path / "state", model, sparse(model))

    model = tiny_llama(seed=1)
    smt_ext.patch(model, llama_plan(model))
    optimizer = sparse(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"q_proj' holds other values"):
        smt_ext.load_training_state(tmp_path / "state", model, optimizer)
    assert not optimizer.state
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    with pytest.raises(PatchError, match="has no SMT layer"):
        smt_ext.load_training_state(tmp_path / "state", tiny_llama(), optimizer)


def test_another_optimizer_is_refused_and_nothing_changes(tmp_path):
    model, optimizer, scheduler = make(torch.float32, foreign)
    step(model, optimizer, scheduler, 0)
    smt_ext.save_training_state(tmp_path / "state", model, optimizer)
    fresh = make(torch.float32, sparse)[0]
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    for made in (
        sparse(fresh),
        torch.optim.SGD([m.blocks for m in smt_ext.smt_modules(fresh).values()]),
    ):
        with pytest.raises(
            CheckpointError, match=f"of the optimizer AdamW, expected {type(made).__name__}"
        ):
            smt_ext.load_training_state(tmp_path / "state", fresh, made)
        assert not made.state
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())


def test_others_may_read_what_is_saved(tmp_path):
    model, optimizer, _ = make(torch.float32, sparse)
    smt_ext.save_training_state(tmp_path / "state", model, optimizer)
    smt_ext.save_blocks(model, tmp_path / "blocks")
    smt_ext.export(model, tmp_path / "exported")
    files = [f for folder in tmp_path.iterdir() for f in folder.iterdir()]
    assert len(files) > 4
    assert {f.stat().st_mode & 0o777 for f in files} == {0o644}


def test_what_cannot_be_saved_is_named(tmp_path):
    model, optimizer, scheduler = make(torch.float32, sparse)
    with pytest.raises(CheckpointError, match=r"'state/extra/data' of type set"):
        smt_ext.save_training_state(tmp_path / "s", model, optimizer, scheduler, data={1})
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("name", ["training_state.safetensors", "training_state.json"])
def test_damage_is_seen(tmp_path, name):
    parts = make(torch.float32, sparse)
    step(*parts, 0)
    smt_ext.save_training_state(tmp_path / "state", *parts)
    path = tmp_path / "state" / name
    content = path.read_bytes()
    for spot in range(3, len(content), len(content) // 25):
        path.write_bytes(content[:spot] + bytes([content[spot] ^ 1]) + content[spot + 1 :])
        with pytest.raises(CheckpointError, match=r"damaged|is no|version"):
            smt_ext.load_training_state(tmp_path / "state", *parts)


def test_moments_do_not_go_to_other_layers(tmp_path):
    model, optimizer, _ = make(torch.float32, sparse)
    smt_ext.save_training_state(tmp_path / "state", model, optimizer)
    blocks = [module.blocks for module in smt_ext.smt_modules(model).values()]
    other = smt_ext.SparseAdamW(blocks[::-1], lr=1e-2)
    with pytest.raises(CheckpointError, match=r"the optimizer holds '.*blocks' where it held"):
        smt_ext.load_training_state(tmp_path / "state", model, other)


def test_a_schedule_that_does_not_go_on_is_said(tmp_path):
    model, optimizer, scheduler = make(torch.float32, sparse)
    smt_ext.save_training_state(tmp_path / "with", model, optimizer, scheduler)
    smt_ext.save_training_state(tmp_path / "without", model, optimizer)
    with pytest.warns(UserWarning, match="this call has no scheduler"):
        smt_ext.load_training_state(tmp_path / "with", model, optimizer)
    with pytest.warns(UserWarning, match="the state has no scheduler"):
        smt_ext.load_training_state(tmp_path / "without", model, optimizer, scheduler)


def test_tensors_of_like_paths_are_told_apart_and_odd_keys_refused(tmp_path):
    class Holder:
        def __init__(self, state):
            self.state = state

        def state_dict(self):
            return self.state

        def load_state_dict(self, state):
            self.state = state

    model, optimizer, _ = make(torch.float32, sparse)
    saved = {"a/b": torch.tensor(1.0), "a": {"b": torch.tensor(2.0)}, 1: torch.tensor(3.0)}
    smt_ext.save_training_state(
        tmp_path / "s", model, optimizer, Holder({**saved, "1": torch.ones(2)})
    )
    found = Holder({})
    smt_ext.load_training_state(tmp_path / "s", model, optimizer, found)
    assert (found.state["a/b"], found.state["a"]["b"], found.state[1]) == (1.0, 2.0, 3.0)
    assert found.state["1"].shape == (2,)
    with pytest.raises(CheckpointError, match=r"key \(1, 2\) of type tuple"):
        smt_ext.save_training_state(tmp_path / "t", model, optimizer, Holder({(1, 2): 1}))
