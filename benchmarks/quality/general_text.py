"""Forgetting: the loss on general text that no task trains on, before and after training.

``general.txt`` was written for this: short paragraphs of documentation, natural science, history,
stories, letters, recipes and code, of which the model has seen the like and not the words.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from smt_ext._files import sha256_of_file

from .rows import Example, held_out_loss

__all__ = ["General"]

PATH = Path(__file__).with_name("general.txt")


class General:
    """The paragraphs, encoded; each is read by itself.

    Attributes:
        tokens: that are predicted. sha256: of the file.
    """

    def __init__(self, tokenizer: Any) -> None:
        paragraphs = PATH.read_text(encoding="utf-8").strip().split("\n\n")
        ids = [tuple(tokenizer(paragraph)["input_ids"]) for paragraph in paragraphs]
        self.examples = [Example(one, one) for one in ids]
        self.tokens = sum(len(one) - 1 for one in ids)
        self.sha256 = sha256_of_file(PATH)
        self._pad_id: int = tokenizer.pad_token_id

    def loss(self, model: nn.Module) -> float:
        """Mean cross entropy in nats a token, in the model's own precision."""
        return held_out_loss(
            model, self.examples, pad_id=self._pad_id, batch_size=8, autocast=nullcontext
        )
