"""A plan for a model without values: where the budget would go is assumed, and said."""

from __future__ import annotations

from collections import Counter
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
    shapes = {name: shape_NK(matrix) for name, matrix in select_targets(model, targets).items()}
    grids = {name: LayerPlan(shape, block_size, ()).grid for name, shape in shapes.items()}
    if budget.unit == "blocks":
        total = int(budget.amount)
    else:
        whole = sum(p.numel() for p in model.parameters())
        total = budget.parameters(whole, sum(n * k for n, k in shapes.values())) // block_size**2
    if total < 1:
        raise PlanError(f"a budget of {budget} buys no block of {block_size} x {block_size}")
    sizes = {name: rows * cols for name, (rows, cols) in grids.items()}
    values = {name: size for name, size in sizes.items() if kind_of(name) in ALIASES["v"]}
    others = {name: size for name, size in sizes.items() if name not in values}
    in_values = round(total * PAPER_VALUE_SHARE) if others else total
    in_values = min(in_values, sum(values.values()))
    counts = _shared(values, in_values) | _shared(others, total - in_values)

    groups = enumerate(sibling_groups(list(shapes)))
    group_of = {name: index for index, group in groups for name in group}
    used: Counter[int | str] = Counter()  # columns that a module's siblings have been given
    layers = {}
    for name in (name for name in shapes if counts[name]):
        group, columns = group_of.get(name, name), grids[name][1]
        places = ((i // columns, (used[group] + i) % columns) for i in range(counts[name]))
        layers[name] = LayerPlan(shapes[name], block_size, tuple(sorted(places)))
        used[group] += counts[name]
    return BlockPlan(layers)


def _shared(sizes: dict[str, int], amount: int) -> dict[str, int]:
    """``amount`` blocks over modules by size, no more than each has."""
    upto = np.cumsum([0, *sizes.values()])
    given = np.round(min(amount, upto[-1]) * upto / max(1, upto[-1])).astype(int)
    return dict(zip(sizes, np.diff(given).tolist(), strict=True))
