"""Laws 4, 5 and 8 by the count of torch's allocator. Not yet run on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import smt_ext
from models import mlp, mlp_plan
from smt_ext.memory import SavedBytes


def requested() -> int:
    """Bytes that tensors have asked the allocator for, without its rounding."""
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_its_columns_and_nothing_else(dtype: torch.dtype, cuda: torch.device) -> None:
    tokens, width, size = 1024, 512, 64
    layer = smt_ext.LayerPlan(shape=(256, width), block_size=size, blocks=((0, 1), (2, 5), (3, 1)))
    model = nn.Sequential(nn.Linear(width, 256, bias=False)).to(cuda, dtype)
    smt_ext.patch(model, smt_ext.BlockPlan(layers={"0": layer}))
    x = torch.randn(tokens, width, device=cuda).to(dtype)
    model(x).sum().backward()  # cuBLAS takes its workspace
    model.zero_grad()
    before = requested()
    with SavedBytes(model) as saved:
        y = model(x)
    columns = tokens * 2 * size * dtype.itemsize
    assert saved.bytes == columns
    assert requested() - before == columns + y.nbytes
    assert smt_ext.status(model).saved_bytes_per_token * tokens == columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_state_is_two_moments_of_the_blocks(
    dtype: torch.dtype, cuda: torch.device
) -> None:
    model = mlp(dtype).to(cuda)
    smt_ext.patch(model, mlp_plan())
    modules = smt_ext.smt_modules(model).values()
    for module in modules:
        module.blocks.grad = torch.randn_like(module.blocks)
    optimizer = smt_ext.SparseAdamW(model)
    before = requested()
    optimizer.step()
    moments = sum(2 * 4 * module.blocks.numel() for module in modules)
    # Beside them three float64: the step count, the last norm, the number of skipped steps.
    assert requested() - before == moments + 3 * 8


WIDTH, LAYERS, TOKENS = 2048, 8, 256


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def train_all(model: nn.Module, x: Tensor) -> None:
    loss_fn(model, x).backward()


def train_nothing(model: nn.Module, x: Tensor) -> None:
    model.requires_grad_(False)
    loss_fn(model, x.clone().requires_grad_(True)).backward()


def train_blocks(model: nn.Module, x: Tensor) -> None:
    layers = {
        name: smt_ext.LayerPlan(shape=(WIDTH, WIDTH), block_size=256, blocks=((0, 0), (3, 1)))
        for name, _ in model.named_children()
    }
    smt_ext.patch(model, smt_ext.BlockPlan(layers=layers))
    loss_fn(model, x).backward()


def plan(model: nn.Module, x: Tensor) -> None:
    smt_ext.make_plan(model, [x, x], budget="50%", block_size=256, targets="all-linear",
                      loss_fn=loss_fn, progress=False)  # fmt: skip


def peak_of(run: Callable[[nn.Module, Tensor], None], device: torch.device) -> int:
    """Bytes that ``run`` holds at most, beyond model and batch."""
    torch.manual_seed(0)
    linears = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
    model = nn.Sequential(*linears).to(device)
    x = torch.randn(TOKENS, WIDTH, device=device)
    # cuBLAS takes its workspaces, autograd's thread its own.
    loss_fn(model, x.clone().requires_grad_()).backward()
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(model, x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_planning_and_training_hold_no_dense_gradient(cuda: torch.device) -> None:
    weight, activation = 4 * WIDTH * WIDTH, 4 * TOKENS * WIDTH
    floor, planning = peak_of(train_nothing, cuda), peak_of(plan, cuda)
    blocks, dense = peak_of(train_blocks, cuda), peak_of(train_all, cuda)
    # All layers' inputs are kept for scoring, and half a weight is more than the scores' tiles.
    assert planning <= floor + LAYERS * activation + weight // 2, (floor, planning)
    # A quarter of the columns of each input, two blocks a layer as parameters and gradients.
    mine = LAYERS * (activation // 4 + 2 * 2 * 4 * 256 * 256)
    assert blocks <= floor + mine + weight // 2, (floor, blocks)
    # The measure sees gradients where they are stored.
    assert dense >= planning + 4 * weight, (planning, dense)
