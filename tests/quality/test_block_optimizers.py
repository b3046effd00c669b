"""Optimizers under trial compute what they say, and rotation goes through the blocks in turn."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from benchmarks.quality.block_optimizers import BlockAdam, BlockMuon, orthogonalised
from benchmarks.quality.methods import matrix_rates
from benchmarks.quality.rotation import LAST, Rotation, next_random
from smt_ext.plan import BlockPlan, LayerPlan


def steps_of(optimizer: torch.optim.Optimizer, param: nn.Parameter, count: int = 4) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def test_without_options_it_is_adamw() -> None:
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 32).view(2, 4, 4)) for _ in range(2))
    steps_of(BlockAdam([ours], 0.1, (0.9, 0.99), 0.05), ours)
    steps_of(torch.optim.AdamW([theirs], 0.1, (0.9, 0.99), weight_decay=0.05), theirs)
    torch.testing.assert_close(ours, theirs)


def test_a_sudden_gradient_moves_a_matrix_by_the_bound() -> None:
    def moved(rms_clip: float | None) -> float:
        param = nn.Parameter(torch.zeros(1, 4, 4))
        optimizer = BlockAdam([param], 0.1, (0.0, 0.999), rms_clip=rms_clip)
        for size in (1e-3, 1.0):
            before = param.detach().clone()
            param.grad = torch.full_like(param, size)
            optimizer.step()
        return float((param.detach() - before).abs().max())

    # second moment (0.999 * 1e-6 + 1) / 1.999 after bias correction: RMS sqrt(2) without a bound.
    assert moved(None) == pytest.approx(0.1 * math.sqrt(2), rel=1e-2)
    assert moved(1.0) == pytest.approx(0.1, rel=1e-3)
    assert moved(2.0) == moved(None)


def test_rows_share_their_second_moment() -> None:
    param = nn.Parameter(torch.zeros(2, 4, 4))
    optimizer = BlockAdam([param], 0.1, (0.9, 0.99), row=True)
    steps_of(optimizer, param, 1)
    assert optimizer.state[param]["exp_avg_sq"].shape == (2, 4, 1)
    grad = param.grad
    expected = -0.1 * grad / (grad.square().mean(-1, keepdim=True).sqrt() + 1e-8)
    torch.testing.assert_close(param.detach(), expected)


def test_muon_steps_are_orthogonal_and_as_large_as_said() -> None:
    param = nn.Parameter(torch.zeros(3, 16, 16))
    steps_of(BlockMuon([param], 0.5), param, 1)
    values = torch.linalg.svdvals(param.detach() / (0.5 * 0.2 * 4))
    assert 0.6 < values.min() < values.max() < 1.3  # where the iteration leaves them
    assert float(param.detach().square().mean().sqrt()) == pytest.approx(0.5 * 0.2, rel=0.15)


def test_orthogonalised_keeps_the_directions() -> None:
    blocks = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1))
    u, _, vh = torch.linalg.svd(blocks)
    diagonal = u.mT @ orthogonalised(blocks) @ vh.mT
    off = diagonal - torch.diag_embed(diagonal.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-4


LAYERS = {
    "a": LayerPlan((48, 32), 16, ((0, 1), (2, 0))),
    "b": LayerPlan((16, 48), 16, ((0, 2),)),
}
PLAN = BlockPlan(LAYERS, {"mean_abs_gradient": {"a": 0.02, "b": 0.01}})


def test_random_rounds_go_through_all_blocks_before_one_comes_again() -> None:
    for name, rounds in (("a", 3), ("b", 3)):
        of = [next_random(PLAN, 0, number).layers[name] for number in range(rounds)]
        assert of[0] == LAYERS[name]
        seen = [block for layer in of for block in layer.blocks]
        rows, cols = LAYERS[name].grid
        assert len(seen) == len(set(seen)) == rows * cols
        assert next_random(PLAN, 0, rounds).layers[name] == LAYERS[name]
    assert next_random(PLAN, 0, 1) == next_random(PLAN, 0, 1)
    assert any(next_random(PLAN, 1, 1).layers[n] != next_random(PLAN, 0, 1).layers[n] for n in "ab")


def test_blocks_change_until_70_percent_and_begin_gently() -> None:
    rotation = Rotation(lambda number, step: next_random(PLAN, 0, number), PLAN, 20, 100)
    assert rotation.factor(0) == 1.0
    changes = [step for step in range(100) if rotation.changes_at(step)]
    assert changes == [20, 40, 60]
    assert changes[-1] <= LAST * 100
    rotation.next_plan(20)
    assert [rotation.factor(20 + i) for i in range(6)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    assert rotation.facts == {"rounds": 2, "touched_blocks": 6}


@pytest.mark.parametrize("kind", ["gradient", "sqrt_gradient", "weight", "fan_in"])
def test_rates_of_matrices_lower_the_loss_as_one_rate_would(kind: str) -> None:
    model = nn.Module()
    model.a, model.b = nn.Linear(32, 48), nn.Linear(48, 16)
    with torch.no_grad():
        model.b.weight.mul_(3)
    rates = matrix_rates(kind, PLAN, model, 1e-3)
    sums = {"a": 2 * 256 * 0.02, "b": 256 * 0.01}
    assert sum(rates[n] * sums[n] for n in sums) == pytest.approx(1e-3 * sum(sums.values()))
    ratio = {
        "gradient": 0.01 / 0.02,
        "sqrt_gradient": math.sqrt(0.01 / 0.02),
        "weight": float(
            model.a.weight.square().mean().sqrt() / model.b.weight.square().mean().sqrt()
        ),
        "fan_in": 48 / 32,
    }[kind]
    assert rates["a"] / rates["b"] == pytest.approx(ratio, rel=1e-5)


def test_a_matrix_without_gradient_is_not_given_a_rate_without_end() -> None:
    model = nn.Module()
    model.a, model.b = nn.Linear(32, 48), nn.Linear(48, 16)
    plan = BlockPlan(LAYERS, {"mean_abs_gradient": {"a": 0.02, "b": 1e-9}})
    rates = matrix_rates("gradient", plan, model, 1e-3)
    assert rates["b"] / rates["a"] < 16.01
