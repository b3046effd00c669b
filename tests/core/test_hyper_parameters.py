"""Numbers that a step cannot compute with change nothing, and are counted or refused."""

from __future__ import annotations

import math

import pytest
import torch

import smt_ext
from models import mlp, mlp_plan

BAD_RATES = [math.inf, -math.inf, math.nan, -1e-3, 3.4e38]


def patched(dtype=torch.float32, **settings):
    model = smt_ext.patch(mlp(dtype), mlp_plan(), **settings)
    for module in smt_ext.smt_modules(model).values():
        module.blocks.grad = torch.ones_like(module.blocks)
    return model


def state_of(model, optimizer):
    tensors = [*model.state_dict().values()]
    for state in optimizer.state.values():
        tensors += [state[key] for key in ("exp_avg", "exp_avg_sq", "step")]
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("rate", BAD_RATES)
@pytest.mark.parametrize("given", ["tensor", "scheduler", "group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_bad_learning_rate_skips_the_step_and_is_counted(rate, given, dtype):
    model = patched(dtype)
    optimizer = smt_ext.SparseAdamW(model, lr=torch.tensor(1e-3) if given == "tensor" else 1e-3)
    optimizer.step()
    before = state_of(model, optimizer)
    group = optimizer.param_groups[0]
    if given == "tensor":
        group["lr"].fill_(rate)
    elif given == "group":
        group["lr"] = rate
    else:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: rate / 1e-3)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(map(torch.equal, before, state_of(model, optimizer)))
    group["lr"] = 1e-3
    optimizer.step()
    assert optimizer.skipped_steps == 1
    after = state_of(model, optimizer)
    assert not all(map(torch.equal, before, after))
    assert all(torch.isfinite(tensor).all() for tensor in after)


@pytest.mark.parametrize("bad", BAD_RATES[:4])
def test_a_bad_rate_as_a_number_is_refused_at_once(bad):
    model = patched()
    with pytest.raises(ValueError, match="lr is"):
        smt_ext.SparseAdamW(model, lr=bad)
    blocks = [m.blocks for m in smt_ext.smt_modules(model).values()]
    with pytest.raises(ValueError, match="lr is"):
        smt_ext.SparseAdamW([{"params": blocks[:1], "lr": bad}, {"params": blocks[1:]}])


@pytest.mark.parametrize(
    ("key", "value"),
    [("betas", (0.9, 1.0)), ("betas", (0.9,)), ("betas", (math.nan, 0.9)), ("betas", ("a", 0.9)),
     ("eps", 0.0), ("eps", math.nan), ("eps", "1e-8"), ("weight_decay", -1.0),
     ("weight_decay", math.inf), ("lr", "fast"), ("lr", torch.ones(2)), ("amsgrad", True),
     ("maximize", True)],
)  # fmt: skip
def test_a_bad_setting_of_any_group_is_refused_before_anything_moves(key, value):
    model = patched()
    blocks = [m.blocks for m in smt_ext.smt_modules(model).values()]
    optimizer = smt_ext.SparseAdamW([{"params": blocks[:1]}, {"params": blocks[1:]}])
    optimizer.step()
    before = state_of(model, optimizer)
    optimizer.param_groups[1][key] = value
    with pytest.raises(ValueError, match=f"{key} is"):
        optimizer.step(lambda: pytest.fail("the closure ran"))
    assert all(map(torch.equal, before, state_of(model, optimizer)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_moments_stay_finite_whatever_finite_gradient_comes(dtype):
    model = patched(dtype, block_dtype=dtype)
    optimizer = smt_ext.SparseAdamW(model, lr=1e-2)
    largest = torch.finfo(dtype).max ** (0.4 if dtype == torch.float64 else 1)
    for step in range(3):
        for module in smt_ext.smt_modules(model).values():
            module.blocks.grad = torch.ones_like(module.blocks)
            if step == 0:
                module.blocks.grad[0] = -largest
                module.blocks.grad[0, 0, 0] = largest
        optimizer.step()
    assert optimizer.skipped_steps == 0
    assert all(torch.isfinite(tensor).all() for tensor in state_of(model, optimizer))


def test_the_clip_is_where_the_head_of_the_kernel_says():
    model = patched()
    optimizer = smt_ext.SparseAdamW(model, betas=(0.0, 0.0))
    module = next(iter(smt_ext.smt_modules(model).values()))
    module.blocks.grad[0, 0, :3] = torch.tensor([2.0**62, 2.0**64, -(2.0**64)])
    optimizer.step()
    state = optimizer.state[module.blocks]
    assert state["exp_avg"][0, 0, :3].tolist() == [2.0**62, 2.0**63, -(2.0**63)]
    assert state["exp_avg_sq"][0, 0, :3].tolist() == [2.0**124, 2.0**126, 2.0**126]


# torch's own optimizers round float16 parameters to inf themselves.
@pytest.mark.parametrize(
    ("kind", "block_dtype"),
    [("SparseAdamW", torch.float32), ("SparseAdamW", torch.float16), ("SGD", torch.float32)],
)
def test_float16_weights_saturate(kind, block_dtype):
    model = patched(torch.float16, block_dtype=block_dtype)
    blocks = [m.blocks for m in smt_ext.smt_modules(model).values()]
    optimizer = (
        smt_ext.SparseAdamW(model, lr=1e5)
        if kind == "SparseAdamW"
        else torch.optim.SGD(blocks, lr=1e5)
    )
    optimizer.step()
    module = next(iter(smt_ext.smt_modules(model).values()))
    weight = module.read_blocks()
    assert torch.equal(weight, torch.full_like(weight, -65504))


@pytest.mark.parametrize("eps", [1e-50, 1e39])
def test_an_eps_that_float32_cannot_hold_is_refused(eps):
    model = smt_ext.patch(mlp(), mlp_plan())
    with pytest.raises(ValueError, match=r"eps is .* that float32 can hold"):
        smt_ext.SparseAdamW(model, lr=0.1, eps=eps)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("betas", 0.9),
        ("betas", None),
        ("max_grad_norm", "1"),
        ("seed", None),
        ("seed", 1.5),
        ("seed", 2**70),
    ],
)
def test_what_is_no_number_is_refused_by_name(name, value):
    model = smt_ext.patch(mlp(), mlp_plan())
    with pytest.raises(ValueError, match=f"{name} is "):
        smt_ext.SparseAdamW(model, lr=0.1, **{name: value})
