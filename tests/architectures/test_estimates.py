"""An estimate is the same to the byte whether each operator runs or its result is remembered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, Architecture

from models import tiny_llama
from smt_ext.estimation import trace
from smt_ext.estimation.meta_model import METHODS, meta_model
from smt_ext.estimation.table import estimate
from smt_ext.estimation.trace import ShapeLog, trace_step

# Causal language models with scaled_dot_product_attention.
ESTIMATED = [a for a in ARCHITECTURES if a.auto == "AutoModelForCausalLM" and a.name != "BLOOM"]


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_made", {})


def remembered() -> int:
    """Calls whose results are made without running them again."""
    return sum(shapes is not None for shapes in trace._made.values())


def run_every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_key", lambda value: None)


@pytest.mark.parametrize(
    "arguments",
    [
        {"memory": "1GB"},
        {"gradient_checkpointing": True, "batch": 3},
        {"dtype": "fp32"},
    ],
    ids=str,
)
def test_every_method(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_llama(num_hidden_layers=3).config
    settings: dict[str, Any] = {"budget": "20%", "block_size": 32, "length": 64, "batch": 2}
    settings |= arguments
    found = estimate(config, methods=METHODS, **settings)
    run_every_operator(monkeypatch)
    assert found == estimate(config, methods=METHODS, **settings)


@pytest.mark.parametrize("architecture", ESTIMATED, ids=lambda a: a.name)
def test_every_moment_of_a_step(
    architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = meta_model(architecture.model().config, torch.bfloat16).requires_grad_(True)
    first, second = (trace_step(model, 2, 16) for _ in range(2))
    assert remembered() > 20
    run_every_operator(monkeypatch)
    whole = trace_step(model, 2, 16)
    assert whole.gradients == sum(p.nbytes for p in model.parameters())
    assert sum(whole.at_peak.values()) == whole.levels.max()
    assert whole.levels.min() >= 0
    for step in (first, second):
        assert step.events == whole.events
        assert (step.levels == whole.levels).all()
        assert (step.saved, step.gradients) == (whole.saved, whole.gradients)
        assert step.at_peak == whole.at_peak


def test_views_and_changes_in_place_run() -> None:
    x = torch.empty(4, 6, device="meta")
    with ShapeLog():
        for _ in range(2):
            assert x.view(24).untyped_storage()._cdata == x.untyped_storage()._cdata
            unsafe = torch.ops.aten._unsafe_view(x, [24])
            assert unsafe.untyped_storage()._cdata == x.untyped_storage()._cdata
            assert x.add_(1) is x
    assert remembered() == 0


def test_what_a_result_depends_on() -> None:
    x = torch.empty(4, 6, device="meta")
    with ShapeLog():
        for _ in range(2):
            assert (x + 1).dtype == torch.float32
            assert (x.int() + 1).dtype == torch.int32
            assert (x.int() + 1.0).dtype == torch.float32
            assert (x.int() + True).dtype == torch.int32
            assert torch.relu(x.mT).stride() == (1, 6)
            assert x.sum(0).shape != x.sum(1).shape
            torch.relu(torch.empty(2, device="meta"))
            assert torch.relu(torch.ones(2)).tolist() == [1, 1]  # a tensor with values
    assert remembered() > 0
