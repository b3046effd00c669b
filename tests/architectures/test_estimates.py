"""Every causal language model with scaled_dot_product_attention can be estimated, from shapes alone."""

from __future__ import annotations

import pytest
import torch
from tiny import ARCHITECTURES, Architecture

from smt_ext.estimation.meta_model import meta_model
from smt_ext.estimation.trace import trace_step

ESTIMATED = [a for a in ARCHITECTURES if a.auto == "AutoModelForCausalLM" and a.name != "BLOOM"]


@pytest.mark.parametrize("architecture", ESTIMATED, ids=lambda a: a.name)
def test_every_parameter_gets_a_gradient(architecture: Architecture) -> None:
    model = meta_model(architecture.model().config, torch.bfloat16).requires_grad_(True)
    step = trace_step(model, 2, 16, None)
    assert step.gradients == sum(p.nbytes for p in model.parameters())
    assert sum(step.at_peak.values()) == step.levels.max()
    assert step.levels.min() >= 0
    assert sum(step.saved.values()) > 0
