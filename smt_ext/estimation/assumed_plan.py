"""A plan for a model without values: where the budget would go is assumed, and said."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from torch import nn

from ..architectures import ALIASES
from ..errors import PlanError
from ..layouts import weight_NK
from ..nn.patching import sibling_groups
from ..plan import BlockPlan, LayerPlan, kind_of
from ..planning.budget import Budget, Scores
from ..planning.selection import select_blocks
from ..planning.targets import select_targets

__all__ = ["PAPER_VALUE_SHARE", "Columns", "Spread", "assumed_plan", "describe"]

Spread = Literal["paper", "uniform"]
Columns = Literal["distinct", "random"]

# SMT paper: share of the blocks chosen within q, k and v of LLaMA-7B that are in v.
PAPER_VALUE_SHARE = 0.9517


def assumed_plan(
    model: nn.Module,
    *,
    budget: Budget | str | float,
    block_size: int,
    targets: str | Iterable[str],
    spread: Spread = "paper",
    columns: Columns = "distinct",
    seed: int = 0,
) -> BlockPlan:
    """Blocks for a model that has no gradients to rank them by. Only shapes are read.

    Args:
        spread: ``paper`` gives value projections the share that the paper found, or all of their
            blocks where that is less, and spreads the rest over the other targets; ``uniform``
            spreads the budget over all targets by size. Layers get equal shares.
        columns: ``distinct`` gives the blocks of modules that read the same input different
            columns as far as there are any: no plan of this spread keeps more input columns.
            ``random`` draws the blocks from ``seed``.

    Raises:
        PlanError: no value projection among the targets for ``paper``, or as in make_plan.
    """
    if spread not in ("paper", "uniform"):
        raise PlanError(f"spread is {spread!r}, expected 'paper' or 'uniform'")
    if columns not in ("distinct", "random"):
        raise PlanError(f"columns is {columns!r}, expected 'distinct' or 'random'")
    budget = Budget.parse(budget)
    matrices = select_targets(model, targets)
    shapes: dict[str, tuple[int, int]] = {}
    for name, matrix in matrices.items():
        n, k = weight_NK(matrix).shape
        shapes[name] = n, k
    scores = {
        name: Scores(shape, block_size, _even_scores(name, shape, block_size, seed))
        for name, shape in shapes.items()
    }
    parameters = sum(p.numel() for p in model.parameters())
    quotas = _value_quota(scores, budget, parameters) if spread == "paper" else {}
    layers = select_blocks(scores, budget, model_parameters=parameters, allocation=quotas)
    if columns == "distinct":
        layers = _distinct_columns(layers)
    return BlockPlan(layers={name: layer for name, layer in layers.items() if layer.blocks})


def describe(spread: Spread, columns: Columns) -> str:
    """The assumption in words."""
    where = {
        "paper": f"{100 * PAPER_VALUE_SHARE:.1f} % of the budget in value projections, as the paper "
        "found for LLaMA-7B, the rest over the other targets",
        "uniform": "the budget spread over all targets by size",
    }[spread]
    which = {
        "distinct": "blocks in different input columns wherever possible (the most that can be saved)",
        "random": "blocks drawn at random",
    }[columns]
    return f"assumed: {where}; layers alike; {which}"


def _even_scores(name: str, shape: tuple[int, int], block_size: int, seed: int) -> np.ndarray:
    """Scores that take the same share of every module, its blocks in random order."""
    grid = tuple(-(-s // block_size) for s in shape)
    order = list(range(grid[0] * grid[1]))
    random.Random(f"{seed}/{name}").shuffle(order)
    return -(np.array(order, dtype=np.float64).reshape(grid) + 0.5) / len(order)


def _value_quota(scores: Mapping[str, Scores], budget: Budget, parameters: int) -> dict[str, float]:
    kinds = {kind_of(name) for name in scores}
    values = [kind for kind in ALIASES["v"] if kind in kinds]
    if not values:
        raise PlanError(
            f"spread 'paper' needs value projections among the targets, which are "
            f"{', '.join(sorted(kinds))}. Use spread 'uniform', or a plan made from gradients."
        )
    in_blocks = budget.unit == "blocks"
    sizes = {n: s.values.size if in_blocks else s.shape[0] * s.shape[1] for n, s in scores.items()}
    total = budget.amount if in_blocks else budget.parameters(parameters, sum(sizes.values()))
    held = sum(size for name, size in sizes.items() if kind_of(name) == values[0])
    share = PAPER_VALUE_SHARE if len(kinds) > 1 else 1.0
    return {values[0]: min(share, held / max(total, 1))}


def _distinct_columns(layers: Mapping[str, LayerPlan]) -> dict[str, LayerPlan]:
    """As many blocks of every module, laid over the columns of each input one after the other."""
    names = list(layers)
    grouped = sibling_groups(names)
    alone = [[name] for name in names if not any(name in group for group in grouped)]
    chosen = {}
    for group in (*grouped, *alone):
        start = 0
        for name in group:
            layer = layers[name]
            columns = layer.grid[1]
            count = len(layer.blocks)
            blocks = sorted((i // columns, (start + i) % columns) for i in range(count))
            chosen[name] = dataclasses.replace(layer, blocks=tuple(blocks))
            start += count
    return {name: chosen[name] for name in names}
