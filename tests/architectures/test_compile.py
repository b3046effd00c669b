"""torch.compile of a whole patched model: one graph, any length, same gradients, same memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tiny import ARCHITECTURES
from torch._dynamo.testing import CompileCounterWithBackend

import smt_ext
from models import llama_plan, tiny_llama, token_batch
from smt_ext.memory import SavedBytes

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# AOTAutograd with the partitioner that decides what forward keeps for backward, as inductor has it,
# without generating code.
PARTITION = "aot_eager_decomp_partition"


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def patched_llama(layers=2):
    model = tiny_llama(num_hidden_layers=layers)
    return smt_ext.patch(model, llama_plan(model, KINDS)).train()


def batch_of(length):
    batch = token_batch(length, length=length)
    # The labels are the same tensor.
    torch._dynamo.mark_dynamic(batch["input_ids"], 1)
    return batch


def loss_of(model, batch):
    return model(**batch, use_cache=False).loss


def compiled(model, backend):
    return torch.compile(lambda batch: loss_of(model, batch), backend=backend, fullgraph=True)


def assert_trains_alike(eager, model, step, length):
    """The same loss and block gradients; returns the bytes that each saved for backward."""
    batch = batch_of(length)
    with SavedBytes(eager) as saved_eager:
        want = loss_of(eager, batch)
    with SavedBytes(model) as saved:
        loss = step(batch)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    want.backward()
    loss.backward()
    assert_same_gradients(eager, model)
    return saved_eager.bytes, saved.bytes


def assert_same_gradients(eager, model):
    reference = smt_ext.smt_modules(eager)
    for name, module in smt_ext.smt_modules(model).items():
        grad = reference[name].blocks.grad
        scale = grad.abs().max().item()
        assert scale > 0, name
        # float32 sums of up to 160 terms in another order, a dozen of them one after the other.
        torch.testing.assert_close(module.blocks.grad, grad, rtol=0, atol=1e-4 * scale)


def test_one_graph_at_any_length_and_after_optimizer_steps():
    eager, model = patched_llama(), patched_llama()
    counter = CompileCounterWithBackend(PARTITION)
    step = compiled(model, counter)
    optimizers = [smt_ext.SparseAdamW(m, lr=1e-3) for m in (eager, model)]
    for length in (16, 9, 40):
        in_eager, in_graph = assert_trains_alike(eager, model, step, length)
        assert in_graph <= in_eager
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert counter.frame_count == 1


def test_gradient_checkpointing_inside_the_graph():
    eager, model = patched_llama(), patched_llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # transformers makes the embeddings' output require gradients, for reentrant checkpointing. The
    # compiler refuses requires_grad_ on what leaves a graph, and without reentrance it is no use.
    model.disable_input_require_grads()
    counter = CompileCounterWithBackend(PARTITION)
    step = compiled(model, counter)
    for length in (16, 11):
        whole, recomputed = assert_trains_alike(eager, model, step, length)
        assert recomputed < whole / 3
        eager.zero_grad()
        model.zero_grad()
    assert counter.frame_count == 1


def test_inductor_forward_and_backward():
    # An MLP alone: the compiler takes a minute for a whole layer, whose other kernels are torch's.
    eager, model = (patched_llama(layers=1).model.layers[0].mlp for _ in range(2))
    x = torch.randn(2, 16, eager.gate_proj.in_features)
    losses = [f(x).square().mean() for f in (eager, torch.compile(model, fullgraph=True))]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    assert_same_gradients(eager, model)


@pytest.mark.parametrize(("name", "fullgraph"), [("GPT-2", True), ("Qwen3-MoE", False)])
def test_transposed_weights_compile_whole_and_experts_between_graphs(name, fullgraph):
    (architecture,) = (a for a in ARCHITECTURES if a.name == name)
    architecture = replace(architecture, config={**architecture.config, "num_hidden_layers": 1})
    eager, model = architecture.model(), architecture.model()
    plan = smt_ext.make_plan(
        eager, metric="random", targets=("qkv", "mlp"), budget="20% of targets", block_size=16,
        allocation="uniform",
    )  # fmt: skip
    step = torch.compile(
        lambda ids: model(ids, use_cache=False).logits, backend="aot_eager", fullgraph=fullgraph
    )
    for patched in (eager, model):
        smt_ext.patch(patched, plan)
    ids = architecture.batch(0)["input_ids"]
    eager(ids, use_cache=False).logits.square().mean().backward()
    step(ids).square().mean().backward()
    assert_same_gradients(eager, model)


def test_siblings_save_the_union_of_their_columns():
    model = patched_llama()
    layers = [model.model.layers[0].self_attn.get_submodule(f"{x}_proj") for x in "qkv"]
    columns = layers[0]._input_group.width
    assert 0 < columns < 96
    step = torch.compile(lambda x: [m(x) for m in layers], fullgraph=True, backend=PARTITION)
    with SavedBytes(model) as saved:
        out = step(torch.randn(2, 8, 96, requires_grad=True))
    assert saved.bytes == 16 * columns * 4
    sum(y.sum() for y in out).backward()
