"""Plan, patch, train, save, load, export and unpatch on tiny models of many architectures."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from architectures_table import PAGE, page_with_table
from tiny import ARCHITECTURES, Architecture

import smt_ext
from models import blocks_of, mask_of
from smt_ext import LayerPlan, PatchError, PlanError
from smt_ext._files import FILES
from smt_ext.layouts import ExpertMatrix, is_conv1d, matrices
from smt_ext.memory import SavedBytes
from smt_ext.nn.patching import patch_meta
from smt_ext.planning.scoring import score_blocks
from smt_ext.planning.targets import select_targets

SIZE = 16
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def plan_for(architecture: Architecture, model, **options):
    """Blocks in every weight that can train."""
    return smt_ext.make_plan(
        model,
        [architecture.batch(seed) for seed in range(2)],
        **{
            "budget": "40% of targets",
            "block_size": SIZE,
            "targets": "all-linear",
            "allocation": "uniform",
            "progress": False,
            **options,
        },
    )


class Stored:
    """Where a plan's layer is in the state dict, and how to see that tensor as (N, K)."""

    def __init__(self, name, matrix):
        self.key = name if isinstance(matrix, ExpertMatrix) else f"{name}.weight"
        self.matrix = matrix

    def view(self, tensor):
        if isinstance(self.matrix, ExpertMatrix):
            return tensor.flatten(0, 1)
        return tensor.T if is_conv1d(self.matrix) else tensor


def stored_of(model, plan):
    found = dict(matrices(model))
    return {name: Stored(name, found[name]) for name, layer in plan.layers.items() if layer.blocks}


def outputs(model, batch):
    with torch.no_grad():
        return model(**batch)


def train(model, batch, steps=3):
    optimizer = smt_ext.SparseAdamW(model, lr=3e-3)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def classes_of(model):
    return {name: type(module) for name, module in model.named_modules()}


@every_architecture
def test_from_plan_to_export_and_back(architecture, tmp_path):
    model, batch = architecture.model(), architecture.batch(7)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    classes, before = classes_of(model), outputs(model, batch)

    plan = plan_for(architecture, model)
    assert classes_of(model) == classes
    stored = stored_of(model, plan)
    smt_ext.patch(model, plan)
    assert set(smt_ext.smt_modules(model)) == set(stored)
    assert torch.equal(outputs(model, batch).logits, before.logits)

    train(model, batch)
    after = outputs(model, batch)
    assert after.loss < before.loss - 1e-3

    state = {k: v for k, v in model.state_dict().items() if not k.endswith(".blocks")}
    assert list(state) == list(base)
    layer_of = {where.key: (name, where) for name, where in stored.items()}
    for key, value in state.items():
        if key not in layer_of:
            assert torch.equal(value, base[key]), key
            continue
        name, where = layer_of[key]
        mask = mask_of(plan.layers[name])
        assert torch.equal(where.view(value)[~mask], where.view(base[key])[~mask]), key
        assert not torch.equal(where.view(value)[mask], where.view(base[key])[mask]), key

    smt_ext.save_blocks(model, tmp_path / "blocks")
    fresh = smt_ext.load_blocks(architecture.model(), tmp_path / "blocks")
    assert torch.equal(outputs(fresh, batch).logits, after.logits)

    smt_ext.export(model, tmp_path / "exported")
    for path in (tmp_path / "exported").iterdir():
        if path.name == FILES:  # says what a later export may replace; nobody else reads it
            continue
        head = path.read_bytes()[:20_000]
        assert b"smt" not in head, path.name
        assert b"blocks" not in head, path.name
    loaded = architecture.load(tmp_path / "exported")
    assert torch.equal(outputs(loaded, batch).logits, after.logits)
    assert classes_of(loaded) == classes

    smt_ext.unpatch(model, restore=True)
    assert classes_of(model) == classes
    restored = model.state_dict()
    assert list(restored) == list(base)
    for name, value in base.items():
        assert torch.equal(restored[name], value), name


@every_architecture
def test_block_gradients_are_slices_of_the_dense_gradient(architecture):
    dense, patched = (architecture.model(torch.float64) for _ in range(2))
    if hasattr(dense, "set_experts_implementation"):
        # The others have no float64.
        dense.set_experts_implementation("eager")
    plan = plan_for(architecture, architecture.model())
    stored = stored_of(dense, plan)
    smt_ext.patch(patched, plan)
    batch = {
        name: value.double() if value.is_floating_point() else value
        for name, value in architecture.batch(3).items()
    }
    dense(**batch).loss.backward()
    patched(**batch).loss.backward()
    for name, module in smt_ext.smt_modules(patched).items():
        gradient = stored[name].view(dense.get_parameter(stored[name].key).grad)
        want = blocks_of(gradient, plan.layers[name])
        scale = want.abs().max()
        assert scale > 1e-9, name
        # The models cast to float32 within (norms, softmax), where a last bit of float64 can
        # move a float32 rounding: 2^-24 relative, a few in a row.
        torch.testing.assert_close(
            module.blocks.grad, want, rtol=0, atol=16 * 2.0**-24 * scale.item()
        )


@every_architecture
def test_the_aliases_find_the_parts_of_a_layer(architecture):
    model = architecture.model()
    qkv, o, mlp = (set(select_targets(model, alias)) for alias in ("qkv", "o", "mlp"))
    # Two layers of one kind at least, apart from each other.
    assert min(len(qkv), len(o), len(mlp)) >= 2
    assert len(qkv | o | mlp) == len(qkv) + len(o) + len(mlp)
    assert set(select_targets(model, "attention")) == qkv | o
    plan = smt_ext.make_plan(
        model, [architecture.batch(0)], budget="3 blocks", block_size=SIZE, progress=False
    )
    assert plan.num_blocks == 3
    assert set(plan.layers) <= qkv


@pytest.mark.parametrize("name", ["GPT-2", "Qwen3-MoE"])
@pytest.mark.parametrize("copier", ["deepcopy", "pickle"])
def test_a_copy_trains_on_its_own(name, copier):
    architecture, batch = BY_NAME[name], BY_NAME[name].batch(7)
    model = architecture.model()
    smt_ext.patch(model, plan_for(architecture, model))
    before = outputs(model, batch)
    twin = copy.deepcopy(model) if copier == "deepcopy" else pickle.loads(pickle.dumps(model))
    train(twin, batch)
    assert outputs(twin, batch).loss < before.loss
    assert torch.equal(outputs(model, batch).logits, before.logits)
    smt_ext.unpatch(twin, restore=True)
    assert torch.equal(outputs(twin, batch).logits, before.logits)
    assert classes_of(twin) == classes_of(smt_ext.unpatch(model))


@pytest.mark.parametrize("name", ["GPT-2", "Qwen3-MoE"])
def test_any_optimizer_and_the_original_weights(name):
    architecture, batch = BY_NAME[name], BY_NAME[name].batch(7)
    model = architecture.model()
    before = outputs(model, batch)
    smt_ext.patch(model, plan_for(architecture, model))
    blocks = [m.blocks for m in smt_ext.smt_modules(model).values()]
    optimizer = torch.optim.AdamW(blocks, lr=3e-3, weight_decay=0.0)
    model(**batch).loss.backward()
    optimizer.step()
    after = outputs(model, batch)
    assert after.loss < before.loss
    with smt_ext.original_weights(model):
        assert torch.equal(outputs(model, batch).logits, before.logits)
    assert torch.equal(outputs(model, batch).logits, after.logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_experts(reentrant):
    architecture, batch = BY_NAME["Qwen3-MoE"], BY_NAME["Qwen3-MoE"].batch(7)
    plan = plan_for(architecture, architecture.model())
    plain, saving = (smt_ext.patch(architecture.model().train(), plan) for _ in range(2))
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, saving):
        model(**batch).loss.backward()
    for layer, module in smt_ext.smt_modules(plain).items():
        torch.testing.assert_close(
            smt_ext.smt_modules(saving)[layer].blocks.grad, module.blocks.grad
        )


def by_block(dense):
    """Mean of every block of (N, K), in a list of rows."""
    return [[block.mean().item() for block in row.split(SIZE, 1)] for row in dense.split(SIZE, 0)]


@pytest.mark.parametrize("name", ["GPT-2", "Qwen3-MoE", "T5"])
def test_scores_are_those_of_the_dense_gradient(name):
    architecture = BY_NAME[name]
    model, batches = architecture.model(), [architecture.batch(seed) for seed in range(2)]
    targets = select_targets(model, "all-linear")
    found = score_blocks(model, targets, batches, block_size=SIZE, progress=False).scores
    want = {}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for layer, matrix in targets.items():
            where = Stored(layer, matrix)
            gradient = where.view(model.get_parameter(where.key).grad)
            want[layer] = want.get(layer, 0) + np.array(by_block(gradient.abs())) / len(batches)
    for layer, values in want.items():
        # Float32 sums in another order, over a few tokens and a block.
        np.testing.assert_allclose(found[layer].values, values, rtol=0, atol=1e-4 * values.max())


def test_activations_of_an_expert_are_those_of_its_tokens():
    architecture = BY_NAME["Qwen3-MoE"]
    model, batch, seen = architecture.model(), architecture.batch(0), {}
    experts = model.model.layers[1].mlp.experts
    hook = experts.register_forward_pre_hook(lambda module, args: seen.update(args=args))
    outputs(model, batch)
    hook.remove()
    hidden, index, _ = seen["args"]
    name = "model.layers.1.mlp.experts.gate_up_proj"
    found = score_blocks(
        model, {name: ExpertMatrix(experts, "gate_up_proj")}, [batch], block_size=SIZE,
        metric="activation", progress=False,
    ).scores[name].values.reshape(4, 4, 3)  # fmt: skip
    for expert in range(4):
        mean = hidden[(index == expert).any(1)].abs().mean(0)
        want = mean.view(3, SIZE).mean(1).numpy()
        np.testing.assert_allclose(found[expert], np.broadcast_to(want, (4, 3)), rtol=1e-5)


@pytest.mark.parametrize("name", ["GPT-2", "Qwen3-MoE"])
@pytest.mark.parametrize("metric", ["activation", "wanda", "weight", "random", "l2"])
def test_every_metric_plans_transposed_weights_and_experts(name, metric):
    architecture = BY_NAME[name]
    model = architecture.model()
    targets = ("c_attn", "mlp.c_proj") if name == "GPT-2" else ("gate_up_proj", "down_proj")
    plan = plan_for(architecture, model, metric=metric, targets=tuple(f"*.{t}" for t in targets))
    assert {n.rpartition(".")[2] for n in plan.layers} == {t.rpartition(".")[2] for t in targets}


@pytest.mark.parametrize("name", ["GPT-2", "Qwen3-MoE"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_moving_to_another_dtype_keeps_weight_and_blocks_equal(name, dtype):
    architecture = BY_NAME[name]
    model = architecture.model(torch.bfloat16)
    smt_ext.patch(model, plan_for(architecture, model))
    train(model, architecture.batch(7), steps=1)
    model.to(dtype)
    for layer, module in smt_ext.smt_modules(model).items():
        assert module.weight.dtype == dtype
        assert torch.equal(module.read_blocks(), module.blocks.to(dtype)), layer


@pytest.mark.parametrize("name", ["GPT-2", "Qwen3-MoE"])
def test_a_state_dict_brings_weight_and_blocks_back(name):
    architecture, batch = BY_NAME[name], BY_NAME[name].batch(7)
    trained = architecture.model()
    plan = plan_for(architecture, trained)
    train(smt_ext.patch(trained, plan), batch)
    want = outputs(trained, batch).logits
    for kept in ("all", "blocks", "weights"):
        state = {
            key: value
            for key, value in trained.state_dict().items()
            if kept == "all" or key.endswith(".blocks") == (kept == "blocks")
        }
        fresh = smt_ext.patch(architecture.model(), plan)
        fresh.load_state_dict(state, strict=kept == "all")
        assert torch.equal(outputs(fresh, batch).logits, want), kept
        for layer, module in smt_ext.smt_modules(fresh).items():
            assert torch.equal(module.read_blocks(), module.blocks), layer


def test_conv1d_saves_the_selected_columns_only():
    model = BY_NAME["GPT-2"].model()
    layer = LayerPlan(shape=(144, 48), block_size=16, blocks=((0, 0), (3, 2), (8, 2)))
    smt_ext.patch(model, smt_ext.BlockPlan(layers={"transformer.h.0.attn.c_attn": layer}))
    module = model.transformer.h[0].attn.c_attn
    with SavedBytes(model) as saved:
        out = module(torch.randn(2, 5, 48))
    assert out.requires_grad
    assert saved.bytes == 10 * 32 * 4


def test_an_expert_saves_the_selected_columns_of_its_own_tokens():
    model = BY_NAME["Qwen3-MoE"].model()
    # 64 rows an expert: the first and the third expert, with one and two column blocks.
    layer = LayerPlan(shape=(256, 48), block_size=16, blocks=((1, 0), (8, 1), (8, 2), (9, 2)))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    experts = model.model.layers[0].mlp.experts
    smt_ext.patch(model, smt_ext.BlockPlan(layers={name: layer}))
    index = torch.tensor([[0, 1], [2, 0], [0, 3], [2, 3], [1, 2], [2, 3], [2, 1]])
    weights = torch.full((7, 2), 0.5)
    kept = []
    child = smt_ext.smt_modules(model)[name]
    keep = child.keep
    child.keep = lambda x, tokens: kept.extend(keep(x, tokens)) or kept
    experts(torch.randn(7, 48), index, weights).sum().backward()
    # Three tokens went to expert 0, five to expert 2.
    assert [tuple(tensor.shape) for tensor in kept] == [(3, 16), (5, 32)]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in kept)
    assert all(child.blocks.grad[i].abs().max() > 0 for i in range(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_on_the_meta_device_save_as_much(dtype):
    model = BY_NAME["Qwen3-MoE"].model(dtype)
    # The same columns in each expert: what is saved does not depend on where tokens go.
    every = [(4 * expert + row, col) for expert in range(4) for row, col in ((0, 1), (2, 2))]
    layer = LayerPlan(shape=(256, 48), block_size=16, blocks=tuple(every))
    plan = smt_ext.BlockPlan(layers={"model.layers.0.mlp.experts.gate_up_proj": layer})
    on_meta = copy.deepcopy(model).to("meta")
    smt_ext.patch(model, plan)
    patch_meta(on_meta, plan)
    batch, kept = BY_NAME["Qwen3-MoE"].batch(0)["input_ids"], []
    for patched in (model, on_meta):
        experts = patched.model.layers[0].mlp.experts
        hidden = torch.zeros(12, 48, dtype=dtype, device=experts.down_proj.device)
        index = batch.reshape(12, 2).to(hidden.device) % 4
        weights = hidden.new_ones(12, 2)
        with SavedBytes(experts) as saved:
            out = experts(hidden, index, weights)
        out.sum().backward()
        kept.append(saved.bytes)
    assert kept[0] == kept[1] > 24 * 32 * dtype.itemsize


def test_an_expert_without_tokens_gets_a_zero_gradient():
    model = BY_NAME["Qwen3-MoE"].model()
    layer = LayerPlan(shape=(256, 48), block_size=16, blocks=((0, 0), (15, 1)))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    smt_ext.patch(model, smt_ext.BlockPlan(layers={name: layer}))
    index = torch.tensor([[0, 1], [2, 0]])
    model.model.layers[1].mlp.experts(
        torch.randn(2, 48), index, torch.full((2, 2), 0.5)
    ).sum().backward()
    grad = smt_ext.smt_modules(model)[name].blocks.grad
    assert grad[0].abs().max() > 0
    assert not grad[1].any()


def test_accumulation_in_place_reaches_experts_and_conv1d():
    for name in ("GPT-2", "Qwen3-MoE"):
        architecture = BY_NAME[name]
        fused, plain = architecture.model(), architecture.model()
        plan = plan_for(architecture, architecture.model())
        for model in (fused, plain):
            smt_ext.patch(model, plan)
        for module in smt_ext.smt_modules(fused).values():
            module.accumulate_in_place = True
        for model in (fused, plain):
            for seed in (1, 2):
                model(**architecture.batch(seed)).loss.backward()
        for layer, module in smt_ext.smt_modules(fused).items():
            torch.testing.assert_close(
                module.blocks.grad, smt_ext.smt_modules(plain)[layer].blocks.grad
            )


def test_a_block_size_that_reaches_over_two_experts_names_those_that_fit():
    architecture = BY_NAME["Mixtral"]
    model = architecture.model()
    with pytest.raises(PlanError, match=r"experts.gate_up_proj' have 160 rows.*Use 32 or 16"):
        plan_for(architecture, model, targets="*.gate_up_proj", block_size=64)
    layer = LayerPlan(shape=(640, 48), block_size=64, blocks=((0, 0),))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(PlanError, match=r"experts.gate_up_proj' have 160 rows"):
        smt_ext.patch(model, smt_ext.BlockPlan(layers={name: layer}))


def test_value_alone_of_a_fused_matrix_says_what_to_use():
    for name, kind in (("GPT-2", "c_attn"), ("Phi-3", "qkv_proj"), ("BLOOM", "query_key_value")):
        with pytest.raises(PlanError, match=rf"one matrix \({kind}\): use 'qkv'"):
            select_targets(BY_NAME[name].model(), "v")


def test_what_cannot_be_trained_is_named():
    falcon = Architecture(
        "Falcon",
        "falcon",
        {"vocab_size": 128, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
    ).model()
    with pytest.raises(PlanError, match=r"query_key_value' is a FalconLinear, and only exactly"):
        select_targets(falcon, "qkv")
    layer = LayerPlan(shape=(72, 48), block_size=16, blocks=((0, 0),))
    name = "transformer.h.0.self_attention.query_key_value"
    with pytest.raises(PatchError, match=r"FalconLinear, and only exactly nn\.Linear"):
        smt_ext.patch(falcon, smt_ext.BlockPlan(layers={name: layer}))
    gpt_oss = Architecture(
        "gpt-oss",
        "gpt_oss",
        {
            "vocab_size": 128,
            "hidden_size": 48,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ).model()
    with pytest.raises(PlanError, match=r"experts.gate_up_proj' of GptOssExperts holds matrices"):
        select_targets(gpt_oss, "mlp")
    assert select_targets(gpt_oss, "attention")


@pytest.mark.parametrize("name", ["Gemma", "GPT-2", "BLOOM", "OPT", "T5"])
def test_a_tied_head_is_left_out_and_refused_by_name(name):
    model = BY_NAME[name].model()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert "lm_head" not in select_targets(model, "all-linear")
    with pytest.raises(PlanError, match=r"'lm_head' shares its weight with .*tied embeddings"):
        select_targets(model, "lm_head")


def test_the_table_in_the_documentation_is_current():
    page = PAGE.read_text(encoding="utf-8")
    assert page == page_with_table(page), (
        "docs/architectures.md is out of date: python tests/architectures/architectures_table.py"
    )


def test_experts_refuse_a_callers_tensors():
    architecture = BY_NAME["Qwen3-MoE"]
    model = architecture.model()
    smt_ext.patch(model, plan_for(architecture, model))
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(PatchError, match=r"experts.*functional_call.*unpatch"):
        torch.func.functional_call(model, state, kwargs=architecture.batch(0))
    model(**architecture.batch(0))
    name = next(name for name in smt_ext.smt_modules(model) if ".experts." in name)
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    setattr(owner, last, torch.nn.Parameter(getattr(owner, last).detach().clone()))
    model(**architecture.batch(0))


def test_experts_with_a_forward_of_their_own_are_refused_by_name():
    hooks = pytest.importorskip("accelerate.hooks")
    architecture = BY_NAME["Qwen3-MoE"]
    model = architecture.model()
    plan = plan_for(architecture, model, metric="random", targets="*.gate_up_proj")
    experts = model.model.layers[1].mlp.experts
    hooks.add_hook_to_module(experts, hooks.ModelHook())
    with pytest.raises(PatchError, match=r"experts.* has a forward of its own"):
        smt_ext.patch(model, plan)
    hooks.remove_hook_from_module(experts)
    smt_ext.unpatch(smt_ext.patch(model, plan))
