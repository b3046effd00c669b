"""Counting what autograd keeps, and what a step allocates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smt_ext.memory import AllocationLog, SavedBytes


def _two_layers(device: str) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_saved_bytes_by_module(device: str) -> None:
    model = _two_layers(device)
    with SavedBytes(model, by_module=True) as saved:
        out = model(torch.ones(3, 8, device=device))
        loss = out.square().sum()
    # The input; tanh's output, which the last layer keeps too; the output, for the square.
    assert saved.by_module == {"0": 4 * 3 * 8, "1": 4 * 3 * 16, "": 4 * 3 * 4}
    assert saved.bytes == sum(saved.by_module.values())
    assert loss.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_only_what_is_kept_counts() -> None:
    model = nn.Linear(2, 2)
    kept = []
    with SavedBytes(model) as saved:
        for step in range(20):
            # Memory of the graphs that are dropped is given out again, to those that are kept too.
            loss = model(torch.ones(50, 2)).sum()
            if step % 2:
                kept.append(loss)
        del loss
    assert saved.bytes == 10 * 4 * 50 * 2


def test_hooks_go_when_forward_fails() -> None:
    model = _two_layers("cpu")
    with pytest.raises(RuntimeError), SavedBytes(model, by_module=True) as saved:
        model(torch.ones(3, 9))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert saved._running == []


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_allocation_log(device: str) -> None:
    held = torch.ones(1000, device=device)
    with AllocationLog([held]) as log:
        held.mul_(2)
        view = held[:10]
        a = torch.ones(100, device=device)
        b = a + 1
        del a
        c = b.view(10, 10)
        del b
        d = F.pad(c, (0, 1))
        assert log.index_of(c) == 1
        assert log.index_of(view) is None
        assert sorted(log.live().values()) == [1, 2]
        del c, d
    assert log.sizes == [400, 400, 440]
    assert log.events == [1, 2, -1, 3, -2, -3]
