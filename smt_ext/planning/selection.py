"""Which blocks a budget buys: units that train together, and how weights share the budget."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from typing import Literal, TypeAlias

import numpy as np

from ..errors import PlanError
from ..plan import LayerPlan, kind_of
from .budget import Budget, Scores

__all__ = ["ALLOCATIONS", "UNITS", "Allocation", "Unit", "select_blocks"]

Unit = Literal["block", "column", "row"]
Allocation: TypeAlias = Literal["global", "uniform", "dims"] | Mapping[str, float]

UNITS = ("block", "column", "row")
ALLOCATIONS = ("global", "uniform", "dims")


class _Units:
    """The units of one weight: blocks, or whole columns or rows of its block grid.

    Attributes:
        score: of each unit: the mean over its blocks, so that units of different sizes compete by
            what a block of them is worth.
        area: entries of the weight in each.
    """

    def __init__(self, scores: Scores, unit: Unit) -> None:
        size = scores.block_size
        self.grid = scores.values.shape
        self.unit = unit
        height, width = (
            np.minimum(size, length - size * np.arange(count))
            for length, count in zip(scores.shape, self.grid, strict=True)
        )
        values = scores.values.astype(np.float64)
        if unit == "column":
            self.score, self.area = values.mean(0), scores.shape[0] * width
        elif unit == "row":
            self.score, self.area = values.mean(1), scores.shape[1] * height
        else:
            self.score, self.area = values.ravel(), np.outer(height, width).ravel()

    def blocks(self, index: int) -> list[tuple[int, int]]:
        rows, cols = self.grid
        if self.unit == "column":
            return [(row, index) for row in range(rows)]
        if self.unit == "row":
            return [(index, col) for col in range(cols)]
        return [divmod(index, cols)]

    def cost(self, in_blocks: bool) -> np.ndarray:
        if not in_blocks:
            return self.area
        return np.full(len(self.score), self.grid[0] * self.grid[1] // len(self.score))


def select_blocks(
    scores: Mapping[str, Scores],
    budget: Budget,
    *,
    model_parameters: int,
    allocation: Allocation = "global",
    unit: Unit = "block",
) -> dict[str, LayerPlan]:
    """The best units that the budget buys.

    Units are taken by falling score; ties go by module name, row and column, so that the same
    scores give the same plan everywhere. The budget is never exceeded: a unit that would is passed
    over for smaller ones behind it (at the ragged edges, or of smaller weights).

    Args:
        scores: by module name.
        budget: what may train in all.
        model_parameters: of the whole model.
        allocation: how modules share the budget.

            - ``global`` ranks the units of all modules together (the paper)
            - ``uniform`` gives every module a share by its entries, N x K
            - ``dims`` gives every module a share by N + K, as adapters of one rank have
            - a mapping, such as ``{"v_proj": 0.9}``, gives kinds of module these shares of the
              budget; kinds without one share the rest, and within a share all units rank together

            ``uniform`` and ``dims`` give every module at least one unit where the budget allows,
            else one to those with the best; shares are rounded to whole units.
        unit: ``block``, or ``column`` or ``row``: all blocks of a column or row of the block grid
            train together, scored by their mean.

    Raises:
        PlanError: the budget buys no unit (says what one costs), a share is out of range, or names a
            kind that is no target.
    """
    for name, score in scores.items():
        if not np.isfinite(score.values).all():
            raise PlanError(f"scores of {name!r} are not finite: gradients were inf or NaN")
    if unit not in UNITS:
        raise PlanError(f"unit is {unit!r}, expected one of {', '.join(UNITS)}")
    if not isinstance(allocation, Mapping) and allocation not in ALLOCATIONS:
        raise PlanError(
            f"allocation is {allocation!r}, expected one of {', '.join(ALLOCATIONS)}, or shares of "
            'the budget by kind of module such as {"v_proj": 0.9}'
        )
    in_blocks = budget.unit == "blocks"
    entries = {name: s.shape[0] * s.shape[1] for name, s in scores.items()}
    if in_blocks:
        total = int(budget.amount)
    else:
        total = budget.parameters(model_parameters, sum(entries.values()))
    units = {name: _Units(scores[name], unit) for name in sorted(scores)}
    if allocation == "uniform":
        picked = _by_share(units, entries, total, in_blocks)
    elif allocation == "dims":
        picked = _by_share(units, {n: sum(s.shape) for n, s in scores.items()}, total, in_blocks)
    else:
        pools = _pools(list(units), total, allocation if isinstance(allocation, Mapping) else {})
        picked = (
            found
            for names, limit in pools
            for found in _ranked({name: units[name] for name in names}, limit, in_blocks)
        )
    chosen: dict[str, list[tuple[int, int]]] = {name: [] for name in scores}
    for name, index in picked:
        chosen[name] += units[name].blocks(index)
    if not any(chosen.values()):
        raise PlanError(_too_small(budget, units, model_parameters))
    return {
        name: LayerPlan(shape=s.shape, block_size=s.block_size, blocks=tuple(sorted(chosen[name])))
        for name, s in scores.items()
    }


def _pools(
    names: list[str], total: int, shares: Mapping[str, float]
) -> list[tuple[list[str], int]]:
    """Modules that compete with each other, and what each such pool may spend."""
    kinds = {kind_of(name) for name in names}
    for kind, share in shares.items():
        if kind not in kinds:
            raise PlanError(f"share for {kind!r}: the targets are {', '.join(sorted(kinds))}")
        if not 0 <= share <= 1:
            raise PlanError(
                f"share for {kind!r} is {share}, expected 0 to 1, a share of the budget"
            )
    if sum(shares.values()) > 1 + 1e-9:
        raise PlanError(f"shares sum to {sum(shares.values()):g}, expected at most 1")
    pools = [
        ([n for n in names if kind_of(n) == kind], int(total * shares[kind] + 1e-9))
        for kind in sorted(shares)
    ]
    if rest := [name for name in names if kind_of(name) not in shares]:
        pools.append((rest, total - sum(limit for _, limit in pools)))
    return pools


def _ranked(units: Mapping[str, _Units], limit: int, in_blocks: bool) -> Iterator[tuple[str, int]]:
    """Units of all modules by falling score, as far as the limit goes."""
    if not units:
        return
    names = list(units)
    costs = np.concatenate([of.cost(in_blocks) for of in units.values()])
    starts = np.cumsum([0] + [len(of.score) for of in units.values()])
    # Stable: equal scores stay in the order of name, row, column.
    order = np.argsort(-np.concatenate([of.score for of in units.values()]), kind="stable")
    smallest = int(costs.min())
    for position in order.tolist():
        if limit < smallest:
            return
        if (cost := int(costs[position])) <= limit:
            limit -= cost
            module = int(np.searchsorted(starts, position, side="right")) - 1
            yield names[module], position - int(starts[module])


def _by_share(
    units: Mapping[str, _Units], weights: Mapping[str, int], total: int, in_blocks: bool
) -> Iterator[tuple[str, int]]:
    """First every module's best unit, then always one to the module that is furthest below its share."""
    order = {n: np.argsort(-of.score, kind="stable").tolist() for n, of in units.items()}
    costs = {name: of.cost(in_blocks).tolist() for name, of in units.items()}
    smallest = min(min(cost) for cost in costs.values())
    whole = sum(weights.values())
    left = total
    queue: list[tuple[float, str]] = []
    for name in sorted(units, key=lambda n: (-units[n].score[order[n][0]], n)):
        missing = total * weights[name] / whole
        first = order[name][0]
        if costs[name][first] <= left:
            order[name].pop(0)
            left -= costs[name][first]
            missing -= costs[name][first]
            yield name, first
        heapq.heappush(queue, (-missing, name))
    while queue and left >= smallest:
        below, name = heapq.heappop(queue)
        # What is too dear now stays so: the budget only shrinks.
        while order[name] and costs[name][order[name][0]] > left:
            order[name].pop(0)
        if order[name]:
            index = order[name].pop(0)
            left -= costs[name][index]
            yield name, index
            heapq.heappush(queue, (below + costs[name][index], name))


def _too_small(budget: Budget, units: Mapping[str, _Units], model_parameters: int) -> str:
    unit = next(iter(units.values())).unit
    what = {"block": "block", "column": "block column", "row": "block row"}[unit]
    smallest = min(int(of.area.min()) for of in units.values())
    holds = min(int(of.cost(in_blocks=True)[0]) for of in units.values())
    return (
        f"budget {budget} buys no {what}: the smallest has {smallest:,} parameters"
        f"{f' in {holds} blocks' if unit != 'block' else ''}, "
        f"{100 * smallest / model_parameters:.3g}% of the model. Raise the budget, or use a "
        "smaller block_size."
    )
