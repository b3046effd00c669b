"""Choose the blocks to train (SMT paper, section 3.1)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import __version__
from ..distributed import sharding
from ..errors import PlanError
from ..nn.modules import patch_record
from ..plan import BlockPlan, LayerPlan, model_fingerprint
from ..precision import warn_slow_bfloat16
from ..quantization import logical_numel
from .budget import Budget
from .score_file import save_scores
from .scoring import ScoredModel, score_blocks
from .selection import Allocation, Unit, select_blocks
from .targets import select_parameters, select_targets, upper_layers

__all__ = ["PRESETS", "Preset", "make_plan"]


@dataclass(frozen=True)
class Preset:
    """Values of :func:`make_plan`'s arguments that belong together."""

    metric: str
    unit: Unit
    allocation: Allocation
    targets: tuple[str, ...]
    block_size: int


# "paper": SMT paper, section 3.1. "recommended": docs/evidence.md, "Blocks in every matrix".
PRESETS = {
    "paper": Preset("mean_abs", "block", "global", ("qkv",), 256),
    "recommended": Preset("random", "block", "dims", ("all-linear",), 64),
}
DEFAULT_PRESET = "paper"
DEFAULT_TARGETS = PRESETS[DEFAULT_PRESET].targets


def make_plan(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    budget: Budget | str | float = "0.84%",
    preset: Literal["paper", "recommended"] | None = None,
    block_size: int | None = None,
    targets: str | Iterable[str] | None = None,
    depth: float = 1.0,
    metric: str | None = None,
    unit: Unit | None = None,
    allocation: Allocation | None = None,
    also_train: str | Iterable[str] = (),
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    num_batches: int | None = 5,
    seed: int = 0,
    progress: bool = True,
    scores_path: str | os.PathLike[str] | None = None,
    distributed: bool = True,
) -> BlockPlan:
    """Score the blocks of the target weights on a few batches and pick the best.

    The model is not changed: no parameter is updated, gradients and flags are as before, the mode
    (train or eval) is left as it is. No weight gradient is ever stored: memory stays within that of a
    training step.

    Args:
        model: any module; the targets are its plain ``nn.Linear`` and transformers ``Conv1D`` layers.
        batches: training batches. A mapping is passed as ``model(**batch)``, a tuple as
            ``model(*batch)``, and ``.loss`` of the output is used, unless ``loss_fn`` is given.
        budget: ``"0.84%"`` of all parameters, ``"2% of targets"``, ``"276 blocks"``, or a fraction.
        preset: where the arguments below have their values from that are not given. ``"paper"`` (as
            None): gradient, global, query, key and value, blocks of 256. ``"recommended"``: what
            had the least development loss at 0.84 % in the one run there is, see the evidence page.
        block_size: L, 16 to 512. Edges need not divide; ragged blocks are smaller.
        targets: patterns for module names, see :func:`smt_ext.planning.targets.select_targets`:
            ``"qkv"``, ``"v"``, ``"attention"``, ``"mlp"``, ``"all-linear"``, ``"re:..."``, globs.
        depth: share of the model's layers, counted from the top, that may train. Below them backward
            has nothing to do: a step takes less time and keeps fewer bytes.
        metric: how a block is scored:

            - ``mean_abs``: mean over batches of the mean ``|dW|`` in the block (the paper)
            - ``abs_mean``: ``|mean over batches of the block's mean dW|``
            - ``l1``, ``l2``: mean over batches of the sum of ``|dW|``, of the root of the sum of squares
            - ``activation``: mean ``|x|`` over the block's input columns. Forward passes only. Blocks
              of one column tie, and are taken from the top row down
            - ``wanda``: mean over the block of ``|W| * rms(x)``. Forward passes only
            - ``weight``: mean ``|W|``, no batches needed
            - ``random``: uniform from ``seed``, no batches needed

            Batches given to the last two are for the statistics that ``lr="auto"`` needs; the metrics
            of forward passes have none.
        unit: ``"block"``, or ``"column"`` or ``"row"``: all blocks of a column or row of a weight's
            block grid together, scored by their mean.
        allocation: ``"global"`` ranks all units together (the paper); ``"uniform"`` gives every weight
            a share by its entries, ``"dims"`` by its in_features + out_features, each at least one
            unit where the budget allows; ``{"v_proj": 0.9}`` gives kinds of module these shares.
        also_train: globs over names of parameters that train whole beside the blocks, such as
            ``"*norm*"``: small ones, outside of the budget. They have a learning rate of their own.
        loss_fn: ``loss_fn(model, batch)`` -> scalar loss.
        num_batches: at most this many batches are taken, None takes all (the paper uses 100
            iterations; of eight rows each, 5 choose 95 % of the blocks that 20 choose).
        seed: of the random metric.
        progress: show a progress bar.
        scores_path: write the score of every block of the targets there, for ``smt-ext report``.
            It looks beside ``plan.json`` for ``plan.scores.safetensors``.
        distributed: where ``torch.distributed`` is initialised with several ranks, plan together: all
            ranks call this with the same model and arguments and each with its own batches, scores
            are summed over ranks, and every rank gets the same plan. Ranks may have different
            numbers of batches, ``num_batches`` counts for each. False: this rank plans alone.

    Returns:
        BlockPlan; ``print(plan)`` shows where the budget went. Its provenance has all settings and,
        where planning ran backward, ``loss`` (mean over batches) and ``mean_abs_gradient``
        (module or parameter name -> mean ``|gradient|`` of the entries that train).

    Raises:
        PlanError: nothing matches the targets, the budget buys no block, a loss or gradient is not
            finite (names the batch), another argument is out of range, the model is wrapped or
            sharded already, or planning failed on another rank (names it).
        DataError: no batches, an empty batch, or one whose labels are all masked.
    """
    budget = Budget.parse(budget)
    if patched := next((n for n, m in model.named_modules() if patch_record(m)), None):
        raise PlanError(
            f"{patched!r} is patched already. Call smt_ext.unpatch(model) before planning again."
        )
    if num_batches is not None and (not isinstance(num_batches, Integral) or num_batches < 1):
        raise PlanError(f"num_batches is {num_batches!r}, expected a whole number >= 1 or None")
    if block_size is not None and not isinstance(block_size, Integral):
        raise PlanError(f"block_size is {block_size!r}, expected a whole number")
    _check_wrapped(model)
    warn_slow_bfloat16(model)
    if preset is not None and preset not in PRESETS:
        raise PlanError(f"preset is {preset!r}, expected one of {', '.join(PRESETS)} or None")
    defaults = PRESETS[preset or DEFAULT_PRESET]
    metric = defaults.metric if metric is None else metric
    unit = defaults.unit if unit is None else unit
    allocation = defaults.allocation if allocation is None else allocation
    block_size = defaults.block_size if block_size is None else block_size
    targets = defaults.targets if targets is None else targets
    patterns = (targets,) if isinstance(targets, str) else tuple(targets)
    linears = upper_layers(model, select_targets(model, patterns), depth)
    names = (also_train,) if isinstance(also_train, str) else tuple(also_train)
    beside = select_parameters(model, names, linears, upper=depth < 1)
    scored = score_blocks(
        model,
        linears,
        batches,
        block_size=block_size,
        metric=metric,
        loss_fn=loss_fn,
        num_batches=num_batches,
        seed=seed,
        progress=progress,
        distributed=distributed,
        unit=unit,
        beside=beside,
    )
    model_parameters = sum(logical_numel(p) for p in model.parameters())
    layers = select_blocks(
        scored.scores,
        budget,
        model_parameters=model_parameters,
        allocation=allocation,
        unit=unit,
    )
    if scores_path is not None:
        save_scores(scores_path, scored.scores, metric=metric)
    chosen = {name: layer for name, layer in layers.items() if layer.blocks}
    groups = (tuple(name for name in group if name in chosen) for group in scored.input_groups)
    trained = sum(layer.num_parameters for layer in chosen.values())
    trained += sum(parameter.numel() for parameter in beside.values())
    return BlockPlan(
        layers=chosen,
        input_groups=tuple(group for group in groups if len(group) > 1),
        also_train={name: tuple(parameter.shape) for name, parameter in beside.items()},
        provenance={
            "metric": metric,
            "num_batches": scored.num_batches,
            "seed": seed,
            "budget": str(budget),
            "percent_of_model": round(100 * trained / model_parameters, 6),
            "preset": preset,
            "block_size": block_size,
            "targets": list(patterns),
            "depth": depth,
            **({"also_train": list(names)} if names else {}),
            "unit": unit,
            "allocation": dict(allocation) if isinstance(allocation, Mapping) else allocation,
            "model_type": getattr(
                getattr(model, "config", None), "model_type", type(model).__name__
            ),
            "model_parameters": model_parameters,
            "model_fingerprint": model_fingerprint(model),
            "smt_ext": __version__,
            **_statistics(scored, chosen),
        },
    )


def _statistics(scored: ScoredModel, chosen: Mapping[str, LayerPlan]) -> dict[str, Any]:
    """The loss while planning, and the mean |gradient| over the entries that train, by module.

    To six digits: the sum over ranks may differ in the last ones from that of one process.
    """
    if scored.loss is None or scored.gradient is None:
        return {}
    means = {}
    for name, layer in chosen.items():
        gradient = scored.gradient[name]
        total = math.fsum(gradient[block] * layer.area(block) for block in layer.blocks)
        means[name] = _six_digits(total / layer.num_parameters)
    means |= {name: _six_digits(mean) for name, mean in (scored.beside or {}).items()}
    return {"loss": _six_digits(scored.loss), "mean_abs_gradient": means}


def _six_digits(value: float) -> float:
    return float(f"{value:.6g}")


def _check_wrapped(model: nn.Module) -> None:
    if any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        raise PlanError(
            "model is wrapped in DistributedDataParallel. Plan and patch first, then wrap."
        )
    if name := next((n for n, p in model.named_parameters() if sharding.is_sharded(p)), None):
        raise PlanError(
            f"{name!r} is sharded already. Plan and patch first, then fully_shard(model)."
        )
