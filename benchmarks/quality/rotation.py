"""Blocks that change during training, at the state of one set: a prototype.

Every so many steps the trained values of the present blocks stay in the weights, as many other blocks of
each matrix are chosen, and their moments start at zero with a step count of their own; their rate rises
over a few steps. Random plans go through a matrix's blocks without replacement, and begin anew when all
have trained; plans by a score are made anew from the batches that come next. The last change is at 70 %
of the steps.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from smt_ext.plan import BlockPlan, LayerPlan

__all__ = ["Rotation", "next_random"]

WARMUP = 5
LAST = 0.7


class Rotation:
    """When blocks change, and to which.

    Args:
        replan: the plan of a round (1, 2, ...), at the step where it begins.
        plan: of the first steps.
        every, steps: of a round; of the run.

    Attributes:
        touched: blocks that have trained so far, by module.
    """

    def __init__(
        self, replan: Callable[[int, int], BlockPlan], plan: BlockPlan, every: int, steps: int
    ) -> None:
        self.replan, self.every, self.steps = replan, every, steps
        self.began = 0
        self.rounds = 1
        self.touched = {name: set(layer.blocks) for name, layer in plan.layers.items()}

    def changes_at(self, step: int) -> bool:
        return step > 0 and step % self.every == 0 and step <= LAST * self.steps

    def next_plan(self, step: int) -> BlockPlan:
        """The plan from this step on."""
        plan = self.replan(self.rounds, step)
        self.began = step
        self.rounds += 1
        for name, layer in plan.layers.items():
            self.touched.setdefault(name, set()).update(layer.blocks)
        return plan

    def factor(self, step: int) -> float:
        """Of the learning rate: below 1 while the blocks are new."""
        return 1.0 if self.began == 0 else min(1.0, (step - self.began + 1) / WARMUP)

    @property
    def facts(self) -> dict[str, int]:
        """For the record."""
        return {"rounds": self.rounds, "touched_blocks": sum(map(len, self.touched.values()))}


def next_random(plan: BlockPlan, seed: int, number: int) -> BlockPlan:
    """As many blocks of each matrix as the plan has; those of round ``number`` without replacement.

    The plan's own blocks are round 0, so that round 1 holds none of them.
    """
    layers = {}
    for name, layer in plan.layers.items():
        rows, cols = layer.grid
        first = set(layer.blocks)
        others = [(r, c) for r in range(rows) for c in range(cols) if (r, c) not in first]
        random.Random(f"{seed}/{name}/rotation").shuffle(others)
        order = [*layer.blocks, *others]
        start = number * len(first)
        chosen = {order[(start + i) % len(order)] for i in range(len(first))}
        layers[name] = LayerPlan(layer.shape, layer.block_size, tuple(sorted(chosen)))
    return dataclasses.replace(plan, layers=layers)
