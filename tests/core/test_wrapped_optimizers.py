"""What people put around optimizers (averages, Lookahead, SAM, scalers) trains as on dense weights.

Each procedure gets a model and the parameters that train, and returns losses. It runs once on blocks
that cover a weight and once on the dense weight; float64, so that both agree to rounding.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import smt_ext
from models import mlp
from smt_ext import PatchError

X = torch.randn(8, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
PLAN = smt_ext.BlockPlan(
    {"up_proj": smt_ext.LayerPlan((64, 96), 32, tuple((r, c) for r in range(2) for c in range(3)))}
)


def loss_of(model):
    return (model(X) - 1).square().mean()


def evaluated(model):
    with torch.no_grad():
        return loss_of(model).item()


def step(model, optimizer):
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    optimizer.step()
    return loss.item()


def adam(params):
    return torch.optim.Adam(params, lr=1e-2)


def lookahead(model, params):
    """As most write it: no subclass of Optimizer, and ``.data`` throughout."""
    inner, losses = adam(params), []
    slow = [p.data.clone() for p in params]
    for count in range(6):
        losses.append(step(model, inner))
        if count % 2:
            for p, q in zip(params, slow, strict=True):
                q.add_(p.data - q, alpha=0.5)
                p.data.copy_(q)
            losses.append(evaluated(model))
    return losses


def ema_swap(model, params):
    """Evaluate with the average, then go on with the weights of training."""
    inner, losses = adam(params), []
    shadow = [p.data.clone() for p in params]
    for _ in range(3):
        losses.append(step(model, inner))
        for s, p in zip(shadow, params, strict=True):
            s.mul_(0.5).add_(p.data, alpha=0.5)
        kept = [p.data.clone() for p in params]
        for p, s in zip(params, shadow, strict=True):
            p.data.copy_(s)
        losses.append(evaluated(model))
        for p, k in zip(params, kept, strict=True):
            p.data.copy_(k)
        losses.append(evaluated(model))
    return losses


def sam(model, params):
    inner, losses = adam(params), []
    for _ in range(3):
        inner.zero_grad()
        loss_of(model).backward()
        old = [p.data.clone() for p in params]
        for p in params:
            p.data.add_(p.grad, alpha=0.1)
        inner.zero_grad()
        loss_of(model).backward()
        for p, o in zip(params, old, strict=True):
            p.data = o
        inner.step()
        losses.append(evaluated(model))
    return losses


def averaged(model, params, **settings):
    inner, losses = adam(params), []
    schedule = SWALR(inner, swa_lr=5e-3)
    average = AveragedModel(model, **settings)
    for _ in range(4):
        step(model, inner)
        average.update_parameters(model)
        schedule.step()
        losses.append(evaluated(average))
    update_bn([X], average)
    model.load_state_dict(average.module.state_dict())
    losses += [evaluated(model), step(model, inner), evaluated(model)]
    return losses


def ema_of_torch(model, params):
    return averaged(model, params, multi_avg_fn=get_ema_multi_avg_fn(0.5))


def scaled(model, params):
    """A scaler that meets an inf in its second step."""
    inner, losses = adam(params), []
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for count in range(4):
        inner.zero_grad()
        scaler.scale(loss_of(model)).backward()
        if count == 1:
            params[0].grad.view(-1)[0] = float("inf")
        scaler.unscale_(inner)
        torch.nn.utils.clip_grad_norm_(params, 0.01)
        scaler.step(inner)
        scaler.update()
        losses.append(evaluated(model))
    return losses


def by_hand(model, params):
    """Gradient descent without an optimizer, in every spelling."""
    losses = []
    for way in range(6):
        model.zero_grad()
        loss = loss_of(model)
        loss.backward()
        losses.append(loss.item())
        for p in params:
            if way == 0:
                p.data -= 0.1 * p.grad
            elif way == 1:
                p.data = p.data - 0.1 * p.grad
            elif way == 2:
                p.detach().sub_(p.grad, alpha=0.1)
            elif way == 3:
                with torch.inference_mode():
                    p.sub_(p.grad, alpha=0.1)
            elif way == 4:
                with torch.no_grad():
                    p[:] = p - 0.1 * p.grad
            else:
                p.data.numpy()[...] -= 0.1 * p.grad.numpy()
        losses.append(evaluated(model))
    return losses


PROCEDURES = [lookahead, ema_swap, sam, averaged, ema_of_torch, scaled, by_hand]


@pytest.mark.parametrize("procedure", PROCEDURES, ids=lambda p: p.__name__)
def test_trains_as_its_dense_twin(procedure):
    found = []
    for sparse in (True, False):
        model = mlp(torch.float64)
        if sparse:
            smt_ext.patch(model, PLAN)
        model.requires_grad_(False)
        trained = model.up_proj.blocks if sparse else model.up_proj.weight
        found.append(procedure(model, [trained.requires_grad_(True)]))
    assert len(set(found[1])) > 2, "the procedure moves the weights"
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_looking_at_data_between_forward_and_backward_leaves_graphs_valid():
    model = smt_ext.patch(mlp(torch.float64), PLAN)
    blocks = model.up_proj.blocks
    first = loss_of(model)
    assert blocks.data.norm() > 0
    second = loss_of(model)
    (first + second).backward()
    version = model.up_proj.weight._version
    assert blocks.data.norm() > 0
    evaluated(model)
    assert model.up_proj.weight._version == version
    blocks.data.mul_(2)
    evaluated(model)
    third = loss_of(model)
    blocks.data.mul_(2)
    evaluated(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        third.backward()


def test_a_compiled_graph_refuses_what_came_by_data():
    torch._dynamo.reset()
    model = smt_ext.patch(mlp(torch.float64), PLAN)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    run(X)
    model.up_proj.blocks.data.mul_(2)
    with pytest.raises(PatchError, match=r"up_proj.*sync_weights"):
        run(X)
    smt_ext.sync_weights(model)
    assert torch.equal(run(X).detach(), model(X).detach())
    torch._dynamo.reset()


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "new parameter", "to"])
def test_copies_notice_too(way):
    model = smt_ext.patch(mlp(torch.float64), PLAN)
    if way == "deepcopy":
        model = copy.deepcopy(model)
    elif way == "pickle":
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        model = torch.load(file, weights_only=False)
    elif way == "to":
        model.float().double()
    else:
        model.up_proj.blocks = torch.nn.Parameter(model.up_proj.blocks.detach().clone())
    before = evaluated(model)
    model.up_proj.blocks.data.mul_(2)
    assert evaluated(model) != before
    after = model.up_proj.blocks.detach()[0]
    assert torch.equal(model.up_proj.weight.detach()[:32, :32], after)
