"""Parameters that train beside the blocks are in every artefact, or refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import smt_ext
from models import llama_plan, tiny_llama, token_batch
from processes import run_ranks
from smt_ext import CheckpointError, PatchError
from smt_ext.checkpoint import blocks
from smt_ext.checkpoint.delta import apply_delta, export_delta

NAMES = ["model.norm.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"]
BATCH = token_batch()
HOW = ["train_also", "requires_grad", "freeze"]


def patched(how="train_also"):
    model = tiny_llama()
    smt_ext.patch(model, llama_plan(model), freeze=how != "freeze")
    if how == "train_also":
        smt_ext.train_also(model, NAMES)
    elif how == "requires_grad":
        for name in NAMES:
            model.get_parameter(name).requires_grad_(True)
    return model


def train(model, steps=2, rank=None):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(
            **(BATCH if rank is None else {k: v[rank : rank + 1] for k, v in BATCH.items()})
        ).loss.backward()
        optimizer.step()
    return model


def state(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items() if "blocks" not in k}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


@pytest.mark.parametrize("how", HOW)
def test_every_artefact_holds_them(tmp_path, how):
    model = train(patched(how))
    trained, base = state(model), state(tiny_llama())
    assert not any(torch.equal(trained[name], base[name]) for name in NAMES)

    smt_ext.save_blocks(model, tmp_path / "blocks")
    loaded = smt_ext.load_blocks(tiny_llama(), tmp_path / "blocks")
    assert same(state(loaded), trained)
    smt_ext.save_blocks(loaded, tmp_path / "again")
    assert same(load_file(tmp_path / "again" / "blocks.safetensors"),
                load_file(tmp_path / "blocks" / "blocks.safetensors"))  # fmt: skip
    with smt_ext.original_weights(loaded):
        assert same(state(loaded), base)
    smt_ext.unpatch(loaded, restore=True)
    assert same(state(loaded), base)

    smt_ext.export(model, tmp_path / "delta", "delta")
    assert same(state(apply_delta(tiny_llama(), tmp_path / "delta")), trained)
    smt_ext.export(model, tmp_path / "export")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert torch.equal(exported(**BATCH).logits, model(**BATCH).logits)
    with pytest.raises(PatchError, match=r"embed_tokens\.weight' has trained.*LoRA"):
        smt_ext.export(model, tmp_path / "lora", "peft-lora")
    fresh = tiny_llama()
    with pytest.raises(PatchError, match=r"embed_tokens\.weight' trained beside.*without a name"):
        smt_ext.load_blocks(fresh, tmp_path / "blocks", name="a")
    assert same(state(fresh), base)
    assert not smt_ext.block_sets.loaded_blocks(fresh)
    smt_ext.unpatch(model)
    assert same(state(model), trained)


def test_before_training_comes_back_bit_for_bit_and_graphs_stay_valid():
    model = train(patched())
    trained, base = state(model), state(tiny_llama())
    wanted = torch.autograd.grad(model(**BATCH).loss, model.get_parameter(NAMES[0]))[0]
    loss = model(**BATCH).loss
    for twin in (model, copy.deepcopy(model)):
        with smt_ext.original_weights(twin):
            assert same(state(twin), base)
            with smt_ext.original_weights(twin):
                assert torch.equal(twin(**BATCH).logits, tiny_llama()(**BATCH).logits)
        assert same(state(twin), trained)
    assert torch.equal(torch.autograd.grad(loss, model.get_parameter(NAMES[0]))[0], wanted)
    with pytest.raises(KeyError), smt_ext.original_weights(model):
        raise KeyError("inside")
    assert same(state(model), trained)
    smt_ext.unpatch(model, restore=True)
    assert same(state(model), base)
    assert all(p.requires_grad for p in model.parameters())


def test_flags_are_those_of_before_patch():
    model = tiny_llama().requires_grad_(False)
    smt_ext.patch(model, llama_plan(model))
    smt_ext.train_also(smt_ext.train_also(model, NAMES[:1]), NAMES)
    assert [
        n for n, p in model.named_parameters() if p.requires_grad and "blocks" not in n
    ] == sorted(NAMES, key=[n for n, _ in model.named_parameters()].index)
    smt_ext.unpatch(model)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("how", HOW[1:])
def test_what_takes_an_unknown_value_is_refused_once_it_has_changed(how):
    model = patched(how)
    with smt_ext.original_weights(model):
        assert same(state(model), state(tiny_llama()))
    train(model)
    before = state(model)
    with (
        pytest.raises(PatchError, match=r"embed_tokens.*train_also"),
        smt_ext.original_weights(model),
    ):
        pass
    with pytest.raises(PatchError, match=r"embed_tokens.*train_also"):
        smt_ext.unpatch(model, restore=True)
    with pytest.raises(PatchError, match=r"has changed since smt_ext\.patch"):
        smt_ext.train_also(model, NAMES)
    assert same(state(model), before)
    assert smt_ext.smt_modules(model)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["blocks", "delta"])
def test_the_base_of_parameters_that_were_kept_is_bound_too(tmp_path, kind, how):
    model = train(patched(how))
    save, load = {
        "blocks": (smt_ext.save_blocks, smt_ext.load_blocks),
        "delta": (export_delta, apply_delta),
    }[kind]
    save(model, tmp_path / "a")
    other = tiny_llama()
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    before = state(other)
    if how == "train_also":
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
            load(other, tmp_path / "a")
        assert same(state(other), before)
        assert not smt_ext.smt_modules(other)
    else:
        load(other, tmp_path / "a")
        assert same(state(other), state(model))
    with torch.no_grad():
        other = tiny_llama(vocab_size=64)
    with pytest.raises((CheckpointError, smt_ext.PlanError)):
        load(other, tmp_path / "a")


def test_bad_names_change_nothing():
    model = smt_ext.patch(tiny_llama(), llama_plan(tiny_llama()))
    for name, told in (
        ("model.norm.bias", "is no parameter of this LlamaForCausalLM"),
        ("model.layers.0.self_attn.q_proj.weight", "trains by blocks already"),
        ("model.layers.0.self_attn.q_proj.blocks", "trains by blocks already"),
    ):
        with pytest.raises(PatchError, match=told):
            smt_ext.train_also(model, [NAMES[0], name])
    assert not model.get_parameter(NAMES[0]).requires_grad
    with smt_ext.original_weights(model), pytest.raises(PatchError, match="original_weights"):
        smt_ext.train_also(model, NAMES)
    with pytest.raises(PatchError, match="no SMT layer"):
        smt_ext.train_also(tiny_llama(), NAMES)


def test_frozen_after_training_they_are_saved_still(tmp_path):
    model = train(patched()).requires_grad_(False)
    smt_ext.save_blocks(model, tmp_path)
    loaded = smt_ext.load_blocks(tiny_llama(), tmp_path)
    assert same(state(loaded), state(model))
    assert loaded.get_parameter(NAMES[0]).requires_grad


def test_what_an_artefact_lacks_is_as_before_training(tmp_path):
    """Blocks that trained alone, loaded onto a model in which norms have trained too."""
    alone = smt_ext.patch(tiny_llama(), llama_plan(tiny_llama()))
    smt_ext.save_blocks(train(alone), tmp_path)
    assert same(state(smt_ext.load_blocks(train(patched()), tmp_path)), state(alone))


def test_ranks_gather_them_in_one_order(tmp_path, monkeypatch):
    """That of the file, which hashes of names do not steer."""
    model = smt_ext.patch(tiny_llama(), llama_plan(tiny_llama()))
    names = [name for name, p in model.named_parameters() if "norm" in name]
    smt_ext.save_blocks(smt_ext.train_also(model, names), tmp_path)
    asked = []
    monkeypatch.setattr(blocks, "train_also", lambda model, names: asked.extend(names))
    with pytest.raises(KeyError):
        smt_ext.load_blocks(tiny_llama(), tmp_path)
    assert asked == names


def sharded_rank(rank, folder):
    model = patched()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    train(model, rank=rank)
    with torch.no_grad(), smt_ext.original_weights(model):
        original = model(**BATCH).logits
    trained = model(**BATCH).logits.detach()
    smt_ext.save_blocks(model, f"{folder}/blocks")
    smt_ext.export(model, f"{folder}/delta", "delta")
    with pytest.raises(PatchError, match="trained beside"):
        smt_ext.export(model, f"{folder}/lora", "peft-lora")
    smt_ext.save_training_state(f"{folder}/state", model, torch.optim.SGD(model.parameters()))
    return original, trained


def test_sharded(tmp_path):
    for original, trained in run_ranks(sharded_rank, 2, tmp_path / "ranks", str(tmp_path)):
        assert torch.equal(original, tiny_llama()(**BATCH).logits)
        loaded = smt_ext.load_blocks(tiny_llama(), tmp_path / "blocks")
        assert torch.equal(loaded(**BATCH).logits, trained)
        assert same(state(apply_delta(tiny_llama(), tmp_path / "delta")), state(loaded))
        assert not torch.equal(loaded.model.norm.weight, tiny_llama().model.norm.weight)
