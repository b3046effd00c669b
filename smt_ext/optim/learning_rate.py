"""The automatic learning rate: from the loss and the gradients that planning saw."""

from __future__ import annotations

import math

from ..errors import PlanError
from ..plan import BlockPlan

__all__ = ["auto_learning_rate", "explain_learning_rate"]

# Times Polyak's step; see the evidence page for runs at 0.5 to 4 times the rate.
FACTOR = 1.5


def auto_learning_rate(plan: BlockPlan) -> float:
    """``FACTOR * L0 / S``: Polyak's step for sign descent, which Adam's first steps are.

    A step of size lr in each entry, against the sign of its gradient, lowers the loss by lr * S to
    first order, where S is the sum of |gradient| over the entries that train and L0 the loss, both
    means over the batches of planning; L0 / S would bring the loss to zero if it went on so.

    Raises:
        PlanError: the plan has no such statistics, or its gradients are zero.
    """
    return FACTOR * _loss(plan) / _gradient_sum(plan)


def explain_learning_rate(plan: BlockPlan) -> str:
    """One line: the automatic rate of a plan, and what it comes from."""
    return (
        f"lr {auto_learning_rate(plan):.3g} = {FACTOR:g} x {_loss(plan):.4g} (loss while planning) / "
        f"{_gradient_sum(plan):.4g} (sum of |gradient| over {plan.num_parameters:,} trained entries)"
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
