"""The automatic learning rate: from the loss and the gradients that planning saw."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import Tensor

from ..errors import PlanError
from ..plan import BlockPlan

__all__ = ["auto_factor", "auto_learning_rate", "explain_learning_rate", "rate", "rate_beside"]

# Fitted to thirteen grids of learning rates (benchmarks/quality/rates.py): two tasks, eight choices of
# blocks, sums of |gradient| 17 x apart. See the evidence page.
FACTOR = 1.7
# No grid had its best rate above; a rule that extrapolates (a toy model, a handful of blocks) must end.
LARGEST = 0.01


def auto_factor(lr: Any) -> float | None:
    """How many times the automatic rate is asked for: 1 by ``"auto"``, 2 by ``"2x auto"`` (``2xauto``).

    None where ``lr`` is anything else.
    """
    asked = re.fullmatch(r"(?:(\d*\.?\d+)\s*x\s*)?auto", lr) if isinstance(lr, str) else None
    factor = asked and float(asked[1] or 1)
    return factor or None


def auto_learning_rate(plan: BlockPlan, factor: float = 1.0) -> float:
    """``factor`` times the peak learning rate for a plan, see :func:`rate`, from what planning saw.

    Raises:
        PlanError: the plan has no such statistics, or its gradients are zero.
    """
    return factor * rate(_loss(plan), _gradient_sum(plan))


def rate_beside(plan: BlockPlan, blocks_rate: float | Tensor) -> float | Tensor:
    """The peak learning rate of what trains beside the blocks, for theirs.

    As many times theirs as :func:`rate` of the one is that of the other; theirs where the plan has no
    statistics.
    """
    if not plan.also_train or "mean_abs_gradient" not in plan.provenance:
        return blocks_rate
    means = plan.provenance["mean_abs_gradient"]
    if plan.also_train.keys() - means.keys():
        return blocks_rate
    total = math.fsum(math.prod(shape) * means[name] for name, shape in plan.also_train.items())
    if not total > 0.0:  # at rest; any rate will do
        return blocks_rate
    return blocks_rate * rate(_loss(plan), total) / auto_learning_rate(plan)


def rate(loss: float, gradient_sum: float) -> float:
    """``1.7 sqrt(L0) / S``, at most 0.01.

    A step of size lr in each entry, against the sign of its gradient, which Adam's first steps are,
    lowers the loss by lr * S to first order, where S is the sum of ``|gradient|`` over the entries
    that train. So a rate belongs to 1 / S. How it depends on the loss L0 is fitted: the loss that
    training can take away would be the numerator (Polyak), and is not known.
    """
    return min(LARGEST, FACTOR * math.sqrt(loss) / gradient_sum)


def explain_learning_rate(plan: BlockPlan, factor: float = 1.0) -> str:
    """One line: ``factor`` times the automatic rate of a plan, and what it comes from."""
    value, times = auto_learning_rate(plan, factor), f"{factor:g} x " if factor != 1 else ""
    bound = f" (the most that 'auto' gives: {LARGEST:g})" if value == factor * LARGEST else ""
    beside = ""
    if plan.also_train:
        beside = f"; {rate_beside(plan, value):.3g} for {plan.num_beside:,} parameters beside them"
    return (
        f"lr {value:.3g}{bound} = {times}{FACTOR:g} x sqrt of the loss while planning, "
        f"{_loss(plan):.4g}, / sum of |gradient| over {plan.num_parameters:,} trained entries, "
        f"{_gradient_sum(plan):.4g}{beside}"
    )


def _loss(plan: BlockPlan) -> float:
    loss = plan.provenance.get("loss")
    if not isinstance(loss, float | int) or "mean_abs_gradient" not in plan.provenance:
        metric = plan.provenance.get("metric", "unknown")
        raise PlanError(
            "lr='auto' needs the loss and the gradients of the training data, which this plan does "
            f"not have (metric {metric!r}). Give lr a number, or plan again with "
            "smt_ext.make_plan(model, batches, ...): with batches every metric keeps them, except "
            "'activation' and 'wanda', which only run forward."
        )
    if not 0.0 < loss < math.inf:
        raise PlanError(
            f"the loss while planning was {loss}, and lr='auto' needs one above 0. Give lr a number."
        )
    return float(loss)


def _gradient_sum(plan: BlockPlan) -> float:
    means = plan.provenance["mean_abs_gradient"]
    if missing := plan.layers.keys() - means.keys():
        raise PlanError(
            f"the plan has no mean |gradient| for {min(missing)!r}, which lr='auto' needs: it was "
            "put together by hand. Give lr a number, or plan again."
        )
    total = math.fsum(layer.num_parameters * means[name] for name, layer in plan.layers.items())
    if not 0.0 < total < math.inf:
        raise PlanError(
            f"the sum of |gradient| over the trained entries is {total}, so lr='auto' has no rate to "
            "give. Look at the batches that the plan was made from, or give lr a number."
        )
    return total
