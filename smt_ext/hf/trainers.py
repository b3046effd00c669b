"""TRL's trainers with SMT in them."""

from __future__ import annotations

from typing import Any

from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import create_model_from_path

from .mixin import SMTMixin
from .reference import ReferenceModel

__all__ = ["SMTDPOTrainer", "SMTSFTTrainer"]


class SMTSFTTrainer(SMTMixin, SFTTrainer):
    """``trl.SFTTrainer`` that trains blocks; all its arguments, and ``smt_config``."""


class SMTDPOTrainer(SMTMixin, DPOTrainer):
    """``trl.DPOTrainer`` that trains blocks; the reference is the model's own original weights."""

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        if isinstance(model, str):
            model = create_model_from_path(
                model, **(getattr(args, "model_init_kwargs", None) or {})
            )
        ref_model = ReferenceModel(model, patched=False) if ref_model is None else ref_model
        super().__init__(model, ref_model, args, **kwargs)
