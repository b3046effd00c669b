"""How much may train, and which blocks that buys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import PlanError
from ..plan import LayerPlan, kind_of

__all__ = ["Allocation", "Budget", "Scores", "select_blocks"]

Allocation = Literal["global", "uniform"]

_TEXT = re.compile(r"\s*([0-9.eE+-]+)\s*(%|blocks?)\s*(of\s+(model|targets))?\s*")


@dataclass(frozen=True)
class Budget:
    """What may train: a share of the model, a share of the target weights, or a number of blocks.

    Written ``"0.84%"`` (of all model parameters), ``"2% of targets"`` or ``"276 blocks"``.
    """

    amount: float
    unit: Literal["model", "targets", "blocks"]

    def __post_init__(self) -> None:
        if self.unit == "blocks":
            if self.amount < 1 or self.amount != int(self.amount):
                raise PlanError(f"budget is {self}, expected a whole number of blocks, at least 1")
        elif not 0 < self.amount <= 100:
            raise PlanError(f"budget is {self}, expected more than 0 and at most 100 percent")

    @classmethod
    def parse(cls, value: Budget | str | float) -> Budget:
        """A Budget from text, or from a number: a fraction of the model such as 0.0084.

        Raises:
            PlanError: neither; names the three ways to write a budget.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if 0 < value <= 1:
                return cls(100.0 * value, "model")
        elif isinstance(value, str) and (match := _TEXT.fullmatch(value)):
            number, unit, _, of = match.groups()
            try:
                if unit == "%":
                    return cls(float(number), "targets" if of == "targets" else "model")
                if of is None:
                    return cls(float(number), "blocks")
            except ValueError as error:
                if isinstance(error, PlanError):
                    raise
        raise PlanError(
            f"budget is {value!r}, expected '0.84%' (of all parameters), '2% of targets', "
            "'276 blocks', or a fraction of all parameters such as 0.0084"
        )

    def parameters(self, model: int, targets: int) -> int:
        """The most parameters that may train; not for a budget in blocks."""
        whole = model if self.unit == "model" else targets
        return int(whole * self.amount / 100.0)

    def __str__(self) -> str:
        if self.unit == "blocks":
            return f"{self.amount:g} blocks"
        return f"{self.amount:g}%" + (" of targets" if self.unit == "targets" else "")


@dataclass(frozen=True)
class Scores:
    """Block scores of one weight, (R, C) float64; a higher score is chosen first."""

    shape: tuple[int, int]
    block_size: int
    values: np.ndarray


def select_blocks(
    scores: Mapping[str, Scores],
    budget: Budget,
    *,
    model_parameters: int,
    allocation: Allocation = "global",
    quotas: Mapping[str, float] | None = None,
) -> dict[str, LayerPlan]:
    """The best blocks that the budget buys.

    Blocks are taken by falling score; ties go by module name, row and column, so that the same
    scores give the same plan everywhere. A block that would exceed the budget is passed over for
    smaller ones behind it (ragged blocks at the edges).

    Args:
        scores: by module name.
        budget: what may train in all.
        model_parameters: of the whole model.
        allocation: ``global`` ranks the blocks of all modules together (the paper); ``uniform``
            gives every module the same share of its own entries.
        quotas: share of the budget by kind of module, such as ``{"v_proj": 0.9}``; kinds without
            one share the rest.

    Raises:
        PlanError: the budget buys no block (says what one costs), a quota is out of range, or
            names a kind that is no target.
    """
    for name, score in scores.items():
        if not np.isfinite(score.values).all():
            raise PlanError(f"scores of {name!r} are not finite: gradients were inf or NaN")
    if allocation not in ("global", "uniform"):
        raise PlanError(f"allocation is {allocation!r}, expected 'global' or 'uniform'")
    pools = _pools(scores, budget, model_parameters, allocation, quotas or {})
    chosen: dict[str, list[tuple[int, int]]] = {name: [] for name in scores}
    for names, limit in pools:
        for name, block in _take(scores, names, limit, in_blocks=budget.unit == "blocks"):
            chosen[name].append(block)
    if not any(chosen.values()):
        smallest = min(
            _area(s, (r, c)) for s in scores.values() for r, c in np.ndindex(s.values.shape)
        )
        raise PlanError(
            f"budget {budget} buys no block: the smallest has {smallest:,} parameters, "
            f"{100 * smallest / model_parameters:.3g}% of the model. Raise the budget, or use a "
            "smaller block_size."
        )
    return {
        name: LayerPlan(shape=s.shape, block_size=s.block_size, blocks=tuple(sorted(chosen[name])))
        for name, s in scores.items()
    }


def _pools(
    scores: Mapping[str, Scores],
    budget: Budget,
    model_parameters: int,
    allocation: Allocation,
    quotas: Mapping[str, float],
) -> list[tuple[list[str], int]]:
    """Modules that compete with each other, and what each such pool may spend."""
    entries = {name: s.shape[0] * s.shape[1] for name, s in scores.items()}
    if budget.unit == "blocks":
        total = int(budget.amount)
    else:
        total = budget.parameters(model_parameters, sum(entries.values()))
    kinds = {kind_of(name) for name in scores}
    for kind, share in quotas.items():
        if kind not in kinds:
            raise PlanError(f"quota for {kind!r}: the targets are {', '.join(sorted(kinds))}")
        if not 0 <= share <= 1:
            raise PlanError(
                f"quota for {kind!r} is {share}, expected 0 to 1, a share of the budget"
            )
    if sum(quotas.values()) > 1 + 1e-9:
        raise PlanError(f"quotas sum to {sum(quotas.values()):g}, expected at most 1")
    groups = {kind: [n for n in scores if kind_of(n) == kind] for kind in sorted(quotas)}
    parts = [(names, int(total * quotas[kind] + 1e-9)) for kind, names in groups.items()]
    rest = [name for name in scores if kind_of(name) not in quotas]
    if rest:
        parts.append((rest, total - sum(limit for _, limit in parts)))
    if allocation == "global":
        return parts
    pools = []
    for names, limit in parts:
        whole = sum(entries[name] for name in names)
        pools += [([name], limit * entries[name] // whole) for name in names]
    return pools


def _take(
    scores: Mapping[str, Scores], names: list[str], limit: int, *, in_blocks: bool
) -> list[tuple[str, tuple[int, int]]]:
    names = sorted(names)
    if not names:
        return []
    values = np.concatenate([scores[name].values.ravel() for name in names]).astype(np.float64)
    # Stable: equal scores stay in the order of name, row, column.
    order = np.argsort(-values, kind="stable")
    starts = np.cumsum([0] + [scores[name].values.size for name in names])
    taken = []
    left = limit
    smallest = min(_smallest_area(scores[name]) for name in names)
    for position in order.tolist():
        if left < (1 if in_blocks else smallest):
            break
        index = int(np.searchsorted(starts, position, side="right")) - 1
        score = scores[names[index]]
        row, col = divmod(position - int(starts[index]), score.values.shape[1])
        cost = 1 if in_blocks else _area(score, (row, col))
        if cost <= left:
            left -= cost
            taken.append((names[index], (row, col)))
    return taken


def _area(score: Scores, block: tuple[int, int]) -> int:
    size = score.block_size
    height, width = (min(size, s - i * size) for s, i in zip(score.shape, block, strict=True))
    return height * width


def _smallest_area(score: Scores) -> int:
    rows, cols = score.values.shape
    return _area(score, (rows - 1, cols - 1))
