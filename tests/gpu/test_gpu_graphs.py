"""SparseAdamW inside CUDA graphs. Not yet run on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import smt_ext
from models import MLP, mlp, mlp_plan
from smt_ext.nn.modules import SMTLinear


def patched(device: torch.device, dtype: torch.dtype) -> tuple[MLP, list[SMTLinear]]:
    model = mlp(dtype).to(device)
    smt_ext.patch(model, mlp_plan(), block_dtype=dtype)
    return model, list(smt_ext.smt_modules(model).values())


def gradients_of(step: int, modules: list[SMTLinear]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [
        torch.randn(m.blocks.shape, generator=generator).to(m.blocks.device, m.blocks.dtype)
        for m in modules
    ]


def set_gradients(step: int, modules: list[SMTLinear]) -> None:
    """Into the tensors that are there: a graph reads those."""
    for module, grad in zip(modules, gradients_of(step, modules), strict=True):
        if module.blocks.grad is None:
            module.blocks.grad = torch.zeros_like(module.blocks)
        module.blocks.grad.copy_(grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_goes_on_as_an_eager_one(dtype: torch.dtype, cuda: torch.device) -> None:
    """Changing gradients and learning rate, the step count, a skipped step: all reach the graph."""
    runs = []
    for captured in (False, True):
        model, modules = patched(cuda, dtype)
        optimizer = smt_ext.SparseAdamW(
            model, lr=torch.tensor(1e-2, device=cuda), weight_decay=0.1, decay_to="base",
            max_grad_norm=5.0, stochastic_rounding=True,
        )  # fmt: skip
        set_gradients(0, modules)
        optimizer.step()
        run = optimizer.step
        if captured:
            graph = torch.cuda.CUDAGraph()
            before = [module.weight.clone() for module in modules]
            with torch.cuda.graph(graph):
                optimizer.step()
            for module, weight in zip(modules, before, strict=True):
                assert torch.equal(module.weight, weight)  # capturing is not running
            run = graph.replay
        norms = []
        for step in range(1, 6):
            set_gradients(step, modules)
            if step == 3:
                modules[0].blocks.grad[0, 0, 0] = torch.nan
            optimizer.param_groups[0]["lr"].fill_(1e-2 * 0.8**step)
            run()
            norms.append(optimizer.last_grad_norm)
        assert optimizer.skipped_steps == 1
        steps = {float(state["step"]) for state in optimizer.state.values()}
        assert steps == {5.0}
        assert [step for step, norm in enumerate(norms, 1) if math.isnan(norm)] == [3]
        runs.append([torch.tensor(norms).nan_to_num(), *(m.weight.clone() for m in modules)])
    for eager, replayed in zip(*runs, strict=True):
        assert torch.equal(eager, replayed)


def test_a_whole_training_step_in_one_graph(cuda: torch.device) -> None:
    runs = []
    for captured in (False, True):
        model, modules = patched(cuda, torch.float32)
        optimizer = smt_ext.SparseAdamW(model, lr=1e-2)
        x = torch.zeros(6, 96, device=cuda)

        def step(model=model, optimizer=optimizer, x=x) -> None:
            optimizer.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            optimizer.step()

        def fill(seed: int, x: Tensor = x) -> None:
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))

        fill(0)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()
        torch.cuda.current_stream().wait_stream(aside)
        run = step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            run = graph.replay
        for seed in range(1, 5):
            fill(seed)
            run()
        runs.append([module.weight.clone() for module in modules])
        start = mlp().to(cuda)
        assert not torch.equal(model.up_proj.weight, start.up_proj.weight)
    for eager, replayed in zip(*runs, strict=True):
        assert torch.equal(eager, replayed)


def test_a_first_step_is_not_captured(cuda: torch.device) -> None:
    model, modules = patched(cuda, torch.float32)
    optimizer = smt_ext.SparseAdamW(model)
    set_gradients(0, modules)
    with (
        pytest.raises(RuntimeError, match="Before the capture take a step"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()


def test_a_capture_with_other_gradients_is_refused(cuda: torch.device) -> None:
    model, modules = patched(cuda, torch.float32)
    optimizer = smt_ext.SparseAdamW(model)
    set_gradients(0, modules)
    optimizer.step()
    modules[0].blocks.grad = None
    with (
        pytest.raises(RuntimeError, match="splits a shared step count"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
