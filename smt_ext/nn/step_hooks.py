"""Keep weights true under optimizers that know nothing of SMT.

Any ``torch.optim.Optimizer`` may update ``blocks``; a hook that torch runs after each step writes
them into the weights. A hook before the step refuses an optimizer that was built before
``patch()``, which holds the frozen weights and would silently train nothing; under ``fully_shard``
it also makes sure that the parameters are in their shards, which the optimizer holds, and that blocks
can be written into those.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..errors import PatchError
from .modules import SMTLayer, live_modules, write_blocks_of

__all__ = ["WRITES_WEIGHTS", "install"]

# Optimizers with this attribute write the weights in their own pass.
WRITES_WEIGHTS = "_smt_writes_weights"

_installed = False


def install() -> None:
    """Register the two hooks, once a process."""
    global _installed
    if not _installed:
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_write_blocks)
        _installed = True


def _updated_by(optimizer: Optimizer) -> list[SMTLayer]:
    """The layers whose blocks it holds, in its own order, which is the same on all ranks."""
    owners = {id(module.blocks): module for module in live_modules()}
    params = (p for group in optimizer.param_groups for p in group["params"])
    return [owners[id(param)] for param in params if id(param) in owners]


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    modules = live_modules()
    if dist.is_available() and dist.is_initialized():
        for record in {id(r): r for r in (m.__dict__.get("_smt_patch") for m in modules)}.values():
            if record is not None:
                record.reshard()
    _refuse_unusable(optimizer, modules)


def _refuse_unusable(optimizer: Optimizer, modules: list[SMTLayer]) -> None:
    own = _updated_by(optimizer)
    if flat := next((module for module in own if module.weight.dim() < 2), None):
        raise PatchError(
            f"the weight of {flat.layer_name!r} has shape {tuple(flat.weight.shape)} instead of "
            f"{flat.layer_plan.shape}: FullyShardedDataParallel (FSDP1) has flattened it. Use "
            "torch.distributed.fsdp.fully_shard (FSDP2; fsdp_version: 2 in accelerate)."
        )
    for module in own:
        module.check_shards()
    if own:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    stale = [module for module in modules if id(module.weight) in held]
    if stale:
        raise PatchError(
            f"this {type(optimizer).__name__} was built before smt_ext.patch(model, plan): it holds "
            f"{len(stale)} frozen weights (first: {tuple(stale[0].weight.shape)}) and none of the "
            "blocks that train. Build the optimizer after patching."
        )


@torch.no_grad()
def _write_blocks(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if hasattr(optimizer, WRITES_WEIGHTS):
        return
    # Writing sharded blocks is a collective: the order matters.
    updated = _updated_by(optimizer)
    for module in updated:
        module._weight_state.check_trained()
    write_blocks_of(updated)
