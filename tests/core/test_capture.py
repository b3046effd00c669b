"""A training step is a fixed sequence of tensor operations that never asks the host for a value.

That is what CUDA graph capture and an asynchronous GPU need, and what can be told without one;
tests/gpu/test_gpu_graphs.py captures for real.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import smt_ext
from models import mlp, mlp_plan
from smt_ext.nn.modules import SMTLinear
from smt_ext.optim.sparse_adamw import _refuse_capture

aten = torch.ops.aten


class Recorder(TorchDispatchMode):
    """Keeps the operations of a ``with`` block and repeats them on the same tensors, like a graph."""

    # Their results, or the shapes of them, must come to the host.
    WAITING = (aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero,
               aten.masked_select, aten._unique2, aten.repeat_interleave)  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in self.WAITING, f"{func} waits for the device"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def set_gradients(step: int, modules: list[SMTLinear]) -> None:
    """Into the tensors that are there: a graph reads those."""
    generator = torch.Generator().manual_seed(step)
    for module in modules:
        if module.blocks.grad is None:
            module.blocks.grad = torch.zeros_like(module.blocks)
        module.blocks.grad.copy_(torch.randn(module.blocks.shape, generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_optimizer_step_goes_on_as_an_eager_one(dtype: torch.dtype) -> None:
    """Changing gradients and learning rate, the step count, a skipped step: all reach the replay."""
    runs = []
    for recorded in (False, True):
        model = smt_ext.patch(mlp(dtype), mlp_plan(), block_dtype=dtype)
        modules = list(smt_ext.smt_modules(model).values())
        optimizer = smt_ext.SparseAdamW(
            model, lr=torch.tensor(1e-2), weight_decay=0.1, decay_to="base", max_grad_norm=5.0,
            stochastic_rounding=True,
        )  # fmt: skip
        set_gradients(0, modules)
        optimizer.step()
        set_gradients(1, modules)
        recorder = Recorder()
        with recorder:
            optimizer.step()
        norms = []
        for step in range(2, 6):
            set_gradients(step, modules)
            if step == 4:
                modules[0].blocks.grad[0, 0, 0] = torch.nan
            optimizer.param_groups[0]["lr"].fill_(1e-2 * 0.8**step)
            (recorder.replay if recorded else optimizer.step)()
            norms.append(optimizer.last_grad_norm)
        assert optimizer.skipped_steps == 1
        assert {float(state["step"]) for state in optimizer.state.values()} == {5.0}
        runs.append([torch.tensor(norms).nan_to_num(), *(m.weight.clone() for m in modules)])
    for eager, replayed in zip(*runs, strict=True):
        assert torch.equal(eager, replayed)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_training_step_asks_the_host_for_nothing(scaled: bool, autocast: bool) -> None:
    model = smt_ext.patch(mlp(), mlp_plan())
    optimizer = smt_ext.SparseAdamW(model, lr=1e-2, weight_decay=0.1, max_grad_norm=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    x = torch.randn(6, 96)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        schedule.step()

    step()
    with Recorder() as recorder:
        step()
    names = {call[0].name().partition(".")[0] for call in recorder.calls}
    assert {"smt_ext::block_grad", "smt_ext::sparse_adamw_step_"} <= names
    # The plan reads all columns: only in another dtype are they copied.
    assert ("smt_ext::gather_columns" in names) == autocast
    assert optimizer.skipped_steps == 0


def test_state_is_not_made_inside_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    _refuse_capture(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="Before the capture take a step"):
        _refuse_capture(torch.device("cuda"))
