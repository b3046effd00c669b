"""The methods: each makes a model trainable for about the parameters that a trial allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import smt_ext
from smt_ext.optim.learning_rate import auto_learning_rate
from smt_ext.plan import BlockPlan
from smt_ext.planning.targets import select_targets

from .matrix import Trial
from .spiel import Spiel

__all__ = ["Trained", "make_plan", "nearest_rank", "prepare"]

LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass
class Trained:
    """A model made ready by a method.

    Attributes:
        optimizer: None where nothing trains.
        parameters: those that train.
        clips: the optimizer clips by itself.
        facts: of the method, for the record: a rank, entries moved, ...
        plan: of SMT.
        spiel: of SpIEL, which acts before and after each step.
    """

    optimizer: torch.optim.Optimizer | None
    parameters: list[nn.Parameter]
    clips: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    plan: BlockPlan | None = None
    spiel: Spiel | None = None

    @property
    def count(self) -> int:
        """How many parameters train; the zeros that pad ragged blocks do not count."""
        if self.plan is not None:
            return self.plan.num_parameters
        return sum(parameter.numel() for parameter in self.parameters)


def targets_of(trial: Trial) -> list[str]:
    assert trial.targets is not None
    return trial.targets.split("+")


def make_plan(
    trial: Trial,
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    scores: Path | None = None,
) -> BlockPlan:
    """The blocks that a trial's SMT trains."""
    assert trial.metric is not None
    assert trial.block_size is not None
    return smt_ext.make_plan(
        model,
        batches if trial.plan_batches is not None else None,
        budget=f"{trial.budget}%",
        block_size=trial.block_size,
        targets=targets_of(trial),
        metric=trial.metric,
        unit=trial.unit,  # type: ignore[arg-type]
        allocation=trial.allocation,  # type: ignore[arg-type]
        depth=trial.depth or 1.0,
        loss_fn=loss_fn,
        num_batches=trial.plan_batches,
        seed=trial.seed,
        progress=False,
        scores_path=scores,
    )


def prepare(trial: Trial, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn) -> Trained:
    """Make ``model`` trainable in place.

    Args:
        batches: of the training data, in the order of training, for methods that look first.
        loss_fn: ``loss_fn(model, batch)``, for the same.
    """
    return _METHODS[trial.method](trial, model, batches, loss_fn)


def nearest_rank(targets: Mapping[str, nn.Linear], entries: int, *, fixed: int = 0) -> int:
    """The rank whose adapters have closest to ``entries`` parameters; at least 1.

    Args:
        fixed: parameters that there are at any rank.
    """
    a_rank = sum(linear.in_features + linear.out_features for linear in targets.values())
    return max(1, round((entries - fixed) / a_rank))


def _base(trial: Trial, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn) -> Trained:
    model.requires_grad_(False)
    return Trained(None, [])


def _full(trial: Trial, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn) -> Trained:
    model.requires_grad_(True)
    return _with_adamw(trial, model)


def _smt(trial: Trial, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn) -> Trained:
    plan = make_plan(trial, model, batches, loss_fn)
    smt_ext.patch(model, plan)
    lr = _lr(trial) if trial.auto is None else trial.auto * auto_learning_rate(plan)
    optimizer = smt_ext.SparseAdamW(
        model, lr=lr, betas=(trial.beta1, trial.beta2), weight_decay=trial.weight_decay,
        max_grad_norm=trial.max_grad_norm,
    )  # fmt: skip
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    facts = {"lr": lr}
    if "mean_abs_gradient" in plan.provenance:
        means = plan.provenance["mean_abs_gradient"]
        facts["planning_loss"] = plan.provenance["loss"]
        facts["gradient_sum"] = sum(x.num_parameters * means[n] for n, x in plan.layers.items())
    return Trained(optimizer, parameters, clips=True, plan=plan, facts=facts)


def _lora(trial: Trial, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn) -> Trained:
    from peft import LoraConfig, get_peft_model

    dora = trial.method == "dora"
    targets = _linears(trial, model)
    # DoRA also trains a magnitude for each output.
    fixed = sum(linear.out_features for linear in targets.values()) if dora else 0
    rank = nearest_rank(targets, _entries(trial, model), fixed=fixed)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, use_dora=dora, target_modules=list(targets)
    )
    get_peft_model(model, config)  # the adapters are put into ``model`` itself
    return _with_adamw(trial, model, rank=rank, lora_alpha=2 * rank)


def _shira(trial: Trial, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn) -> Trained:
    from peft import ShiraConfig, get_peft_model

    targets = _linears(trial, model)
    rank = nearest_rank(targets, _entries(trial, model))
    get_peft_model(model, ShiraConfig(r=rank, random_seed=trial.seed, target_modules=list(targets)))
    return _with_adamw(trial, model, rank=rank)


def _spiel(trial: Trial, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn) -> Trained:
    interval = max(2, min(20, trial.steps // 4))
    spiel = Spiel(
        model, _linears(trial, model), _entries(trial, model), trial.steps, lr=_lr(trial),
        betas=(trial.beta1, trial.beta2), weight_decay=trial.weight_decay, interval=interval,
        accumulate=min(5, interval - 1),
    )  # fmt: skip
    facts = {
        "interval": interval,
        "accumulate": spiel.accumulate,
        "rate": spiel.rate,
        "moved": spiel.moved,  # filled while it trains
    }
    return Trained(spiel.optimizer, spiel.parameters, facts=facts, spiel=spiel)


_METHODS: dict[str, Callable[[Trial, nn.Module, Iterable[Any], LossFn], Trained]] = {
    "base": _base, "full": _full, "smt": _smt, "lora": _lora, "dora": _lora, "shira": _shira,
    "spiel": _spiel,
}  # fmt: skip


def _with_adamw(trial: Trial, model: nn.Module, **facts: Any) -> Trained:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=_lr(trial), betas=(trial.beta1, trial.beta2),
        weight_decay=trial.weight_decay, fused=True,
    )  # fmt: skip
    return Trained(optimizer, parameters, facts=facts)


def _linears(trial: Trial, model: nn.Module) -> dict[str, nn.Linear]:
    targets = select_targets(model, targets_of(trial))
    return {name: module for name, module in targets.items() if isinstance(module, nn.Linear)}


def _entries(trial: Trial, model: nn.Module) -> int:
    assert trial.budget is not None
    return int(trial.budget / 100 * sum(p.numel() for p in model.parameters()))


def _lr(trial: Trial) -> float:
    assert trial.lr is not None
    return trial.lr
