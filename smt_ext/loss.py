"""The language-model loss on the answers, with the head computed where it counts alone.

The logits of a 50,000-word vocabulary over a whole batch are the largest tensor of a training step,
and most of them belong to prompt and padding, where no loss is taken.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import IGNORE_INDEX
from .errors import DataError

__all__ = ["AnswerLoss"]


class AnswerLoss:
    """Mean cross entropy over the answer tokens of a batch.

    Where the model lets its decoder and its head be called apart, the head runs on the
    answer positions alone. Whether that gives the model's own logits (some scale or cap them) is
    checked once, on the first batch; if not, the whole logits are used from then on.

    Args:
        model: a causal language model of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.decoder: nn.Module | None = getattr(model, "base_model", None)
        self.head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        # None until the first batch has been compared.
        self.head_on_answers: bool | None = None
        if self.decoder is None or self.decoder is model or not isinstance(self.head, nn.Linear):
            self.head_on_answers = False

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of the batch; differentiable."""
        logits, labels = self.answer_logits(batch)
        return F.cross_entropy(logits.float(), labels)

    def answer_logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (A, V) that predict the A answer tokens of a batch, and these tokens (A,).

        Raises:
            DataError: the batch has no answer token.
        """
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        labels = batch["labels"][:, 1:]
        where = labels != IGNORE_INDEX
        if not where.any():
            raise DataError("a batch has no answer token: all of its labels are masked")
        if self.head_on_answers is None:
            self.head_on_answers = self._head_agrees(inputs, where)
        logits = self._part(inputs, where) if self.head_on_answers else self._whole(inputs, where)
        return logits, labels[where]

    def _part(self, inputs: dict[str, Tensor], where: Tensor) -> Tensor:
        assert self.decoder is not None
        hidden = self.decoder(**inputs, use_cache=False).last_hidden_state
        logits: Tensor = self.head(hidden[:, :-1][where])
        return logits

    def _whole(self, inputs: dict[str, Tensor], where: Tensor) -> Tensor:
        logits: Tensor = self.model(**inputs, use_cache=False).logits[:, :-1][where]
        return logits

    @torch.no_grad()
    def _head_agrees(self, inputs: dict[str, Tensor], where: Tensor) -> bool:
        training = self.model.training
        self.model.eval()  # dropout would make the two differ
        try:
            part, whole = self._part(inputs, where).float(), self._whole(inputs, where).float()
        finally:
            self.model.train(training)
        # The same sums in another order: a few units in the last place of the compute dtype.
        scale = float(whole.abs().max())
        return bool((part - whole).abs().max() <= 0.02 * scale)
