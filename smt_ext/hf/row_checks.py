"""The part of :class:`~smt_ext.hf.mixin.SMTMixin` that looks at rows before a model is given them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, islice
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
        self._checked = False
        self._uncut: list[tuple[str, Any]] = []  # to be checked before the first batch
        self._known_rows: list[Any] = []  # and those that need no further look
        super().__init__(*args, **kwargs)

    def _check_rows(self) -> None:
        """Refuse rows that the model cannot take before anything is computed from one."""
        if self._checked:
            return
        if self.train_dataset is None:
            raise DataError("the trainer has no train_dataset, which planning and training read")
        pad = getattr(self.processing_class, "pad_token_id", None)
        padding = {} if pad is None else {"input_ids": [pad]}
        check_row(padding, "the tokenizer's padding token", Limits.of(self._smt_model))
        held_out: Any = self.eval_dataset
        self._is_checked(self.train_dataset, "training row")
        for rows in held_out.values() if isinstance(held_out, dict) else [held_out]:
            self._is_checked(rows, "held-out row")
        self._checked = True

    def _is_checked(self, rows: Any, name: str) -> bool:
        """Check the rows of a table, once; False for a stream, whose rows are checked as they come."""
        limits = Limits.of(self._smt_model)
        for what, table in self._uncut:
            _check_table(table, what, limits, check_hidden)
        self._uncut.clear()
        if rows is None or any(rows is known for known in self._known_rows):
            return True
        if isinstance(rows, IterableDataset):
            return False
        _check_table(rows, name, limits)
        self._known_rows.append(rows)
        return True

    def _look_at(self, rows: Any, name: str) -> Any:
        """Rows before TRL cuts them, to be checked later; or, of a stream, as they are read."""
        name = {"train": "training row", "eval": "held-out row"}.get(name, f"{name} row")
        stream = isinstance(rows, IterableDataset)
        if not stream:
            self._uncut.append((name, rows))
            return rows

        def look(row: dict[str, Any], index: int) -> dict[str, Any]:
            # While TRL's trainer is being built, which looks at the first row, it has no model yet.
            check_row(row, f"{name} {index}", Limits.of(getattr(self, "model", None)))
            check_hidden(row, f"{name} {index}")
            return {}  # nothing new in the row

        return rows.map(look, with_indices=True)

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
        if not self._is_checked(dataset, name):
            self.data_collator = CheckedCollator(collate, name, Limits.of(self._smt_model))
        if description == "Training" and not hasattr(dataset, "__len__"):
            dataset = Repeated(dataset)
        try:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        finally:
            self.data_collator = collate


class Repeated(IterableDataset[Any]):
    """A stream, again and again: in one pass, as the trainer counts it where it goes on after a resume.

    It takes ``max_steps`` for the length of a stream, and would skip over what only one pass has.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        for epoch in count():
            if hasattr(self.rows, "set_epoch"):  # a shuffled one has another order then
                self.rows.set_epoch(epoch)
            any_row = False
            for row in self.rows:
                any_row = True
                yield row
            if not any_row:
                return


def _check_table(
    rows: Any, name: str, limits: Limits, also: Callable[[Any, str], None] | None = None
) -> None:
    for index, row in enumerate(islice(iter(rows), len(rows))):
        if not check_row(row, f"{name} {index}", limits):
            return  # no token ids, in this row and all others
        if also is not None:
            also(row, f"{name} {index}")
