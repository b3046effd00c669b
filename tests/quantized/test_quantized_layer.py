"""A quantised base under patch: what it computes, what it trains, what it leaves alone."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import smt_ext
from models import blocks_of, mask_of
from quantized_models import (
    LAYERS,
    SCHEMES,
    needs,
    quant_mlp,
    quant_plan,
    stored_bits,
    values_of,
)
from smt_ext import ops, precision
from smt_ext.errors import PatchError
from smt_ext.nn.quantized import SMTQuantizedLinear
from smt_ext.quantization import packed_weight

DTYPES = (torch.float32, torch.bfloat16)
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16"))


@pytest.fixture(autouse=True)
def _library(request):
    if hasattr(request.node, "callspec") and "scheme" in request.node.callspec.params:
        pytest.importorskip(needs(request.node.callspec.params["scheme"]))


def inputs(dtype=torch.float32, seed=1, rows=24, width=128):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense_twin(model, scheme, dtype):
    """The same model with the dequantised weights (and trained blocks) in plain linears."""
    twin = nn.Module()
    for name, child in model.named_children():
        n, k = LAYERS[name].shape
        linear = nn.Linear(k, n, bias=child.bias is not None, dtype=dtype)
        weight = values_of(child, scheme, dtype)
        if isinstance(child, SMTQuantizedLinear):
            ops.scatter_blocks_(weight, child.blocks.detach(), child.block_rows, child.block_cols)
        linear.weight = nn.Parameter(weight)
        if child.bias is not None:
            linear.bias = nn.Parameter(child.bias.detach().to(dtype))
        twin.add_module(name, linear)
    return twin


def forward(twin, x):
    hidden = torch.tanh(twin.gate_proj(x)) * twin.up_proj(x)
    return twin.down_proj(hidden)


@each_scheme
@each_dtype
def test_untrained_it_computes_the_bits_of_the_dequantised_layer(scheme, dtype):
    model = quant_mlp(scheme, dtype)
    x = inputs(dtype)
    expected = forward(dense_twin(model, scheme, dtype), x)
    smt_ext.patch(model, quant_plan())
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if needs(s) == "bitsandbytes"])
@each_dtype
def test_untrained_it_computes_the_bits_of_bitsandbytes_itself(scheme, dtype):
    model = quant_mlp(scheme, dtype).train()
    x = inputs(dtype)
    expected = model(x)
    smt_ext.patch(model, quant_plan())
    assert torch.equal(model(x), expected)


@each_scheme
@each_dtype
def test_gradients_are_slices_of_the_dense_gradient(scheme, dtype):
    model = smt_ext.patch(quant_mlp(scheme, dtype), quant_plan())
    with torch.no_grad():  # other values than those of the base, and no power of two
        for module in smt_ext.smt_modules(model).values():
            module.blocks.add_(torch.full_like(module.blocks, 0.037))
    twin = dense_twin(model, scheme, dtype)
    x, x_dense = (inputs(dtype).requires_grad_() for _ in range(2))
    out, dense = model(x), forward(twin, x_dense)
    assert torch.equal(out, dense)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    (out * weights).sum().backward()
    (dense * weights).sum().backward()
    assert torch.equal(x.grad, x_dense.grad)
    for name, module in smt_ext.smt_modules(model).items():
        expected = blocks_of(twin.get_submodule(name).weight.grad.float(), LAYERS[name])
        assert expected.abs().max() > 0.1
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(
            module.blocks.grad,
            expected,
            rtol=tolerance,
            atol=tolerance * expected.abs().max().item(),
        )


@each_scheme
def test_steps_change_the_blocks_and_not_a_bit_of_the_base(scheme):
    model = smt_ext.patch(quant_mlp(scheme), quant_plan())
    before = stored_bits(model)
    outside = {n: m.weight_NK for n, m in smt_ext.smt_modules(model).items()}
    optimizer = smt_ext.SparseAdamW(model, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(inputs()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, value in stored_bits(model).items():
        assert torch.equal(value, before[name]) != name.endswith(".blocks"), name
    for name, module in smt_ext.smt_modules(model).items():
        changed = module.weight_NK != outside[name]
        assert torch.equal(changed, mask_of(LAYERS[name]))


@each_scheme
def test_sparse_adamw_takes_the_steps_of_torchs(scheme):
    models = [smt_ext.patch(quant_mlp(scheme), quant_plan()) for _ in range(2)]
    blocks = [[m.blocks for m in smt_ext.smt_modules(model).values()] for model in models]
    optimizers = [
        smt_ext.SparseAdamW(models[0], lr=1e-2, weight_decay=0.1),
        torch.optim.AdamW(blocks[1], lr=1e-2, weight_decay=0.1),
    ]
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(inputs(seed=step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, torchs in zip(*blocks, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)


@each_scheme
def test_unpatch_brings_the_quantised_module_back(scheme):
    model = quant_mlp(scheme)
    classes = {name: type(m) for name, m in model.named_children()}
    modules = dict(model.named_children())
    before, expected = stored_bits(model), model(inputs())
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    smt_ext.patch(model, quant_plan())
    optimizer = smt_ext.SparseAdamW(model, lr=1e-2)
    model(inputs()).square().mean().backward()
    optimizer.step()
    with pytest.raises(PatchError, match=r"cannot take the trained blocks.*restore=True"):
        smt_ext.unpatch(model)
    assert all(isinstance(m, SMTQuantizedLinear) for m in model.children())
    smt_ext.unpatch(model, restore=True)
    assert {name: type(m) for name, m in model.named_children()} == classes
    assert dict(model.named_children()) == modules
    after = stored_bits(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert torch.equal(model(inputs()), expected)


@each_scheme
def test_original_weights_are_the_quantised_ones(scheme):
    model = quant_mlp(scheme)
    smt_ext.patch(model, quant_plan())
    with torch.no_grad():
        before = model(inputs())
        for module in smt_ext.smt_modules(model).values():
            module.blocks.mul_(1.5)
        trained = model(inputs())
        assert not torch.equal(trained, before)
        with smt_ext.original_weights(model):
            assert torch.equal(model(inputs()), before)
        assert torch.equal(model(inputs()), trained)


@each_scheme
def test_copies_and_pickles_keep_training(scheme):
    model = smt_ext.patch(quant_mlp(scheme), quant_plan())
    with torch.no_grad():
        model.up_proj.blocks.mul_(1.5)
    twins = [copy.deepcopy(model)]
    if needs(scheme) == "bitsandbytes":  # torchao's tensors do not pickle by themselves
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert torch.equal(twin(inputs()), model(inputs()))
        optimizer = smt_ext.SparseAdamW(twin, lr=1e-2)
        twin(inputs()).square().mean().backward()
        optimizer.step()
        assert not torch.equal(twin.up_proj.blocks, model.up_proj.blocks)


@pytest.mark.parametrize("scheme", ["torchao-int8", "torchao-int4"])
def test_torchaos_layers_move_and_convert(scheme, tmp_path):
    """torch swaps the contents of such parameters, and of no parameter with a weak reference."""
    model = smt_ext.patch(quant_mlp(scheme), quant_plan())
    optimizer = smt_ext.SparseAdamW(model, lr=1e-2)
    for _ in range(2):
        model(inputs()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        smt_ext.save_blocks(model, tmp_path / "blocks")
        y = model(inputs()).detach()
        model._apply(torch.clone)  # as a move to another device does
        assert torch.equal(model(inputs()), y)
    loaded = smt_ext.load_blocks(quant_mlp(scheme), tmp_path / "blocks")
    assert torch.equal(loaded(inputs()), y)
    model.to(torch.bfloat16)
    with torch.no_grad():
        assert torch.allclose(model(inputs(torch.bfloat16)).float(), y, rtol=0.1, atol=0.05)


@each_scheme
def test_bytes_are_packed_weight_blocks_and_moments(scheme):
    model = quant_mlp(scheme)
    before = 0
    for name, module in model.named_children():
        n, k = LAYERS[name].shape
        scales = -(-n * k // 64)
        expected = {
            # Packed, scales, and the table of the 16 values.
            "nf4": n * k // 2 + 4 * scales + 64,
            "fp4": n * k // 2 + 4 * scales + 64,
            # Scales of one byte, their own scales, the table of their 256 values, and an offset.
            "nf4-double": n * k // 2 + 64 + scales + 4 * -(-scales // 256) + 4 * 256 + 4,
            "bnb-int8": n * k + 4 * n,
            "torchao-int8": n * k + n * (4 + 1),  # zero points
            "torchao-int4": n * k + n * k // 32 * (4 + 1),  # a byte a value, zero points
        }
        assert packed_weight(module).num_bytes == expected[scheme]
        before += expected[scheme]
    smt_ext.patch(model, quant_plan())
    optimizer = smt_ext.SparseAdamW(model, lr=1e-2)
    model(inputs()).square().mean().backward()
    optimizer.step()
    modules = smt_ext.smt_modules(model)
    assert sum(m.packed.num_bytes for m in modules.values()) == before
    entries = sum(len(layer.blocks) * 32 * 32 for layer in LAYERS.values())
    assert sum(m.blocks.numel() * m.blocks.element_size() for m in modules.values()) == 4 * entries
    moments = [t for s in optimizer.state.values() for t in (s["exp_avg"], s["exp_avg_sq"])]
    assert sum(t.numel() * t.element_size() for t in moments) == 8 * entries


@each_scheme
def test_backward_holds_the_selected_columns_and_nothing_of_the_weights_size(scheme):
    model = smt_ext.patch(quant_mlp(scheme), quant_plan())
    held = {}

    def pack(tensor):
        if tensor.dtype.is_floating_point and type(tensor) is torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.gate_proj(inputs())
    widest = max(t.numel() for t in held.values())
    assert widest < 64 * 128
    columns = [t for t in held.values() if t.shape == (24, 5 * 32)]
    assert not columns
    union = len({c for n in ("gate_proj", "up_proj") for _, c in LAYERS[n].blocks}) * 32
    assert sum(t.shape == (24, union) for t in held.values()) == 1


@pytest.mark.parametrize(
    ("scheme", "dtype", "computes", "kept"),
    [
        ("nf4", torch.bfloat16, None, torch.bfloat16),
        ("nf4", torch.bfloat16, torch.float32, torch.float32),
        ("bnb-int8", torch.float32, None, torch.float32),
        ("torchao-int8", torch.bfloat16, None, torch.bfloat16),
    ],
)
def test_status_counts_columns_in_the_dtype_that_they_are_kept_in(scheme, dtype, computes, kept):
    model = quant_mlp(scheme, dtype)
    if computes is not None:
        for layer in model.children():
            layer.compute_dtype, layer.compute_type_is_set = computes, True
    smt_ext.patch(model, quant_plan())
    columns = []
    with torch.autograd.graph.saved_tensors_hooks(columns.append, lambda t: t):
        model(inputs(dtype)[:7])
    held = {t.data_ptr(): t for t in columns if t.dtype == kept and t.shape in ((7, 128), (7, 64))}
    widths = {t.shape[1]: t.element_size() for t in held.values()}
    assert widths.keys() == {128, 64}
    expected = sum(width * size for width, size in widths.items())
    assert smt_ext.status(model).saved_bytes_per_token == expected


def test_packed_weights_stored_as_bfloat16_are_no_bfloat16_model(monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Module()
    model.v_proj = bnb.nn.Linear4bit(
        64, 64, bias=False, quant_type="nf4", quant_storage=torch.bfloat16
    ).to("cpu")
    assert model.v_proj.weight.dtype == torch.bfloat16
    monkeypatch.setattr(precision, "_warned", False)
    monkeypatch.setattr(precision, "slow_bfloat16", lambda device: 9.0)
    plan = smt_ext.BlockPlan({"v_proj": smt_ext.LayerPlan((64, 64), 32, ((0, 0),))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smt_ext.patch(model, plan)


@each_scheme
def test_status_counts_weights_and_not_packed_bytes(scheme):
    model = smt_ext.patch(quant_mlp(scheme), quant_plan())
    status = smt_ext.status(model)
    biases = 64 + 50
    assert status.total == sum(n * k for n, k in (x.shape for x in LAYERS.values())) + biases
    assert status.trainable == quant_plan().num_parameters
    assert all(m.block_dtype == torch.float32 for m in status.modules)


@each_scheme
def test_gradient_accumulation_in_place(scheme):
    plain, in_place = (smt_ext.patch(quant_mlp(scheme), quant_plan()) for _ in range(2))
    for module in smt_ext.smt_modules(in_place).values():
        module.accumulate_in_place = True
    for model in (plain, in_place):
        for seed in (1, 2):
            model(inputs(seed=seed)).square().mean().backward()
    for a, b in zip(*(smt_ext.smt_modules(m).values() for m in (plain, in_place)), strict=True):
        torch.testing.assert_close(a.blocks.grad, b.blocks.grad, rtol=1e-6, atol=1e-7)
        assert a.blocks.grad.abs().max() > 0


@each_scheme
def test_autocast_computes_the_bits_of_the_quantised_layer(scheme):
    model = quant_mlp(scheme).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if needs(scheme) == "bitsandbytes":
            expected = model(inputs())
        else:
            expected = forward(dense_twin(model, scheme, torch.float32), inputs())
        smt_ext.patch(model, quant_plan())
        out = model(inputs())
    assert torch.equal(out.float(), expected.float())
    out.float().square().mean().backward()
    assert all(m.blocks.grad.abs().max() > 0 for m in smt_ext.smt_modules(model).values())


def test_a_changed_block_between_forward_and_backward_is_an_error():
    pytest.importorskip("bitsandbytes")
    model = smt_ext.patch(quant_mlp("nf4"), quant_plan())
    loss = model(inputs().requires_grad_()).square().mean()
    with torch.no_grad():
        model.up_proj.blocks.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
