"""Sparse Matrix Tuning: train the few blocks of a model's weights that matter, freeze the rest.

    plan = smt_ext.make_plan(model, batches, budget="0.84%")
    smt_ext.patch(model, plan)
    optimizer = smt_ext.SparseAdamW(model, lr=1e-3)
    ...                                   # an ordinary training loop
    smt_ext.save_blocks(model, "blocks")  # or smt_ext.export(model, "finetuned")

After He, Li, Jiang, Miller: "SMT: Fine-Tuning Large Language Models with Sparse Matrices",
ICLR 2025.
"""

from importlib.metadata import PackageNotFoundError, version

from .block_sets import (
    activate,
    active_blocks,
    deactivate,
    loaded_blocks,
    merge_blocks,
    remove_blocks,
)
from .checkpoint import load_blocks, load_training_state, save_blocks, save_training_state
from .delta import apply_delta, export_delta
from .errors import CheckpointError, DataError, PatchError, PlanError
from .estimate import Estimate, estimate
from .export import export
from .modules import SMTConv1D, SMTLayer, SMTLinear
from .optim import SparseAdamW
from .patching import (
    Status,
    original_weights,
    patch,
    plan_of,
    smt_modules,
    status,
    sync_weights,
    unpatch,
)
from .peft_export import export_peft_lora
from .plan import BlockPlan, LayerPlan
from .planning import make_plan

try:
    __version__ = version("smt_ext")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "BlockPlan",
    "CheckpointError",
    "DataError",
    "Estimate",
    "LayerPlan",
    "PatchError",
    "PlanError",
    "SMTConv1D",
    "SMTLayer",
    "SMTLinear",
    "SparseAdamW",
    "Status",
    "activate",
    "active_blocks",
    "apply_delta",
    "deactivate",
    "estimate",
    "export",
    "export_delta",
    "export_peft_lora",
    "load_blocks",
    "load_training_state",
    "loaded_blocks",
    "make_plan",
    "merge_blocks",
    "original_weights",
    "patch",
    "plan_of",
    "remove_blocks",
    "save_blocks",
    "save_training_state",
    "smt_modules",
    "status",
    "sync_weights",
    "unpatch",
]
