"""SpIEL-AG finds a sparse change whose place and values are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.quality.spiel import Spiel, SpielAdamW

N, K, CHANGED = 12, 20, 9


def problem() -> tuple[nn.Linear, torch.Tensor]:
    """A layer, and the weight that it should become: CHANGED entries of it differ."""
    generator = torch.Generator().manual_seed(3)
    linear = nn.Linear(K, N)
    target = linear.weight.detach().clone()
    changed = torch.randperm(N * K, generator=generator)[:CHANGED]
    signs = torch.randint(0, 2, (CHANGED,), generator=generator) * 2.0 - 1.0
    target.view(-1)[changed] += signs * torch.linspace(0.5, 1.0, CHANGED)
    return linear, target


def train(linear: nn.Linear, target: torch.Tensor, entries: int, steps: int = 400) -> Spiel:
    spiel = Spiel(linear, {"linear": linear}, entries, steps, lr=0.03, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(4)
    for step in range(steps):
        x = torch.randn(64, K, generator=generator)
        spiel.before_step(step)
        error = linear(x) - torch.nn.functional.linear(x, target, linear.bias)
        error.square().mean().backward()
        spiel.optimizer.step()
        spiel.after_step(step)
        spiel.optimizer.zero_grad()
    return spiel


def test_it_finds_the_entries_that_differ() -> None:
    linear, target = problem()
    before = linear.weight.detach().clone()
    spiel = train(linear, target, entries=CHANGED + 4)
    changed = (target != before).flatten().nonzero().flatten()
    found = set(spiel.layers["linear"].indices_M.tolist())
    assert len(found) == CHANGED + 4, "an entry is trained twice"
    assert set(changed.tolist()) <= found
    assert (linear.weight - target).abs().max() < 0.02 < (target - before).abs().max()
    # A random choice that stays would hold all nine in one draw of 1e12.
    assert spiel.moved[0] > 0


def test_entries_that_are_not_trained_keep_their_bits() -> None:
    linear, target = problem()
    before = linear.weight.detach().clone()
    spiel = train(linear, target, entries=30, steps=90)
    assert len(spiel.moved) == 5
    assert sum(spiel.moved[1:]) > 0, "nothing was dropped after the first selection"
    untouched = torch.ones(N * K, dtype=torch.bool)
    untouched[spiel.layers["linear"].indices_M] = False
    assert torch.equal(linear.weight.flatten()[untouched], before.flatten()[untouched])


def test_gradients_are_those_of_the_dense_weight() -> None:
    linear, _ = problem()
    dense = nn.Linear(K, N)
    dense.load_state_dict(linear.state_dict())
    spiel = Spiel(linear, {"linear": linear}, 40, 100, lr=0.1, betas=(0.9, 0.99))
    x = torch.randn(3, 5, K, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    linear(x).square().sum().backward()
    dense(x2).square().sum().backward()
    layer = spiel.layers["linear"]
    assert dense.weight.grad is not None
    torch.testing.assert_close(layer.deltas_M.grad, dense.weight.grad.flatten()[layer.indices_M])
    torch.testing.assert_close(x.grad, x2.grad)


def test_the_optimizer_is_adamw_where_no_entry_moves() -> None:
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    mine = SpielAdamW([ours], 0.1, (0.9, 0.99), 0.05)
    reference = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.99), weight_decay=0.05)
    for step in range(5):
        ours.grad = theirs.grad = torch.randn(7, generator=torch.Generator().manual_seed(step))
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs)


def test_a_selection_must_end_before_the_next() -> None:
    linear, _ = problem()
    with pytest.raises(ValueError, match="accumulate is 20, expected less than interval, 20"):
        Spiel(linear, {"l": linear}, 9, 99, lr=0.1, betas=(0.9, 0.99), accumulate=20)
