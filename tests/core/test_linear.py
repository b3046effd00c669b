"""Laws 3 and 4 on the patched layer: exact block gradients, and only their columns are saved."""

from __future__ import annotations

import contextlib
import threading
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import smt_ext
from models import MLP_LAYERS, blocks_of, llama_plan, mlp, mlp_plan, tiny_llama, token_batch
from smt_ext.nn.functional import smt_linear


def block_gradients(model):
    return {name: m.blocks.grad.clone() for name, m in smt_ext.smt_modules(model).items()}


class SavedStorages:
    """Unique storages that autograd keeps, without those of the model's parameters and buffers."""

    def __init__(self, model):
        tensors = [*model.parameters(), *model.buffers()]
        self.owned = {t.untyped_storage().data_ptr() for t in tensors}
        self.saved = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.owned:
            self.saved[storage.data_ptr()] = storage
        return tensor

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self.saved.values())

    def record(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 96), (2, 5, 96), (2, 1, 3, 96), (96,), (0, 96)])
def test_block_gradients_are_slices_of_the_dense_gradient(dtype, shape):
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=dtype)
    seed = torch.randn(*shape[:-1], 50, dtype=dtype)
    dense, patched = mlp(dtype), smt_ext.patch(mlp(dtype), mlp_plan())
    exact = mlp(dtype).double()
    x_dense, x_patched = x.clone().requires_grad_(), x.clone().requires_grad_()
    exact(x.double()).backward(seed.double())
    y = dense(x_dense)
    y.backward(seed)
    y_patched = patched(x_patched)
    y_patched.backward(seed)
    assert torch.equal(y_patched, y)
    torch.testing.assert_close(x_patched.grad, x_dense.grad, rtol=1e-2, atol=1e-2)
    for name, layer in MLP_LAYERS.items():
        reference = blocks_of(exact.get_submodule(name).weight.grad, layer)
        native = blocks_of(dense.get_submodule(name).weight.grad, layer).double()
        ours = patched.get_submodule(name).blocks.grad.double()
        if x.numel():
            assert reference.abs().max() > 0.05
        native_error = (native - reference).abs().max()
        scale = reference.abs().max()
        eps = torch.finfo(dtype).eps
        # The gradient that reaches a layer is rounded alike in both; the blocks themselves are
        # accumulated in float32 at least, so we may not be worse than torch's own dense gradient.
        assert (ours - reference).abs().max() <= 2 * native_error + 4 * eps * scale, name


def test_gradcheck_in_float64():
    torch.manual_seed(0)
    x = torch.randn(5, 96, dtype=torch.float64, requires_grad=True)
    module = smt_ext.patch(mlp(torch.float64), mlp_plan()).gate_proj

    def linear_in_blocks(x, blocks, bias):
        """The layer as a function of its blocks: write them, then apply."""
        with torch.no_grad():
            module.write_blocks_(blocks)
            weight = module.weight.detach().clone()
        x_cols = module._input_group.columns(x, x.dtype)
        return smt_linear(
            x, weight, bias, blocks, x_cols, module.block_rows, module._block_slots, 32
        )

    blocks = module.blocks.detach().clone().requires_grad_()
    bias = torch.randn(64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear_in_blocks, (x, blocks, bias), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes_are_the_union_of_the_input_groups_columns(dtype):
    model = smt_ext.patch(mlp(dtype), mlp_plan())
    x = torch.randn(3, 7, 96, dtype=dtype)
    storages = SavedStorages(model)
    with storages.record():
        # Both siblings read x: columns 0..96 once. No activation follows, so nothing else is kept.
        out = (model.gate_proj(x), model.up_proj(x))
    assert storages.bytes == 21 * 96 * dtype.itemsize
    del out
    storages = SavedStorages(model)
    hidden = torch.randn(21, 64, dtype=dtype)
    with storages.record():
        out = model.down_proj(hidden)
    assert storages.bytes == 21 * 64 * dtype.itemsize
    del out


def test_saved_bytes_at_a_ragged_column_edge():
    layer = smt_ext.LayerPlan(shape=(64, 90), block_size=32, blocks=((0, 0), (1, 2)))
    linear = torch.nn.Sequential(torch.nn.Linear(90, 64))
    model = smt_ext.patch(linear, smt_ext.BlockPlan(layers={"0": layer}))
    storages = SavedStorages(model)
    with storages.record():
        out = model(torch.randn(11, 90))
    assert storages.bytes == 11 * (32 + 26) * 4
    out.sum().backward()
    assert storages.bytes == smt_ext.status(model).saved_bytes_per_token * 11


def test_the_input_itself_is_let_go():
    import weakref

    model = first_columns()
    x = torch.randn(4, 96)
    ref = weakref.ref(x)
    gate, up = model.gate_proj(x), model.up_proj(x)
    del x
    assert ref() is None
    assert not model.gate_proj._input_group._held
    (gate.sum() + up.sum()).backward()


def test_shared_columns_do_not_outlive_backward():
    model = first_columns()
    x = torch.randn(4, 96)
    model.gate_proj(x)  # the sibling never comes
    assert model.gate_proj._input_group._held
    del x
    assert not model.gate_proj._input_group._held


def first_columns():
    """:func:`mlp` with blocks of the first 32 inputs alone."""
    layer = smt_ext.LayerPlan(shape=(64, 96), block_size=32, blocks=((0, 0),))
    plan = smt_ext.BlockPlan(layers={"gate_proj": layer, "up_proj": layer})
    return smt_ext.patch(mlp(), plan)


@pytest.mark.skipif(
    torch.__version__ < (2, 11),
    reason="FakeTensorMode of torch 2.10 takes no subclass of Parameter",
)
def test_siblings_of_an_input_without_values():
    model = first_columns()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(4, 96)
        assert model.gate_proj(x).shape == model.up_proj(x).shape


def test_an_input_changed_in_place_between_siblings_is_gathered_anew():
    model = first_columns()
    x = torch.randn(4, 96)
    gate = model.gate_proj(x).sum()
    x.mul_(3.0)
    up = model.up_proj(x).sum()
    (gate + up).backward()
    twin = first_columns()
    twin.up_proj(x.clone()).sum().backward()
    assert torch.equal(model.up_proj.blocks.grad, twin.up_proj.blocks.grad)


@pytest.mark.parametrize("how", ["numpy", "data"])
def test_an_input_refilled_unseen_is_gathered_anew(how):
    """A member that asks again, or another thread, is in another forward."""
    model = first_columns()
    x = torch.randn(4, 96)
    model.gate_proj(x)
    if how == "numpy":
        x.numpy()[:] = 2.0
    else:
        x.data.fill_(2.0)
    (model.gate_proj(x).sum() + model.up_proj(x).sum()).backward()
    for linear in (model.gate_proj, model.up_proj):
        assert torch.equal(linear.blocks.grad, torch.full_like(linear.blocks, 8.0))


def test_threads_share_no_columns():
    model = first_columns()
    x = torch.ones(4, 96)
    columns = []

    def fetch(linear):
        columns.append(linear._input_group.columns(x, x.dtype, id(linear)))

    fetch(model.gate_proj)
    thread = threading.Thread(target=fetch, args=(model.up_proj,))
    thread.start()
    thread.join()
    fetch(model.up_proj)
    assert columns[0] is not columns[1]
    assert columns[0] is columns[2]


def test_where_all_columns_are_selected_the_input_itself_is_kept():
    """No copy of it, unless that would keep more than it, or another dtype is computed in."""
    model = smt_ext.patch(mlp(), mlp_plan())
    x = torch.randn(2, 2, 96)
    storages = SavedStorages(model)
    with storages.record():
        kept = model.gate_proj(x), model.up_proj(x)
    assert storages.saved.keys() == {x.untyped_storage().data_ptr()}
    for part in (torch.randn(9, 96)[:4], torch.randn(96, 4).T):
        storages = SavedStorages(model)
        with storages.record():
            model.gate_proj(part)
        assert storages.bytes == 4 * 96 * 4
    del kept
    out = model.gate_proj(x).sum()
    x.mul_(3.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_siblings_on_different_inputs_get_their_own_columns():
    model = smt_ext.patch(mlp(), mlp_plan())
    x, z = torch.randn(4, 96), torch.randn(4, 96)
    (model.gate_proj(x).sum() + model.up_proj(z).sum()).backward()
    for linear, inputs in ((model.gate_proj, x), (model.up_proj, z)):
        dense = torch.ones(4, 64).T @ inputs
        torch.testing.assert_close(linear.blocks.grad, blocks_of(dense, linear.layer_plan))


def test_dx_is_skipped_where_nothing_below_needs_it(monkeypatch):
    model = smt_ext.patch(mlp(), mlp_plan())
    from smt_ext.nn import functional

    seen = []
    backward = functional._SMTLinearFunction.backward

    def spy(ctx, dy):
        grads = backward(ctx, dy)
        seen.append(grads[0] is not None)
        return grads

    monkeypatch.setattr(functional._SMTLinearFunction, "backward", staticmethod(spy))
    model(torch.randn(4, 96)).sum().backward()
    # down needs dX for the layers below it; gate and up read a plain input.
    assert seen == [True, False, False]


def test_gradients_accumulate_over_micro_batches():
    whole, parts = (smt_ext.patch(mlp(torch.float64), mlp_plan()) for _ in range(2))
    x = torch.randn(8, 96, dtype=torch.float64)
    whole(x).sum().backward()
    for half in x.split(4):
        parts(half).sum().backward()
    for name, grad in block_gradients(whole).items():
        torch.testing.assert_close(block_gradients(parts)[name], grad)


def test_accumulation_in_place_gives_the_same_gradients_in_the_same_buffer():
    fused, plain = (smt_ext.patch(mlp(), mlp_plan()) for _ in range(2))
    for module in smt_ext.smt_modules(fused).values():
        module.accumulate_in_place = True
    x = torch.randn(6, 96)
    for model in (fused, plain):
        model(x).sum().backward()
    buffers = {n: m.blocks.grad.data_ptr() for n, m in smt_ext.smt_modules(fused).items()}
    for model in (fused, plain):
        model(x.flip(0)).square().sum().backward()
    for name, module in smt_ext.smt_modules(fused).items():
        assert module.blocks.grad.data_ptr() == buffers[name]
        torch.testing.assert_close(module.blocks.grad, block_gradients(plain)[name])


def test_accumulation_in_place_leaves_gradients_that_are_handed_out_alone():
    fused, plain = (smt_ext.patch(mlp(), mlp_plan()) for _ in range(2))
    for module in smt_ext.smt_modules(fused).values():
        module.accumulate_in_place = True
    x = torch.randn(6, 96)
    handed_out = []
    for model in (fused, plain):
        model(x).sum().backward()
        blocks = [module.blocks for module in smt_ext.smt_modules(model).values()]
        loss = model(x.flip(0)).square().sum()
        handed_out.append(torch.autograd.grad(loss, blocks[1:], retain_graph=True))
        loss.backward(inputs=blocks[:2])
    for grads in zip(*handed_out, strict=True):
        torch.testing.assert_close(*grads)
    for name, gradient in block_gradients(plain).items():
        torch.testing.assert_close(block_gradients(fused)[name], gradient)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_bits(reentrant):
    plain, saving = (smt_ext.patch(mlp(), mlp_plan()) for _ in range(2))
    x = torch.randn(6, 96, requires_grad=True)
    plain(x).square().sum().backward()
    checkpoint(saving, x, use_reentrant=reentrant).square().sum().backward()
    for name, grad in block_gradients(plain).items():
        assert torch.equal(block_gradients(saving)[name], grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_a_transformers_model(reentrant):
    plain, saving = tiny_llama(), tiny_llama()
    for model in (plain, saving):
        smt_ext.patch(model, llama_plan(model, ("q_proj", "k_proj", "v_proj", "down_proj")))
        model.train()
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    saving.enable_input_require_grads()
    for model in (plain, saving):
        model(**token_batch()).loss.backward()
    for name, grad in block_gradients(plain).items():
        torch.testing.assert_close(block_gradients(saving)[name], grad)
        assert grad.abs().max() > 0


@pytest.mark.parametrize("reference", ["autocast", "saved bytes"])
def test_autocast_computes_and_saves_in_the_autocast_dtype(reference):
    model, dense = smt_ext.patch(mlp(), mlp_plan()), mlp()
    x = torch.randn(9, 96)
    storages = SavedStorages(model)
    with torch.autocast("cpu", torch.bfloat16):
        if reference == "saved bytes":
            with storages.record():
                out = (model.gate_proj(x), model.up_proj(x))
            assert storages.bytes == 9 * 96 * 2
            del out
            return
        y, y_dense = model(x), dense(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, y_dense)
    y.float().square().sum().backward()
    y_dense.float().square().sum().backward()
    for name, layer in MLP_LAYERS.items():
        grad = model.get_submodule(name).blocks.grad
        assert grad.dtype == torch.float32
        native = blocks_of(dense.get_submodule(name).weight.grad, layer)
        assert native.abs().max() > 1
        torch.testing.assert_close(grad, native, rtol=2e-2, atol=2e-2 * native.abs().max().item())


def test_a_trainable_bias_gets_its_gradient():
    model, dense = smt_ext.patch(mlp(), mlp_plan()), mlp()
    model.down_proj.bias.requires_grad_(True)
    x = torch.randn(5, 96)
    model(x).square().sum().backward()
    dense(x).square().sum().backward()
    torch.testing.assert_close(model.down_proj.bias.grad, dense.down_proj.bias.grad)


def test_an_expanded_gradient_is_taken_as_it_is():
    model, dense = smt_ext.patch(mlp(), mlp_plan()), mlp()
    x = torch.randn(5, 96)
    model.up_proj(x).sum().backward()  # dy has stride 0 in both dimensions
    dense.up_proj(x).sum().backward()
    native = blocks_of(dense.up_proj.weight.grad, MLP_LAYERS["up_proj"])
    torch.testing.assert_close(model.up_proj.blocks.grad, native)


def test_a_transposed_input_is_taken_as_it_is():
    model, dense = smt_ext.patch(mlp(), mlp_plan()), mlp()
    x = torch.randn(96, 5).T
    model.up_proj(x).square().sum().backward()
    dense.up_proj(x).square().sum().backward()
    native = blocks_of(dense.up_proj.weight.grad, MLP_LAYERS["up_proj"])
    torch.testing.assert_close(model.up_proj.blocks.grad, native)


def test_a_frozen_layer_saves_nothing():
    model = smt_ext.patch(mlp(), mlp_plan())
    model.requires_grad_(False)
    storages = SavedStorages(model)
    with storages.record():
        y = model(torch.randn(3, 96))
    assert not y.requires_grad
    assert storages.bytes == 0


def test_frozen_blocks_above_what_trains_are_told_of():
    model = smt_ext.patch(mlp(), mlp_plan())
    model.requires_grad_(False)
    x = torch.randn(3, 96, requires_grad=True)
    with pytest.warns(UserWarning, match=r"they do not train.*smt_ext\.unpatch"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x.detach())
        with torch.no_grad():  # the first pass of reentrant checkpointing
            model(x)
        model.eval()(x)


def test_saved_tensor_hooks_may_move_the_columns():
    plain, offloaded = (smt_ext.patch(mlp(), mlp_plan()) for _ in range(2))
    x = torch.randn(6, 96)
    plain(x).sum().backward()
    with torch.autograd.graph.save_on_cpu():
        y = offloaded(x)
    y.sum().backward()
    for name, grad in block_gradients(plain).items():
        assert torch.equal(block_gradients(offloaded)[name], grad)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_compile_full_graph(dynamic, autocast):
    torch._dynamo.reset()
    eager, compiled = (smt_ext.patch(mlp(), mlp_plan()) for _ in range(2))
    backend = "aot_eager_decomp_partition"
    step = torch.compile(compiled, fullgraph=True, dynamic=dynamic, backend=backend)
    for length in (5, 9):
        x = torch.randn(length, 96, requires_grad=True)
        context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
        with context:
            y, y_compiled = eager(x), step(x)
        y.float().square().sum().backward()
        y_compiled.float().square().sum().backward()
        tolerance = 5e-2 if autocast else 1e-4
        for name, grad in block_gradients(eager).items():
            scale = grad.abs().max().item()
            torch.testing.assert_close(
                block_gradients(compiled)[name], grad, rtol=tolerance, atol=tolerance * scale
            )


def test_compiled_siblings_save_their_columns_once():
    torch._dynamo.reset()
    model = smt_ext.patch(mlp(), mlp_plan())

    @torch.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    def both(x):
        return model.gate_proj(x), model.up_proj(x)

    storages = SavedStorages(model)
    with storages.record():
        out = both(torch.randn(8, 96))
    assert storages.bytes == 8 * 96 * 4
    (out[0].sum() + out[1].sum()).backward()
