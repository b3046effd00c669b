"""The delta: base plus delta is the trained model in every bit, and anyone can read it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import smt_ext
from models import MLP_LAYERS, llama_plan, mlp, mlp_plan, tiny_llama
from smt_ext import CheckpointError, PatchError
from smt_ext.checkpoint.delta import apply_delta

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def trained_mlp(dtype=torch.float32, steps=3, lr=1e-2):
    model = smt_ext.patch(mlp(dtype), mlp_plan())
    optimizer = smt_ext.SparseAdamW(model, lr=lr)
    for _ in range(steps):
        model(torch.randn(6, 96, dtype=dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items() if not k.endswith(".blocks")}


def assert_same(model, expected):
    assert list(model.state_dict()) == list(expected)
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("lr", [1e-4, 1e-1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_added_to_the_base_it_is_the_trained_model(tmp_path, dtype, lr):
    model = trained_mlp(dtype, lr=lr)
    exact = smt_ext.export(model, tmp_path / "delta", "delta")
    base = mlp(dtype)
    before = weights(base)
    assert apply_delta(base, tmp_path / "delta") is base
    assert any(not torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert set(exact) == set(MLP_LAYERS)
    if all(exact.values()):
        assert_same(base, weights(model))
    else:
        assert dtype == torch.float64
        for name, value in base.state_dict().items():
            # Rounded twice relative to the larger of the two, which is below 2.
            torch.testing.assert_close(value, weights(model)[name], rtol=0, atol=2**-51)
    assert not smt_ext.smt_modules(base)
    assert all(p.requires_grad for p in base.parameters())


def test_a_value_that_moved_far_gets_the_digits_it_needs(tmp_path):
    model = smt_ext.patch(mlp(torch.bfloat16), mlp_plan())
    with torch.no_grad():
        model.gate_proj.blocks[0, 0, 0] = 2.0**-40
    smt_ext.sync_weights(model)
    assert smt_ext.export(model, tmp_path / "delta", "delta")["gate_proj"]
    tensors = load_file(tmp_path / "delta" / "delta.safetensors")
    assert tensors["gate_proj.delta"].dtype == torch.float64
    assert tensors["up_proj.delta"].dtype == torch.float32
    base = apply_delta(mlp(torch.bfloat16), tmp_path / "delta")
    assert base.gate_proj.weight[0, 0] == 2.0**-40


def test_readable_with_safetensors_alone(tmp_path):
    model = trained_mlp(torch.bfloat16)
    smt_ext.export(model, tmp_path / "delta", "delta")
    tensors = load_file(tmp_path / "delta" / "delta.safetensors")
    about = json.loads((tmp_path / "delta" / "delta.json").read_text())
    base = mlp(torch.bfloat16)
    for name, layer in about["plan"]["layers"].items():
        weight, size = base.get_submodule(name).weight.data, layer["block_size"]
        assert about["exact"][name]
        index = tensors[f"{name}.index"].tolist()
        for (row, col), delta in zip(index, tensors[f"{name}.delta"], strict=True):
            part = weight[row * size : (row + 1) * size, col * size : (col + 1) * size]
            part += delta[: part.shape[0], : part.shape[1]]
    assert_same(base, weights(model))


def test_what_apply_refuses_leaves_the_model_as_it_was(tmp_path):
    smt_ext.export(trained_mlp(), tmp_path / "delta", "delta")
    other = mlp(seed=1)
    before = weights(other)
    with pytest.raises(CheckpointError, match=r"'gate_proj' holds other values than the base"):
        apply_delta(other, tmp_path / "delta")
    assert_same(other, before)
    apply_delta(other, tmp_path / "delta", strict_base=False)
    assert not torch.equal(other.up_proj.weight, before["up_proj.weight"])

    with pytest.raises(CheckpointError, match=r"is for another model.*'down_proj'"):
        apply_delta(tiny_llama(), tmp_path / "delta")
    with pytest.raises(PatchError, match=r"onto a patched model.*restore=True"):
        apply_delta(smt_ext.patch(mlp(), mlp_plan()), tmp_path / "delta")
    with pytest.raises(CheckpointError, match=r"float32 model\. Load the base model in float32"):
        apply_delta(mlp(torch.float64), tmp_path / "delta")

    file = tmp_path / "delta" / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="damaged or cut off"):
        apply_delta(mlp(), tmp_path / "delta")
    with pytest.raises(CheckpointError, match=r"delta\.json.*No such file"):
        apply_delta(mlp(), tmp_path / "nowhere")


def test_needs_a_patched_model_that_holds_its_trained_values(tmp_path):
    with pytest.raises(PatchError, match="has no SMT layer"):
        smt_ext.export(tiny_llama(), tmp_path / "delta", "delta")
    model = trained_mlp()
    with smt_ext.original_weights(model), pytest.raises(PatchError, match="original_weights"):
        smt_ext.export(model, tmp_path / "delta", "delta")
    assert not list(tmp_path.iterdir())


def test_on_a_language_model(tmp_path):
    model = tiny_llama()
    smt_ext.patch(model, llama_plan(model))
    with torch.no_grad():
        for module in smt_ext.smt_modules(model).values():
            module.blocks.mul_(1.5)
    smt_ext.sync_weights(model)
    smt_ext.export(model, tmp_path / "delta", "delta")
    assert_same(apply_delta(tiny_llama(), tmp_path / "delta"), weights(model))
