"""TRL's trainers with SMT in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl.trainer import utils
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import create_model_from_path

from ..errors import DataError
from .mixin import SMTMixin
from .reference import ReferenceModel
from .score_callback import evaluating

__all__ = ["SMTDPOTrainer", "SMTSFTTrainer"]


class SMTSFTTrainer(SMTMixin, SFTTrainer):
    """``trl.SFTTrainer`` that trains blocks; all its arguments, and ``smt_config``.

    The head runs on answer positions alone on every device, and packing is refused where the model
    would look from one row of a packed sequence into another.
    """

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss."""
        # TRL leaves out the other positions where it has Triton, and computes them elsewhere for the
        # sake of accelerators that compile for each shape.
        plain = utils._use_triton  # type: ignore[attr-defined]
        utils._use_triton = lambda device: plain(device) or device.type == "cpu"  # type: ignore[attr-defined]
        try:
            return super().compute_loss(*args, **kwargs)
        finally:
            utils._use_triton = plain  # type: ignore[attr-defined]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`smt_ext.hf.mixin.SMTMixin.train`."""
        if self.padding_free:
            self._check_packing()
        return super().train(*args, **kwargs)

    @torch.no_grad()
    def _check_packing(self) -> None:
        """Two rows in one sequence: neither may see the other, nor a token a later one."""
        model: Any = self.model
        last = [2, 3, 4, 5, 6, 7, 8, 9]

        def logits(first: list[int], second: list[int]) -> Tensor:
            rows = [{"input_ids": row, "labels": row} for row in (first, second)]
            batch: Any = self._prepare_inputs(self.data_collator(rows))
            batch.pop("labels")
            with self.accelerator.autocast():
                found: Tensor = model(**batch, use_cache=False).logits[0]
            return found.float()

        with evaluating(model):
            base = logits(last, last)
            other_first, other_end = logits([5, *last[1:]], last), logits(last, [*last[:-1], 5])
        size = len(last)
        scale = 1e-3 * float(base.abs().max())
        leaks = [(base - other_first)[size:], (base - other_end)[: 2 * size - 1]]
        if any(float(leak.abs().max()) > scale for leak in leaks):
            raise DataError(
                f"packing: with its {model.config._attn_implementation!r} attention this "
                f"{type(model).__name__} lets rows of one sequence see each other. Leave packing "
                "away, or load the model with an attn_implementation that keeps them apart, such as "
                "sdpa or flash_attention_2."
            )


class SMTDPOTrainer(SMTMixin, DPOTrainer):
    """``trl.DPOTrainer`` that trains blocks; the reference is the model's own original weights."""

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        if isinstance(model, str):
            model = create_model_from_path(
                model, **(getattr(args, "model_init_kwargs", None) or {})
            )
        ref_model = ReferenceModel(model, patched=False) if ref_model is None else ref_model
        super().__init__(model, ref_model, args, **kwargs)
