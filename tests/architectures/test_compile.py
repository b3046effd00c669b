"""torch.compile of a whole patched model: one graph, any length, the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import smt_ext
from models import llama_plan, tiny_llama, token_batch

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def patched_llama(dtype=torch.float32):
    model = tiny_llama(dtype)
    return smt_ext.patch(model, llama_plan(model, KINDS))


def loss_of(model, batch):
    return model(**batch, use_cache=False).loss


def gradients(model):
    return {name: m.blocks.grad.clone() for name, m in smt_ext.smt_modules(model).items()}


def assert_same_gradients(model, reference, tolerance):
    want = gradients(reference)
    for name, grad in gradients(model).items():
        scale = want[name].abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(grad, want[name], rtol=0, atol=tolerance * scale)


def test_one_graph_at_any_length_and_after_optimizer_steps():
    eager, compiled = patched_llama(), patched_llama()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(
        lambda batch: loss_of(compiled, batch), backend=counter, fullgraph=True, dynamic=True
    )
    optimizers = [smt_ext.SparseAdamW(model, lr=1e-3) for model in (eager, compiled)]
    for length in (16, 9, 23, 40):
        batch = token_batch(length, length=length)
        want, loss = loss_of(eager, batch), step(batch)
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
        want.backward()
        loss.backward()
        # float32 sums in another order: of the length of a weight's row, three layers deep.
        assert_same_gradients(compiled, eager, 1e-4)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert counter.frame_count == 1


def test_inductor_forward_and_backward():
    eager, compiled = patched_llama(), patched_llama()
    batch = token_batch()
    step = torch.compile(lambda batch: loss_of(compiled, batch), fullgraph=True)
    want, loss = loss_of(eager, batch), step(batch)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    want.backward()
    loss.backward()
    assert_same_gradients(compiled, eager, 1e-4)


def test_gradient_checkpointing_inside_the_graph():
    eager, compiled = patched_llama(), patched_llama()
    for model in (eager, compiled):
        model.train()
    compiled.gradient_checkpointing_enable({"use_reentrant": False})
    step = torch.compile(
        lambda batch: loss_of(compiled, batch), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for length in (16, 11):
        batch = token_batch(length, length=length)
        loss_of(eager, batch).backward()
        step(batch).backward()
        assert_same_gradients(compiled, eager, 1e-4)


def test_a_compiled_layer_saves_its_columns_and_not_its_input():
    """Law 4 under the compiler: what the graph keeps for backward of one attention layer."""
    model = patched_llama()
    layers = [model.model.layers[0].self_attn.get_submodule(f"{x}_proj") for x in "qkv"]
    columns = layers[0]._input_group.width
    assert 0 < columns < 96
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    step = torch.compile(
        lambda x: [layer(x) for layer in layers],
        fullgraph=True,
        backend="aot_eager_decomp_partition",
    )
    x = torch.randn(2, 8, 96, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = step(x)
    kept = sum(size for pointer, size in saved.items() if pointer not in owned)
    assert kept == 16 * columns * 4
    sum(y.sum() for y in out).backward()
