"""Write what was trained in a form that others load."""

from __future__ import annotations

import os
from typing import Any, Literal, overload

import torch
from torch import nn

from ..nn.patching import check_trained, patched_root
from .delta import export_delta
from .merged import export_merged
from .peft_lora import LoraAdapter, export_peft_lora

__all__ = ["export"]

_WRITERS: dict[str, Any] = {
    "hf": export_merged,
    "peft-lora": export_peft_lora,
    "delta": export_delta,
}
Folder = str | os.PathLike[str]


@overload
def export(
    model: nn.Module,
    directory: Folder,
    format: Literal["hf"] = "hf",
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None: ...
@overload
def export(
    model: nn.Module,
    directory: Folder,
    format: Literal["peft-lora"],
    *,
    base_model: str | None = None,
    uniform_rank: bool = False,
    overwrite: bool = False,
) -> LoraAdapter: ...
@overload
def export(
    model: nn.Module, directory: Folder, format: Literal["delta"], *, overwrite: bool = False
) -> dict[str, bool]: ...


def export(model: nn.Module, directory: Folder, format: str = "hf", **options: Any) -> Any:
    """Write a patched model's training for programs without smt_ext; the model stays patched.

    The directory appears whole or not at all.

    Args:
        model: a patched model. Under ``fully_shard`` all ranks must call, and rank 0 writes.
        directory: made if need be, replaced if it holds a save of smt_ext.
        format: ``hf``, a plain checkpoint with the blocks merged
            (:func:`~smt_ext.checkpoint.merged.export_merged`); ``peft-lora``, a LoRA adapter of exact
            rank (:func:`~smt_ext.checkpoint.peft_lora.export_peft_lora`); ``delta``, the change of each
            block as safetensors (:func:`~smt_ext.checkpoint.delta.export_delta`).
        options: ``overwrite=True`` also replaces a directory that holds other things. ``hf``:
            ``tokenizer``, ``dtype``; ``peft-lora``: ``base_model``, ``uniform_rank``.

    Returns:
        ``hf``: None; ``peft-lora``: ranks and sizes; ``delta``: module name -> whether exact.

    Raises:
        ValueError: no such format.
        PatchError, CheckpointError: see the functions of the formats.
    """
    if format not in _WRITERS:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(map(repr, _WRITERS))}")
    check_trained(model)
    return _WRITERS[format](patched_root(model), directory, **options)
