"""Every operator against its definition in float64: dtypes, strides, ragged edges, empty inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from reference import DTYPES, PRODUCTS, index, on
from smt_ext import ops

LAYOUTS = ("rows", "columns", "gaps")


def pick(n: int, k: int, block_size: int) -> tuple[list[int], list[int]]:
    """Two of every three blocks of the grid, in order."""
    grid = [(r, c) for r in range(-(-n // block_size)) for c in range(-(-k // block_size))]
    kept = [block for i, block in enumerate(grid) if i % 3 != 1 or len(grid) < 3]
    return [r for r, _ in kept], [c for _, c in kept]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_columns(dtype: torch.dtype, layout: str, device: str) -> None:
    x = reference.strided((50, 150), dtype, layout)
    for col_blocks in ([], [0], [4], [0, 2, 4], [0, 1, 2, 3, 4]):
        for out_dtype in (None, *DTYPES):
            got = ops.gather_columns(on(device, x), index(col_blocks, device), 32, out_dtype)
            expected = reference.gather_columns(x, col_blocks, 32).to(out_dtype or dtype)
            assert torch.equal(got.cpu(), expected)
            assert got.dtype == expected.dtype
            assert got.is_contiguous()
            # Owned: as many bytes as it shows, and none of x's.
            assert got.untyped_storage().nbytes() == got.numel() * got.element_size()
            assert not got.numel() or got.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_and_scatter_blocks(dtype: torch.dtype, layout: str, device: str) -> None:
    w = reference.strided((90, 70), dtype, layout)
    rows, cols = [0, 1, 2, 2], [1, 0, 1, 2]
    where = index(rows, device), index(cols, device)
    for block_dtype in DTYPES:
        got = ops.gather_blocks(on(device, w), *where, 32, block_dtype)
        assert torch.equal(got.cpu(), reference.gather_blocks(w, rows, cols, 32).to(block_dtype))
        blocks = torch.randn(4, 32, 32, dtype=torch.float64).to(block_dtype)
        changed, expected = on(device, w.clone()), w.clone()
        ops.scatter_blocks_(changed, blocks.to(device), *where)
        reference.scatter_blocks_(expected, blocks.to(dtype), rows, cols)
        assert torch.equal(changed.cpu(), expected)
        assert not torch.equal(changed.cpu(), w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_block_grad(
    dtype: torch.dtype, shape: tuple[int, int, int, int], layout: str, device: str
) -> None:
    t, n, k, size = shape
    rows, cols = pick(n, k, size)
    dy, x = reference.strided((t, n), dtype, layout), reference.strided((t, k), dtype, "rows")
    columns = sorted(set(cols))
    x_cols = ops.gather_columns(on(device, x), index(columns, device), size)
    where = index(rows, device), index([columns.index(col) for col in cols], device)
    dense, bound = reference.dense_grad(dy, x)
    exact, bound = (reference.gather_blocks(m, rows, cols, size) for m in (dense, bound))
    for out_dtype in {dtype, reference.accumulator(dtype)}:
        rounding = reference.rounding(exact, out_dtype)
        got = ops.block_grad(on(device, dy), x_cols, *where, size, out_dtype)
        assert got.dtype == out_dtype
        if t == 0:
            assert not got.any()
        else:
            reference.assert_within(got, exact, bound + rounding)
        start = torch.randn(len(rows), size, size, dtype=torch.float64).to(out_dtype)
        into = start.to(device, copy=True)
        ops.block_grad_acc_(into, on(device, dy), x_cols, *where, size)
        total = start.double() + exact
        slack = bound + 2 * reference.unit(out_dtype) * (total.abs() + start.double().abs())
        reference.assert_within(into, total, slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_siblings(dtype: torch.dtype, layout: str, device: str) -> None:
    """On CPUs the bits of a call for each."""
    t, size, widths = 33, 32, (70, 32, 1, 100)
    x_cols = reference.strided((t, 80), dtype, "rows").to(device)
    dys = [on(device, reference.strided((t, n), dtype, layout)) for n in widths]
    each = [pick(n, 80, size) for n in widths]
    rows, first = [], 0
    for n, (own, _) in zip(widths, each, strict=True):
        rows += [first + row for row in own]
        first += -(-n // size)
    slots = [col for _, cols in each for col in cols]
    out_dtype = reference.accumulator(dtype)
    got = ops.block_grad_siblings(
        dys, x_cols, index(rows, device), index(slots, device), size, out_dtype
    )
    parts = got.split([len(own) for own, _ in each])
    for dy, (own, cols), part in zip(dys, each, parts, strict=True):
        assert len(own) > 0
        if device == "cpu":
            alone = ops.block_grad(dy, x_cols, index(own), index(cols), size, out_dtype)
            assert torch.equal(part, alone)
        dense, bound = reference.dense_grad(dy.cpu(), x_cols.cpu())
        exact, bound = (reference.gather_blocks(m, own, cols, size) for m in (dense, bound))
        reference.assert_within(part, exact, bound + reference.rounding(exact, out_dtype))


def test_block_grad_is_no_worse_than_torch(device: str) -> None:
    """The error of the low-precision product is that of torch's own, within a factor of two."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        dy, x = (torch.randn(700, 256).to(device, dtype) for _ in range(2))
        exact = dy.double().T @ x.double()
        zero = index([0], device)
        ours = ops.block_grad(dy, x, zero, zero, 256).double() - exact
        torchs = (dy.T @ x).double() - exact
        assert ours.norm() <= 2 * torchs.norm()


@pytest.mark.parametrize("metric", ops.METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_block_scores(
    dtype: torch.dtype, shape: tuple[int, int, int, int], metric: str, device: str
) -> None:
    t, n, k, size = shape
    for layout in LAYOUTS:
        g = reference.strided((n, k), dtype, layout)
        magnitude = reference.block_reduce(g.double().abs(), size, metric)
        # Up to 512 terms are summed before float64 takes over.
        bound = 600 * reference.unit(reference.accumulator(dtype)) * magnitude
        got = ops.block_score(on(device, g), size, metric)
        assert got.dtype == reference.accumulator(dtype)
        reference.assert_within(got, reference.block_reduce(g, size, metric), bound)

        dy, x = reference.strided((t, n), dtype, layout), reference.strided((t, k), dtype, layout)
        fused = ops.block_score_fused(on(device, dy), on(device, x), size, metric)
        if t == 0:
            assert not fused.any()
            continue
        dense, error = reference.dense_grad(dy, x)
        # An entry's error goes into the score as the entry itself does.
        slack = reference.block_reduce(error, size, metric)
        magnitude = reference.block_reduce(dense.abs(), size, metric)
        bound = slack + 600 * reference.unit(reference.accumulator(dtype)) * magnitude
        reference.assert_within(fused, reference.block_reduce(dense, size, metric), bound)


def adamw_arguments(
    dtype: torch.dtype, weight_dtype: torch.dtype, master: bool, device: str = "cpu"
) -> dict[str, list]:
    """Two layers, the second ragged in both directions."""
    arguments: dict[str, list] = {
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
        )
    }
    for (n, k), rows, cols in (((64, 96), [0, 1, 1], [2, 0, 1]), ((50, 40), [0, 1], [1, 0])):
        w = torch.randn(n, k, dtype=torch.float64).to(device, weight_dtype)
        where = index(rows, device), index(cols, device)
        blocks = ops.gather_blocks(w, *where, 32, dtype)
        moment = reference.accumulator(dtype)
        arguments["weights"].append(w)
        arguments["blocks"].append(blocks)
        arguments["grads"].append(torch.randn(*blocks.shape, dtype=torch.float64).to(device, dtype))
        arguments["exp_avgs"].append(torch.zeros_like(blocks, dtype=moment))
        arguments["exp_avg_sqs"].append(torch.zeros_like(blocks, dtype=moment))
        if master:
            arguments["masters"].append(blocks.float())
        arguments["rows"].append(where[0])
        arguments["cols"].append(where[1])
    return arguments


def scalar(value: float, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


@pytest.mark.parametrize("with_origin", [False, True])
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw_is_torchs(
    dtype: torch.dtype, weight_dtype: torch.dtype, with_origin: bool, device: str
) -> None:
    """With an origin the decay is taken out of torch's step, and made of the distance to it."""
    for master in {False, dtype in (torch.bfloat16, torch.float16)}:
        a = adamw_arguments(dtype, weight_dtype, master, device)
        wide = [(m if master else b).double() for m, b in zip(a["masters"] or a["blocks"], a["blocks"],
                                                              strict=True)]  # fmt: skip
        params = [torch.nn.Parameter(p.clone()) for p in wide]
        decay = 0.0 if with_origin else 0.1
        kind = min(dtype, weight_dtype, key=lambda kind: kind.itemsize)
        origins = [torch.randn(p.shape).to(device, kind) for p in wide] if with_origin else []
        optimizer = torch.optim.AdamW(
            params, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay
        )
        for step in range(1, 4):
            for grad, param in zip(a["grads"], params, strict=True):
                grad.copy_(torch.randn(grad.shape))
                param.grad = 0.5 * grad.double()
            for param, origin in zip(params, origins, strict=False):
                param.detach().lerp_(origin.double(), 1e-2 * 0.1)
            optimizer.step()
            ops.sparse_adamw_step_(
                **a, step=scalar(step, device), lr=scalar(1e-2, device),
                grad_scale=scalar(0.5, device), found_inf=scalar(0, device),
                beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1, origins=origins,
            )  # fmt: skip
        for i, param in enumerate(params):
            inside = reference.gather_blocks(
                torch.ones_like(a["weights"][i]), a["rows"][i].tolist(), a["cols"][i].tolist(), 32
            ).bool()
            got = (a["masters"] or a["blocks"])[i]
            exact = param.detach()[inside].cpu()
            u = reference.unit(got.dtype) + 8 * reference.unit(a["exp_avgs"][i].dtype)
            reference.assert_within(got[inside], exact, 3 * u * (exact.abs() + 0.1))
            assert torch.equal(a["blocks"][i][inside], got[inside].to(dtype))
            held = ops.gather_blocks(a["weights"][i], a["rows"][i], a["cols"][i], 32)
            assert torch.equal(held[inside], got[inside].to(weight_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw_writes_nothing_if_a_gradient_was_inf(dtype: torch.dtype, device: str) -> None:
    a = adamw_arguments(dtype, dtype, False, device)
    a["grads"][0][0, 0, 0] = torch.inf
    before = {name: [t.clone() for t in tensors] for name, tensors in a.items()}
    ops.sparse_adamw_step_(
        **a, step=scalar(1, device), lr=scalar(1, device), grad_scale=scalar(1, device),
        found_inf=scalar(1, device), beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1,
    )  # fmt: skip
    for name, tensors in a.items():
        assert all(map(torch.equal, tensors, before[name])), name


def test_grad_norm(device: str) -> None:
    grads = [torch.randn(3, 17, 17).to(device, dtype) for dtype in DTYPES]
    grads.append(torch.empty(0, device=device))
    exact = torch.cat([g.double().flatten() for g in grads]).norm()
    assert abs(ops.grad_norm(grads) - exact) <= 1e-12 * exact
    for bad in (torch.inf, torch.nan):
        grads[1][2, 16, 16] = bad
        assert not ops.grad_norm(grads).isfinite()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    dy, x = torch.randn(333, 520).to(dtype), torch.randn(333, 390).to(dtype)
    rows, cols = pick(520, 390, 64)
    runs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        a = adamw_arguments(dtype, dtype, False)
        for i, grad in enumerate(a["grads"]):
            grad.copy_(torch.arange(grad.numel()).view(grad.shape).sin() + i)
            a["weights"][i].zero_()
            a["blocks"][i].fill_(0.5)
        ops.sparse_adamw_step_(
            **a, step=scalar(1), lr=scalar(1e-2), grad_scale=scalar(1), found_inf=scalar(0),
            beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, seed=3,
        )  # fmt: skip
        runs.append(
            [
                ops.gather_columns(x, index(sorted(set(cols))), 64),
                ops.block_grad(dy, x, index(rows), index(cols), 64),
                ops.block_score(dy, 64),
                ops.block_score_fused(dy, x, 64),
                ops.grad_norm([dy, x]),
                *a["weights"],
                *a["blocks"],
            ]
        )
    for other in runs[1:]:
        for one, many in zip(runs[0], other, strict=True):
            assert torch.equal(one, many)


@settings(max_examples=60)
@given(
    st.integers(0, 70), st.integers(1, 150), st.integers(1, 150), st.integers(16, 80),
    st.sampled_from(DTYPES), st.randoms(use_true_random=False),
)  # fmt: skip
def test_any_shape(device: str, t: int, n: int, k: int, size: int, dtype: torch.dtype, rng) -> None:
    grid = [(r, c) for r in range(-(-n // size)) for c in range(-(-k // size))]
    blocks = sorted(rng.sample(grid, rng.randint(0, len(grid))))
    rows, cols = [r for r, _ in blocks], [c for _, c in blocks]
    columns = sorted(set(cols))
    dy, x = torch.randn(t, n).to(dtype), torch.randn(t, k).to(dtype)
    x_cols = ops.gather_columns(x.to(device), index(columns, device), size)
    assert torch.equal(x_cols.cpu(), reference.gather_columns(x, columns, size))
    where = index(rows, device), index([columns.index(c) for c in cols], device)
    got = ops.block_grad(dy.to(device), x_cols, *where, size, reference.accumulator(dtype))
    dense, bound = reference.dense_grad(dy, x)
    exact = reference.gather_blocks(dense, rows, cols, size)
    error = (got.double().cpu() - exact).abs()
    assert (error <= reference.gather_blocks(bound, rows, cols, size)).all()
