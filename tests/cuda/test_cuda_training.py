"""Planning and training of unmodified models, every operator of smt_ext by the CUDA kernels."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
import smt_ext
from checked_cuda import NAMES, on_cuda_kernels
from models import MLP_LAYERS, blocks_of, mask_of, mlp, mlp_plan, tiny_llama, token_batch
from smt_ext.planning.scoring import score_blocks
from smt_ext.planning.targets import select_targets


@pytest.fixture(autouse=True)
def _columns_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel, also in plans that select all of them, where a layer keeps its input as it is."""
    monkeypatch.setattr("smt_ext.nn.modules._is_all_of_its_memory", lambda x: False)


STEPS = 4
LR = 1e-2
HYPER = {"lr": LR, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
# Names of ways to train -> dtype of the weights, of the blocks, and of SparseAdamW.
WAYS: dict[str, tuple[torch.dtype, torch.dtype | None, dict[str, Any]]] = {
    "float64": (torch.float64, None, {}),
    "float32": (torch.float32, None, {}),
    "float16": (torch.float16, None, {}),
    "bfloat16": (torch.bfloat16, None, {}),
    "master": (torch.bfloat16, torch.bfloat16, {"master_dtype": torch.float32}),
    "stochastic": (torch.bfloat16, torch.bfloat16, {"stochastic_rounding": True, "seed": 5}),
}


def train(way: str, dtype: torch.dtype | None = None) -> tuple[nn.Module, list[Tensor]]:
    """Some clipped steps of two micro-batches each: the model, and everything that training wrote.

    ``dtype`` trains the values of the way's dtypes in another one.
    """
    weight_dtype, block_dtype, options = WAYS[way]
    model = mlp(weight_dtype)
    if dtype is not None:
        model, block_dtype, options = model.to(dtype), dtype, {}
    smt_ext.patch(model, mlp_plan(), block_dtype=block_dtype)
    modules = smt_ext.smt_modules(model).values()
    for module in modules:
        module.accumulate_in_place = True
    optimizer = smt_ext.SparseAdamW(model, **HYPER, max_grad_norm=0.05, **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(2):
            backward(model, 2 * step + part)
        optimizer.step()
    assert optimizer.last_grad_norm > 0.05  # clipped
    state = [t for m in modules for t in optimizer.state[m.blocks].values()]
    return model, [*(m.weight for m in modules), *(m.blocks for m in modules), *state]


def backward(model: nn.Module, seed: int) -> None:
    dtype = model.gate_proj.weight.dtype
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(seed)).to(dtype)
    model(x).to(torch.float64).square().mean().backward()


TRAINING = {"gather_blocks", "gather_columns", "block_grad", "block_grad_acc_", "grad_norm",
            "sparse_adamw_step_"}  # fmt: skip


def test_float64_trajectory_is_that_of_the_cpu_kernels(kernels: ModuleType) -> None:
    _, on_cpu = train("float64")
    with on_cuda_kernels(kernels) as calls:
        _, on_cuda = train("float64")
    assert set(calls) == TRAINING
    assert calls["sparse_adamw_step_"] == STEPS  # all layers in one launch
    for ours, cpus in zip(on_cuda, on_cpu, strict=True):
        torch.testing.assert_close(ours, cpus, rtol=1e-12, atol=1e-14)
    assert kernels.last_stats("sparse_adamw").plain_global == 0


@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_low_precision_trajectory_stays_within_its_rounding(kernels: ModuleType, way: str) -> None:
    exact, _ = train(way, torch.float64)
    with on_cuda_kernels(kernels):
        model, _ = train(way)
    for name, layer in MLP_LAYERS.items():
        module = model.get_submodule(name)
        start, mask = mlp(WAYS[way][0]).get_submodule(name).weight, mask_of(layer)
        assert torch.equal(module.weight[~mask], start[~mask])
        assert torch.equal(module.read_blocks(), module.blocks.to(module.weight.dtype))
        error = (module.weight.double() - exact.get_submodule(name).weight)[mask].abs()
        moved = (start.double() - exact.get_submodule(name).weight)[mask].abs()
        # Adam's update is sign-like (|step| <= lr): a gradient entry near zero may flip its sign
        # by rounding, which moves an entry by 2 lr a step at most. The mean must be far smaller.
        assert error.max() <= 2 * STEPS * LR
        budget = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-3}[start.dtype]
        assert error.mean() <= budget < moved.mean() / 3


@pytest.mark.parametrize("way", ["float32", "bfloat16", "stochastic"])
def test_bits_do_not_depend_on_the_order_of_blocks_and_threads(
    kernels: ModuleType, way: str
) -> None:
    results = []
    for seed in (1, 2, 3):
        with on_cuda_kernels(kernels, seed):
            results.append(train(way)[1])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def test_stochastic_rounding_draws_the_bits_of_the_cpu_kernels(kernels: ModuleType) -> None:
    """Sums differ in the last bit of float32, the random bits in none: few entries may."""
    _, on_cpu = train("stochastic")
    with on_cuda_kernels(kernels):
        _, on_cuda = train("stochastic")
    for ours, cpus in zip(on_cuda[:3], on_cpu[:3], strict=True):
        assert (ours == cpus).float().mean() > 0.97


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_bad_gradient_skips_the_step(kernels: ModuleType, bad: float) -> None:
    with on_cuda_kernels(kernels):
        model = smt_ext.patch(mlp(torch.bfloat16), mlp_plan())
        optimizer = smt_ext.SparseAdamW(model, max_grad_norm=1.0)
        for step in range(3):
            optimizer.zero_grad()
            backward(model, step)
            if step == 1:
                weights = copy.deepcopy(model.state_dict())
                state = copy.deepcopy(optimizer.state_dict()["state"])
                model.up_proj.blocks.grad[1, 3, 5] = bad
            optimizer.step()
            if step == 1:
                for name, value in model.state_dict().items():
                    assert torch.equal(value, weights[name])
                for index, saved in state.items():
                    for key, value in saved.items():
                        assert torch.equal(optimizer.state_dict()["state"][index][key], value)
        assert optimizer.skipped_steps == 1
        assert not torch.equal(model.up_proj.weight, weights["up_proj.weight"])
        assert torch.isfinite(model.up_proj.weight).all()


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_siblings_launch_once(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, size: int, tiled: bool, together: bool
) -> None:
    """q, k and v: one launch in place of three."""
    monkeypatch.setattr("smt_ext.nn.modules._gains_by_one_launch", lambda x: together)
    torch.manual_seed(0)
    widths = {"q_proj": 288, "k_proj": 272, "v_proj": 144}
    model = nn.ModuleDict({name: nn.Linear(96, width) for name, width in widths.items()})
    layers = {
        name: smt_ext.LayerPlan(
            shape=(width, 96),
            block_size=size,
            blocks=tuple((r, c) for r in range(width // size) for c in (0, 2)),
        )
        for name, width in widths.items()
    }
    smt_ext.patch(model, smt_ext.BlockPlan(layers=layers))
    x, dys = torch.randn(40, 96), [torch.randn(40, width) for width in widths.values()]
    with on_cuda_kernels(kernels) as calls:
        for module in smt_ext.smt_modules(model).values():
            if tiled:
                module.plan_tiles_()
        torch.autograd.backward([linear(x) for linear in model.values()], dys)
    assert calls["block_grad_siblings"] + calls["block_grad"] == (1 if together else 3)
    for linear, dy in zip(model.values(), dys, strict=True):
        assert (linear._block_tiles is not None) == tiled
        exact, bound = (blocks_of(m, linear.layer_plan) for m in reference.dense_grad(dy, x))
        reference.assert_within(linear.blocks.grad, exact, bound)


def llama_run(dtype: torch.dtype) -> tuple[smt_ext.BlockPlan, dict[str, Tensor], list[float]]:
    """Plan and train a Llama: the plan, the scores it was made from, the losses."""
    model = tiny_llama(dtype)
    targets = ("q", "v", "down_proj")
    batches = [token_batch(seed) for seed in range(2)]
    scores = {
        name: torch.from_numpy(scored.values)
        for name, scored in score_blocks(
            model, select_targets(model, targets), batches, block_size=32, progress=False
        ).scores.items()
    }
    plan = smt_ext.make_plan(
        model, batches, budget="8 blocks", block_size=32, targets=targets, progress=False
    )
    smt_ext.patch(model, plan)
    optimizer = smt_ext.SparseAdamW(model, lr=LR, max_grad_norm=1.0)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**batches[0]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with smt_ext.original_weights(model), torch.no_grad():
        assert model(**batches[0]).loss.item() == losses[0]
    return plan, scores, losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_llama_is_planned_and_trained(kernels: ModuleType, dtype: torch.dtype) -> None:
    plan, scores, losses = llama_run(dtype)
    with on_cuda_kernels(kernels) as calls:
        cuda_plan, cuda_scores, cuda_losses = llama_run(dtype)
    planning = {"block_score_fused", "scatter_blocks_"}  # the second by original_weights
    assert set(calls) == TRAINING - {"block_grad_acc_"} | planning
    for name, score in scores.items():
        # Of the same dy and x, T = 32 products in two orders: they part by at most 4 (T + 2)
        # roundings of the sum of magnitudes (reference.dense_grad), which for products of either
        # sign is about sqrt(T) times the sum.
        torch.testing.assert_close(
            cuda_scores[name], score, rtol=4 * 34 * 2.0**-24 * 32**0.5, atol=0
        )
    assert cuda_plan.layers == plan.layers
    # Float32 blocks and sums in both: losses part by rounding only.
    rounding = 1e-5 if dtype == torch.float32 else 2.0**-8
    assert cuda_losses == pytest.approx(losses, rel=rounding)
    assert cuda_losses[-1] < cuda_losses[0] - 10 * rounding * cuda_losses[0]


def test_scores_of_a_dense_gradient(kernels: ModuleType) -> None:
    model = mlp()
    targets = {name: model.get_submodule(name) for name in MLP_LAYERS}
    on_cpu = score_blocks(model, targets, None, block_size=32, metric="weight").scores
    with on_cuda_kernels(kernels) as calls:
        on_cuda = score_blocks(model, targets, None, block_size=32, metric="weight").scores
    assert set(calls) == {"block_score"}
    for name in targets:
        assert on_cuda[name].values == pytest.approx(on_cpu[name].values, rel=130 * 2.0**-24)


def test_the_cpu_kernels_are_back_afterwards(kernels: ModuleType) -> None:
    before = kernels.config.seed
    calls = None

    def fail() -> None:
        nonlocal calls
        with on_cuda_kernels(kernels, seed=before + 1) as calls:
            assert kernels.config.seed == before + 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    train("float32")
    assert not calls
    assert kernels.config.seed == before


def test_every_operator_is_covered() -> None:
    schemas = torch._C._jit_get_all_schemas()
    registered = {
        s.name.removeprefix("smt_ext::") for s in schemas if s.name.startswith("smt_ext::")
    }
    no_kernel = {"cpu_capability", "cuda_archs", "check_written_"}
    assert registered - no_kernel == set(NAMES)
