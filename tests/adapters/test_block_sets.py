"""Several block sets on one base: bit-exact in any order, merged, and never mixed with training."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

import smt_ext
from models import blocks_of, mask_of, mlp
from smt_ext import BlockPlan, LayerPlan, PatchError, block_sets
from smt_ext.checkpoint.block_sets import block_set
from smt_ext.checkpoint.delta import apply_delta

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# Different modules, different blocks, and two that both have: (0, 0) of gate, (1, 0) of down.
PLANS = {
    "math": BlockPlan(
        {
            "gate_proj": LayerPlan((64, 96), 32, ((0, 0), (1, 2))),
            "down_proj": LayerPlan((50, 64), 32, ((1, 0),)),
        }
    ),
    "code": BlockPlan(
        {
            "gate_proj": LayerPlan((64, 96), 32, ((0, 0), (0, 1))),
            "up_proj": LayerPlan((64, 96), 32, ((1, 1),)),
            "down_proj": LayerPlan((50, 64), 32, ((0, 0), (1, 0))),
        }
    ),
    "chat": BlockPlan({"up_proj": LayerPlan((64, 96), 32, ((0, 0),))}),
}


def trained(name, dtype):
    model = smt_ext.patch(mlp(dtype), PLANS[name])
    optimizer = smt_ext.SparseAdamW(model, lr=3e-2)
    generator = torch.Generator().manual_seed(len(name) + ord(name[0]))
    for _ in range(3):
        x = torch.randn(6, 96, generator=generator).to(dtype)
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items() if not k.endswith(".blocks")}


def holds(model, expected):
    return list(model.state_dict()) == list(expected) and all(
        torch.equal(v, expected[k]) for k, v in model.state_dict().items()
    )


@pytest.fixture
def make(tmp_path):
    """A base model with sets loaded, and what the weights are with each (None: with no set)."""

    def build(dtype=torch.float32, names=("math", "code", "chat")):
        base = mlp(dtype)
        expected = {None: weights(base)}
        for name in names:
            model = trained(name, dtype)
            smt_ext.save_blocks(model, tmp_path / name)
            expected[name] = weights(model)
            assert not holds(base, expected[name])
            assert smt_ext.load_blocks(base, tmp_path / name, name=name) is base
        return base, expected

    return build


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_order_bit_for_bit(make, dtype):
    base, expected = make(dtype)
    assert block_sets.loaded_blocks(base) == ("math", "code", "chat")
    assert holds(base, expected[None])
    choices = random.Random(0).choices([None, *expected], k=40)
    for name in choices:
        if name is None:
            block_sets.deactivate(base)
        else:
            block_sets.activate(base, name)
        assert block_sets.active_blocks(base) == name
        assert holds(base, expected[name])


def test_the_model_stays_an_ordinary_one(make):
    base, _ = make()
    plain = mlp()
    block_sets.activate(base, "code")
    for (name, module), other in zip(base.named_modules(), plain.modules(), strict=True):
        assert type(module) is type(other), name
    assert all(p.requires_grad for p in base.parameters())
    x = torch.randn(3, 96)
    block_sets.deactivate(base)
    assert torch.equal(base(x), plain(x))


def test_loading_while_another_is_active_meets_the_base(make, tmp_path):
    base, expected = make(names=("math",))
    block_sets.activate(base, "math")
    other = trained("code", torch.float32)
    smt_ext.save_blocks(other, tmp_path / "code")
    smt_ext.load_blocks(base, tmp_path / "code", name="code")
    assert block_sets.active_blocks(base) == "math"
    assert holds(base, expected["math"])
    assert holds(block_sets.activate(base, "code"), weights(other))


def test_through_a_wrapper_and_in_a_copy(make):
    base, expected = make()
    wrapper = nn.ModuleDict({"model": base})
    block_sets.activate(wrapper, "math")
    assert holds(base, expected["math"])
    twin = copy.deepcopy(base)
    block_sets.activate(twin, "code")
    assert holds(twin, expected["code"])
    assert holds(base, expected["math"])
    assert block_sets.active_blocks(wrapper) == "math"


def test_converting_the_model_converts_its_sets(make):
    base, expected = make(torch.bfloat16)
    block_sets.activate(base, "math")
    base.float()
    assert holds(base, {k: v.float() for k, v in expected["math"].items()})
    assert holds(
        block_sets.activate(base, "code"),
        {k: v.float() for k, v in expected["code"].items()},
    )
    assert holds(block_sets.deactivate(base), {k: v.float() for k, v in expected[None].items()})


def test_training_and_sets_keep_out_of_each_other(make, tmp_path):
    base, expected = make()
    block_sets.activate(base, "math")
    with pytest.raises(PatchError, match=r"block set 'math' is active.*block_sets.deactivate"):
        smt_ext.patch(base, PLANS["code"])
    with pytest.raises(PatchError, match=r"block set 'math' is active"):
        smt_ext.load_blocks(base, tmp_path / "code")
    assert holds(base, expected["math"])
    # A part of the model is no way around it.
    part = BlockPlan({"": LayerPlan((64, 96), 32, ((0, 0),))})
    with pytest.raises(PatchError, match=r"block set 'math' is active"):
        smt_ext.patch(base.gate_proj, part)

    block_sets.deactivate(base)
    smt_ext.load_blocks(base, tmp_path / "code")
    with pytest.raises(PatchError, match=r"cannot activate 'math'.*'gate_proj'.*unpatch"):
        block_sets.activate(base, "math")
    with pytest.raises(PatchError, match=r"as block set 'more'.*is patched"):
        smt_ext.load_blocks(base, tmp_path / "chat", name="more")
    with smt_ext.original_weights(base):
        assert torch.equal(base.up_proj.weight, expected[None]["up_proj.weight"])
    # The trained model saves with the true base's fingerprint.
    smt_ext.save_blocks(base, tmp_path / "again")
    smt_ext.unpatch(base, restore=True)
    assert holds(block_sets.activate(base, "math"), expected["math"])
    assert smt_ext.load_blocks(mlp(), tmp_path / "again")


def test_what_an_active_set_cannot_do_is_said_with_the_way_out(make, tmp_path):
    base, expected = make()
    block_sets.activate(base, "math")
    with pytest.raises(PatchError, match=r"'math' is active, in plain weights.*name=\.\.\."):
        smt_ext.export(base, tmp_path / "delta", "delta")
    with pytest.raises(ValueError, match="'math' is active, and sets do not train"):
        smt_ext.SparseAdamW(base)
    smt_ext.save_blocks(base, tmp_path / "way out", name="math")
    fresh = smt_ext.load_blocks(mlp(), tmp_path / "way out")
    smt_ext.export(fresh, tmp_path / "delta", "delta")
    assert holds(apply_delta(mlp(), tmp_path / "delta"), expected["math"])


def test_a_base_that_has_changed_is_noticed(make, tmp_path):
    base, expected = make()
    smt_ext.load_blocks(base, tmp_path / "code")
    smt_ext.unpatch(base)  # keeps the trained values
    with pytest.raises(
        PatchError, match=r"'gate_proj' has changed since block set 'math' was loaded"
    ):
        block_sets.activate(base, "math")
    assert block_sets.active_blocks(base) is None
    assert holds(base, expected["code"])

    base, expected = make()
    block_sets.activate(base, "math")
    base.load_state_dict(expected["code"])
    for action in (
        block_sets.deactivate,
        lambda model: block_sets.activate(model, "chat"),
    ):
        with pytest.raises(PatchError, match=r"changed since block set 'math' was activated"):
            action(base)
        assert holds(base, expected["code"])


def test_a_failing_switch_leaves_the_active_set(make):
    base, _ = make(names=("math", "chat"))
    block_sets.activate(base, "math")
    with torch.no_grad():
        base.up_proj.weight[0, 0] += 1  # a block of "chat" alone
    before = weights(base)
    with pytest.raises(
        PatchError, match=r"'up_proj' has changed since block set 'chat' was loaded"
    ):
        block_sets.activate(base, "chat")
    assert block_sets.active_blocks(base) == "math"
    assert holds(base, before)


def test_names(make, tmp_path):
    base, expected = make()
    with pytest.raises(
        PatchError, match=r"no block set 'art' on this MLP: loaded are 'math', 'code'"
    ):
        block_sets.activate(base, "art")
    with pytest.raises(PatchError, match=r"no block set 'art' on this MLP: none is loaded"):
        block_sets.activate(mlp(), "art")
    with pytest.raises(PatchError, match=r"'math' is loaded already.*remove_blocks"):
        smt_ext.load_blocks(base, tmp_path / "chat", name="math")
    with pytest.raises(ValueError, match="name is ''"):
        smt_ext.load_blocks(base, tmp_path / "chat", name="")
    block_sets.activate(base, "math")
    block_sets.remove_blocks(base, "math")
    assert holds(base, expected[None])
    assert block_sets.loaded_blocks(base) == ("code", "chat")
    block_sets.remove_blocks(base, "code")
    block_sets.remove_blocks(base, "chat")
    assert block_sets.loaded_blocks(base) == ()
    assert block_sets.deactivate(base) is base
    assert base.__dict__.keys() == mlp().__dict__.keys()


def test_another_base_is_refused_and_left_alone(make, tmp_path):
    make()
    other = mlp(seed=1)
    before = weights(other)
    with pytest.raises(smt_ext.CheckpointError, match=r"'gate_proj' holds other values"):
        smt_ext.load_blocks(other, tmp_path / "math", name="math")
    assert holds(other, before)
    assert block_sets.loaded_blocks(other) == ()
    smt_ext.load_blocks(other, tmp_path / "math", name="math", strict_base=False)
    block_sets.activate(other, "math")
    mask = mask_of(PLANS["math"].layers["gate_proj"])
    changed = other.gate_proj.weight != before["gate_proj.weight"]
    assert not changed[~mask].any()
    assert changed[mask].all()
    assert holds(block_sets.deactivate(other), before)


def test_a_set_costs_its_blocks_and_the_originals_of_them(make):
    base, _ = make(torch.bfloat16)
    for name, plan in PLANS.items():
        entries = sum(len(layer.blocks) * 32 * 32 for layer in plan.layers.values())
        held = block_set(base, name)
        sizes = [
            sum(t.untyped_storage().nbytes() for t in tensors.values())
            for tensors in (held.blocks, held.originals)
        ]
        assert sizes == [4 * entries, 2 * entries]  # float32 master values; bfloat16 base


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_merging_disjoint_sets_is_exact_at_weight_one(make, dtype):
    base, expected = make(dtype, names=("math", "chat"))
    block_sets.merge_blocks(base, {"math": 1, "chat": 1.0}, name="both")
    assert holds(base, expected[None])
    block_sets.activate(base, "both")
    for key in ("gate_proj.weight", "down_proj.weight"):
        assert torch.equal(base.state_dict()[key], expected["math"][key])
    assert torch.equal(base.up_proj.weight, expected["chat"]["up_proj.weight"])
    assert holds(block_sets.deactivate(base), expected[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merging_adds_weighted_changes(make, dtype):
    base, expected = make(dtype)
    factors = {"math": 0.7, "code": -0.3, "chat": 1.0}
    block_sets.merge_blocks(base, factors, name="all", overlap="sum")
    block_sets.activate(base, "all")
    for key, value in base.state_dict().items():
        origin = expected[None][key].double()
        change = sum(w * (expected[name][key].double() - origin) for name, w in factors.items())
        assert key.endswith("bias") or change.any()
        # One rounding from float64.
        torch.testing.assert_close(
            value.double(), origin + change, rtol=torch.finfo(dtype).eps, atol=1e-15
        )
    assert holds(block_sets.activate(base, "code"), expected["code"])


def test_a_merged_set_can_be_saved_and_loaded(make, tmp_path):
    base, _ = make(torch.bfloat16)
    block_sets.merge_blocks(base, {"math": 0.5, "code": 0.5}, name="mix", overlap="sum")
    smt_ext.save_blocks(base, tmp_path / "mix", name="mix")
    block_sets.activate(base, "mix")
    assert holds(base, weights(smt_ext.load_blocks(mlp(torch.bfloat16), tmp_path / "mix")))


def test_conflicts_are_named(make, tmp_path):
    base, _ = make()
    with pytest.raises(
        PatchError, match=r"'math' and 'code' have both trained 2 .*'down_proj' block \(1, 0\)"
    ):
        block_sets.merge_blocks(base, {"math": 1, "code": 1}, name="both")
    coarse = smt_ext.patch(mlp(), BlockPlan({"up_proj": LayerPlan((64, 96), 16, ((3, 3),))}))
    smt_ext.save_blocks(coarse, tmp_path / "fine")
    smt_ext.load_blocks(base, tmp_path / "fine", name="fine")
    with pytest.raises(
        PatchError, match=r"different sizes in 'up_proj' \('chat': 32, 'fine': 16\)"
    ):
        block_sets.merge_blocks(base, {"chat": 1, "fine": 1}, name="both")
    with pytest.raises(PatchError, match=r"no block set 'art'"):
        block_sets.merge_blocks(base, {"art": 1}, name="both")
    with pytest.raises(PatchError, match=r"'chat' is loaded already"):
        block_sets.merge_blocks(base, {"math": 1}, name="chat")
    with pytest.raises(ValueError, match=r"weights\['math'\] is nan"):
        block_sets.merge_blocks(base, {"math": float("nan")}, name="both")
    with pytest.raises(ValueError, match="weights is empty"):
        block_sets.merge_blocks(base, {}, name="both")
    with pytest.raises(ValueError, match="overlap is 'mean'"):
        block_sets.merge_blocks(base, {"math": 1}, name="both", overlap="mean")
    assert block_sets.loaded_blocks(base) == ("math", "code", "chat", "fine")


def test_sets_loaded_onto_different_bases_do_not_merge(make, tmp_path):
    base, _ = make(names=("math",))
    with torch.no_grad():
        base.gate_proj.weight[0, 0] += 1  # in block (0, 0), which both sets have
    smt_ext.save_blocks(trained("code", torch.float32), tmp_path / "code")
    smt_ext.load_blocks(base, tmp_path / "code", name="code", strict_base=False)
    with pytest.raises(
        PatchError, match=r"'code' was loaded onto other base values of 'gate_proj'"
    ):
        block_sets.merge_blocks(base, {"math": 1, "code": 1}, name="both", overlap="sum")


def test_ragged_blocks_reach_to_the_edge(make):
    base, expected = make(names=("math",))
    block_sets.activate(base, "math")
    layer = PLANS["math"].layers["down_proj"]
    change = base.down_proj.weight - expected[None]["down_proj.weight"]
    assert blocks_of(change.detach(), layer)[0, :18].all()


def test_a_set_that_diverged_can_be_switched_off_again(make):
    base, expected = make(names=("math",))
    block_set(base, "math").blocks["gate_proj"][0, 0] = float("nan")
    block_sets.activate(base, "math")
    assert base.gate_proj.weight[0].isnan().any()
    assert holds(block_sets.deactivate(base), expected[None])


def test_a_module_that_was_replaced_is_named(make):
    base, _ = make(names=("math",))
    base.gate_proj = nn.Sequential(base.gate_proj)
    with pytest.raises(PatchError, match=r"'gate_proj' held a weight .* is a Sequential now"):
        block_sets.activate(base, "math")
    base.gate_proj = nn.Linear(96, 32)
    with pytest.raises(PatchError, match=r"is a Linear of shape \(32, 96\) now"):
        block_sets.activate(base, "math")
    del base.gate_proj
    with pytest.raises(PatchError, match="is gone now"):
        block_sets.activate(base, "math")
