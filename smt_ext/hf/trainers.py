"""TRL's trainers with SMT in them."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import create_model_from_path

from ..errors import DataError
from ..nn.patching import smt_modules
from .mixin import SMTMixin
from .reference import ReferenceModel
from .score_callback import evaluating

__all__ = ["SMTDPOTrainer", "SMTSFTTrainer"]

logger = logging.getLogger("smt_ext")
trl_utils: Any = import_module("trl.trainer.utils")


class SMTSFTTrainer(SMTMixin, SFTTrainer):
    """``trl.SFTTrainer`` that trains blocks; all its arguments, and ``smt_config``.

    The head runs on answer positions alone on every device, and packing is refused where the model
    would look from one row of a packed sequence into another.
    """

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss; its head takes answer positions alone where it thinks that it has Triton."""
        thinks = trl_utils._use_triton
        if self.accelerator.device.type == "cpu":  # all positions took two to three times as long
            trl_utils._use_triton = lambda device: True
        try:
            return super().compute_loss(*args, **kwargs)
        finally:
            trl_utils._use_triton = thinks

    def _prepare_dataset(
        self, dataset: Any, tokenizer: Any, args: Any, packing: bool, *rest: Any
    ) -> Any:
        """TRL's token ids; says how many rows it has cut or left out, which it does without a word."""
        found = super()._prepare_dataset(dataset, tokenizer, args, packing, *rest)
        most = args.max_length
        if most is None or packing or not hasattr(found, "__len__"):
            return found
        if len(found) == 0:
            raise DataError(f"no row has an answer within max_length = {most} tokens: raise it")
        cut = sum(len(ids) >= most for ids in found["input_ids"])
        if cut or len(found) < len(dataset):
            logger.warning(
                "max_length = %d: %d of %d rows are cut there, without their ends, and %d left out",
                most, cut, len(dataset), len(dataset) - len(found),
            )  # fmt: skip
        return found

    def _check_rows(self) -> None:
        if self.args.eval_packing and not self.padding_free:
            raise DataError(
                "eval_packing packs held-out rows, and the model, which trains without packing, would "
                "look from one into another: leave it away."
            )
        if not self._checked and self.padding_free:
            self._check_packing()
        super()._check_rows()

    @torch.no_grad()
    def _check_packing(self) -> None:
        """Of two rows in one sequence the last tokens change: nothing else may see it."""
        model: Any = self.model
        row = [2, 3, 4, 5, 6, 7, 8, 9]

        def logits(row: list[int]) -> Tensor:
            batch: Any = self.data_collator([{"input_ids": row, "labels": row}] * 2)
            batch = self._prepare_inputs(batch)
            batch.pop("labels")
            with self.accelerator.autocast():
                found: Tensor = model(**batch, use_cache=False).logits[0]
            return found.float()

        with evaluating(model):
            base, other = logits(row), logits([*row[:-1], 5])
        leak = (base - other).view(2, len(row), -1)[:, :-1]
        if float(leak.abs().max()) > 1e-3 * float(base.abs().max()):
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
        if ref_model is None:
            if getattr(args, "sync_ref_model", False):
                raise DataError(
                    "sync_ref_model moves a reference model of its own, and here the reference is the "
                    "model's original weights: pass a ref_model, or leave sync_ref_model away"
                )
            _say_what_is_the_reference(model)
            ref_model = ReferenceModel(model, patched=False)
        super().__init__(model, ref_model, args, **kwargs)


def _say_what_is_the_reference(model: Any) -> None:
    """Of blocks that were trained before, the reference is not what they are now."""
    for layer in smt_modules(model).values():
        original = layer.original_blocks
        if not torch.equal(layer.read_blocks().to(original), original):
            logger.warning(
                "the model's blocks have been trained before, and the reference is the base from before "
                "that. To begin from what they are now, call smt_ext.unpatch(model) first."
            )
            return
