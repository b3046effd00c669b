"""AdamW and the gradient norm by the CUDA kernels, at any shape, stride, address and dtype."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from checked_cuda import Operators
from reference import assert_within, index
from shapes import HALF, dtypes, examples, grids, in_two_orders, layouts, seeds


def adamw_layers(draw_dtype: st.SearchStrategy[torch.dtype]) -> st.SearchStrategy[list[Any]]:
    """Block dtype, weight dtype, layout and blocks of each layer."""
    layer = st.tuples(draw_dtype, dtypes, layouts, grids(distinct=True))
    return st.lists(layer, min_size=1, max_size=3)


@examples(60)
@given(
    # Masters are of half-precision blocks.
    st.tuples(st.just(False), adamw_layers(dtypes))
    | st.tuples(st.just(True), adamw_layers(st.sampled_from(HALF))),
    st.sampled_from((False, False, False, True)), st.integers(1, 1000),
    st.sampled_from((-1, 0)) | st.integers(1, 2**62), st.booleans(), seeds,
)  # fmt: skip
def test_sparse_adamw(
    kernels: ModuleType,
    layers_of: tuple[bool, list[Any]],
    skip: bool,
    step: int,
    rounding_seed: int,
    with_origins: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    with_masters, layers = layers_of
    numbers = {"lr": 0.01, "grad_scale": 0.25, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8,
               "weight_decay": 0.1}  # fmt: skip
    before: dict[str, list[Tensor]] = {
        name: []
        for name in (
            "weights",
            "blocks",
            "grads",
            "exp_avgs",
            "exp_avg_sqs",
            "masters",
            "rows",
            "cols",
            "origins",
        )
    }
    for dtype, weight_dtype, layout, (n, k, size, rows, cols) in layers:
        shape = (len(rows), size, size)
        normal = [torch.randn(shape, dtype=torch.float64) for _ in range(4)]
        moment = reference.accumulator(dtype)
        before["weights"].append(reference.strided((n, k), weight_dtype, layout))
        before["blocks"].append(normal[0].to(dtype))
        before["grads"].append(normal[1].to(dtype))
        before["exp_avgs"].append(normal[2].to(moment))
        before["exp_avg_sqs"].append(normal[3].abs().to(moment))
        before["rows"].append(index(rows))
        before["cols"].append(index(cols))
        if with_masters:
            # Not representable in half precision, so that reading the block instead is seen.
            before["masters"].append(before["blocks"][-1].float() * 1.0003)
        if with_origins:
            kind = min(weight_dtype, moment, key=lambda dtype: dtype.itemsize)
            before["origins"].append(torch.randn(shape, dtype=torch.float64).to(kind))
    after: dict[str, list[Tensor]] = {}

    def run(operators: Operators) -> list[Tensor]:
        nonlocal after
        after = {name: [copy_of(t) for t in tensors] for name, tensors in before.items()}
        operators.sparse_adamw_step_(
            *list(after.values())[:8],
            *(
                torch.tensor(float(value), dtype=torch.float64)
                for value in (step, numbers["lr"], numbers["grad_scale"], skip)
            ),
            *(numbers[name] for name in ("beta1", "beta2", "eps", "weight_decay")),
            rounding_seed,
            after["origins"],
        )
        return [t for tensors in after.values() for t in tensors]

    in_two_orders(kernels, seed, run)
    for i in range(len(layers)):
        was, now = ({name: t[i] for name, t in all_.items() if t} for all_ in (before, after))
        if skip:
            assert all(torch.equal(was[name], now[name]) for name in was)
        else:
            check_adamw_layer(was, now, step, rounding_seed, numbers)


def copy_of(tensor: Tensor) -> Tensor:
    """With the same strides and address modulo 64, a view of memory of its own if it is a view."""
    whole = tensor.new_empty(tensor.untyped_storage().nbytes() // tensor.element_size())
    whole.untyped_storage().copy_(tensor.untyped_storage())
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def check_adamw_layer(
    was: dict[str, Tensor],
    now: dict[str, Tensor],
    step: int,
    rounding_seed: int,
    numbers: dict[str, float],
) -> None:
    rows, cols = was["rows"].tolist(), was["cols"].tolist()
    dtype, weight_dtype = was["blocks"].dtype, was["weights"].dtype
    size = was["blocks"].shape[1]
    inside = reference.gather_blocks(torch.ones_like(was["weights"]), rows, cols, size).bool()
    for name in ("blocks", "exp_avgs", "exp_avg_sqs", "masters"):
        if name in was:
            assert torch.equal(now[name][~inside], was[name][~inside]), name
    u = reference.unit(reference.accumulator(dtype))
    value = was.get("masters", was["blocks"])
    exact = reference.adamw(
        *(t[inside] for t in (value, was["grads"], was["exp_avgs"], was["exp_avg_sqs"])), u,
        step=step, **numbers, origin=was["origins"][inside] if "origins" in was else None,
    )  # fmt: skip
    (p, p_bound), m, v = exact
    assert_within(now["exp_avgs"][inside], *m)
    assert_within(now["exp_avg_sqs"][inside], *v)
    if "masters" in now:
        assert_within(now["masters"][inside], p, p_bound)
        assert torch.equal(now["blocks"][inside], now["masters"][inside].to(dtype))
    else:
        if dtype in HALF:
            # Stochastic rounding goes to either neighbour, hence up to a whole step.
            stochastic = rounding_seed >= 0 and dtype == torch.bfloat16
            rounding = reference.rounding(p.abs() + p_bound, dtype)
            p_bound = p_bound + rounding * (2 if stochastic else 1)
        assert_within(now["blocks"][inside], p, p_bound)
    expected = was["weights"].clone()
    reference.scatter_blocks_(
        expected, now.get("masters", now["blocks"]).to(weight_dtype), rows, cols
    )
    assert torch.equal(now["weights"], expected)


@examples(40)
@given(
    st.lists(st.tuples(dtypes, st.integers(0, 400) | st.integers(16000, 17000), st.integers(0, 1)),
             min_size=1, max_size=5),
    seeds,
)  # fmt: skip
def test_grad_norm(
    kernels: ModuleType, shapes: list[tuple[torch.dtype, int, int]], seed: int
) -> None:
    torch.manual_seed(seed)
    grads = [
        torch.randn(size + offset, dtype=torch.float64).to(dtype)[offset:]
        for dtype, size, offset in shapes
    ]
    got = in_two_orders(kernels, seed, lambda o: o.grad_norm(grads))
    exact = torch.cat([g.double() for g in grads]).norm()
    terms = sum(size for _, size, _ in shapes)
    assert abs(got - exact) <= max(1, terms) * 2.0**-53 * exact
    assert got > 0 or terms == 0
