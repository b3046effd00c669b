"""Planning on a GPU finds what it finds on the CPU. Not yet run on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import smt_ext
from models import tiny_llama, token_batch
from smt_ext.planning.scoring import METRICS, score_blocks
from smt_ext.planning.targets import select_targets

BATCHES = [token_batch(seed) for seed in range(2)]


@pytest.mark.parametrize("metric", METRICS)
def test_scores_are_those_of_the_cpu(metric: str, cuda: torch.device) -> None:
    def scores(device: torch.device | str) -> dict[str, np.ndarray]:
        model = tiny_llama().to(device)
        targets = select_targets(model, "all-linear")
        scored = score_blocks(
            model, targets, BATCHES, block_size=32, metric=metric, progress=False
        )  # fmt: skip
        return {name: s.values for name, s in scored.scores.items()}

    on_cpu, on_gpu = scores("cpu"), scores(cuda)
    assert on_cpu.keys() == on_gpu.keys()
    for name, expected in on_cpu.items():
        assert np.abs(expected).max() > 0
        # Float32 forward and backward passes through two layers, summed in another order.
        tolerance = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(on_gpu[name], expected, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_batches_give_the_same_plan(dtype: torch.dtype, cuda: torch.device) -> None:
    plans = [
        smt_ext.make_plan(
            tiny_llama(dtype).to(cuda), BATCHES, budget="20%", block_size=32, targets="all-linear",
            progress=False,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert plans[0].layers == plans[1].layers
    assert sum(len(layer.blocks) for layer in plans[0].layers.values()) > 10


def test_planning_leaves_the_model_as_it_was(cuda: torch.device) -> None:
    model, before = tiny_llama().to(cuda), tiny_llama().state_dict()
    smt_ext.make_plan(model, BATCHES, budget="5%", block_size=32, progress=False)
    for name, value in model.state_dict().items():
        assert value.device.type == "cuda"
        assert torch.equal(value.cpu(), before[name])
    assert all(parameter.requires_grad for parameter in model.parameters())
