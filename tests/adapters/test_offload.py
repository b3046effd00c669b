"""SparseAdamW with its state on the CPU: the same bits as without, along the way of a GPU's blocks.

On a machine without a GPU the blocks are taken to be elsewhere, so that the host buffers, the
chunks and the way back run as they would; streams and page-locked memory do not.
"""

from __future__ import annotations

import copy

import pytest
import torch

import smt_ext
from models import MLP_LAYERS, mlp, mlp_plan
from smt_ext.optim import offload
from smt_ext.optim import sparse_adamw as optim


@pytest.fixture(params=[False, True], ids=["one chunk", "a chunk a layer"])
def elsewhere(monkeypatch, request):
    monkeypatch.setattr(optim, "_is_elsewhere", lambda param: True)
    if request.param:
        monkeypatch.setattr(offload, "_CHUNK_BYTES", 1)


def start(dtype, block_dtype=None, **options):
    model = smt_ext.patch(mlp(dtype), mlp_plan(), block_dtype=block_dtype)
    return model, smt_ext.SparseAdamW(model, lr=2e-2, weight_decay=0.1, **options)


def train(model, optimizer, steps, first=0, overflow_at=()):
    for step in range(first, first + steps):
        x = torch.randn(6, 96, generator=torch.Generator().manual_seed(step))
        model(x.to(model.gate_proj.weight.dtype)).float().square().mean().backward()
        if step in overflow_at:
            model.up_proj.blocks.grad[0, 0, 0] = float("inf")
        optimizer.step()
        optimizer.zero_grad()


def assert_same_training(one, other):
    (model, optimizer), (twin, second) = one, other
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    for name in MLP_LAYERS:
        module = twin.get_submodule(name)
        assert torch.equal(module.read_blocks(), module.blocks.to(module.weight.dtype))
    states = optimizer.state_dict()["state"], second.state_dict()["state"]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        assert state.keys() == states[1][index].keys()
        for key, value in state.items():
            assert torch.equal(value, states[1][index][key]), key
    assert optimizer.skipped_steps == second.skipped_steps


CASES = {
    "float64": (torch.float64, None, {}),
    "decay to the base": (torch.bfloat16, None, {"decay_to": "base"}),
    "float32": (torch.float32, None, {"max_grad_norm": 0.05}),
    "float32 master blocks": (torch.bfloat16, None, {}),
    "bfloat16": (torch.bfloat16, torch.bfloat16, {}),
    "float16": (torch.float16, torch.float16, {}),
    "master values in the optimizer": (
        torch.bfloat16,
        torch.bfloat16,
        {"master_dtype": torch.float32, "max_grad_norm": 0.05},
    ),
    "stochastic rounding": (
        torch.bfloat16,
        torch.bfloat16,
        {"stochastic_rounding": True, "seed": 5},
    ),
}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_as_without(case):
    dtype, block_dtype, options = CASES[case]
    plain = start(dtype, block_dtype, **options)
    offloaded = start(dtype, block_dtype, **options, offload="cpu")
    for pair in (plain, offloaded):
        train(*pair, steps=5, overflow_at=(0, 2))
    assert offloaded[1].skipped_steps == 2
    assert not torch.equal(plain[0].up_proj.weight, mlp(dtype).up_proj.weight)
    assert_same_training(plain, offloaded)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("case", CASES)
def test_resumes_from_either_to_either(case):
    dtype, block_dtype, options = CASES[case]
    straight = start(dtype, block_dtype, **options)
    train(*straight, steps=4)
    for first, then in ((None, "cpu"), ("cpu", None), ("cpu", "cpu")):
        begun = start(dtype, block_dtype, **options, offload=first)
        train(*begun, steps=2)
        resumed = start(dtype, block_dtype, **options, offload=then)
        for into, out in zip(resumed, begun, strict=True):
            into.load_state_dict(copy.deepcopy(out.state_dict()))
        train(*resumed, steps=2, first=2)
        assert_same_training(straight, resumed)


@pytest.mark.usefixtures("elsewhere")
def test_layers_without_a_gradient_are_left_out():
    pairs = [start(torch.float32, offload=o) for o in (None, "cpu")]
    for model, optimizer in pairs:
        for step in range(4):
            for name, module in smt_ext.smt_modules(model).items():
                seen = name != "gate_proj" or step % 2
                grad = torch.full_like(module.blocks, step + 1.0) if seen else None
                module.blocks.grad = grad
            optimizer.step()
    assert_same_training(*pairs)


@pytest.mark.usefixtures("elsewhere")
def test_blocks_that_were_changed_by_hand_are_what_the_next_step_starts_from():
    pairs = [start(torch.float32, offload=o) for o in (None, "cpu")]
    for model, optimizer in pairs:
        train(model, optimizer, steps=1)
        with torch.no_grad():
            model.up_proj.blocks.mul_(0.5)
        smt_ext.sync_weights(model)
        train(model, optimizer, steps=1, first=1)
    assert_same_training(*pairs)


@pytest.mark.usefixtures("elsewhere")
def test_entries_outside_the_blocks_never_change_a_bit():
    model, optimizer = start(torch.bfloat16, offload="cpu")
    before = mlp(torch.bfloat16).down_proj.weight
    train(model, optimizer, steps=2)
    changed = model.down_proj.weight != before
    assert changed[:32, 32:].any()
    assert changed[32:, :32].any()
    assert not changed[:32, :32].any()
    assert not changed[32:, 32:].any()


def test_on_the_cpu_it_changes_nothing(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("blocks on the CPU were copied")

    monkeypatch.setattr(offload.Offload, "update", never)
    pairs = [start(torch.float32, offload=o) for o in (None, "cpu")]
    for pair in pairs:
        train(*pair, steps=2)
    assert_same_training(*pairs)


def test_only_the_cpu():
    with pytest.raises(ValueError, match="offload is 'disk', expected 'cpu' or None"):
        start(torch.float32, offload="disk")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_state_stays_on_the_host_and_the_result_is_that_of_the_gpu(case):
    dtype, block_dtype, options = CASES[case]
    plain, offloaded = (
        (model.cuda(), optimizer)
        for model, optimizer in (
            start(dtype, block_dtype, **options),
            start(dtype, block_dtype, **options, offload="cpu"),
        )
    )
    for model, optimizer in (plain, offloaded):
        for step in range(3):
            x = torch.randn(6, 96, generator=torch.Generator().manual_seed(step))
            model(x.to("cuda", dtype)).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for state in offloaded[1].state.values():
        assert {value.device.type for value in state.values()} == {"cpu"}
    for name in MLP_LAYERS:
        module = offloaded[0].get_submodule(name)
        assert torch.equal(module.read_blocks(), module.blocks.to(module.weight.dtype))
        # Two kernels: the same formula, other rounding of its square roots and quotients.
        other = plain[0].get_submodule(name)
        eps = torch.finfo(module.blocks.dtype).eps
        torch.testing.assert_close(module.blocks, other.blocks, rtol=8 * eps, atol=8 * eps)
