"""The part of :class:`~smt_ext.hf.mixin.SMTMixin` that looks at rows before a model is given them."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..errors import DataError
from .saving import SavesBlocks
from .token_rows import CheckedCollator, Limits, check_hidden, check_row

__all__ = ["ChecksRows"]


class ChecksRows(SavesBlocks):
    """Refuses rows that the model cannot take."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._given_model = kwargs.get("model", args[0] if args else None)
        self._known_rows: list[Any] = []  # which need no further look
        super().__init__(*args, **kwargs)

    @property
    def _limits(self) -> Limits:
        # TRL's trainers prepare rows before they have a model.
        return Limits.of(self._smt_model if hasattr(self, "model") else self._given_model)

    def _check_rows(self) -> None:
        """Refuse rows that the model cannot take before anything is computed from one."""
        if self.train_dataset is None:
            raise DataError("the trainer has no train_dataset, which planning and training read")
        pad = getattr(self.processing_class, "pad_token_id", None)
        padding = {} if pad is None else {"input_ids": [pad]}
        check_row(padding, "the tokenizer's padding token", self._limits)
        held_out: Any = self.eval_dataset
        self._check_table(self.train_dataset, "training row")
        for rows in held_out.values() if isinstance(held_out, dict) else [held_out]:
            self._check_table(rows, "held-out row")

    def _check_table(self, rows: Any, name: str, *, of_trl: bool = False) -> None:
        """Check the rows of a table, once. Those of a stream are checked as they come."""
        if rows is None or isinstance(rows, IterableDataset):
            return
        if any(rows is known for known in self._known_rows):
            return
        limits = self._limits
        for index, row in enumerate(islice(iter(rows), len(rows))):
            if not check_row(row, f"{name} {index}", limits):
                break  # no token ids, in this row and all others
            if of_trl:
                check_hidden(row, f"{name} {index}")
        self._known_rows.append(rows)

    @staticmethod
    def _row_name(name: str) -> str:
        return {"train": "training row", "eval": "held-out row"}.get(name, f"{name} row")

    def _look_at(self, rows: Any, name: str) -> Any:
        """Check rows before TRL cuts them; those of a stream as they are read."""
        name = self._row_name(name)
        stream = isinstance(rows, IterableDataset)
        self._check_table(rows, name, of_trl=True)

        def look(row: dict[str, Any], index: int) -> dict[str, Any]:
            check_row(row, f"{name} {index}", self._limits)
            check_hidden(row, f"{name} {index}")
            return {}  # nothing new in the row

        return rows.map(look, with_indices=True) if stream else rows

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's; where it groups rows by length, in one order an epoch also after a resume."""
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler.generator = torch.Generator().manual_seed(seed)
            # Called by the trainer for every epoch, at a resume too.
            again: Any = sampler
            again.set_epoch = lambda epoch: sampler.generator.manual_seed(seed + epoch)
        return sampler

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """The trainer's; training, evaluation and prediction get their rows here."""
        name = "training row" if description == "Training" else "held-out row"
        collate: Any = self.data_collator
        self._check_table(dataset, name)
        if isinstance(dataset, IterableDataset) and not any(dataset is r for r in self._known_rows):
            self.data_collator = CheckedCollator(collate, name, self._limits)
        try:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        finally:
            self.data_collator = collate
