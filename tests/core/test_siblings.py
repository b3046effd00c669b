"""Siblings whose block gradients one launch computes: the same bits, and the same laws.

CUDA alone does so. Here CPUs do, by the operator's CPU kernel.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import smt_ext
from models import llama_plan, tiny_llama, token_batch
from smt_ext import BlockPlan, LayerPlan, PatchError, ops

WIDTHS = {"q_proj": 96, "k_proj": 32, "v_proj": 50}  # 50 rows are a ragged edge
T = 7


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, width in WIDTHS.items():
            setattr(self, name, nn.Linear(96, width, bias=name == "q_proj"))


def attention(columns: int = 2) -> Attention:
    """Patched; of three block columns so many are selected."""
    torch.manual_seed(0)
    layers = {
        name: LayerPlan(
            shape=(width, 96),
            block_size=32,
            blocks=tuple((r, c) for r in range(-(-width // 32)) for c in range(columns)),
        )
        for name, width in WIDTHS.items()
    }
    return smt_ext.patch(Attention(), BlockPlan(layers=layers))


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(T, 96, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def loss_of(*outputs: Tensor) -> Tensor:
    """Of which no two entries have the same gradient."""
    return sum(
        (i + 1) * (y.float().sin() * torch.arange(1.0, y.numel() + 1).view_as(y)).sum()
        for i, y in enumerate(outputs)
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each operator ran."""
    counted: Counter[str] = Counter()

    def count(name: str) -> None:
        operator = getattr(ops, name)

        def call(*args: object, **kwargs: object) -> object:
            counted[name] += 1
            return operator(*args, **kwargs)

        monkeypatch.setattr(ops, name, call)

    for name in ("block_grad", "block_grad_siblings"):
        count(name)
    return counted


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch, calls: Counter[str]) -> Callable[[bool], None]:
    """Turns the one launch on or off, and counts anew."""

    def turn(on: bool) -> None:
        monkeypatch.setattr("smt_ext.nn.modules._gains_by_one_launch", lambda x: on)
        calls.clear()

    turn(True)
    return turn


def qkv(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return model.q_proj(x), model.k_proj(x), model.v_proj(x)


def plain(model: nn.Module, x: Tensor) -> None:
    loss_of(*qkv(model, x)).backward()


def in_batches(model: nn.Module, x: Tensor) -> None:
    loss_of(*qkv(model, x.view(1, T, 96))).backward()


def one_unused(model: nn.Module, x: Tensor) -> None:
    loss_of(model.q_proj(x), model.v_proj(x)).backward()


def one_without_a_gradient(model: nn.Module, x: Tensor) -> None:
    q, _, v = qkv(model, x)
    loss_of(q, v).backward()


def one_frozen(model: nn.Module, x: Tensor) -> None:
    model.k_proj.blocks.requires_grad_(False)
    plain(model, x)


def one_accumulates_in_place(model: nn.Module, x: Tensor) -> None:
    model.v_proj.accumulate_in_place = True
    plain(model, x)
    plain(model, x)


def one_twice(model: nn.Module, x: Tensor) -> None:
    loss_of(*qkv(model, x), model.q_proj(x)).backward()


def another_input_between(model: nn.Module, x: Tensor) -> None:
    q, k = model.q_proj(x), model.k_proj(tokens(2))
    loss_of(q, k, model.k_proj(x), model.v_proj(x)).backward()


def two_backwards(model: nn.Module, x: Tensor) -> None:
    loss = loss_of(*qkv(model, x))
    loss.backward(retain_graph=True)
    loss.backward()


def a_backward_for_each(model: nn.Module, x: Tensor) -> None:
    for y in qkv(model, x):
        loss_of(y).backward()


def backward_before_the_next(model: nn.Module, x: Tensor) -> None:
    for linear in (model.q_proj, model.k_proj, model.v_proj):
        loss_of(linear(x)).backward()


def accumulated(model: nn.Module, x: Tensor) -> None:
    for part in x.split(3):
        plain(model, part)


def autocast(model: nn.Module, x: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(*qkv(model, x))
    loss.backward()


def in_bfloat16(model: nn.Module, x: Tensor) -> None:
    plain(model.to(torch.bfloat16), x.bfloat16())


def checkpointed(model: nn.Module, x: Tensor) -> None:
    loss_of(*checkpoint(qkv, model, x, use_reentrant=False)).backward()


def checkpointed_reentrant(model: nn.Module, x: Tensor) -> None:
    loss_of(*checkpoint(qkv, model, x, use_reentrant=True)).backward()


def some_checkpointed(model: nn.Module, x: Tensor) -> None:
    q = model.q_proj(x)
    k, v = checkpoint(lambda x: (model.k_proj(x), model.v_proj(x)), x, use_reentrant=False)
    loss_of(q, k, v).backward()


def offloaded(model: nn.Module, x: Tensor) -> None:
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(*qkv(model, x))
    loss.backward()


# What runs -> calls of block_grad_siblings, and of block_grad.
WAYS: dict[Callable[[nn.Module, Tensor], None], tuple[int, int]] = {
    plain: (1, 0),
    in_batches: (1, 0),
    one_unused: (1, 0),
    one_without_a_gradient: (1, 0),
    one_frozen: (1, 0),
    one_accumulates_in_place: (2, 1),
    one_twice: (2, 0),
    another_input_between: (3, 0),
    two_backwards: (2, 0),
    a_backward_for_each: (3, 0),
    backward_before_the_next: (3, 0),
    accumulated: (3, 0),
    autocast: (1, 0),
    in_bfloat16: (1, 0),
    checkpointed: (1, 0),
    checkpointed_reentrant: (1, 0),
    some_checkpointed: (1, 0),
    offloaded: (1, 0),
}


def result_of(way: Callable[[nn.Module, Tensor], None], columns: int) -> list[Tensor | None]:
    model, x = attention(columns), tokens()
    way(model, x)
    return [x.grad, *(module.blocks.grad for module in smt_ext.smt_modules(model).values())]


@pytest.mark.parametrize("columns", [2, 3])  # 3: all of them, where the input itself is kept
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_bits_are_those_of_a_call_for_each(
    way: Callable[[nn.Module, Tensor], None],
    columns: int,
    together: Callable[[bool], None],
    calls: Counter[str],
) -> None:
    got = result_of(way, columns)
    assert (calls["block_grad_siblings"], calls["block_grad"]) == WAYS[way]
    together(False)
    expected = result_of(way, columns)
    assert calls["block_grad_siblings"] == 0
    for ours, alone in zip(got, expected, strict=True):
        assert (ours is None) == (alone is None)
        if ours is not None and alone is not None:
            assert torch.equal(ours, alone)
            assert ours.dtype == alone.dtype


def test_a_model_with_attention(together: Callable[[bool], None], calls: Counter[str]) -> None:
    def gradients() -> list[Tensor]:
        model = tiny_llama()
        kinds = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
        smt_ext.patch(model, llama_plan(model, kinds))
        model(**token_batch()).loss.backward()
        return [module.blocks.grad for module in smt_ext.smt_modules(model).values()]

    got = gradients()
    assert calls == {"block_grad_siblings": 4, "block_grad": 2}  # of two layers, of 12 linears
    together(False)
    for ours, alone in zip(got, gradients(), strict=True):
        assert torch.equal(ours, alone)


@pytest.mark.usefixtures("together")
def test_gradients_of_some_alone() -> None:
    model, x = attention(), tokens()
    loss = loss_of(*qkv(model, x))
    blocks = [module.blocks for module in smt_ext.smt_modules(model).values()]
    (alone,) = torch.autograd.grad(loss, blocks[1:2], retain_graph=True)
    (of_x,) = torch.autograd.grad(loss, [x], retain_graph=True)
    loss.backward(inputs=blocks[:1], retain_graph=True)
    assert blocks[1].grad is None
    first = blocks[0].grad.clone()
    blocks[0].grad = None
    loss.backward()
    assert torch.equal(alone, blocks[1].grad)
    assert torch.equal(of_x, x.grad)
    assert torch.equal(first, blocks[0].grad)


def test_the_gradient_of_the_input_alone_needs_no_launch(
    together: Callable[[bool], None], calls: Counter[str]
) -> None:
    model, x = attention(), tokens()
    outputs = qkv(model, x)
    columns = weakref.ref(outputs[0].grad_fn.launch)
    (gradient,) = torch.autograd.grad(loss_of(*outputs), [x])
    assert not calls
    assert gradient.any()
    assert not columns()._x_cols_TU, "nobody would let them go"


@pytest.mark.parametrize("post", [True, False])
def test_hooks_of_blocks_see_what_they_saw(
    post: bool, together: Callable[[bool], None], calls: Counter[str]
) -> None:
    """A sibling that is not called has no gradient, and its hooks are not called."""

    def seen(way: Callable[[nn.Module, Tensor], None]) -> list[Tensor]:
        model, found = attention(), []
        for name in ("k_proj", "v_proj"):
            blocks = model.get_submodule(name).blocks
            if post:
                blocks.register_post_accumulate_grad_hook(lambda p: found.append(p.grad.clone()))
            else:
                blocks.register_hook(lambda grad: found.append(grad.clone()))
        way(model, tokens())
        return found

    for way, count in ((plain, 2), (one_unused, 1)):
        together(True)
        got = seen(way)
        together(False)
        assert len(got) == count
        for ours, alone in zip(got, seen(way), strict=True):
            assert torch.equal(ours, alone)


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("columns", [2, 3])
def test_columns_are_saved_once(columns: int) -> None:
    model, x = attention(columns), tokens()
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = qkv(model, x)
    assert list(saved.values()) == [T * 32 * columns * 4]
    handles = [
        edge for y in outputs for edge, _ in y.grad_fn.next_functions if hasattr(edge, "launch")
    ]
    assert len(handles) == 3
    assert len(set(handles)) == 1


@pytest.mark.usefixtures("together")
def test_handles_take_no_memory() -> None:
    model, x = attention(), tokens()
    q = model.q_proj(x)
    (held,) = model.q_proj._input_group._held.values()
    handles = [place.handle for place in held.places.values()]
    assert [handle.shape for handle in handles] == [(T, WIDTHS["k_proj"]), (T, WIDTHS["v_proj"])]
    assert [handle.untyped_storage().nbytes() for handle in handles] == [4, 4]
    del q


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("end", ["backward", "dropped", "one never called"])
def test_no_column_outlives_the_graph(columns: int, end: str) -> None:
    """Nor waits for the collector of reference cycles."""
    model = attention(columns)
    group = model.q_proj._input_group
    base = tokens()
    x = base * 1.0
    gc.collect()
    gc.disable()
    try:
        outputs = [model.q_proj(x), model.k_proj(x)]
        columns_of_x = group._held[next(iter(group._held))].x_cols
        alive = weakref.ref(columns_of_x)
        node = weakref.ref(outputs[0].grad_fn.launch)
        del columns_of_x
        if end != "one never called":
            outputs.append(model.v_proj(x))
            assert not group._held
        del x
        assert not group._held
        if end != "dropped":
            loss_of(*outputs).backward()
            assert alive() is None, "the graph alone keeps them"
        del outputs
        assert alive() is None
        assert node() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("together")
def test_gradients_share_memory_of_their_own_size() -> None:
    """Views of one tensor, none of which is copied; nothing else is kept alive."""
    model = attention()
    plain(model, tokens())
    grads = [module.blocks.grad for module in smt_ext.smt_modules(model).values()]
    (storage,) = {
        grad.untyped_storage().data_ptr(): grad.untyped_storage() for grad in grads
    }.values()
    assert storage.nbytes() == sum(grad.nbytes for grad in grads)
    assert all(grad.is_contiguous() for grad in grads)


def test_copies_have_siblings_of_their_own(
    together: Callable[[bool], None], calls: Counter[str]
) -> None:
    model = attention()
    plain(model, tokens())
    expected = [module.blocks.grad.clone() for module in smt_ext.smt_modules(model).values()]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.zero_grad()
        calls.clear()
        plain(twin, tokens())
        assert calls == {"block_grad_siblings": 1}
        for module, grad in zip(smt_ext.smt_modules(twin).values(), expected, strict=True):
            assert torch.equal(module.blocks.grad, grad)


@pytest.mark.usefixtures("together")
def test_what_was_refused_still_is() -> None:
    model, x = attention(), tokens()
    q, k, v = qkv(model, x)
    (grad,) = torch.autograd.grad(loss_of(q, k, v), [model.q_proj.blocks], create_graph=True)
    with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
        grad.sum().backward()
    loss = loss_of(*qkv(model, x))
    with smt_ext.original_weights(model), pytest.raises(PatchError, match="original_weights"):
        loss.backward()
    loss = loss_of(*qkv(attention(3), x := tokens().detach()))
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_more_siblings_than_a_launch_takes(
    calls: Counter[str], together: Callable[[bool], None]
) -> None:
    count = ops.MAX_SIBLINGS + 2
    layer = LayerPlan(shape=(32, 64), block_size=32, blocks=((0, 0),))
    names = tuple(str(i) for i in range(count))
    plan = BlockPlan(layers=dict.fromkeys(names, layer), input_groups=(names,))

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(64, 32) for _ in range(count)))
        smt_ext.patch(model, plan)
        x = torch.randn(5, 64)
        loss_of(*(linear(x) for linear in reversed(model))).backward()
        return [module.blocks.grad for module in smt_ext.smt_modules(model).values()]

    got = gradients()
    assert calls == {"block_grad_siblings": 2}
    together(False)
    for ours, alone in zip(got, gradients(), strict=True):
        assert torch.equal(ours, alone)


@pytest.mark.parametrize("planned", [True, False])
def test_tiles_are_planned_where_the_layers_have_them(
    planned: bool, together: Callable[[bool], None]
) -> None:
    """Blocks of 32: two whole columns of each share tiles."""
    model = attention()
    if planned:
        for module in smt_ext.smt_modules(model).values():
            module.plan_tiles_()
    plain(model, tokens())
    (siblings,) = model.q_proj._input_group._siblings.values()
    assert (siblings.tiles is not None) == planned
    model.to(torch.float32)
    assert not model.q_proj._input_group._siblings, "indices move with the layers"
