"""What planning keeps for the automatic learning rate, and the rate made of it."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch

import smt_ext
from models import mlp, tiny_llama, token_batch
from smt_ext import BlockPlan, PlanError, SparseAdamW
from smt_ext.optim.learning_rate import (
    auto_factor,
    auto_learning_rate,
    explain_learning_rate,
    rate,
)
from smt_ext.planning.make_plan import PRESETS

BATCHES = [
    (torch.randn(5 + i, 96, dtype=torch.float64), torch.randn(5 + i, 50, dtype=torch.float64))
    for i in range(3)
]
SETTINGS = {"budget": "5 blocks", "block_size": 32, "targets": "all-linear", "progress": False}


def loss_fn(model, batch):
    x, target = batch
    return (model(x) - target).square().mean()


def plan_of_mlp(batches=BATCHES, **settings):
    return smt_ext.make_plan(
        mlp(torch.float64), batches, loss_fn=loss_fn, **{**SETTINGS, **settings}
    )


def dense_statistics(plan):
    """Mean loss, and mean |dense gradient| over each module's planned blocks, edges included."""
    model = mlp(torch.float64)
    losses, sums = [], dict.fromkeys(plan.layers, 0.0)
    for batch in BATCHES:
        model.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        losses.append(loss.item())
        for name, layer in plan.layers.items():
            grad = model.get_submodule(name).weight.grad
            for row, col in layer.blocks:
                block = grad[32 * row : 32 * row + 32, 32 * col : 32 * col + 32]
                sums[name] += float(block.abs().sum())
    means = {n: s / len(BATCHES) / plan.layers[n].num_parameters for n, s in sums.items()}
    return float(np.mean(losses)), means


@pytest.mark.parametrize("metric", ["mean_abs", "abs_mean", "l1", "l2", "weight", "random"])
def test_every_metric_with_a_backward_keeps_loss_and_gradients(metric):
    plan = plan_of_mlp(metric=metric, budget="12 blocks")  # a ragged block among them
    loss, means = dense_statistics(plan)
    assert plan.provenance["loss"] == pytest.approx(loss, rel=1e-5)
    assert plan.provenance["mean_abs_gradient"].keys() == plan.layers.keys()
    for name, mean in means.items():
        assert mean > 0
        assert plan.provenance["mean_abs_gradient"][name] == pytest.approx(mean, rel=1e-5)
    assert plan.provenance["num_batches"] == 3


def test_batches_do_not_change_what_is_drawn_or_ranked_by_weight():
    for metric in ("weight", "random"):
        assert plan_of_mlp(metric=metric).layers == plan_of_mlp(None, metric=metric).layers


def test_without_a_backward_there_are_none():
    for plan in (plan_of_mlp(None, metric="random"), plan_of_mlp(metric="wanda")):
        assert not {"loss", "mean_abs_gradient"} & plan.provenance.keys()
        with pytest.raises(PlanError, match=r"plan again with smt_ext.make_plan\(model, batches"):
            auto_learning_rate(plan)


def test_the_rate_is_of_the_loss_and_the_sum_of_gradients():
    plan = plan_of_mlp(metric="mean_abs")
    loss, means = dense_statistics(plan)
    total = sum(means[name] * layer.num_parameters for name, layer in plan.layers.items())
    assert auto_learning_rate(plan) == rate(loss, total) == 0.01  # a toy's would be too large
    assert "(the most that 'auto' gives: 0.01)" in explain_learning_rate(plan)
    large = with_gradients(plan, 1000.0)
    expected = 1.7 * loss**0.5 / (1000 * total)
    assert auto_learning_rate(large) == pytest.approx(expected, rel=1e-4)
    assert f"lr {expected:.3g} = 1.7 x sqrt" in explain_learning_rate(large)
    # It lives in the file.
    assert auto_learning_rate(BlockPlan.from_json(plan.to_json())) == auto_learning_rate(plan)


def with_gradients(plan, factor):
    means = plan.provenance["mean_abs_gradient"]
    scaled = {name: factor * mean for name, mean in means.items()}
    provenance = {**plan.provenance, "mean_abs_gradient": scaled}
    return dataclasses.replace(plan, provenance=provenance)


def test_twice_the_gradient_halves_the_rate():
    once, twice = (with_gradients(plan_of_mlp(), factor) for factor in (1000, 2000))
    assert auto_learning_rate(twice) == pytest.approx(auto_learning_rate(once) / 2)


@pytest.mark.parametrize(
    ("lr", "factor"),
    [("auto", 1), ("2x auto", 2), ("2xauto", 2), ("1.5 x auto", 1.5), (".5x auto", 0.5),
     ("0x auto", None), ("-1x auto", None), ("x auto", None), ("auto 2", None), ("", None),
     (2.0, None), (None, None)],
)  # fmt: skip
def test_times_the_automatic_rate(lr, factor):
    assert auto_factor(lr) == factor


def test_the_optimizer_takes_a_multiple_of_the_rate(caplog):
    plan = with_gradients(plan_of_mlp(), 1000)
    model = smt_ext.patch(mlp(torch.float64), plan)
    with caplog.at_level(logging.INFO, logger="smt_ext"):
        optimizer = SparseAdamW(model, lr="2x auto")
    assert optimizer.param_groups[0]["lr"] == 2 * auto_learning_rate(plan)
    assert f"lr {2 * auto_learning_rate(plan):.3g} = 2 x 1.7 x sqrt" in caplog.text


def test_a_plan_put_together_by_hand_is_refused():
    plan = plan_of_mlp(budget="15 blocks", allocation="uniform")
    means = dict(plan.provenance["mean_abs_gradient"])
    del means["up_proj"]
    broken = dataclasses.replace(plan, provenance={**plan.provenance, "mean_abs_gradient": means})
    with pytest.raises(PlanError, match=r"no mean .gradient. for 'up_proj'"):
        auto_learning_rate(broken)
    zero = dataclasses.replace(
        plan, provenance={**plan.provenance, "mean_abs_gradient": dict.fromkeys(plan.layers, 0.0)}
    )
    with pytest.raises(PlanError, match=r"over the trained entries is 0\.0"):
        auto_learning_rate(zero)
    negative = dataclasses.replace(plan, provenance={**plan.provenance, "loss": -1.0})
    with pytest.raises(PlanError, match=r"was -1\.0, and lr='auto' needs one above 0"):
        auto_learning_rate(negative)


def test_the_optimizer_takes_the_rate_of_its_models_plan(caplog):
    plan = plan_of_mlp()
    model = smt_ext.patch(mlp(torch.float64), plan)
    with caplog.at_level(logging.INFO, logger="smt_ext"):
        optimizer = SparseAdamW(model, lr="auto")
    assert optimizer.param_groups[0]["lr"] == auto_learning_rate(plan)
    assert explain_learning_rate(plan) in caplog.text
    with pytest.raises(ValueError, match="lr is 'fast', expected a number, 'auto', or such as"):
        SparseAdamW(model, lr="fast")
    with pytest.raises(ValueError, match="pass the patched model, not parameters"):
        SparseAdamW([m.blocks for m in smt_ext.smt_modules(model).values()], lr="auto")


def test_presets_are_defaults_that_arguments_overrule():
    batches = [token_batch(seed=seed) for seed in range(2)]
    settings = {"budget": "20% of targets", "progress": False}
    for name, preset in PRESETS.items():
        given = {
            "metric": preset.metric, "unit": preset.unit, "allocation": preset.allocation,
            "targets": preset.targets, "block_size": preset.block_size,
        }  # fmt: skip
        plan = smt_ext.make_plan(tiny_llama(), batches, preset=name, **settings)
        alike = smt_ext.make_plan(tiny_llama(), batches, **given, **settings)
        assert plan.fingerprint == alike.fingerprint
        assert plan.provenance["preset"] == name
        assert {**plan.provenance, "preset": None} == dict(alike.provenance)
        assert given == {key: _as_given(plan.provenance[key]) for key in given}
    default = smt_ext.make_plan(tiny_llama(), batches, **settings)
    assert default.fingerprint == smt_ext.make_plan(
        tiny_llama(), batches, preset="paper", **settings
    ).fingerprint  # fmt: skip
    overruled = smt_ext.make_plan(
        tiny_llama(), batches, preset="recommended", block_size=16, targets="v", **settings
    )
    assert set(overruled.layers) == {f"model.layers.{i}.self_attn.v_proj" for i in range(2)}
    assert {layer.block_size for layer in overruled.layers.values()} == {16}
    with pytest.raises(PlanError, match="preset is 'best', expected one of paper, recommended"):
        smt_ext.make_plan(tiny_llama(), batches, preset="best", **settings)


def _as_given(value):
    return tuple(value) if isinstance(value, list) else value
