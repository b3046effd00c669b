"""Parameters that train whole beside the blocks: chosen, measured, trained, taken back."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

import smt_ext
from models import mlp, tiny_llama, token_batch
from smt_ext import BlockPlan, PlanError, SparseAdamW
from smt_ext.nn.patching import parameters_beside
from smt_ext.optim.learning_rate import auto_learning_rate, explain_learning_rate, rate, rate_beside

SETTINGS = {"budget": "4 blocks", "block_size": 32, "targets": "all-linear", "progress": False}
NORMS = "*norm*"


def batches(count: int = 2):
    return [
        {**token_batch(seed=i), "labels": token_batch(seed=i)["input_ids"]} for i in range(count)
    ]


def plan_of(model, **settings):
    return smt_ext.make_plan(model, batches(), **{**SETTINGS, "also_train": NORMS, **settings})


def loss_of(model, seed: int = 0):
    return model(**token_batch(seed)).loss


def norms(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if "norm" in name}


@pytest.fixture
def patched():
    model = tiny_llama()
    plan = plan_of(model)
    return smt_ext.patch(model, plan), plan


def train(model, optimizer, steps: int = 3):
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step % 2).backward()
        optimizer.step()


def test_the_plan_names_them_with_their_gradients() -> None:
    model = tiny_llama()
    before = [p.requires_grad for p in model.parameters()]
    plan = plan_of(model)
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())
    assert dict(plan.also_train) == {n: tuple(p.shape) for n, p in norms(model).items()}
    assert plan.num_beside == sum(p.numel() for p in norms(model).values()) > 0
    sums = dict.fromkeys(plan.also_train, 0.0)
    for seed in range(2):
        model.zero_grad()
        loss_of(model, seed).backward()
        for name, parameter in norms(model).items():
            sums[name] += float(parameter.grad.abs().mean()) / 2
    for name, mean in sums.items():
        assert plan.provenance["mean_abs_gradient"][name] == pytest.approx(mean, rel=1e-4)
    trained = plan.num_parameters + plan.num_beside
    total = sum(p.numel() for p in model.parameters())
    assert plan.provenance["percent_of_model"] == pytest.approx(100 * trained / total, rel=1e-5)


def test_biases_of_the_targets_can_train_too() -> None:
    x, target = torch.randn(7, 96, dtype=torch.float64), torch.randn(7, 50, dtype=torch.float64)
    model = mlp(torch.float64)

    def loss_fn(model, batch):
        return (model(x) - target).square().mean()

    plan = smt_ext.make_plan(model, [0], loss_fn=loss_fn, **SETTINGS, also_train="*.bias")
    loss_fn(model, 0).backward()
    for name in ("gate_proj.bias", "down_proj.bias"):
        mean = float(model.get_parameter(name).grad.abs().mean())
        assert plan.provenance["mean_abs_gradient"][name] == pytest.approx(mean, rel=1e-5)
    before = model.down_proj.bias.detach().clone()
    smt_ext.patch(model, plan)
    optimizer = SparseAdamW(model, lr=0.1)
    loss_fn(model, 0).backward()
    optimizer.step()
    assert (model.down_proj.bias - before).abs().min() > 0.05


def test_a_plan_is_the_same_file_without_and_reads_back_with_them() -> None:
    plan, without = plan_of(tiny_llama()), plan_of(tiny_llama(), also_train=())
    assert "also_train" not in without.to_json()
    assert BlockPlan.from_json(plan.to_json()) == copy.deepcopy(plan) == plan
    assert plan.layers == without.layers
    assert plan.fingerprint != without.fingerprint
    assert f"{plan.num_beside:,} parameters" in str(plan)
    with pytest.raises(PlanError, match="shape of 'x' is"):
        dataclasses.replace(plan, also_train={"x": (0,)})
    with pytest.raises(PlanError, match="holds blocks too"):
        dataclasses.replace(plan, also_train={f"{next(iter(plan.layers))}.weight": (4, 4)})


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("*nothing*", "no parameter matches .*There are: .*norm.weight"),
        ("*q_proj*", "is the weight of the target"),
        ("re:(", "no regular expression"),
    ],
)
def test_what_cannot_train_whole_is_named(patterns: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_of(tiny_llama(), also_train=patterns)


def test_tied_embeddings_are_refused() -> None:
    with pytest.raises(PlanError, match=r"shared by several modules"):
        plan_of(tiny_llama(), also_train="*embed_tokens*")


def test_a_shallow_plan_leaves_those_below_alone() -> None:
    plan = plan_of(tiny_llama(), depth=0.5)
    layers = {int(name.split(".")[2]) for name in plan.also_train if ".layers." in name}
    assert layers == {int(n.split(".")[2]) for n in plan.layers} == {1}
    assert "model.norm.weight" in plan.also_train


def test_a_plan_for_another_model_is_refused() -> None:
    plan = plan_of(tiny_llama())
    wrong = dataclasses.replace(plan, also_train={**plan.also_train, "model.norm.weight": (3,)})
    model = tiny_llama()
    with pytest.raises(PlanError, match=r"'model.norm.weight' of shape \(3,\)"):
        smt_ext.patch(model, wrong)
    assert not smt_ext.smt_modules(model)


def test_a_plan_of_an_untied_model_changes_nothing_in_a_tied_one() -> None:
    untied = tiny_llama(tie_word_embeddings=False)
    plan = plan_of(untied, targets="qkv", also_train="lm_head.weight")
    tied = tiny_llama()
    with pytest.raises(PlanError, match=r"lm_head\.weight.*has none"):
        smt_ext.patch(tied, plan)
    assert not smt_ext.smt_modules(tied)


def test_they_train_as_torchs_adamw_would(patched) -> None:
    model, _ = patched
    base = {n: p.detach().clone() for n, p in parameters_beside(model).items()}
    twin = copy.deepcopy(model)
    options = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-7}
    train(model, SparseAdamW(model, also_lr=3e-2, weight_decay=0.1, **options))
    assert all(p.requires_grad for p in parameters_beside(twin).values())
    blocks = [m.blocks for m in smt_ext.smt_modules(twin).values()]
    beside = list(parameters_beside(twin).values())
    groups = [
        {"params": blocks, "weight_decay": 0.1},
        {"params": beside, "lr": 3e-2, "weight_decay": 0.0},
    ]
    train(twin, torch.optim.AdamW(groups, **options))
    for name, parameter in parameters_beside(model).items():
        torch.testing.assert_close(parameter, parameters_beside(twin)[name], rtol=1e-5, atol=1e-6)
        assert (parameter - base[name]).abs().max() > 1e-2


def test_clipping_counts_them(patched) -> None:
    model, _ = patched
    optimizer = SparseAdamW(model, lr=1e-3, max_grad_norm=1e-3)
    loss_of(model).backward()
    grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    kept = [g.clone() for g in grads]
    optimizer.step()
    assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True)), "gradients stay"
    parameter = next(iter(parameters_beside(model).values()))
    moment = optimizer.state[parameter]["exp_avg"]
    torch.testing.assert_close(moment, 0.1 * parameter.grad * (1e-3 / norm), rtol=1e-3, atol=0)


def test_a_step_with_a_nan_leaves_them_alone(patched) -> None:
    model, _ = patched
    optimizer = SparseAdamW(model, lr=1e-2)
    train(model, optimizer, 1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.zero_grad()
    loss_of(model).backward()
    next(iter(smt_ext.smt_modules(model).values())).blocks.grad[0, 0, 0] = math.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    one = parameters_beside(model)["model.norm.weight"]
    assert float(optimizer.state[one]["step"]) == 1


def test_half_precision_ones_have_master_values() -> None:
    model = tiny_llama().to(torch.bfloat16)
    smt_ext.patch(model, plan_of(model))
    optimizer = SparseAdamW(model, lr=1e-5, also_lr=1e-4)
    parameter = parameters_beside(model)["model.norm.weight"]
    before = parameter.detach().clone()
    for _ in range(60):  # one step is far below half a unit in the last place
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    master = optimizer.state[parameter]["master"]
    assert (before.float() - master).abs().mean() == pytest.approx(60e-4, rel=1e-3)
    assert torch.equal(parameter, master.bfloat16())
    assert not torch.equal(parameter, before)


def test_state_goes_on_bit_for_bit(patched) -> None:
    model, _ = patched
    optimizer = SparseAdamW(model, lr=1e-2)
    train(model, optimizer, 2)
    twin = copy.deepcopy(model)
    other = SparseAdamW(twin, lr=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 2)
    train(twin, other, 2)
    for (name, one), two in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_they_come_back_exactly(patched) -> None:
    model, _ = patched
    base = {n: p.detach().clone() for n, p in tiny_llama().named_parameters()}
    flags = {n: p.requires_grad for n, p in tiny_llama().named_parameters()}
    train(model, SparseAdamW(model, lr=1e-2))
    trained = {n: p.detach().clone() for n, p in norms(model).items()}
    waiting = loss_of(model)
    with smt_ext.original_weights(model):
        assert all(torch.equal(p, base[n]) for n, p in norms(model).items())
        assert torch.equal(model(**token_batch()).logits, tiny_llama()(**token_batch()).logits)
    assert all(torch.equal(p, trained[n]) for n, p in norms(model).items())
    waiting.backward()  # the graph of before is still valid
    smt_ext.unpatch(model, restore=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, base[name]), name
        assert parameter.requires_grad == flags[name]


def test_unpatching_keeps_them(patched) -> None:
    model, _ = patched
    train(model, SparseAdamW(model, lr=1e-2))
    trained = {n: p.detach().clone() for n, p in norms(model).items()}
    smt_ext.unpatch(model)
    assert all(torch.equal(p, trained[n]) for n, p in norms(model).items())


def test_flags_of_before_come_back() -> None:
    model = tiny_llama()
    plan = plan_of(model)
    model.requires_grad_(False)
    smt_ext.patch(model, plan)
    assert all(p.requires_grad for p in norms(model).values())
    smt_ext.unpatch(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_their_rate_is_made_of_their_own_gradients(patched) -> None:
    model, plan = patched
    means = plan.provenance["mean_abs_gradient"]
    total = sum(means[n] * math.prod(shape) for n, shape in plan.also_train.items())
    expected = rate(plan.provenance["loss"], total)
    assert rate_beside(plan, auto_learning_rate(plan)) == pytest.approx(expected)
    groups = SparseAdamW(model, lr="auto").param_groups
    assert [g["lr"] for g in groups] == [auto_learning_rate(plan), pytest.approx(expected)]
    assert f"{expected:.3g} for {plan.num_beside:,} parameters" in explain_learning_rate(plan)
    half = SparseAdamW(model, lr=auto_learning_rate(plan) / 2).param_groups
    assert half[1]["lr"] == pytest.approx(expected / 2)
    assert half[1]["weight_decay"] == 0.0
    unknown = dataclasses.replace(plan, provenance={})
    assert rate_beside(unknown, 0.25) == 0.25


def test_their_rate_needs_them(patched) -> None:
    model, plan = patched
    with pytest.raises(ValueError, match="also_lr is for a model"):
        SparseAdamW(list(parameters_beside(model).values()), lr=0.1, also_lr=0.1)
    smt_ext.unpatch(model)
    smt_ext.patch(model, dataclasses.replace(plan, also_train={}))
    with pytest.raises(ValueError, match="nothing trains beside"):
        SparseAdamW(model, lr=0.1, also_lr=0.1)


def test_status_counts_them(patched) -> None:
    model, plan = patched
    status = smt_ext.status(model)
    assert status.beside == plan.num_beside
    assert status.trainable == plan.num_parameters + plan.num_beside
    assert f"{status.beside:,}" in str(status)
    bare = sum(2 * 4 * m.blocks.numel() for m in smt_ext.smt_modules(model).values())
    assert status.moment_bytes == bare + 8 * plan.num_beside


def test_a_huge_gradient_leaves_moments_finite(patched) -> None:
    model, _ = patched
    optimizer = SparseAdamW(model, lr=1e-2)
    one = parameters_beside(model)["model.norm.weight"]
    one.grad = torch.full_like(one, 1e30)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert optimizer.state[one]["exp_avg_sq"].isfinite().all()
    assert one.isfinite().all()
