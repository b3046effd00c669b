"""Sparse Matrix Tuning: train the few blocks of a model's weights that matter, freeze the rest.

    plan = smt_ext.make_plan(model, batches, budget="0.84%")
    smt_ext.patch(model, plan)
    optimizer = smt_ext.SparseAdamW(model, lr=1e-3)
    ...                                   # an ordinary training loop
    smt_ext.save_blocks(model, "blocks")  # or smt_ext.export(model, "finetuned")

After He, Li, Jiang, Miller: "SMT: Fine-Tuning Large Language Models with Sparse Matrices",
ICLR 2025.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import block_sets as block_sets
    from .checkpoint.block_sets import activate as activate
    from .checkpoint.block_sets import active_blocks as active_blocks
    from .checkpoint.block_sets import deactivate as deactivate
    from .checkpoint.block_sets import loaded_blocks as loaded_blocks
    from .checkpoint.block_sets import merge_blocks as merge_blocks
    from .checkpoint.block_sets import remove_blocks as remove_blocks
    from .checkpoint.blocks import load_blocks as load_blocks
    from .checkpoint.blocks import load_plan as load_plan
    from .checkpoint.blocks import save_blocks as save_blocks
    from .checkpoint.delta import apply_delta as apply_delta
    from .checkpoint.delta import export_delta as export_delta
    from .checkpoint.merged import export as export
    from .checkpoint.peft_lora import check_peft_lora as check_peft_lora
    from .checkpoint.peft_lora import export_peft_lora as export_peft_lora
    from .checkpoint.training_state import load_training_state as load_training_state
    from .checkpoint.training_state import save_training_state as save_training_state
    from .errors import CheckpointError as CheckpointError
    from .errors import DataError as DataError
    from .errors import PatchError as PatchError
    from .errors import PlanError as PlanError
    from .estimation.table import Estimate as Estimate
    from .estimation.table import estimate as estimate
    from .hf.config import SMTConfig as SMTConfig
    from .hf.mixin import SMTMixin as SMTMixin
    from .hf.trainers import SMTDPOTrainer as SMTDPOTrainer
    from .hf.trainers import SMTSFTTrainer as SMTSFTTrainer
    from .nn.modules import SMTConv1D as SMTConv1D
    from .nn.modules import SMTLayer as SMTLayer
    from .nn.modules import SMTLinear as SMTLinear
    from .nn.patching import Status as Status
    from .nn.patching import original_weights as original_weights
    from .nn.patching import patch as patch
    from .nn.patching import plan_of as plan_of
    from .nn.patching import smt_modules as smt_modules
    from .nn.patching import status as status
    from .nn.patching import sync_weights as sync_weights
    from .nn.patching import train_also as train_also
    from .nn.patching import unpatch as unpatch
    from .optim.sparse_adamw import SparseAdamW as SparseAdamW
    from .plan import BlockPlan as BlockPlan
    from .plan import LayerPlan as LayerPlan
    from .planning.make_plan import make_plan as make_plan

# Public name -> its module. Loaded when first asked for: `smt-ext --help` needs no torch, and who
# trains needs no estimate.
_HOME = {
    name: module
    for module, names in {
        "checkpoint.block_sets": (
            "activate", "active_blocks", "block_sets", "deactivate", "loaded_blocks",
            "merge_blocks", "remove_blocks",
        ),
        "checkpoint.blocks": (
            "load_blocks", "load_plan", "save_blocks",
        ),
        "checkpoint.delta": ("apply_delta", "export_delta"),
        "checkpoint.merged": ("export",),
        "checkpoint.peft_lora": ("check_peft_lora", "export_peft_lora"),
        "checkpoint.training_state": ("load_training_state", "save_training_state"),
        "errors": ("CheckpointError", "DataError", "PatchError", "PlanError"),
        "estimation.table": ("Estimate", "estimate"),
        "hf.config": ("SMTConfig",),
        "hf.mixin": ("SMTMixin",),
        "hf.trainers": ("SMTDPOTrainer", "SMTSFTTrainer"),
        "nn.modules": ("SMTConv1D", "SMTLayer", "SMTLinear"),
        "nn.patching": (
            "Status", "original_weights", "patch", "plan_of", "smt_modules", "status",
            "sync_weights", "train_also", "unpatch",
        ),
        "optim.sparse_adamw": ("SparseAdamW",),
        "plan": ("BlockPlan", "LayerPlan"),
        "planning.make_plan": ("make_plan",),
    }.items()
    for name in names
}  # fmt: skip

__all__ = sorted(_HOME)

try:
    __version__ = version("smt_ext")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'smt_ext' has no attribute {name!r}")
    value = import_module(f"{__name__}.{_HOME[name]}")
    if name != "block_sets":
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
