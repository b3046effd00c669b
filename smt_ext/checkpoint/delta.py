"""What training has changed, as plain safetensors: trained blocks minus the base model's, exact."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import __version__
from .._files import replace_directory, sha256_of_file, write_text
from ..distributed import sharding
from ..errors import CheckpointError, PatchError, PlanError
from ..nn.modules import SMTLayer
from ..nn.patching import patch, plan_of, smt_modules, unpatch
from .artifact import (
    about_base,
    check_base,
    modules_by_plan,
    one_writer,
    read_info,
    refuse_quantized,
    sealed,
    set_beside,
    stored_beside,
    whole_beside,
)

__all__ = ["apply_delta", "delta_blocks", "export_delta", "trained_modules"]

DELTA_FORMAT, DELTA_VERSION = "smt_ext.delta", 2
_DELTA_FILE, _DELTA_INFO = "delta.safetensors", "delta.json"


def trained_modules(model: nn.Module) -> dict[str, SMTLayer]:
    """The layers of a patched model under the names of its plan, holding their trained values.

    Raises:
        PatchError: not patched, or :func:`smt_ext.original_weights` is active.
    """
    sharding.reshard(model)
    modules = modules_by_plan(model, plan_of(model))
    for module in modules.values():
        module.check_trained()
    return modules


@torch.no_grad()
def delta_blocks(module: SMTLayer) -> tuple[Tensor, bool]:
    """Trained minus original blocks, (S, L, L) on the CPU, and whether adding them back is exact.

    The model computes with its weight, so that is what counts: of a bfloat16 weight the rounded
    values, whatever float32 master blocks they came from. Exact means that ``original + delta``,
    computed in the delta's dtype and rounded to the weight's, is the trained weight in every bit.
    Two numbers within a factor of two have an exact difference in their own format; an entry that
    training has moved further may need more digits. So the delta is float32 where that is exact,
    else float64, which only float64 weights can be too fine for.
    """
    trained = module.read_blocks().cpu()
    original = module.original_blocks.to(trained.dtype)
    narrow = torch.float64 if trained.dtype == torch.float64 else torch.float32
    delta, exact = _difference(trained, original, narrow)
    if not exact and narrow != torch.float64:
        delta, exact = _difference(trained, original, torch.float64)
    return delta, exact


def _difference(trained: Tensor, original: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    delta = trained.to(dtype) - original.to(dtype)
    return delta, torch.equal((original.to(dtype) + delta).to(trained.dtype), trained)


def export_delta(
    model: nn.Module, directory: str | os.PathLike[str], *, overwrite: bool = False
) -> dict[str, bool]:
    """Write the change of every trained block, readable with nothing but safetensors.

    ``delta.safetensors`` holds two tensors a module: ``NAME.delta`` (S, L, L), zero where a ragged
    edge block is smaller than L x L, and ``NAME.index`` (S, 2) int32, the (row, column) of each
    block: block (r, c) is ``weight[r*L : (r+1)*L, c*L : (c+1)*L]`` of the weight (N, K).
    Parameters that train beside the blocks, and buffers that training has changed, are there under
    their own names, with their new values.
    ``delta.json`` holds the plan with shapes and block sizes, digests of the base
    model, and per module whether base plus delta is exact (see :func:`delta_blocks`).
    :func:`apply_delta` reads it.

    Args:
        model: a patched model; it stays patched. Under ``fully_shard`` all ranks must call, and rank 0
            writes.
        directory: made if need be, replaced if it exists.
        overwrite: also replace a directory that holds other things than our saves.

    Returns:
        module name -> whether base plus delta gives the trained weight bit for bit. False is
        possible for float64 weights only, which then come out right to their rounding.

    Raises:
        PatchError: the model is not patched, or holds a frozen parameter that has changed since.
        CheckpointError: the disk is full or not writable.
    """
    modules = trained_modules(model)
    tensors: dict[str, Tensor] = {}
    exact: dict[str, bool] = {}
    for name, module in modules.items():
        tensors[f"{name}.delta"], exact[name] = delta_blocks(module)
        tensors[f"{name}.index"] = torch.tensor(module.layer_plan.blocks, dtype=torch.int32)
    others = whole_beside(model)
    about = {**about_base(model, modules), "parameters": list(others)}
    tensors.update(others)
    with one_writer(model) as writes:
        if not writes:
            return exact
        with replace_directory(directory, "a delta", overwrite=overwrite) as temporary:
            save_file(tensors, temporary / _DELTA_FILE, metadata={"format": "pt"})
            info: dict[str, Any] = {
                "format": DELTA_FORMAT,
                "version": DELTA_VERSION,
                "smt_ext": __version__,
                "sha256": sha256_of_file(temporary / _DELTA_FILE),
                **about,
                "exact": exact,
                "plan": json.loads(plan_of(model).to_json()),
            }
            write_text(temporary / _DELTA_INFO, json.dumps(sealed(info), indent=1) + "\n")
    return exact


@torch.no_grad()
def apply_delta(
    model: nn.Module, directory: str | os.PathLike[str], *, strict_base: bool = True
) -> nn.Module:
    """Add what :func:`export_delta` wrote onto a base model, in place and for good.

    Everything is checked before a weight changes.

    Args:
        model: the base model, not patched.
        strict_base: require the whole base model to be that of training. False adds the change onto
            any model of the same shapes, with a warning.

    Returns:
        ``model``.

    Raises:
        CheckpointError: damaged, or another base model; names the first module that differs.
        PatchError: the model is patched.
    """
    where = os.fspath(directory)
    if smt_modules(model):
        raise PatchError(
            f"cannot add the delta in {where!r} onto a patched model: its weights belong to "
            "training. Call smt_ext.unpatch(model, restore=True) first."
        )
    info = read_info(
        directory,
        _DELTA_INFO,
        _DELTA_FILE,
        DELTA_FORMAT,
        DELTA_VERSION,
        whole=True,
        older=not strict_base,
    )
    tensors: dict[str, Tensor] = info["tensors"]
    try:
        patch(model, info["plan"])
    except PlanError as error:
        raise CheckpointError(f"the delta in {where!r} is for another model: {error}") from None
    try:
        sums: list[tuple[SMTLayer, Tensor]] = []
        modules = modules_by_plan(model, info["plan"])
        refuse_quantized(modules, f"the delta in {where!r} cannot be added to")
        check_base(directory, model, modules, info, strict_base)
        others = stored_beside(directory, model, info, tensors)
        for name, module in modules.items():
            delta = tensors.get(f"{name}.delta")
            if delta is None or delta.shape != module.original_blocks.shape:
                raise CheckpointError(f"{where!r} holds no usable delta of {name!r}: it is damaged")
            total = module.original_blocks.to(delta.dtype) + delta
            sums.append((module, total.to(module.weight.dtype)))
        for module, blocks in sums:
            module.blocks.copy_(blocks)
            module.write_blocks_()
        set_beside(model, others)
    finally:
        unpatch(model)
    return model
