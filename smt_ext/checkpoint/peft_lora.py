"""Trained blocks as a PEFT LoRA adapter of exact rank, for whatever serves LoRA.

The change of a weight is zero outside the selected blocks. With R rows of it not zero,

    delta_NK = B_NR @ A_RK,   A = those rows of delta,   B = unit columns that put them in place,

exactly: every entry of the product is one number times one. The same works with columns, and with
some rows and some columns that touch all blocks together; the smallest rank is taken.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import __version__
from .._files import replace_directory, sha256_of_file, write_text
from ..errors import PatchError
from ..nn.expert_modules import SMTExpertWeight
from ..nn.modules import SMTConv1D
from ..nn.patching import changed_beside, patch, plan_of, smt_modules, unpatch
from ..plan import LayerPlan
from .artifact import (
    about_base,
    check_base,
    modules_by_plan,
    one_writer,
    read_info,
    sealed,
    source_of,
)
from .delta import delta_blocks, trained_modules

__all__ = ["LoraAdapter", "check_peft_lora", "exact_factors", "export_peft_lora"]

LORA_FORMAT, LORA_VERSION = "smt_ext.peft_lora", 2
_LORA_FILE, _LORA_INFO = "adapter_model.safetensors", "smt_lora.json"


@dataclass(frozen=True)
class LoraAdapter:
    """What :func:`export_peft_lora` wrote.

    Attributes:
        ranks: module name -> its rank; modules without any change are left out.
        num_bytes: bytes of the adapter's tensors.
        delta_bytes: bytes of the changed blocks alone, in the same dtype, for comparison.
    """

    ranks: dict[str, int]
    num_bytes: int
    delta_bytes: int

    @property
    def max_rank(self) -> int:
        """What a server must allow (``--max-lora-rank`` of vLLM)."""
        return max(self.ranks.values())


def export_peft_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    uniform_rank: bool = False,
    overwrite: bool = False,
) -> LoraAdapter:
    """Write the trained blocks as a LoRA adapter that PEFT loads onto the base model.

    No approximation: base weight plus B @ A is the trained weight, to the rounding of float32 (of
    float64 for float64 weights), which the adapter is stored in. Every module's ``lora_alpha``
    is its rank, so that the scale is 1. Beside it ``smt_lora.json`` names the whole base model by
    digests, for :func:`check_peft_lora`.

    A LoRA of high rank is larger and slower to serve than the merged weights of
    :func:`smt_ext.export`; it pays where one base model serves many adapters. Limits of others:

    - vLLM serves ranks up to its ``--max-lora-rank``, 512 at most, and rounds adapters to the
      model's dtype.
    - llama.cpp scales each module by ``lora_alpha`` over that module's rank, with one
      ``lora_alpha`` for all: it needs ``uniform_rank``.

    Args:
        model: a patched model; it stays patched. Under ``fully_shard`` all ranks must call, and rank 0
            writes.
        directory: made if need be, replaced if it exists.
        base_model: name or folder of the base model, for ``base_model_name_or_path``. Default: where
            the model was loaded from.
        uniform_rank: pad all modules with zeros to the largest rank, for programs that know one
            rank only. Larger files, same result.
        overwrite: also replace a directory that holds other things than our saves.

    Returns:
        the ranks and sizes.

    Raises:
        PatchError: the model is not patched, nothing has been trained, other parameters or buffers have
            changed beside the blocks, or experts have: PEFT's LoRA layers know no parameter that holds
            the matrices of all experts.
        CheckpointError: the disk is full or not writable.
    """
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    delta_bytes = 0
    trained = trained_modules(model)
    if others := changed_beside(model):
        raise PatchError(
            f"{others[0]!r} has trained beside the blocks, and a LoRA adapter has no place for it. Use "
            "smt_ext.export (merged weights), or smt_ext.save_blocks."
        )
    for name, module in trained.items():
        if isinstance(module, SMTExpertWeight):
            raise PatchError(
                f"{name!r} holds the matrices of all experts, for which PEFT has no LoRA layer. Use "
                "smt_ext.export (merged weights) or the delta format, or plan without experts."
            )
        delta, _ = delta_blocks(module)
        wide = module.weight.dtype == torch.float64
        delta = delta.to(torch.float64 if wide else torch.float32)
        if delta.any():
            tensors[name] = exact_factors(delta, module.layer_plan)
            delta_bytes += module.layer_plan.num_parameters * delta.element_size()
    if not tensors:
        raise PatchError(
            "the trained blocks equal the original ones in every module, so the adapter would be "
            "empty. Train first."
        )
    max_rank = max(len(a) for a, _ in tensors.values())
    if uniform_rank:
        tensors = {name: _padded(a, b, max_rank) for name, (a, b) in tensors.items()}
    ranks = {name: len(a) for name, (a, _) in tensors.items()}
    transposed = any(isinstance(trained[name], SMTConv1D) for name in ranks)
    source = source_of(model)
    base_model = base_model or source.get("base_model")
    same = base_model == source.get("base_model")
    about = {**about_base(model, trained), "plan": json.loads(plan_of(model).to_json())}
    num_bytes = sum(t.numel() * t.element_size() for pair in tensors.values() for t in pair)
    adapter = LoraAdapter(ranks, num_bytes, delta_bytes)
    config = _config(model, ranks, base_model, transposed)
    config["revision"] = source.get("base_revision") if same else None
    with one_writer(model) as writes:
        if not writes:
            return adapter
        with replace_directory(directory, "a LoRA adapter", overwrite=overwrite) as temporary:
            _write(temporary, tensors, config)
            info = {
                "format": LORA_FORMAT,
                "version": LORA_VERSION,
                "smt_ext": __version__,
                "sha256": sha256_of_file(temporary / _LORA_FILE),
                **about,
            }
            write_text(temporary / _LORA_INFO, json.dumps(sealed(info), indent=1) + "\n")
    return adapter


def check_peft_lora(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Require that a model is the base that an adapter of :func:`export_peft_lora` was made for.

    PEFT loads an adapter onto any model of its shapes. Call this before.

    Args:
        model: the base model, without adapter, or a patched one.

    Raises:
        CheckpointError: the adapter is damaged, or the model another base; names the first tensor that
            differs. The model stays as it is.
        PatchError: the model is patched with another plan.
    """
    info = read_info(directory, _LORA_INFO, _LORA_FILE, LORA_FORMAT, LORA_VERSION)
    was_patched = bool(smt_modules(model))
    patch(model, info["plan"])
    try:
        check_base(directory, model, modules_by_plan(model, info["plan"]), info, strict=True)
    finally:
        if not was_patched:
            unpatch(model)


def exact_factors(delta: Tensor, layer: LayerPlan) -> tuple[Tensor, Tensor]:
    """A (r, K) and B (N, r) with B @ A equal to the change of the weight, bit for bit.

    Args:
        delta: (S, L, L), the change of each block of ``layer``.

    Rows and columns that did not change cost no rank. Zero blocks give r = 0.
    """
    dense_NK = _dense(delta, layer)
    changed = {block for block, d in zip(layer.blocks, delta, strict=True) if d.any()}
    all_rows = {row for row, _ in changed}
    # Each set of block rows leaves the columns that are not zero without them.
    covers = [
        _rows_and_rest(dense_NK, block_rows, layer.block_size)
        for block_rows in (all_rows, set[int](), _rows_of_smallest_cover(changed))
    ]
    rows, cols = min(covers, key=lambda cover: sum(map(len, cover)))
    unit_rows = dense_NK.new_zeros(len(dense_NK), len(rows))
    unit_rows[rows, torch.arange(len(rows))] = 1
    unit_cols = dense_NK.new_zeros(len(cols), dense_NK.shape[1])
    unit_cols[torch.arange(len(cols)), cols] = 1
    rest_NK = dense_NK.index_fill(0, rows, 0)
    a = torch.cat([dense_NK[rows], unit_cols])
    b = torch.cat([unit_rows, rest_NK[:, cols]], dim=1)
    return a, b


def _dense(delta: Tensor, layer: LayerPlan) -> Tensor:
    """The blocks in place, (N, K), zero elsewhere."""
    size = layer.block_size
    dense = delta.new_zeros(layer.shape)
    for (row, col), block in zip(layer.blocks, delta, strict=True):
        target = dense[row * size : (row + 1) * size, col * size : (col + 1) * size]
        target.copy_(block[: target.shape[0], : target.shape[1]])
    return dense


def _rows_and_rest(
    dense_NK: Tensor, block_rows: Iterable[int], block_size: int
) -> tuple[Tensor, Tensor]:
    """Indices of the rows within ``block_rows`` that are not zero, and of the other rows' columns."""
    taken = torch.zeros(len(dense_NK), dtype=torch.bool)
    for row in block_rows:
        taken[row * block_size : (row + 1) * block_size] = True
    rows = (dense_NK.any(dim=1) & taken).nonzero().flatten()
    cols = dense_NK[~taken].any(dim=0).nonzero().flatten()
    return rows, cols


def _rows_of_smallest_cover(blocks: Iterable[tuple[int, int]]) -> set[int]:
    """The rows of a smallest set of rows and columns that touches every block.

    König's theorem: blocks are edges between their row and their column. From a largest matching,
    the cover is the columns that alternating paths from unmatched rows reach, and the rows that
    they do not.
    """
    cols_of: defaultdict[int, list[int]] = defaultdict(list)
    for row, col in sorted(blocks):
        cols_of[row].append(col)
    row_of_col: dict[int, int] = {}
    col_of_row: dict[int, int] = {}
    for root in cols_of:
        # Breadth first to a free column; then the path's pairs change over.
        came_from: dict[int, int] = {}
        queue = deque([root])
        free: int | None = None
        while queue and free is None:
            row = queue.popleft()
            for col in cols_of[row]:
                if col in came_from:
                    continue
                came_from[col] = row
                if col not in row_of_col:
                    free = col
                    break
                queue.append(row_of_col[col])
        while free is not None:
            row = came_from[free]
            before = col_of_row.get(row)
            row_of_col[free], col_of_row[row] = row, free
            free = before
    reached = {row for row in cols_of if row not in col_of_row}
    queue = deque(reached)
    while queue:
        for col in cols_of[queue.popleft()]:
            if (row := row_of_col[col]) not in reached:
                reached.add(row)
                queue.append(row)
    return set(cols_of) - reached


def _padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    more = rank - len(a)
    return nn.functional.pad(a, (0, 0, 0, more)), nn.functional.pad(b, (0, more))


def _config(
    model: nn.Module, ranks: dict[str, int], base_model: str | None, transposed: bool
) -> dict[str, Any]:
    """adapter_config.json as PEFT reads it; ``transposed``: the base stores (K, N), as Conv1D does."""
    # PEFT takes the keys for regular expressions, matched behind any prefix unless anchored.
    by_module = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    uniform = len(set(ranks.values())) == 1
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "target_modules": list(ranks),
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": {} if uniform else by_module,
        "alpha_pattern": {} if uniform else by_module,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _task_type(model: nn.Module) -> str | None:
    """Decides which of PEFT's wrappers gets around the model; None is the plain one."""
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate():
        return None
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"


def _write(
    directory: Path, tensors: dict[str, tuple[Tensor, Tensor]], config: dict[str, Any]
) -> None:
    stored = {}
    for name, (a, b) in tensors.items():
        stored[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        stored[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    save_file(stored, directory / _LORA_FILE, metadata={"format": "pt"})
    write_text(directory / "adapter_config.json", json.dumps(config, indent=2) + "\n")
