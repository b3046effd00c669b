"""Keep weights true under optimizers that know nothing of SMT.

Any ``torch.optim.Optimizer`` may update ``blocks``. A hook that torch runs after each step writes them
into the weights, and one before has the closure, where the optimizer takes one, write them too before
it evaluates the model. The hook before also refuses an optimizer that was built before ``patch()``,
which holds the frozen weights and would silently train nothing; under ``fully_shard`` it makes sure
that the parameters are in their shards, which the optimizer holds, and that blocks can be written into
those. While nothing is patched both return at once.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..errors import PatchError
from .modules import (
    BlocksParameter,
    SMTLayer,
    live_modules,
    patch_record,
    write_blocks_of,
    write_changed_blocks_of,
)

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


def _before_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    modules = live_modules()
    if not modules:
        return None
    if dist.is_available() and dist.is_initialized():
        for record in {id(r): r for r in map(patch_record, modules)}.values():
            if record is not None:
                record.reshard()
    own = _updated_by(optimizer)
    _refuse_unusable(optimizer, own, modules)
    if not own or hasattr(optimizer, WRITES_WEIGHTS):
        return None
    # Some optimizers (LBFGS) change parameters and evaluate the model again within a step.
    return (
        tuple(_with_current_weights(value, optimizer) for value in args),
        {name: _with_current_weights(value, optimizer) for name, value in kwargs.items()},
    )


def _with_current_weights(value: Any, optimizer: Optimizer) -> Any:
    """A closure that evaluates the model at the blocks' values; anything else as it is."""
    if not callable(value) or isinstance(value, Optimizer):
        return value

    @wraps(value)
    def closure(*args: Any, **kwargs: Any) -> Any:
        write_changed_blocks_of(_updated_by(optimizer))
        return value(*args, **kwargs)

    return closure


def _refuse_unusable(optimizer: Optimizer, own: list[SMTLayer], modules: list[SMTLayer]) -> None:
    if flat := next((module for module in own if module.weight.dim() < 2), None):
        raise PatchError(
            f"the weight of {flat.layer_name!r} has shape {tuple(flat.weight.shape)} instead of "
            f"{flat.layer_plan.shape}: FullyShardedDataParallel (FSDP1) has flattened it. Use "
            "torch.distributed.fsdp.fully_shard (FSDP2; fsdp_version: 2 in accelerate)."
        )
    for module in own:
        module.check_trained()
        module.check_holds_weight()
        module.check_not_lent()
        module.check_shards()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    alive = {id(module.blocks) for module in modules}
    dead = [p for p in params if isinstance(p, BlocksParameter) and id(p) not in alive]
    if dead and not hasattr(optimizer, WRITES_WEIGHTS):
        raise PatchError(
            f"this {type(optimizer).__name__} holds blocks of layers that were unpatched, or that have "
            "other blocks now: it would train nothing. Build a new optimizer."
        )
    if own:
        return
    held = {id(p) for p in params}
    stale = [module for module in modules if id(module.weight) in held]
    if stale:
        raise PatchError(
            f"this {type(optimizer).__name__} was built before smt_ext.patch(model, plan): it holds "
            f"{len(stale)} frozen weights (first: {tuple(stale[0].weight.shape)}) and none of the "
            "blocks that train. Build the optimizer after patching."
        )


@torch.no_grad()
def _write_blocks(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not live_modules() or hasattr(optimizer, WRITES_WEIGHTS):
        return
    # Writing sharded blocks is a collective: the order matters.
    write_blocks_of(_updated_by(optimizer))
