"""How much may train, and the scores that compete for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import PlanError

__all__ = ["Budget", "Scores"]

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
            if not 1 <= self.amount < 2**63 or self.amount != int(self.amount):
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
            if 0 < value < 1:  # 1 may mean 1 %, or all
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
        amount = f"{self.amount:.15g}"  # settings are compared, and parsed again, as text
        if self.unit == "blocks":
            return f"{amount} blocks"
        return f"{amount}%" + (" of targets" if self.unit == "targets" else "")


@dataclass(frozen=True)
class Scores:
    """Block scores of one weight, (R, C) float64; a higher score is chosen first."""

    shape: tuple[int, int]
    block_size: int
    values: np.ndarray
