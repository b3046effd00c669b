"""Laws 2, 3 and 5 on SparseAdamW, and every other optimizer through the step hook."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import smt_ext
from models import (
    MLP_LAYERS,
    blocks_of,
    llama_plan,
    mask_of,
    mlp,
    mlp_plan,
    tiny_llama,
    token_batch,
)
from smt_ext import PatchError


def backward(model, seed):
    dtype = model.gate_proj.weight.dtype
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(seed)).to(dtype)
    model(x).float().square().mean().backward()


def masked_reference(model, steps, optimizer, scheduler=None, max_grad_norm=None):
    """Dense training of ``model`` with gradients that are zero outside the selected blocks."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("weight"))
    weights = [model.get_submodule(name).weight for name in MLP_LAYERS]
    masks = [mask_of(layer) for layer in MLP_LAYERS.values()]
    start = [w.detach().clone() for w in weights]
    dense = optimizer(weights)
    schedule = scheduler(dense) if scheduler else None
    for step in range(steps):
        dense.zero_grad()
        backward(model, step)
        for weight, mask in zip(weights, masks, strict=True):
            weight.grad.mul_(mask)
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(weights, max_grad_norm)
        dense.step()
        # Decoupled decay also shrinks masked entries; those do not belong to the model that trains.
        with torch.no_grad():
            for weight, mask, w0 in zip(weights, masks, start, strict=True):
                weight.copy_(torch.where(mask, weight, w0))
        if schedule:
            schedule.step()
    return model


HYPER = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("scheduled", [False, True])
def test_float64_trajectory_is_that_of_dense_adamw_on_masked_gradients(max_grad_norm, scheduled):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)

    reference = masked_reference(
        mlp(torch.float64),
        8,
        lambda weights: torch.optim.AdamW(weights, foreach=False, **HYPER),
        schedule if scheduled else None,
        max_grad_norm,
    )
    model = smt_ext.patch(mlp(torch.float64), mlp_plan())
    optimizer = smt_ext.SparseAdamW(model, **HYPER, max_grad_norm=max_grad_norm)
    scheduler = schedule(optimizer) if scheduled else None
    for step in range(8):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        if scheduler:
            scheduler.step()
    for name in MLP_LAYERS:
        trained, expected = model.get_submodule(name).weight, reference.get_submodule(name).weight
        assert (expected - mlp(torch.float64).get_submodule(name).weight).abs().max() > 1e-3
        torch.testing.assert_close(trained, expected, rtol=1e-12, atol=1e-14)


def test_decay_to_the_base_takes_back_a_share_of_the_change():
    def pulled(weights):
        base = [w.detach().clone() for w in weights]
        dense = torch.optim.AdamW(weights, foreach=False, **{**HYPER, "weight_decay": 0.0})

        def pull(*_):
            for weight, to in zip(weights, base, strict=True):
                weight.detach().lerp_(to, HYPER["lr"] * 20)

        dense.register_step_pre_hook(pull)
        return dense

    reference = masked_reference(mlp(torch.float64), 8, pulled)
    model = smt_ext.patch(mlp(torch.float64), mlp_plan())
    optimizer = smt_ext.SparseAdamW(model, **{**HYPER, "weight_decay": 20}, decay_to="base")
    for step in range(8):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    for name in MLP_LAYERS:
        trained, expected = model.get_submodule(name).weight, reference.get_submodule(name).weight
        torch.testing.assert_close(trained, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decay_to_the_base_leaves_it_where_no_gradient_comes(dtype):
    model = smt_ext.patch(mlp(dtype), mlp_plan())
    optimizer = smt_ext.SparseAdamW(model, lr=0.3, weight_decay=0.7, decay_to="base")
    for module in smt_ext.smt_modules(model).values():
        module.blocks.grad = torch.zeros_like(module.blocks)
    optimizer.step()
    for name, value in mlp(dtype).state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_state_of_before_decay_to_decays_to_zero():
    model = smt_ext.patch(mlp(), mlp_plan())
    optimizer = smt_ext.SparseAdamW(model, lr=0.1, weight_decay=1.0, decay_to="base")
    state = optimizer.state_dict()
    del state["param_groups"][0]["decay_to"]
    optimizer.load_state_dict(state)
    before = model.up_proj.blocks.detach().clone()
    for module in smt_ext.smt_modules(model).values():
        module.blocks.grad = torch.zeros_like(module.blocks)
    optimizer.step()
    torch.testing.assert_close(model.up_proj.blocks.detach(), 0.9 * before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_trajectory_stays_within_its_rounding(dtype):
    exact = masked_reference(
        mlp(dtype).double(), 5, lambda weights: torch.optim.AdamW(weights, foreach=False, **HYPER)
    )
    model = smt_ext.patch(mlp(dtype), mlp_plan())
    optimizer = smt_ext.SparseAdamW(model, **HYPER)
    for step in range(5):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    for name in MLP_LAYERS:
        weight = model.get_submodule(name).weight.double()
        reference = exact.get_submodule(name).weight
        # Adam's update is sign-like (|step| <= lr): a gradient entry near zero may flip its sign
        # by rounding, which moves an entry by 2 lr a step at most. The mean must be far smaller.
        assert (weight - reference).abs().max() <= 2 * 5 * HYPER["lr"]
        budget = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-3}[dtype]
        assert (weight - reference).abs().mean() <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["SparseAdamW", "AdamW", "SGD", "Adafactor"])
def test_entries_outside_the_blocks_never_change_a_bit(dtype, kind):
    model = smt_ext.patch(mlp(dtype), mlp_plan())
    before = mlp(dtype)
    if kind == "SparseAdamW":
        optimizer = smt_ext.SparseAdamW(model, lr=0.05, weight_decay=0.1)
    else:
        optimizer = getattr(torch.optim, kind)(
            [p for p in model.parameters() if p.requires_grad], lr=0.05
        )
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    for name, layer in MLP_LAYERS.items():
        module, mask = model.get_submodule(name), mask_of(layer)
        old = before.get_submodule(name)
        assert torch.equal(module.weight[~mask], old.weight[~mask])
        assert not torch.equal(module.weight[mask], old.weight[mask])
        assert torch.equal(module.read_blocks(), module.blocks.to(dtype))
        if module.bias is not None:
            assert torch.equal(module.bias, old.bias)
        padding = blocks_of(torch.ones(layer.shape), layer) == 0
        assert not module.blocks[padding].any()


def test_a_foreign_optimizer_follows_its_own_trajectory():
    reference = masked_reference(
        mlp(torch.float64), 4, lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9)
    )
    model = smt_ext.patch(mlp(torch.float64), mlp_plan())
    optimizer = torch.optim.SGD(
        [m.blocks for m in smt_ext.smt_modules(model).values()], lr=0.1, momentum=0.9
    )
    for step in range(4):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    for name in MLP_LAYERS:
        torch.testing.assert_close(
            model.get_submodule(name).weight, reference.get_submodule(name).weight
        )


def test_optimizer_state_is_for_the_blocks_only():
    model = smt_ext.patch(tiny_llama(torch.bfloat16), llama_plan(tiny_llama()))
    optimizer = smt_ext.SparseAdamW(model)
    model(**token_batch()).loss.backward()
    optimizer.step()
    entries = sum(m.blocks.numel() for m in smt_ext.smt_modules(model).values())
    tensors = {
        id(value): value
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.dim()
    }
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == 2 * 4 * entries
    assert smt_ext.status(model).moment_bytes == 2 * 4 * entries


def test_master_values_in_the_optimizer_keep_small_updates():
    for master_dtype in (None, torch.float32):
        model = smt_ext.patch(mlp(torch.bfloat16), mlp_plan(), block_dtype=torch.bfloat16)
        optimizer = smt_ext.SparseAdamW(model, lr=1e-6, master_dtype=master_dtype)
        start = model.up_proj.weight.detach().clone()
        for _ in range(600):
            model.up_proj.blocks.grad = torch.ones_like(model.up_proj.blocks)
            optimizer.step()
        mask = mask_of(MLP_LAYERS["up_proj"])
        if master_dtype is None:
            # Most entries are larger than 2^-6, where half a bfloat16 step exceeds lr.
            unchanged = (start == model.up_proj.weight)[mask].float().mean()
            assert unchanged > 0.7
            continue
        state = optimizer.state[model.up_proj.blocks]
        assert state["master"].dtype == torch.float32
        assert torch.equal(state["master"].bfloat16(), model.up_proj.blocks)
        moved = blocks_of(start.float(), MLP_LAYERS["up_proj"]) - state["master"]
        torch.testing.assert_close(moved, torch.full_like(moved, 6e-4), rtol=0.01, atol=0)


def test_layers_with_and_without_master_train_in_one_group():
    """Half-precision blocks have a master, float32 ones beside them are their own."""

    def train(names):
        model = smt_ext.patch(mlp(), mlp_plan())
        model.gate_proj.bfloat16()
        model.down_proj.bfloat16()
        start = copy.deepcopy(model.state_dict())
        blocks = [model.get_submodule(name).blocks for name in names]
        optimizer = smt_ext.SparseAdamW(blocks, **HYPER, master_dtype=torch.float32)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for name in MLP_LAYERS:
                module = model.get_submodule(name)
                grad = torch.randn(module.blocks.shape, generator=generator)
                module.blocks.grad = grad.to(module.blocks.dtype)
            optimizer.step()
        assert all(
            not torch.equal(start[f"{n}.weight"], model.get_submodule(n).weight) for n in names
        )
        masters = {n: optimizer.state[model.get_submodule(n).blocks].get("master") for n in names}
        return model, masters

    together, masters = train(tuple(MLP_LAYERS))
    assert [n for n, master in masters.items() if master is not None] == ["gate_proj", "down_proj"]
    for name in MLP_LAYERS:
        alone, own = train((name,))
        module, expected = together.get_submodule(name), alone.get_submodule(name)
        assert torch.equal(module.blocks, expected.blocks)
        assert torch.equal(module.weight, expected.weight)
        if own[name] is not None:
            assert torch.equal(masters[name], own[name])


def test_stochastic_rounding_is_unbiased_and_reproducible():
    results = []
    for _ in range(2):
        model = smt_ext.patch(mlp(torch.bfloat16), mlp_plan(), block_dtype=torch.bfloat16)
        optimizer = smt_ext.SparseAdamW(model, lr=1e-6, stochastic_rounding=True, seed=3)
        start = model.up_proj.weight.detach().clone()
        for _ in range(600):
            model.up_proj.blocks.grad = torch.ones_like(model.up_proj.blocks)
            optimizer.step()
        results.append(model.up_proj.weight.detach().clone())
    assert torch.equal(*results)
    mask = mask_of(MLP_LAYERS["up_proj"])
    assert (start - results[0]).float()[mask].mean().item() == pytest.approx(6e-4, rel=0.1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_gradient_skips_the_step_and_is_counted(bad):
    model = smt_ext.patch(mlp(), mlp_plan())
    optimizer = smt_ext.SparseAdamW(model, max_grad_norm=1.0)
    backward(model, 0)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict()["state"])
    weights = copy.deepcopy(model.state_dict())
    model.up_proj.blocks.grad[1, 3, 5] = bad
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    for index, saved in state.items():
        for key, value in saved.items():
            assert torch.equal(optimizer.state_dict()["state"][index][key], value)
    optimizer.zero_grad()
    backward(model, 1)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert not torch.equal(model.up_proj.weight, weights["up_proj.weight"])
    assert torch.isfinite(model.up_proj.weight).all()


@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler(overflow):
    scaled, plain = (smt_ext.patch(mlp(), mlp_plan()) for _ in range(2))
    optimizers = [smt_ext.SparseAdamW(m, lr=1e-2, max_grad_norm=0.1) for m in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randn(5, 96)
    loss = scaled(x).square().mean()
    scaler.scale(loss * float("inf") if overflow else loss).backward()
    scaler.step(optimizers[0])
    scaler.update()
    if overflow:
        assert optimizers[0].skipped_steps == 1
        assert scaler.get_scale() == 2.0**9
        assert torch.equal(scaled.up_proj.weight, mlp().up_proj.weight)
        return
    plain(x).square().mean().backward()
    optimizers[1].step()
    assert optimizers[0].last_grad_norm == pytest.approx(optimizers[1].last_grad_norm, rel=1e-5)
    torch.testing.assert_close(scaled.up_proj.weight, plain.up_proj.weight)


def test_closure_is_evaluated_with_gradients():
    model = smt_ext.patch(mlp(), mlp_plan())
    optimizer = smt_ext.SparseAdamW(model)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 96)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert optimizer.last_grad_norm > 0


def test_a_layer_without_gradient_keeps_its_own_step_count():
    model = smt_ext.patch(mlp(torch.float64), mlp_plan())
    optimizer = smt_ext.SparseAdamW(model, **HYPER)
    weights = {n: m.weight.detach().clone().requires_grad_() for n, m in model.named_children()}
    dense = torch.optim.AdamW(weights.values(), foreach=False, **HYPER)
    active = [("gate_proj", "up_proj", "down_proj"), ("gate_proj",), ("up_proj", "down_proj")]
    for step, names in enumerate(active):
        optimizer.zero_grad()
        dense.zero_grad()
        for name in names:
            grad = torch.randn(MLP_LAYERS[name].shape, dtype=torch.float64) + step
            weights[name].grad = grad
            model.get_submodule(name).blocks.grad = blocks_of(grad, MLP_LAYERS[name])
        optimizer.step()
        dense.step()
    for name, layer in MLP_LAYERS.items():
        torch.testing.assert_close(
            model.get_submodule(name).blocks, blocks_of(weights[name], layer)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip_continues_bit_for_bit(dtype):
    def fresh():
        model = smt_ext.patch(mlp(dtype), mlp_plan(), block_dtype=dtype)
        return model, smt_ext.SparseAdamW(model, lr=1e-2, master_dtype=torch.float32)

    straight, optimizer = fresh()
    for step in range(2):
        optimizer.zero_grad()
        backward(straight, step)
        optimizer.step()
    resumed, second = fresh()
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, opt in ((straight, optimizer), (resumed, second)):
        opt.zero_grad()
        backward(model, 7)
        opt.step()
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    for key, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            loaded = second.state_dict()["state"][key][name]
            assert loaded.dtype == value.dtype
            assert torch.equal(loaded, value)


def test_state_of_another_plan_is_refused():
    model = smt_ext.patch(mlp(), mlp_plan())
    optimizer = smt_ext.SparseAdamW(model)
    backward(model, 0)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"][:1]
    with pytest.raises(ValueError, match=r"exp_avg.*another plan"):
        smt_ext.SparseAdamW(model).load_state_dict(state)


def test_parameter_groups():
    model = smt_ext.patch(mlp(), mlp_plan())
    groups = [
        {"params": [model.gate_proj.blocks], "lr": 0.0},
        {"params": [model.up_proj.blocks, model.down_proj.blocks]},
    ]
    optimizer = smt_ext.SparseAdamW(groups, lr=1e-2)
    backward(model, 0)
    optimizer.step()
    assert torch.equal(model.gate_proj.weight, mlp().gate_proj.weight)
    assert not torch.equal(model.up_proj.weight, mlp().up_proj.weight)


def test_an_optimizer_built_before_patching_is_refused():
    model = mlp()
    stale = torch.optim.AdamW(model.parameters())
    smt_ext.patch(model, mlp_plan())
    backward(model, 0)
    with pytest.raises(PatchError, match=r"AdamW was built before smt_ext.patch.*after patching"):
        stale.step()
    torch.optim.AdamW(model.parameters()).step()  # built after: holds the blocks too


def test_sparse_adamw_names_the_way_out_of_bad_parameters():
    with pytest.raises(ValueError, match=r"no SMT layer.*smt_ext.patch"):
        smt_ext.SparseAdamW(mlp())
    with pytest.raises(ValueError, match=r"shape \(64, 96\).*patch"):
        smt_ext.SparseAdamW(mlp().parameters())
    model = smt_ext.patch(mlp(), mlp_plan()).requires_grad_(False)
    with pytest.raises(ValueError, match=r"no blocks require gradients.*Freeze first, then patch"):
        smt_ext.SparseAdamW(model)
    model = smt_ext.patch(mlp(), mlp_plan())
    model.down_proj.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'down_proj.bias'.*second optimizer"):
        smt_ext.SparseAdamW(model)
    optimizer = smt_ext.SparseAdamW([model.down_proj.blocks])
    backward(model, 0)
    smt_ext.unpatch(model)
    with pytest.raises(ValueError, match="unpatching"):
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("betas", (1.0, 0.9)),
        ("eps", -1e-8),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("decay_to", "origin"),
        ("max_grad_norm", 0.0),
        ("master_dtype", torch.float16),
        ("seed", -1),
    ],
)
def test_bad_hyper_parameters_are_named(name, value):
    model = smt_ext.patch(mlp(), mlp_plan())
    with pytest.raises(ValueError, match=name):
        smt_ext.SparseAdamW(model, **{name: value})


@pytest.mark.parametrize("how", ["in place", "data", "beside", "beside, data", "beside, data ="])
def test_master_values_follow_what_others_write_into_half_precision(how):
    """Loaded or averaged blocks are where the next step begins, not what the master was."""
    model = smt_ext.patch(mlp(torch.bfloat16), mlp_plan(), block_dtype=torch.bfloat16)
    smt_ext.train_also(model, ["down_proj.bias"])
    optimizer = smt_ext.SparseAdamW(model, lr=1e-3, master_dtype=torch.float32)
    written = model.down_proj.bias if "beside" in how else model.gate_proj.blocks
    for step in range(2):
        model(torch.randn(4, 96, dtype=torch.bfloat16)).float().square().mean().backward()
        if step == 1:
            with torch.no_grad():
                if how.endswith("data ="):
                    written.data = torch.full_like(written, 3.0)
                elif how.endswith("data"):
                    written.data.fill_(3.0)
                else:
                    written.fill_(3.0)
        kept = optimizer.state[model.up_proj.blocks].get("master")
        kept = None if kept is None else kept.clone()
        optimizer.step()
        optimizer.zero_grad()
    assert float((written.detach().float() - 3.0).abs().max()) < 0.05
    # What nobody wrote keeps the digits that bfloat16 has not.
    moved = optimizer.state[model.up_proj.blocks]["master"] - kept
    assert 0 < float(moved.abs().max()) < 3e-3


def both_copied(copier, model, optimizer):
    if copier == "deepcopy":
        return copy.deepcopy((model, optimizer))
    if copier == "optimizer first":
        return copy.deepcopy((optimizer, model))[::-1]
    if copier == "pickle":
        return pickle.loads(pickle.dumps((model, optimizer)))
    torch.save({"model": model, "optimizer": optimizer}, file := io.BytesIO())
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    return loaded["model"], loaded["optimizer"]


@pytest.mark.parametrize("copier", ["deepcopy", "optimizer first", "pickle", "torch.save"])
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {"max_grad_norm": 0.1, "weight_decay": 0.1, "decay_to": "base"}),
        (torch.bfloat16, {"master_dtype": torch.float32, "offload": "cpu"}),
        (torch.bfloat16, {"stochastic_rounding": True, "seed": 7}),
    ],
    ids=["clipped", "master", "stochastic"],
)
def test_a_copied_optimizer_trains_the_copied_model(copier, dtype, settings):
    def train(model, optimizer, seed):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()

    model = smt_ext.patch(mlp(dtype), mlp_plan(), block_dtype=dtype)
    smt_ext.train_also(model, ["down_proj.bias"])
    optimizer = smt_ext.SparseAdamW(model, lr=1e-2, **settings)
    train(model, optimizer, 0)
    model.down_proj.blocks.grad = torch.full_like(model.down_proj.blocks, torch.nan)
    optimizer.step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin, twins = both_copied(copier, model, optimizer)
    assert twins.skipped_steps == 1
    optimizer.zero_grad()
    twins.zero_grad()
    train(twin, twins, 1)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert not torch.equal(twin.up_proj.weight, model.up_proj.weight)
    train(model, optimizer, 1)
    assert twins.last_grad_norm == optimizer.last_grad_norm
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    assert str(twins) == str(optimizer)


def test_an_optimizer_copied_without_its_model_or_its_ranks_is_refused(monkeypatch):
    model = smt_ext.patch(mlp(), mlp_plan())
    optimizer = smt_ext.SparseAdamW(model)
    alone = copy.deepcopy(optimizer)
    alone.param_groups[0]["params"][0].grad = torch.ones_like(model.gate_proj.blocks)
    with pytest.raises(ValueError, match="parameters are none"):
        alone.step()
    optimizer._process_group = object()
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"process_group=.*state_dict"):
        copy.deepcopy(optimizer)


def test_decay_to_the_base_is_for_groups_of_blocks_alone():
    model = smt_ext.patch(mlp(), mlp_plan())
    smt_ext.train_also(model, ["down_proj.bias"])
    both = {"params": [model.gate_proj.blocks, model.down_proj.bias], "weight_decay": 0.1}
    with pytest.raises(ValueError, match=r"decay_to='base'.*shape \(50,\).*weight_decay=0"):
        smt_ext.SparseAdamW([dict(both)], decay_to="base")
    optimizer = smt_ext.SparseAdamW([both])
    backward(model, 0)
    optimizer.param_groups[0]["decay_to"] = "base"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="decay_to='base'"):
        optimizer.step()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    smt_ext.SparseAdamW(model, decay_to="base", weight_decay=0.1).step()
