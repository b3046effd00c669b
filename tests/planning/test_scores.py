"""Every metric against the dense gradient, input or weight that it stands for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import smt_ext
from models import mlp, tiny_llama, token_batch
from smt_ext import PlanError
from smt_ext.planning.scoring import METRICS, score_blocks

SIZE = 32
BATCHES = 3


def loss_fn(model, batch):
    x, target = batch
    return (model(x) - target).square().mean()


def mlp_batches(dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(5 + i, 96, generator=generator, dtype=dtype),
            torch.randn(5 + i, 50, generator=generator, dtype=dtype),
        )
        for i in range(BATCHES)
    ]


def dense_gradients(model, batches):
    """Per batch, module name -> (N, K) gradient."""
    grads = []
    for batch in batches:
        model.zero_grad()
        loss_fn(model, batch).backward()
        grads.append({n: m.weight.grad.clone() for n, m in model.named_children()})
    model.zero_grad()
    return grads


def inputs_of(model, batches):
    """Module name -> all rows of its input, (T, K)."""
    seen = {name: [] for name, _ in model.named_children()}
    hooks = [
        m.register_forward_pre_hook(lambda m, args, n=n: seen[n].append(args[0].detach()))
        for n, m in model.named_children()
    ]
    for x, _ in batches:
        model(x)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def by_block(dense, reduce):
    """``reduce`` of every block of an (N, K) tensor; (R, C)."""
    rows = [
        [float(reduce(block)) for block in band.split(SIZE, dim=1)]
        for band in dense.split(SIZE, dim=0)
    ]
    return np.array(rows)


def scores(model, metric, batches, **options):
    targets = dict(model.named_children())
    found = score_blocks(
        model, targets, batches, block_size=SIZE, metric=metric, loss_fn=loss_fn, progress=False,
        **options,
    )  # fmt: skip
    return {name: s.values for name, s in found.scores.items()}


def mean_over_batches(grads, name, reduce):
    return np.mean([by_block(g[name], reduce) for g in grads], axis=0)


REFERENCES = {
    "mean_abs": lambda grads, name: mean_over_batches(grads, name, lambda b: b.abs().mean()),
    "abs_mean": lambda grads, name: np.abs(mean_over_batches(grads, name, lambda b: b.mean())),
    "l1": lambda grads, name: mean_over_batches(grads, name, lambda b: b.abs().sum()),
    "l2": lambda grads, name: mean_over_batches(grads, name, lambda b: b.square().sum().sqrt()),
}


@pytest.mark.parametrize("metric", REFERENCES)
def test_gradient_metrics_equal_the_dense_gradient(metric):
    model, batches = mlp(torch.float64), mlp_batches()
    grads = dense_gradients(model, batches)
    found = scores(model, metric, batches)
    for name in found:
        np.testing.assert_allclose(
            found[name], REFERENCES[metric](grads, name), rtol=1e-12, atol=1e-16
        )


def test_activation_is_the_mean_magnitude_of_the_blocks_columns():
    model, batches = mlp(), mlp_batches(torch.float32)
    found = scores(model, "activation", batches)
    for name, x in inputs_of(model, batches).items():
        want = np.array([float(part.abs().mean()) for part in x.double().split(SIZE, dim=1)])
        np.testing.assert_allclose(found[name], np.broadcast_to(want, found[name].shape), rtol=1e-5)


def test_wanda_is_weight_times_input_norm():
    model, batches = mlp(), mlp_batches(torch.float32)
    found = scores(model, "wanda", batches)
    for name, x in inputs_of(model, batches).items():
        weight = getattr(model, name).weight.detach().double()
        scaled = weight * x.double().square().mean(0).sqrt()
        np.testing.assert_allclose(
            found[name], by_block(scaled, lambda b: b.abs().mean()), rtol=1e-5
        )


def test_weight_is_the_mean_magnitude():
    model = mlp()
    found = scores(model, "weight", None)
    for name, values in found.items():
        weight = getattr(model, name).weight.detach().double()
        np.testing.assert_allclose(values, by_block(weight, lambda b: b.abs().mean()), rtol=1e-6)


def test_random_depends_on_seed_and_name_alone():
    first, again, other = (scores(mlp(seed=s), "random", None, seed=r) for s, r in
                           ((0, 1), (5, 1), (0, 2)))  # fmt: skip
    for name in first:
        assert np.array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])
    assert not np.array_equal(first["gate_proj"], first["up_proj"])


@pytest.mark.parametrize("unit", ["column", "row"])
def test_random_units_are_drawn_whole(unit):
    """The mean of a draw a block would lie near a half for units of many blocks, and never win."""
    model = nn.ModuleDict({"up_proj": nn.Linear(512, 16), "down_proj": nn.Linear(16, 512)})
    for name in model:
        drawn = []
        for seed in range(20):
            values = scores(model, "random", None, seed=seed, unit=unit)[name]
            units = values if unit == "row" else values.T
            assert (units == units[:, :1]).all()
            drawn += units[:, 0].tolist()
        assert min(drawn) < 0.2
        assert max(drawn) > 0.8


@pytest.mark.parametrize("metric", METRICS)
def test_planning_leaves_the_model_as_it_was(metric):
    model = mlp()
    model.up_proj.weight.requires_grad_(False)
    model.gate_proj.weight.grad = torch.full((64, 96), 3.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    attributes = {n: (type(m), set(m.__dict__)) for n, m in model.named_modules()}
    model.eval()
    smt_ext.make_plan(
        model, mlp_batches(torch.float32), budget="3 blocks", block_size=SIZE, metric=metric,
        targets="all-linear", loss_fn=loss_fn, progress=False,
    )  # fmt: skip
    assert not model.training
    assert flags == {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    assert attributes == {n: (type(m), set(m.__dict__)) for n, m in model.named_modules()}
    assert torch.equal(model.gate_proj.weight.grad, torch.full((64, 96), 3.0))
    assert model.up_proj.weight.grad is None
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_model_is_put_back_when_a_batch_fails():
    model = mlp()

    def fails(model, batch):
        model(batch[0])
        raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own"):
        smt_ext.make_plan(
            model, mlp_batches(torch.float32), budget="3 blocks", block_size=SIZE,
            targets="all-linear", loss_fn=fails, progress=False,
        )  # fmt: skip
    assert [type(m) for m in model.children()] == [nn.Linear] * 3
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_language_model_plans_alike_with_gradient_checkpointing(dtype, checkpointing):
    plain = tiny_llama(dtype)
    batches = [token_batch(seed) for seed in range(2)]
    options = {"budget": "5 blocks", "block_size": SIZE, "progress": False}
    want = smt_ext.make_plan(plain, batches, **options)
    model = tiny_llama(dtype)
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    plan = smt_ext.make_plan(model, batches, **options)
    assert plan.layers == want.layers
    assert plan.num_blocks == 5


def test_siblings_are_recorded_as_input_groups():
    plan = smt_ext.make_plan(
        tiny_llama(), [token_batch()], budget="50% of targets", block_size=16,
        targets="all-linear", allocation="uniform", progress=False,
    )  # fmt: skip
    groups = {tuple(name.rpartition(".")[2] for name in group) for group in plan.input_groups}
    assert groups == {("k_proj", "q_proj", "v_proj"), ("gate_proj", "up_proj")}


def test_the_same_batches_give_the_same_plan_at_any_number_of_threads():
    plans = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        plans.append(
            smt_ext.make_plan(
                tiny_llama(), [token_batch()], budget="7 blocks", block_size=16, progress=False
            )
        )
    assert plans[0].layers == plans[1].layers == plans[2].layers


@pytest.mark.parametrize("num_batches", [1, 2, None])
def test_at_most_num_batches_are_taken(num_batches):
    taken = []

    def stream():
        for seed in range(3):
            taken.append(seed)
            yield token_batch(seed)

    plan = smt_ext.make_plan(
        tiny_llama(), stream(), budget="3 blocks", block_size=16, num_batches=num_batches,
        progress=False,
    )  # fmt: skip
    assert plan.provenance["num_batches"] == len(taken) == (num_batches or 3)


def test_a_progress_bar_counts_the_batches(capfd):
    smt_ext.make_plan(tiny_llama(), [token_batch()] * 2, budget="3 blocks", block_size=16)
    assert "2/2" in capfd.readouterr().err


def test_an_endless_loader_is_left_after_a_few_batches():
    plan = smt_ext.make_plan(
        tiny_llama(), itertools.repeat(token_batch()), budget="3 blocks", block_size=16,
        progress=False,
    )  # fmt: skip
    assert plan.provenance["num_batches"] == 5


def test_an_unknown_metric_lists_the_known_ones():
    with pytest.raises(PlanError, match="'gradient', expected one of mean_abs, abs_mean"):
        smt_ext.make_plan(tiny_llama(), [token_batch()], metric="gradient")
