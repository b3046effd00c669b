"""Means over seeds and test rows with their standard errors, and whether a difference is one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .matrix import Trial
from .tasks import MAIN_COLUMN, TWINS

__all__ = ["Difference", "Estimate", "Line"]

# Two-sided 95 % points of Student's t, by degrees of freedom.
_T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
_NORMAL95 = 1.96


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; None where one run does not tell."""

    mean: float
    error: float | None


@dataclass(frozen=True)
class Difference(Estimate):
    """Of two estimates; ``limit`` times its error is the widest that chance explains (95 %)."""

    limit: float = _NORMAL95

    @property
    def is_real(self) -> bool | None:
        """False: inside the error, which is no difference. None: a single run cannot say."""
        return None if self.error is None else abs(self.mean) > self.limit * self.error


@dataclass
class Line:
    """A row of a table: one configuration, and the records of its seeds.

    Attributes:
        trial: with the seed and the learning rate left out.
        seeds: how many the matrix asks for.
        records: of those that have run, by seed.
    """

    trial: Trial
    seeds: int = 0
    records: dict[int, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def first(self) -> Mapping[str, Any]:
        """The record of the least seed, which has the same data as other lines' of that seed."""
        return self.records[min(self.records)]

    def loss(self, group: str = "test") -> Estimate | None:
        """Held-out loss, nats a token; the error is that between seeds."""
        losses = self._losses(group)
        if not losses:
            return None
        return Estimate(statistics.mean(losses.values()), _error(list(losses.values())))

    def loss_beyond(self, other: Line, group: str = "test") -> Difference | None:
        """This loss less the other's, seed by seed: they share data and its order."""
        mine, theirs = self._losses(group), other._losses(group)
        pairs = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
        if not pairs:
            return None
        limit = _T95.get(len(pairs) - 1, _NORMAL95)
        return Difference(statistics.mean(pairs), _error(pairs), limit)

    def accuracy(self, names: Sequence[str] | None = None) -> Estimate | None:
        """Share of right answers.

        The error holds that of the drawn test rows and, from two seeds on, that between seeds.

        Args:
            names: of the sets; default all but the near twins. Math sets count by their rows,
                commonsense sets alike.
        """
        if not self.records:
            return None
        rows = self._rows(names)
        return Estimate(_mean(rows, self._weights(rows)), self._total_error(rows, names))

    def accuracy_beyond(self, other: Line, names: Sequence[str] | None = None) -> Difference | None:
        """This accuracy less the other's, row by row: both answered the same questions."""
        if not self.records or not other.records:
            return None
        mine, theirs = self._rows(names), other._rows(names)
        if {n: len(v) for n, v in mine.items()} != {n: len(v) for n, v in theirs.items()}:
            return None
        rows = {name: mine[name] - theirs[name] for name in mine}
        weights = self._weights(rows)
        squares = _row_variance(rows, weights)
        squares += self._seed_variance(names) + other._seed_variance(names)
        return Difference(_mean(rows, weights), math.sqrt(squares))

    def sets(self) -> list[str]:
        """Names of the test sets in the records."""
        return list(self.first["right"]) if self.records else []

    def _losses(self, group: str) -> dict[int, float]:
        found = {s: r["held_out_loss"].get(group) for s, r in self.records.items()}
        return {seed: loss for seed, loss in found.items() if loss is not None}

    def _rows(self, names: Sequence[str] | None) -> dict[str, np.ndarray]:
        """Set -> share of the seeds that answered each row rightly."""
        by_seed = [self._rows_of(record, names) for record in self.records.values()]
        return {name: np.mean([rows[name] for rows in by_seed], axis=0) for name in by_seed[0]}

    def _rows_of(
        self, record: Mapping[str, Any], names: Sequence[str] | None
    ) -> dict[str, np.ndarray]:
        column = MAIN_COLUMN[self.trial.task]
        return {
            name: np.array(list(columns[column]), dtype=float)
            for name, columns in record["right"].items()
            if (name != TWINS if names is None else name in names)
        }

    def _weights(self, rows: Mapping[str, np.ndarray]) -> dict[str, float]:
        if self.trial.task == "commonsense":
            return dict.fromkeys(rows, 1 / len(rows))
        whole = sum(map(len, rows.values()))
        return {name: len(values) / whole for name, values in rows.items()}

    def _seed_variance(self, names: Sequence[str] | None) -> float:
        """Of the mean over seeds; 0 for a single seed, which says nothing of it."""
        by_seed = [self._rows_of(record, names) for record in self.records.values()]
        error = _error([_mean(rows, self._weights(rows)) for rows in by_seed])
        return 0.0 if error is None else error * error

    def _total_error(self, rows: Mapping[str, np.ndarray], names: Sequence[str] | None) -> float:
        return math.sqrt(_row_variance(rows, self._weights(rows)) + self._seed_variance(names))


def _mean(rows: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> float:
    return float(sum(weights[name] * values.mean() for name, values in rows.items()))


def _row_variance(rows: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> float:
    return float(
        sum(
            weights[name] ** 2 * values.var(ddof=1) / len(values)
            for name, values in rows.items()
            if len(values) > 1
        )
    )


def _error(values: Sequence[float]) -> float | None:
    """Standard error of a mean; None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
