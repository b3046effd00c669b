"""TRL's trainers with SMT in them."""

from __future__ import annotations

import copy
import logging
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import AutoProcessor
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import create_model_from_path

from ..errors import DataError
from ..nn.patching import smt_modules
from .config import SMTConfig
from .loading import keep_commit, of_the_hub
from .mixin import SMTMixin
from .reference import ReferenceModel
from .rows import check_rows, kind_of
from .run_binding import check_begins_anew
from .score_callback import evaluating
from .token_rows import say_what_is_cut

__all__ = ["SMTDPOTrainer", "SMTSFTTrainer"]

logger = logging.getLogger("smt_ext")
trl_utils: Any = import_module("trl.trainer.utils")


class SMTSFTTrainer(SMTMixin, SFTTrainer):
    """``trl.SFTTrainer`` that trains blocks; all its arguments, and ``smt_config``.

    The head runs on answer positions alone on every device, and packing is refused where the model
    would look from one row of a packed sequence into another; not with ``packing_strategy="wrapped"``,
    whose sequences TRL cuts from one text of all rows, so that rows do see each other.
    """

    _kind: str | None = None  # of the training rows

    def __init__(self, model: Any, args: Any = None, **kwargs: Any) -> None:
        model, args = _loaded(model, args, kwargs)
        super().__init__(model, args, **kwargs)

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
        self, dataset: Any, tokenizer: Any, args: Any, packing: bool, formatting: Any, name: str
    ) -> Any:
        """TRL's token ids. It cuts and packs in a second call, where rows have been looked at before."""
        _check_anew(self.smt_config, dataset, name)
        first: dict[str, Any] = next(iter(dataset), {})
        told = formatting is not None or args.completion_only_loss is not None
        kind = None if told else kind_of(first)
        if "_kind" not in vars(self):  # the training rows come first
            self._kind = kind
        elif kind != self._kind and kind is not None and self._kind is not None:
            # TRL goes by the first training row, and would take the loss of prompts, too, or of none.
            raise DataError(
                f"{name}_dataset has {kind!r} rows, and train_dataset {self._kind!r} ones: their losses "
                "would not be of the same tokens. Give both in one format."
            )
        if "input_ids" in first:
            dataset = self._look_at(dataset, name)
        elif formatting is None:
            field = args.dataset_text_field
            dataset = check_rows(dataset, tokenizer, self._row_name(name), text_field=field)
        whole, most = copy.copy(args), args.max_length
        whole.max_length, whole.shuffle_dataset = None, False
        rows = super()._prepare_dataset(dataset, tokenizer, whole, False, formatting, name)
        rows = self._look_at(rows, name)
        cuts = most is not None and (not packing or args.packing_strategy == "bfd")
        if cuts and not isinstance(rows, IterableDataset):
            from_end = args.truncation_mode == "keep_end" and not packing
            end = "beginnings" if from_end else "ends"
            lost = "left without an answer" if packing else "left out"
            say_what_is_cut(rows, name, most, end=end, lost=lost)
        found = super()._prepare_dataset(rows, tokenizer, args, packing, None, name)
        self._known_rows.append(found)
        return found

    def _check_rows(self) -> None:
        if self.args.eval_packing and not self.padding_free:
            raise DataError(
                "eval_packing: the model, which trains without packing, would look from one row into "
                "another. Leave it away."
            )
        if self.padding_free:
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
                f"{type(model).__name__} lets rows of one sequence see each other. Leave packing away, "
                "or load it with another attn_implementation, such as sdpa or flash_attention_2."
            )


class SMTDPOTrainer(SMTMixin, DPOTrainer):
    """``trl.DPOTrainer`` that trains blocks; the reference is the model's own original weights."""

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        model, args = _loaded(model, args, kwargs)
        if ref_model is None:
            if getattr(args, "sync_ref_model", False):
                raise DataError(
                    "sync_ref_model needs a ref_model: else the reference is the original weights"
                )
            _say_what_is_the_reference(model)
            ref_model = ReferenceModel(model, patched=False)
        super().__init__(model, ref_model, args, **kwargs)

    def _prepare_dataset(self, dataset: Any, tokenizer: Any, args: Any, name: str) -> Any:
        """TRL's token ids, looked at before rows are left out here, and cut in TRL's collator."""
        _check_anew(self.smt_config, dataset, name)
        dataset = check_rows(dataset, tokenizer, self._row_name(name), preferences=True)
        whole, most = copy.copy(args), args.max_length
        whole.max_length = None
        rows = super()._prepare_dataset(dataset, tokenizer, whole, name)
        rows = self._look_at(rows, name)
        end = "beginnings" if args.truncation_mode == "keep_end" else "ends"
        if most is not None and not isinstance(rows, IterableDataset):
            say_what_is_cut(rows, name, most, end=end, lost="left out")
        if most is not None and end == "ends":
            rows = rows.filter(lambda row: len(row["prompt_ids"]) < most)
        self._known_rows.append(rows)
        return rows


def _check_anew(config: SMTConfig, dataset: Any, name: str) -> None:
    if "data" not in (config.allow_changed or ()):
        check_begins_anew(dataset, f"{name}_dataset")


def _loaded(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The model of a name, and its tokenizer of the same revision, as TRL loads both by ``args``."""
    if not isinstance(model, str):
        return model, args
    given = dict(getattr(args, "model_init_kwargs", None) or {})
    if (quantization := kwargs.pop("quantization_config", None)) is not None:
        given["quantization_config"] = quantization
    if args is not None:
        given.setdefault("trust_remote_code", getattr(args, "trust_remote_code", False))
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            given["device_map"] = None
        args = copy.copy(args)
        args.model_init_kwargs = None  # they are used here
    if kwargs.get("processing_class") is None:
        kwargs["processing_class"] = AutoProcessor.from_pretrained(model, **of_the_hub(given))
    loaded = create_model_from_path(model, **given)
    keep_commit(loaded, model, given)
    return loaded, args


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
