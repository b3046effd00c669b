"""Parameters that train beside the blocks are in every artefact, or refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
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
    smt_ext.load_blocks(tiny_llama(), tmp_path)
    assert asked == names


class Averaging(nn.Module):
    """Keeps statistics in buffers: one is written into, one replaced, one stays."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.norm = nn.BatchNorm1d(32)
        self.register_buffer("average", torch.zeros(32))
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, x):
        y = self.norm(self.linear(x))
        if self.training:
            self.average = 0.9 * self.average + y.detach().amax(0)
            self.scratch += 1
        return (y + self.average * self.scale).square().mean()


X = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
CHANGED = {
    "average",
    "norm.running_mean",
    "norm.running_var",
    "norm.num_batches_tracked",
}


def averaging(mean=0.0):
    torch.manual_seed(0)
    model = Averaging()
    model.norm.running_mean += mean
    return model


def averaging_patched(mean=0.0):
    layer = smt_ext.LayerPlan(shape=(32, 32), block_size=16, blocks=((0, 1), (1, 0)))
    return smt_ext.patch(averaging(mean), smt_ext.BlockPlan(layers={"linear": layer}))


def averaging_trained(steps=2, model=None, optimizer=None):
    model = averaging_patched() if model is None else model
    optimizer = smt_ext.SparseAdamW(model, lr=1e-2) if optimizer is None else optimizer
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).backward()
        optimizer.step()
    return model


def test_buffers_that_training_changes_are_in_every_artefact(tmp_path):
    model = averaging_trained()
    trained, base = state(model), state(averaging())
    assert {name for name in base if not torch.equal(trained[name], base[name])} == {
        *CHANGED,
        "linear.weight",
    }
    smt_ext.save_blocks(copy.deepcopy(model), tmp_path / "copy")
    smt_ext.save_blocks(model, tmp_path / "blocks")
    saved = load_file(tmp_path / "blocks" / "blocks.safetensors")
    assert saved.keys() == CHANGED | {"linear.blocks"}
    for folder in ("blocks", "copy"):
        loaded = smt_ext.load_blocks(averaging(), tmp_path / folder)
        assert same(state(loaded), trained)
    average = loaded.average
    with smt_ext.original_weights(loaded):
        assert same(state(loaded), base)
        loaded(X)  # in training mode: replaces one, writes into others
    assert same(state(loaded), trained)
    assert loaded.average is average
    smt_ext.load_blocks(averaging_trained(5, loaded), tmp_path / "blocks")
    assert same(state(loaded), trained)
    smt_ext.unpatch(loaded, restore=True)
    assert same(state(loaded), base)

    smt_ext.export(model, tmp_path / "delta", "delta")
    assert same(state(apply_delta(averaging(), tmp_path / "delta")), trained)
    with pytest.raises(PatchError, match=r"'average' has trained.*LoRA"):
        smt_ext.export(model, tmp_path / "lora", "peft-lora")
    with pytest.raises(PatchError, match=r"trained beside.*without a name"):
        smt_ext.load_blocks(averaging(), tmp_path / "blocks", name="a")
    for load in (smt_ext.load_blocks, apply_delta):
        folder = tmp_path / ("delta" if load is apply_delta else "blocks")
        with pytest.raises(CheckpointError, match=r"norm\.running_mean' holds other values"):
            load(averaging(mean=1.0), folder)
    other = averaging()
    other.average = torch.zeros(31)
    with pytest.raises(CheckpointError, match=r"average"):
        smt_ext.load_blocks(other, tmp_path / "blocks", strict_base=False)
    smt_ext.unpatch(model)
    assert same(state(model), trained)


def test_a_resume_takes_up_buffers_that_training_changes(tmp_path):
    whole = averaging_trained(4)
    model = averaging_patched()
    optimizer = smt_ext.SparseAdamW(model, lr=1e-2)
    smt_ext.save_training_state(tmp_path / "start", model, optimizer)
    averaging_trained(2, model, optimizer)
    smt_ext.save_training_state(tmp_path / "s", model, optimizer)
    for fresh in (averaging_patched(), averaging_trained(3)):
        resumed = smt_ext.SparseAdamW(fresh, lr=1e-2)
        smt_ext.load_training_state(tmp_path / "s", fresh, resumed)
        assert same(state(averaging_trained(2, fresh, resumed)), state(whole))
        smt_ext.load_training_state(tmp_path / "start", fresh, resumed)
        assert same(state(fresh), state(averaging()))
    other = averaging_patched(mean=1.0)
    with pytest.raises(CheckpointError, match=r"norm\.running_mean' holds other values"):
        smt_ext.load_training_state(tmp_path / "s", other, smt_ext.SparseAdamW(other))


def test_a_buffer_that_has_come_since_patch_is_of_no_base(tmp_path):
    model = averaging_patched()
    model.register_buffer("late", torch.ones(2))
    smt_ext.save_blocks(model, tmp_path / "blocks")
    with pytest.raises(CheckpointError, match=r"'late' .* this model has none"):
        smt_ext.load_blocks(averaging(), tmp_path / "blocks")
    model.average = torch.zeros(5)
    for call in (
        lambda: smt_ext.unpatch(model, restore=True),
        smt_ext.original_weights(model).__enter__,
    ):
        with pytest.raises(PatchError, match=r"'average' of the Averaging has shape \(5,\)"):
            call()


@pytest.mark.parametrize("how", ["copy_", "="])
def test_a_bias_that_is_written_through_data_is_seen(how, tmp_path):
    """Which advances no version; biases and norms are compared by value."""
    model = averaging_patched()
    smt_ext.save_blocks(model, tmp_path / "before")
    bias = model.linear.bias.requires_grad_(True)
    with smt_ext.original_weights(model):
        pass
    if how == "copy_":
        bias.data.copy_(bias.detach() + 1)
    else:
        bias.data = bias.detach() + 1
    with torch.no_grad():
        model.linear.blocks.mul_(2.0)
    with pytest.raises(PatchError, match=r"'linear\.bias' has trained.*LoRA"):
        smt_ext.export(model, tmp_path / "lora", "peft-lora")
    with pytest.raises(PatchError, match=r"'linear\.bias' trains.*unknown"):
        smt_ext.unpatch(model, restore=True)
    smt_ext.save_blocks(model, tmp_path / "blocks")
    loaded = smt_ext.load_blocks(averaging(), tmp_path / "blocks")
    assert torch.equal(loaded.linear.bias, bias)
    bias.requires_grad_(False)
    with pytest.raises(PatchError, match=r"'linear\.bias' is frozen, and has changed since"):
        smt_ext.save_blocks(model, tmp_path / "frozen")


class ByData(torch.optim.Optimizer):
    """SGD as third parties write it."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad, alpha=-0.1)


def test_an_optimizer_that_writes_into_data_is_seen(tmp_path):
    model = patched("requires_grad")
    optimizer = ByData([p for p in model.parameters() if p.requires_grad])
    model(**BATCH).loss.backward()
    model.model.norm.weight.grad = model.model.layers[0].input_layernorm.weight.grad = None
    optimizer.step()
    with pytest.raises(PatchError, match=r"embed_tokens.*train_also"):
        smt_ext.unpatch(model, restore=True)
    with pytest.raises(PatchError, match=r"embed_tokens\.weight' has trained.*LoRA"):
        smt_ext.export(model, tmp_path / "lora", "peft-lora")


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
