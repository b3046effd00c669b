"""The methods: each makes a model trainable for about the parameters that a trial allows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import smt_ext
from smt_ext.errors import DataError
from smt_ext.layouts import weight_NK
from smt_ext.nn.patching import parameters_beside
from smt_ext.optim.learning_rate import rate, rate_beside
from smt_ext.plan import BlockPlan
from smt_ext.planning.targets import select_targets
from smt_ext.quantization import logical_numel

from .block_optimizers import BlockAdam, BlockMuon
from .matrix import Trial
from .rotation import Rotation, next_random
from .spiel import Spiel

__all__ = ["Trained", "make_plan", "matrix_rates", "nearest_rank", "prepare"]

BOUND = 4.0  # on how far rates of matrices lie from their median
ALL_BUT_EMBEDDING, PARAMETERS = "all-but-embedding", "params:"
LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass
class Trained:
    """A model made ready by a method.

    Attributes:
        optimizers: none where nothing trains.
        parameters: those that train.
        clips: the optimizer clips by itself.
        facts: of the method, for the record: a rank, entries moved, ...
        plan: of SMT.
        spiel: of SpIEL, which acts before and after each step.
        rotation: of blocks that change; ``change`` then trains others from a step on.
    """

    optimizers: list[torch.optim.Optimizer]
    parameters: list[nn.Parameter]
    clips: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    plan: BlockPlan | None = None
    spiel: Spiel | None = None
    rotation: Rotation | None = None
    change: Callable[[BlockPlan], None] | None = None

    @property
    def count(self) -> int:
        """How many parameters train; the zeros that pad ragged blocks do not count."""
        if self.plan is not None:
            return self.plan.num_parameters + self.plan.num_beside
        return sum(parameter.numel() for parameter in self.parameters)

    def before_step(self, step: int) -> None:
        """Train other blocks, or entries, where the method does so at this step."""
        if self.spiel is not None:
            self.spiel.before_step(step)
        if self.rotation is not None and self.rotation.changes_at(step):
            assert self.change is not None
            self.change(self.rotation.next_plan(step))

    def set_rate(self, factor: float, step: int) -> None:
        """The learning rates of a step: ``factor`` times those that the optimizers began with."""
        if self.rotation is not None:
            factor *= self.rotation.factor(step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("peak_lr", group["lr"]) * factor


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
        allocation=_allocation(trial),  # type: ignore[arg-type]
        depth=trial.depth or 1.0,
        also_train=[] if trial.also_train is None else trial.also_train.split("+"),
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
    return Trained([], [])


def _full(trial: Trial, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn) -> Trained:
    model.requires_grad_(True)
    return _with_adamw(trial, model)


def _dense(trial: Trial, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn) -> Trained:
    """What training a few entries of the targets could reach at most."""
    assert trial.targets is not None
    model.requires_grad_(False)
    if trial.targets == ALL_BUT_EMBEDDING:
        model.requires_grad_(True)
        model.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
    elif trial.targets.startswith(PARAMETERS):
        for parameter in _named(model, trial.targets.removeprefix(PARAMETERS)):
            parameter.requires_grad_(True)
    else:
        for linear in _linears(trial, model).values():
            linear.weight.requires_grad_(True)
    return _with_adamw(trial, model)


def _smt(trial: Trial, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn) -> Trained:
    batches = iter(batches)
    plan = make_plan(trial, model, batches, loss_fn)
    sums = _gradient_sums(plan)
    loss = plan.provenance.get("loss")
    total = sum(sums.values())
    lr = _lr(trial) if trial.auto is None else trial.auto * rate(loss, total)
    facts: dict[str, Any] = {"lr": lr}
    if sums:
        facts |= {"planning_loss": loss, "gradient_sum": total}
    rates = dict.fromkeys(plan.layers, lr)
    if trial.matrix_lr is not None:
        rates = matrix_rates(trial.matrix_lr, plan, model, lr)
        facts["matrix_lr"] = [min(rates.values()), max(rates.values())]
    also_lr = rate_beside(plan, lr) if trial.also_lr is None else trial.also_lr
    if plan.also_train:
        facts |= {"also_lr": also_lr, "also_parameters": plan.num_beside}
    trained = Trained([], [], facts=facts, plan=plan)

    def train(plan: BlockPlan) -> None:
        smt_ext.patch(model, plan)
        layers = smt_ext.smt_modules(model)
        if trial.matrix_lr is None:
            groups = [{"params": [layer.blocks for layer in layers.values()], "lr": lr}]
        else:
            groups = [{"params": [x.blocks], "lr": rates[name]} for name, x in layers.items()]
        beside = list(parameters_beside(model).values())
        trained.parameters = [*(layer.blocks for layer in layers.values()), *beside]
        if beside:
            beside_group = {"params": beside, "lr": also_lr, "weight_decay": 0.0}
        if trial.optimizer is None and trial.rms_clip is None:
            groups += [beside_group] if beside else []
            trained.clips = True
            trained.optimizers = [
                smt_ext.SparseAdamW(
                    groups, lr=lr, betas=(trial.beta1, trial.beta2),
                    weight_decay=trial.weight_decay, decay_to="base",
                    max_grad_norm=trial.max_grad_norm,
                )
            ]  # fmt: skip
            return
        trained.optimizers = [_block_optimizer(trial, groups, lr)]
        if beside:
            betas = (trial.beta1, trial.beta2)
            trained.optimizers.append(torch.optim.AdamW([beside_group], betas=betas))

    train(plan)
    if trial.rotate_every is not None:

        def replan(number: int, step: int) -> BlockPlan:
            smt_ext.unpatch(model)
            if trial.metric == "random":
                return next_random(plan, trial.seed, number)
            return make_plan(trial, model, batches, loss_fn)

        trained.rotation = Rotation(replan, plan, trial.rotate_every, trial.steps)
        trained.change = train
    return trained


def _block_optimizer(
    trial: Trial, groups: list[dict[str, Any]], lr: float
) -> torch.optim.Optimizer:
    if trial.optimizer == "muon":
        return BlockMuon(groups, lr, trial.weight_decay)
    return BlockAdam(
        groups, lr, (trial.beta1, trial.beta2), trial.weight_decay, rms_clip=trial.rms_clip,
        row=trial.optimizer == "row",
    )  # fmt: skip


def matrix_rates(kind: str, plan: BlockPlan, model: nn.Module, lr: float) -> dict[str, float]:
    """A rate for each matrix of a plan; together they lower the loss at first as ``lr`` for all would.

    Args:
        kind: in proportion to what the rates are:

            - ``gradient``: 1 / mean |gradient| of the matrix: each entry gains the same
            - ``sqrt_gradient``: the root of that
            - ``weight``: root mean square of the matrix
            - ``fan_in``: 1 / in_features

            Before the scale, each within a factor of four of their median: matrices with next to no
            gradient would otherwise move without end.
    """
    sums = _gradient_sums(plan)
    shares = {}
    for name, layer in plan.layers.items():
        mean = max(sums[name] / layer.num_parameters, 1e-12)
        weight = weight_NK(model.get_submodule(name)).detach()
        shares[name] = {
            "gradient": 1 / mean,
            "sqrt_gradient": mean**-0.5,
            "weight": float(weight.float().square().mean().sqrt()),
            "fan_in": 1 / layer.shape[1],
        }[kind]
    median = statistics.median(shares.values())
    shares = {n: min(max(s, median / BOUND), median * BOUND) for n, s in shares.items()}
    scale = lr * sum(sums.values()) / math.fsum(shares[n] * sums[n] for n in sums)
    return {name: scale * share for name, share in shares.items()}


def _gradient_sums(plan: BlockPlan) -> dict[str, float]:
    """Sum of mean |gradient| over a matrix's trained entries; empty without statistics."""
    means = plan.provenance.get("mean_abs_gradient", {})
    return {
        name: layer.num_parameters * means[name] for name, layer in plan.layers.items() if means
    }


def _named(model: nn.Module, pattern: str) -> list[nn.Parameter]:
    """Parameters whose names match the glob."""
    found = [p for name, p in model.named_parameters() if fnmatchcase(name, pattern)]
    if not found:
        raise DataError(f"no parameter matches {pattern!r}")
    return found


def _allocation(trial: Trial) -> str | dict[str, float] | None:
    if trial.allocation is None or ":" not in trial.allocation:
        return trial.allocation
    pairs = (part.split(":") for part in trial.allocation.split(","))
    return {kind: float(share) for kind, share in pairs}


def _lora(trial: Trial, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn) -> Trained:
    from peft import LoraConfig, get_peft_model

    dora = trial.method == "dora"
    targets = _linears(trial, model)
    # DoRA also trains a magnitude for each output.
    fixed = sum(linear.out_features for linear in targets.values()) if dora else 0
    rank = nearest_rank(targets, _entries(trial, model), fixed=fixed)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, use_dora=dora,
        use_rslora=trial.method == "rslora", target_modules=list(targets),
    )  # fmt: skip
    get_peft_model(model, config)  # the adapters are put into ``model`` itself
    return _with_adamw(trial, model, rank=rank, lora_alpha=2 * rank)


def _shira(trial: Trial, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn) -> Trained:
    from peft import ShiraConfig, get_peft_model

    targets = _linears(trial, model)
    rank = nearest_rank(targets, _entries(trial, model))
    get_peft_model(model, ShiraConfig(r=rank, random_seed=trial.seed, target_modules=list(targets)))
    return _with_adamw(trial, model, rank=rank)


def _miss(trial: Trial, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn) -> Trained:
    from peft import MissConfig, get_peft_model

    targets = _linears(trial, model)
    # One (rank, out_features) matrix a layer, shared by stretches of its inputs.
    outputs = sum(linear.out_features for linear in targets.values())
    rank = max(1, round(_entries(trial, model) / outputs))
    get_peft_model(model, MissConfig(r=rank, target_modules=list(targets)))
    return _with_adamw(trial, model, rank=rank)


def _supertuning(
    trial: Trial, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn
) -> Trained:
    """The same share of each matrix's entries, those of largest magnitude."""
    from peft import SupertuningConfig, get_peft_model

    targets = _linears(trial, model)
    share = _entries(trial, model) / sum(linear.weight.numel() for linear in targets.values())
    get_peft_model(model, SupertuningConfig(sparsity=1 - share, target_modules=list(targets)))
    return _with_adamw(trial, model)


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
    return Trained([spiel.optimizer], spiel.parameters, facts=facts, spiel=spiel)


_METHODS: dict[str, Callable[[Trial, nn.Module, Iterable[Any], LossFn], Trained]] = {
    "base": _base, "full": _full, "dense": _dense, "smt": _smt, "lora": _lora, "rslora": _lora,
    "dora": _lora, "miss": _miss, "shira": _shira, "supertuning": _supertuning, "spiel": _spiel,
}  # fmt: skip


def _with_adamw(trial: Trial, model: nn.Module, **facts: Any) -> Trained:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=_lr(trial), betas=(trial.beta1, trial.beta2),
        weight_decay=trial.weight_decay, fused=True,
    )  # fmt: skip
    return Trained([optimizer], parameters, facts=facts)


def _linears(trial: Trial, model: nn.Module) -> dict[str, nn.Linear]:
    targets = select_targets(model, targets_of(trial))
    return {name: module for name, module in targets.items() if isinstance(module, nn.Linear)}


def _entries(trial: Trial, model: nn.Module) -> int:
    assert trial.budget is not None
    return int(trial.budget / 100 * sum(logical_numel(p) for p in model.parameters()))


def _lr(trial: Trial) -> float:
    assert trial.lr is not None
    return trial.lr
