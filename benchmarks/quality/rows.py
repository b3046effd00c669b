"""Rows as token ids, the order of the batches, and the loss on the answers: the same for every method.

The records of years apart are compared, so what is here stays as it is to the bit.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smt_ext.errors import DataError
from smt_ext.hf.score_callback import evaluating

__all__ = [
    "AnswerLoss", "BatchOrder", "Example", "Row", "collate", "cosine_with_warmup", "encode",
    "held_out_loss", "read_rows",
]  # fmt: skip

IGNORE_INDEX = -100
Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Row:
    """A question, what is to be answered, and the gold answer that a generated one is judged by."""

    question: str
    output: str
    answer: str

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer:"


@dataclass(frozen=True)
class Example:
    """Token ids of a row, and labels, which are IGNORE_INDEX on the prompt."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.input_ids)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file.

    Raises:
        DataError: no such file, or a line that is no object with the fields; names it.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                row["instruction"], row["output"], row["answer"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}:{number}: expected an object with 'instruction', 'output' and 'answer': "
                    f"{error!r}"
                ) from None
            rows.append(row)
    return rows


def encode(rows: Sequence[Row], tokenizer: Any, max_length: int) -> list[Example]:
    """Prompt, answer and end of text of each row; longer rows are left out."""
    examples = []
    for row in rows:
        prompt = tokenizer(row.prompt)["input_ids"]
        answer = tokenizer(f" {row.output}", add_special_tokens=False)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
        if len(prompt) + len(answer) <= max_length:
            labels = [IGNORE_INDEX] * len(prompt) + answer
            examples.append(Example(tuple(prompt + answer), tuple(labels)))
    return examples


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """input_ids, labels and attention_mask, padded on the right; masked by position, not by token."""
    size = (len(examples), max(map(len, examples)))
    ids = torch.full(size, pad_id)
    labels = torch.full(size, IGNORE_INDEX)
    mask = torch.zeros(size, dtype=torch.long)
    for row, example in enumerate(examples):
        end = len(example)
        ids[row, :end] = torch.tensor(example.input_ids)
        labels[row, :end] = torch.tensor(example.labels)
        mask[row, :end] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


class BatchOrder:
    """Which items make up each batch, as a function of seed and batch number alone.

    Every epoch is shuffled anew; items of like length share a batch, to save padding.

    Args:
        lengths: of the items.
        batch_size: items a batch; the last batch of an epoch may be smaller.
        seed: of the shuffling.
    """

    # Lengths are sorted within this many batches: enough to pad little, few enough to stay random.
    _WINDOW = 16

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self._epoch: tuple[int, list[list[int]]] | None = None

    def __getitem__(self, batch: int) -> list[int]:
        epoch, index = divmod(batch, -(-len(self.lengths) // self.batch_size))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        return self._epoch[1][index]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        shuffle = random.Random(f"{self.seed}/{epoch}").shuffle
        order = list(range(len(self.lengths)))
        shuffle(order)
        window = self._WINDOW * self.batch_size
        batches = []
        for start in range(0, len(order), window):
            near = sorted(order[start : start + window], key=lambda i: (self.lengths[i], i))
            batches += [near[i : i + self.batch_size] for i in range(0, len(near), self.batch_size)]
        shuffle(batches)
        return batches


class AnswerLoss:
    """Mean cross entropy over the answer tokens of a batch, the head run on these alone.

    Whether that gives the model's own logits (some scale or cap them) is checked on the first batch.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._checked = False

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        logits, labels = self.answer_logits(batch)
        return F.cross_entropy(logits.float(), labels)

    def answer_logits(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (A, V) that predict the A answer tokens of a batch, and these tokens (A,)."""
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        labels = batch["labels"][:, 1:]
        where = labels != IGNORE_INDEX
        if not self._checked:
            self._check(inputs, where)
            self._checked = True
        return self._logits(inputs, where), labels[where]

    def _logits(self, inputs: Mapping[str, Tensor], where: Tensor) -> Tensor:
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        logits: Tensor = self.model.get_output_embeddings()(hidden[:, :-1][where])
        return logits

    @torch.no_grad()
    def _check(self, inputs: Mapping[str, Tensor], where: Tensor) -> None:
        with evaluating(self.model):  # dropout would make the two differ
            part = self._logits(inputs, where).float()
            whole = self.model(**inputs, use_cache=False).logits[:, :-1][where].float()
        if (part - whole).abs().max() > 0.02 * whole.abs().max():  # rounding in bfloat16
            raise DataError(f"{type(self.model).__name__} computes more logits than its head does")


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    pad_id: int,
    batch_size: int,
    autocast: Autocast,
) -> float:
    """Mean cross entropy in nats over all answer tokens of the examples."""
    loss = AnswerLoss(model)
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with evaluating(model):
        for batch in _like_lengths(examples, batch_size):
            inputs = {k: v.to(device) for k, v in collate(batch, pad_id).items()}
            with autocast():
                logits, labels = loss.answer_logits(inputs)
            total += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
            count += len(labels)
    return total / count


def _like_lengths(examples: Sequence[Example], batch_size: int) -> Iterator[list[Example]]:
    ordered = sorted(examples, key=len)
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


def cosine_with_warmup(steps: int, warmup: float) -> Callable[[int], float]:
    """Linear rise over the first ``warmup`` share of the steps, then half a cosine down to 0."""
    rising = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return factor
