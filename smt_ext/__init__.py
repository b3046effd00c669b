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
    from . import block_sets as block_sets
    from .checkpoint.blocks import load_blocks as load_blocks
    from .checkpoint.blocks import save_blocks as save_blocks
    from .checkpoint.export import export as export
    from .checkpoint.training_state import load_training_state as load_training_state
    from .checkpoint.training_state import save_training_state as save_training_state
    from .errors import CheckpointError as CheckpointError
    from .errors import DataError as DataError
    from .errors import PatchError as PatchError
    from .errors import PlanError as PlanError
    from .hf.config import SMTConfig as SMTConfig
    from .hf.mixin import SMTMixin as SMTMixin
    from .hf.trainers import SMTDPOTrainer as SMTDPOTrainer
    from .hf.trainers import SMTSFTTrainer as SMTSFTTrainer
    from .nn.patching import original_weights as original_weights
    from .nn.patching import patch as patch
    from .nn.patching import smt_modules as smt_modules
    from .nn.patching import status as status
    from .nn.patching import sync_weights as sync_weights
    from .nn.patching import train_also as train_also
    from .nn.patching import unpatch as unpatch
    from .optim.sparse_adamw import SparseAdamW as SparseAdamW
    from .plan import BlockPlan as BlockPlan
    from .plan import LayerPlan as LayerPlan
    from .planning.make_plan import make_plan as make_plan

# Public name -> its module. Loaded when first asked for: `smt-ext --help` needs no torch.
_HOME = {
    "block_sets": "block_sets",
    "load_blocks": "checkpoint.blocks",
    "save_blocks": "checkpoint.blocks",
    "export": "checkpoint.export",
    "load_training_state": "checkpoint.training_state",
    "save_training_state": "checkpoint.training_state",
    "CheckpointError": "errors",
    "DataError": "errors",
    "PatchError": "errors",
    "PlanError": "errors",
    "SMTConfig": "hf.config",
    "SMTMixin": "hf.mixin",
    "SMTDPOTrainer": "hf.trainers",
    "SMTSFTTrainer": "hf.trainers",
    "original_weights": "nn.patching",
    "patch": "nn.patching",
    "smt_modules": "nn.patching",
    "status": "nn.patching",
    "sync_weights": "nn.patching",
    "train_also": "nn.patching",
    "unpatch": "nn.patching",
    "SparseAdamW": "optim.sparse_adamw",
    "BlockPlan": "plan",
    "LayerPlan": "plan",
    "make_plan": "planning.make_plan",
}

__all__ = sorted(_HOME)

try:
    __version__ = version("smt_ext")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'smt_ext' has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOME[name]}")
    value = module if name == "block_sets" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
