"""The exact base model inside a context, for reference log-probabilities."""

from __future__ import annotations

import copy

import pytest
import torch

import smt_ext
from models import mlp, mlp_plan
from smt_ext import PatchError


@pytest.fixture
def trained():
    """A patched model after one large step."""
    model = smt_ext.patch(mlp(torch.bfloat16), mlp_plan())
    optimizer = smt_ext.SparseAdamW(model, lr=0.1)
    model(torch.randn(4, 96, dtype=torch.bfloat16)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model


def test_inside_is_the_base_and_outside_the_trained_model_bit_for_bit(trained):
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    y = trained(x)
    state = {k: v.clone() for k, v in trained.state_dict().items()}
    with smt_ext.original_weights(trained) as base:
        assert base is trained
        out = base(x)
        assert not out.requires_grad
        assert torch.equal(out, mlp(torch.bfloat16)(x))
    assert not torch.equal(out, y)
    for name, value in trained.state_dict().items():
        assert torch.equal(value, state[name])


def test_a_graph_built_before_stays_valid(trained):
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    trained(x).square().sum().backward()
    expected = {n: m.blocks.grad.clone() for n, m in smt_ext.smt_modules(trained).items()}
    trained.zero_grad()
    loss = trained(x).square().sum()
    with smt_ext.original_weights(trained):
        trained(x)
    loss.backward()
    for name, module in smt_ext.smt_modules(trained).items():
        assert torch.equal(module.blocks.grad, expected[name])


def test_gradients_inside_are_refused(trained):
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    loss = trained(x).sum()
    optimizer = smt_ext.SparseAdamW(trained)
    foreign = torch.optim.SGD([m.blocks for m in smt_ext.smt_modules(trained).values()], lr=1.0)
    for module in smt_ext.smt_modules(trained).values():
        module.blocks.grad = torch.ones_like(module.blocks)
    with smt_ext.original_weights(trained):
        with pytest.raises(PatchError, match=r"original_weights.*no_grad"):
            loss.backward()
        with torch.enable_grad(), pytest.raises(PatchError, match="original_weights"):
            trained(x)
        with pytest.raises(PatchError, match="original_weights"):
            optimizer.step()
        with pytest.raises(PatchError, match="original_weights"):
            foreign.step()
        with pytest.raises(PatchError, match="original_weights"):
            smt_ext.unpatch(trained)
        with pytest.raises(PatchError, match="original_weights"):
            smt_ext.sync_weights(trained)


def test_an_exception_inside_brings_the_trained_weights_back(trained):
    weight = trained.up_proj.weight.clone()
    with pytest.raises(KeyError), smt_ext.original_weights(trained):
        raise KeyError("inside")
    assert torch.equal(trained.up_proj.weight, weight)
    trained(torch.randn(2, 96, dtype=torch.bfloat16)).sum().backward()


def test_nesting(trained):
    weight = trained.up_proj.weight.clone()
    with smt_ext.original_weights(trained):
        with smt_ext.original_weights(trained):
            assert not torch.equal(trained.up_proj.weight, weight)
        assert not torch.equal(trained.up_proj.weight, weight)
    assert torch.equal(trained.up_proj.weight, weight)


def test_unpatch_can_bring_the_base_back(trained):
    smt_ext.unpatch(trained, restore=True)
    for name, value in mlp(torch.bfloat16).state_dict().items():
        assert torch.equal(trained.state_dict()[name], value)


def test_saving_loading_and_copying_wait_for_the_trained_weights(tmp_path):
    model = smt_ext.patch(mlp(), mlp_plan())
    optimizer = smt_ext.SparseAdamW(model, lr=0.1)
    smt_ext.save_training_state(tmp_path / "state", model, optimizer)
    with torch.no_grad():
        model.gate_proj.blocks.add_(1.0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    calls = (
        lambda: smt_ext.save_blocks(model, tmp_path / "blocks"),
        lambda: smt_ext.export(model, tmp_path / "delta", "delta"),
        lambda: smt_ext.save_training_state(tmp_path / "other", model, optimizer),
        lambda: smt_ext.load_training_state(tmp_path / "state", model, optimizer),
        lambda: model.load_state_dict(state),
        lambda: copy.deepcopy(model),
    )
    with smt_ext.original_weights(model):
        for call in calls:
            with pytest.raises(PatchError, match="original_weights"):
                call()
        model.to(torch.float64)
        assert torch.equal(
            model.gate_proj.read_held_blocks(), model.gate_proj.original_blocks.double()
        )
    model.float()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]
