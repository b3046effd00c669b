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

from .checkpoint import load_blocks, load_training_state, save_blocks, save_training_state
from .errors import CheckpointError, DataError, PatchError, PlanError
from .estimate import Estimate, estimate
from .export import export
from .modules import SMTLinear
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
    "SMTLinear",
    "SparseAdamW",
    "Status",
    "estimate",
    "export",
    "load_blocks",
    "load_training_state",
    "make_plan",
    "original_weights",
    "patch",
    "plan_of",
    "save_blocks",
    "save_training_state",
    "smt_modules",
    "status",
    "sync_weights",
    "unpatch",
]
