"""A plan for a model without values: where the budget would go is assumed, and said."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import nn

from ..architectures import ALIASES
from ..errors import PlanError
from ..layouts import shape_NK
from ..nn.patching import sibling_groups
from ..plan import BlockPlan, LayerPlan, kind_of
from ..planning.budget import Budget
from ..planning.targets import select_targets

__all__ = ["PAPER_VALUE_SHARE", "assumed_plan"]

# SMT paper: share of the blocks chosen within q, k and v of LLaMA-7B that are in v.
PAPER_VALUE_SHARE = 0.9517


def assumed_plan(
    model: nn.Module, *, budget: Budget | str | float, block_size: int, targets: str | Iterable[str]
) -> BlockPlan:
    """Blocks for a model that has no gradients to rank them by. Only shapes are read.

    Value projections get the share that the paper found, or all of their blocks where that is less;
    the other targets share the rest by size. Without values among several kinds, all share by size.
    Modules that read the same input get different columns as far as there are any: no plan of this
    spread keeps more input columns.

    Raises:
        PlanError: the budget buys no block, or as in make_plan.
    """
    budget = Budget.parse(budget)
    chosen = select_targets(model, targets)
    shapes = {name: shape_NK(matrix) for name, matrix in chosen.items()}
    grids = {name: (-(-n // block_size), -(-k // block_size)) for name, (n, k) in shapes.items()}
    if budget.unit == "blocks":
        total = int(budget.amount)
    else:
        whole = sum(p.numel() for p in model.parameters())
        total = budget.parameters(whole, sum(n * k for n, k in shapes.values())) // block_size**2
    if total < 1:
        raise PlanError(f"a budget of {budget} buys no block of {block_size} x {block_size}")
    values = {name for name in shapes if kind_of(name) in ALIASES["v"]}
    others = [name for name in shapes if name not in values]
    size = {name: rows * cols for name, (rows, cols) in grids.items()}
    in_values = min(
        round(total * PAPER_VALUE_SHARE) if others else total, sum(size[name] for name in values)
    )
    counts = _shared({name: size[name] for name in values}, in_values)
    counts |= _shared({name: size[name] for name in others}, total - in_values)

    layers = {}
    siblings = sibling_groups(list(shapes))
    grouped = {name for group in siblings for name in group}
    for group in (*siblings, *([name] for name in shapes if name not in grouped)):
        start = 0
        for name in group:
            across = grids[name][1]
            places = ((i // across, (start + i) % across) for i in range(counts[name]))
            layers[name] = LayerPlan(shapes[name], block_size, tuple(sorted(places)))
            start += counts[name]
    return BlockPlan({name: layers[name] for name in shapes if counts[name]})


def _shared(sizes: dict[str, int], amount: int) -> dict[str, int]:
    """``amount`` blocks over modules by size, no more than each has."""
    upto = np.cumsum([0, *sizes.values()])
    given = np.round(min(amount, upto[-1]) * upto / max(1, upto[-1])).astype(int)
    return dict(zip(sizes, np.diff(given).tolist(), strict=True))
