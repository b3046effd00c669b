"""Choose the blocks to train (SMT paper, section 3.1)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed import sharding
from ..errors import PlanError
from ..plan import BlockPlan, model_fingerprint
from ..precision import warn_slow_bfloat16
from .budget import Allocation, Budget, select_blocks
from .score_file import save_scores
from .scoring import score_blocks
from .targets import select_targets

__all__ = ["make_plan"]

DEFAULT_TARGETS = ("qkv",)


def make_plan(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    budget: Budget | str | float = "0.84%",
    block_size: int = 256,
    targets: str | Iterable[str] = DEFAULT_TARGETS,
    metric: str = "mean_abs",
    allocation: Allocation = "global",
    quotas: Mapping[str, float] | None = None,
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
        block_size: L, 16 to 512 (256 in the paper). Edges need not divide; ragged blocks are smaller.
        targets: patterns for module names, see :func:`smt_ext.planning.targets.select_targets`. Default
            query, key and value as in the paper; ``"v"`` alone, ``"attention"``, ``"mlp"``,
            ``"all-linear"``, ``"re:..."`` and globs work too.
        metric: how a block is scored:

            - ``mean_abs``: mean over batches of the mean ``|dW|`` in the block (the paper)
            - ``abs_mean``: ``|mean over batches of the block's mean dW|``
            - ``l1``, ``l2``: mean over batches of the sum of ``|dW|``, of the root of the sum of squares
            - ``activation``: mean ``|x|`` over the block's input columns. Forward passes only. Blocks
              of one column tie, and are taken from the top row down
            - ``wanda``: mean over the block of ``|W| * rms(x)``. Forward passes only
            - ``weight``: mean ``|W|``, no batches needed
            - ``random``: uniform from ``seed``, no batches needed
        allocation: ``"global"`` ranks all blocks together (the paper); ``"uniform"`` gives every
            weight the same share of its entries.
        quotas: share of the budget by kind of module, such as ``{"v_proj": 0.9}``.
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
        BlockPlan; ``print(plan)`` shows where the budget went.

    Raises:
        PlanError: nothing matches the targets, the budget buys no block, a loss or gradient is not
            finite (names the batch), another argument is out of range, the model is wrapped or
            sharded already, or planning failed on another rank (names it).
        DataError: no batches, an empty batch, or one whose labels are all masked.
    """
    budget = Budget.parse(budget)
    if patched := next((n for n, m in model.named_modules() if hasattr(m, "_smt_patch")), None):
        raise PlanError(
            f"{patched!r} is patched already. Call smt_ext.unpatch(model) before planning again."
        )
    _check_wrapped(model)
    warn_slow_bfloat16(model)
    patterns = (targets,) if isinstance(targets, str) else tuple(targets)
    linears = select_targets(model, patterns)
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
    )
    model_parameters = sum(p.numel() for p in model.parameters())
    layers = select_blocks(
        scored.scores,
        budget,
        model_parameters=model_parameters,
        allocation=allocation,
        quotas=quotas,
    )
    if scores_path is not None:
        save_scores(scores_path, scored.scores, metric=metric)
    chosen = {name: layer for name, layer in layers.items() if layer.blocks}
    groups = (tuple(name for name in group if name in chosen) for group in scored.input_groups)
    trained = sum(layer.num_parameters for layer in chosen.values())
    return BlockPlan(
        layers=chosen,
        input_groups=tuple(group for group in groups if len(group) > 1),
        provenance={
            "metric": metric,
            "num_batches": scored.num_batches,
            "seed": seed,
            "budget": str(budget),
            "percent_of_model": round(100 * trained / model_parameters, 6),
            "block_size": block_size,
            "targets": list(patterns),
            "allocation": allocation,
            "quotas": dict(quotas or {}),
            "model_type": getattr(
                getattr(model, "config", None), "model_type", type(model).__name__
            ),
            "model_parameters": model_parameters,
            "model_fingerprint": model_fingerprint(model),
            "smt_ext": _package_version(),
        },
    )


def _check_wrapped(model: nn.Module) -> None:
    if any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        raise PlanError(
            "model is wrapped in DistributedDataParallel. Plan and patch first, then wrap."
        )
    if name := next((n for n, p in model.named_parameters() if sharding.is_sharded(p)), None):
        raise PlanError(
            f"{name!r} is sharded already. Plan and patch first, then fully_shard(model)."
        )


def _package_version() -> str:
    try:
        return version("smt_ext")
    except PackageNotFoundError:
        return "unknown"
