"""Law 10: every artefact names its whole base model; on another it is refused by the difference."""

from __future__ import annotations

import copy
import functools
import json
import warnings

import pytest
import torch
from torch import nn

import smt_ext
from models import llama_plan, mlp, mlp_plan, save_checkpoint, tiny_llama
from smt_ext import CheckpointError, PatchError
from smt_ext._files import sha256_of_file
from smt_ext.checkpoint import base_digest
from smt_ext.checkpoint.artifact import sealed
from smt_ext.checkpoint.base_digest import digests_of_base
from smt_ext.checkpoint.blocks import load_plan
from smt_ext.checkpoint.delta import apply_delta
from smt_ext.nn.patching import plan_of


def trained(model):
    plan = llama_plan(model) if hasattr(model, "config") else mlp_plan()
    smt_ext.patch(model, plan)
    with torch.no_grad():
        for module in smt_ext.smt_modules(model).values():
            module.blocks.mul_(1.5)
    return model


def save_state(model, folder):
    smt_ext.save_training_state(folder, model, smt_ext.SparseAdamW(model))


def load_state(model, folder):
    smt_ext.patch(model, llama_plan(model))
    smt_ext.load_training_state(folder, model, smt_ext.SparseAdamW(model))


ARTEFACTS = {
    "blocks": (smt_ext.save_blocks, smt_ext.load_blocks),
    "set": (smt_ext.save_blocks, lambda m, f: smt_ext.load_blocks(m, f, name="a")),
    "delta": (functools.partial(smt_ext.export, format="delta"), apply_delta),
    "state": (save_state, load_state),
}


@pytest.mark.parametrize("kind", ARTEFACTS)
@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight",
     "model.layers.0.self_attn.q_proj.weight"],
)  # fmt: skip
def test_another_base_is_refused_by_the_first_tensor_that_differs(tmp_path, kind, name):
    save, load = ARTEFACTS[kind]
    save(trained(tiny_llama()), tmp_path / "a")
    load(tiny_llama(), tmp_path / "a")
    other = tiny_llama()
    with torch.no_grad():
        other.get_parameter(name).view(-1)[-40] += 1  # outside of every block
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(other, tmp_path / "a")
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("kind", ["blocks", "delta"])
def test_another_base_all_the_same_with_a_warning(tmp_path, kind):
    save, load = ARTEFACTS[kind]
    save(trained(tiny_llama()), tmp_path / "a")
    other = tiny_llama()
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    with pytest.warns(UserWarning, match=r"model\.norm\.weight"):
        load(other, tmp_path / "a", strict_base=False)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp()
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


def test_buffers_and_tensors_that_one_model_lacks_count(tmp_path):
    plan = smt_ext.BlockPlan({f"inner.{k}": v for k, v in mlp_plan().layers.items()})
    smt_ext.save_blocks(smt_ext.patch(Counting(), plan), tmp_path / "a")
    other = Counting()
    other.scratch += 1
    smt_ext.load_blocks(copy.deepcopy(other), tmp_path / "a")
    other.count += 1
    with pytest.raises(CheckpointError, match="'count' holds other values"):
        smt_ext.load_blocks(other, tmp_path / "a")
    other = Counting()
    del other.count
    with pytest.raises(CheckpointError, match="no tensor 'count'"):
        smt_ext.load_blocks(other, tmp_path / "a")
    other = Counting()
    other.more = nn.Parameter(torch.zeros(3))
    with pytest.raises(CheckpointError, match="a tensor 'more'"):
        smt_ext.load_blocks(other, tmp_path / "a")


def test_digests_are_of_the_base_whatever_is_trained_and_kept_until_a_tensor_changes(monkeypatch):
    expected = digests_of_base(mlp(), leave_out=())
    model = smt_ext.patch(mlp(), mlp_plan())
    optimizer = smt_ext.SparseAdamW(model, lr=0.1)
    for _ in range(2):
        model(torch.ones(2, 96)).sum().backward()
        optimizer.step()
        assert digests_of_base(model) == expected
    calls = []
    monkeypatch.setattr(
        base_digest,
        "_sha256",
        lambda chunk, plain=base_digest._sha256: calls.append(0) or plain(chunk),
    )
    assert digests_of_base(model) == expected
    assert not calls
    with torch.no_grad():
        model.down_proj.bias[0] += 1
    now = digests_of_base(model, leave_out=())["tensors"]
    assert [k for k, v in now.items() if v != expected["tensors"][k]] == ["down_proj.bias"]
    assert len(calls) == 1
    with torch.no_grad():
        model.up_proj.weight[0, 0] += 1  # outside of its blocks
    model(torch.ones(2, 96))
    assert (
        digests_of_base(model, leave_out=())["tensors"]["up_proj.weight"]
        != expected["tensors"]["up_proj.weight"]
    )


def in_place(parameter, entry):
    with torch.no_grad():
        parameter.view(-1)[entry] += 1


def by_data(parameter, entry):
    parameter.data.view(-1)[entry] += 1


def by_new_data(parameter, entry):
    parameter.data = parameter.data.clone()
    in_place(parameter, entry)


def by_numpy(parameter, entry):
    parameter.detach().numpy().reshape(-1)[entry] += 1


def by_signs(parameter, entry):
    parameter.data.neg_()


def by_a_sign_a_column(parameter, entry):
    parameter.data[..., entry].neg_()


def by_flip(parameter, entry):
    parameter.data.copy_(parameter.data.flip(0))


@pytest.mark.parametrize("saved_before", [False, True])
@pytest.mark.parametrize("name", ["down_proj.bias", "inner.weight", "up_proj.weight"])
@pytest.mark.parametrize(
    "change", [in_place, by_data, by_new_data, by_numpy, by_signs, by_a_sign_a_column, by_flip]
)
def test_a_frozen_parameter_changed_by_hand_is_refused_when_saved(
    tmp_path, change, name, saved_before
):
    """Its blocks would load onto no base, or, worse, onto one that lacks the change."""
    base = mlp()
    base.inner = nn.Linear(9, 10, dtype=torch.float64)
    model = trained(copy.deepcopy(base))
    if saved_before:
        smt_ext.save_blocks(model, tmp_path / "first")
    copied = copy.deepcopy(model)
    for either in (model, copied):
        change(either.get_parameter(name), -1)  # in no block
        for save in (
            lambda m: smt_ext.save_blocks(m, tmp_path / "a"),
            lambda m: smt_ext.export(m, tmp_path / "b", "delta"),
            lambda m: smt_ext.save_training_state(tmp_path / "c", m, smt_ext.SparseAdamW(m)),
        ):
            with pytest.raises(PatchError, match=rf"'{name}' is frozen.*train_also"):
                save(either)
    assert not {"a", "b", "c"} & {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("'bias' of a SMTLinear is gone", lambda m: setattr(m.gate_proj, "bias", None)),
        ("'inner.0.bias' has come", lambda m: setattr(m, "inner", nn.Sequential(m.inner))),
        ("'weight' of a Linear is gone", lambda m: setattr(m, "inner", nn.Linear(9, 10))),
    ],
)
def test_parameters_that_come_or_go_are_refused_when_saved(tmp_path, name, change):
    base = mlp()
    base.inner = nn.Linear(9, 10, bias=False)
    model = trained(base)
    change(model)
    if "come" in name:
        model.inner[0].bias = nn.Parameter(torch.zeros(10), requires_grad=False)
    with pytest.raises(PatchError, match=f"{name} since smt_ext.patch"):
        smt_ext.save_blocks(model, tmp_path / "a")


def test_what_changes_by_hand_can_be_let_train_and_hidden_from_optimizers(tmp_path):
    base = mlp()
    base.inner = nn.Linear(9, 10)
    model = smt_ext.patch(copy.deepcopy(base), mlp_plan())
    smt_ext.train_also(model, ["inner.weight"]).inner.weight.requires_grad_(False)
    trained(model)
    model.inner.weight.data.mul_(2)
    smt_ext.save_blocks(model, tmp_path / "a")
    loaded = smt_ext.load_blocks(copy.deepcopy(base), tmp_path / "a")
    assert torch.equal(loaded.inner.weight, base.inner.weight * 2)
    with smt_ext.original_weights(loaded):
        assert torch.equal(loaded.inner.weight, base.inner.weight)


@pytest.mark.parametrize("kind", ["blocks", "delta", "state"])
def test_a_head_that_no_checkpoint_has_need_not_be_as_random(tmp_path, kind):
    from transformers import AutoModelForSequenceClassification

    folder, batch = save_checkpoint(tmp_path / "base"), {"input_ids": torch.arange(6)[None]}

    def classifier(head=True):
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        return smt_ext.train_also(smt_ext.patch(model, llama_plan(model)), ["score.weight"][:head])

    save, load = ARTEFACTS[kind]

    def load_onto(model, folder):
        if kind == "delta":
            apply_delta(smt_ext.unpatch(model), folder)
        elif kind == "state":
            smt_ext.load_training_state(folder, model, smt_ext.SparseAdamW(model))
        else:
            load(model, folder)

    model = classifier()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.blocks.mul_(2)
        model.score.weight.mul_(2)
    save(model, tmp_path / "a")
    other = classifier()
    before = other.score.weight.detach().clone()
    assert not torch.equal(before * 2, model.score.weight)
    load_onto(other, tmp_path / "a")
    assert torch.equal(other(**batch).logits, model(**batch).logits)
    if kind != "delta":
        with smt_ext.original_weights(other):
            assert torch.equal(other.score.weight, before)
    other = classifier()
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' holds other values"):
        load_onto(other, tmp_path / "a")
    save(classifier(head=False), tmp_path / "without")
    with pytest.raises(CheckpointError, match="score"):
        load_onto(classifier(head=False), tmp_path / "without")


def test_the_same_values_written_again_are_no_change(tmp_path):
    model = trained(mlp())
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    smt_ext.save_blocks(model, tmp_path / "a")
    smt_ext.load_blocks(mlp(), tmp_path / "a")


@pytest.mark.parametrize("chunk", [1 << 24, 1000, 64])
def test_a_digest_sees_every_byte_shape_and_dtype(monkeypatch, chunk):
    monkeypatch.setattr(base_digest, "_CHUNK_BYTES", chunk)

    def digest(tensor):
        holder = nn.Module()
        holder.register_buffer("x", tensor)
        return digests_of_base(holder)["tensors"]["x"]

    plain = torch.arange(1000, dtype=torch.int16).view(10, 100)
    seen = {digest(plain), digest(plain.view(100, 10)), digest(plain.view(torch.bfloat16))}
    for at in (0, 499, 999):
        changed = plain.clone()
        changed.view(-1)[at] ^= 256
        seen.add(digest(changed))
    assert len(seen) == 6
    assert digest(plain.t().contiguous().t()) == digest(plain)
    assert digest(torch.tensor(3.0)) != digest(torch.tensor(4.0))
    digest(torch.empty(0))


def test_what_trains_beside_the_blocks_is_in_the_state_and_not_in_the_base(tmp_path):
    def run(steps, resume=False):
        model = smt_ext.patch(mlp(), mlp_plan())
        model.gate_proj.bias.requires_grad_(True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        if resume:
            smt_ext.load_training_state(tmp_path / "s", model, optimizer)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(2, 96)).sum().backward()
            optimizer.step()
        return model, optimizer

    whole, _ = run(4)
    smt_ext.save_training_state(tmp_path / "s", *run(2))
    resumed, _ = run(2, resume=True)
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
    plain = smt_ext.patch(mlp(), mlp_plan())
    optimizer = torch.optim.AdamW([m.blocks for m in smt_ext.smt_modules(plain).values()])
    with pytest.raises(CheckpointError, match=r"'gate_proj\.bias' trains beside"):
        smt_ext.load_training_state(tmp_path / "s", plain, optimizer)


def test_version_1_says_how_to_go_on(tmp_path):
    model = trained(tiny_llama())
    smt_ext.save_blocks(model, tmp_path / "a")
    path = tmp_path / "a" / "smt_blocks.json"
    info = json.loads(path.read_text())
    del info["model"], info["seal"]
    path.write_text(json.dumps(sealed({**info, "version": 1})))
    assert sha256_of_file(tmp_path / "a" / "blocks.safetensors") == info["sha256"]
    with pytest.raises(CheckpointError, match=r"version 1.*strict_base=False and save it again"):
        smt_ext.load_blocks(tiny_llama(), tmp_path / "a")
    assert load_plan(tmp_path / "a") == plan_of(model)
    old = smt_ext.load_blocks(tiny_llama(), tmp_path / "a", strict_base=False)
    smt_ext.save_blocks(old, tmp_path / "b")
    smt_ext.load_blocks(tiny_llama(), tmp_path / "b")


def test_digests_are_those_of_the_present_patch(tmp_path):
    """Trained, unpatched and trained again: the second artefact is of the base with the first."""
    model = trained(mlp())
    smt_ext.save_blocks(model, tmp_path / "first")
    smt_ext.unpatch(model)
    base = copy.deepcopy(model)
    trained(model)
    smt_ext.save_blocks(model, tmp_path / "second")
    smt_ext.load_blocks(base, tmp_path / "second")
    with pytest.raises(CheckpointError, match="holds other values"):
        smt_ext.load_blocks(mlp(), tmp_path / "second")


@pytest.mark.parametrize("stepped", [False, True])
def test_a_weight_written_outside_its_blocks_is_digested_anew(tmp_path, stepped):
    model = trained(mlp())
    before = digests_of_base(model)["tensors"]
    optimizer = torch.optim.SGD([m.blocks for m in smt_ext.smt_modules(model).values()], lr=0.1)
    with torch.no_grad():
        model.gate_proj.weight[40, 40] += 1
    if stepped:
        model.gate_proj.blocks.grad = torch.ones_like(model.gate_proj.blocks)
        optimizer.step()
    after = digests_of_base(model, leave_out=())["tensors"]
    assert [name for name in before if before[name] != after[name]] == ["gate_proj.weight"]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapped_copy_names_its_tensors_as_the_model_does(tmp_path, wrap):
    copied = wrap(copy.deepcopy(trained(mlp())))
    smt_ext.save_blocks(copied, tmp_path / "blocks")
    smt_ext.load_blocks(mlp(), tmp_path / "blocks")


def test_blocks_of_a_converted_model_are_of_the_base_in_that_dtype(tmp_path):
    smt_ext.save_blocks(trained(mlp()).to(torch.bfloat16), tmp_path / "blocks")
    smt_ext.load_blocks(mlp().to(torch.bfloat16), tmp_path / "blocks")


def test_a_base_that_computes_otherwise_is_warned_of(tmp_path):
    """Its tensors are the same; its configuration, which the artefact names by a digest, is not."""
    model = tiny_llama()
    smt_ext.patch(model, llama_plan(model))
    smt_ext.save_blocks(model, tmp_path / "blocks")
    like = tiny_llama()
    like.config.use_cache, like.config.pad_token_id = False, 1  # what trainers set
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smt_ext.load_blocks(like, tmp_path / "blocks")
    other = tiny_llama()
    other.config.rms_norm_eps = 1e-2
    with pytest.warns(UserWarning, match="configuration is another than that of the base"):
        smt_ext.load_blocks(other, tmp_path / "blocks")
