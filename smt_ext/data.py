"""Training text: JSON lines -> token ids with the loss on the answer only -> batches."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import DataError, TooLongError

__all__ = [
    "IGNORE_INDEX",
    "TEMPLATES",
    "BatchOrder",
    "Example",
    "Row",
    "answer_ids",
    "collate",
    "encode",
    "encode_rows",
    "pack",
    "read_rows",
]

IGNORE_INDEX = -100
Template = Literal["plain", "alpaca", "chat"]
TEMPLATES = ("plain", "alpaca", "chat")
_FIELDS = (
    "expected 'instruction' and 'output' (with an optional 'input'), 'prompt' and 'completion', "
    "or 'messages'"
)


@dataclass(frozen=True)
class Row:
    """One line of a data file: chat messages, or a prompt and its completion.

    Attributes:
        where: ``file:line``, for error messages.
        messages: chat turns with ``role`` and ``content``; None for a prompt and completion.
        prompt, completion: the text before the answer, and the answer.
        kind: ``instruction`` rows are put into a template; ``prompt`` rows are taken as they are.
        answer: the gold answer, where the file has one.
    """

    where: str
    kind: Literal["instruction", "prompt", "messages"]
    prompt: str = ""
    completion: str = ""
    messages: tuple[dict[str, str], ...] = ()
    answer: str | None = None


@dataclass(frozen=True)
class Example:
    """Token ids of one row; ``labels`` are the ids where the loss counts and -100 elsewhere."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    where: str

    def __len__(self) -> int:
        return len(self.input_ids)


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """Read a JSON-lines file, or a ``.json`` file with one array of rows.

    Raises:
        DataError: no such file, no row in it, or a line that cannot be used; names file and line
            (in an array: the position, from 0).
    """
    name = os.fspath(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {name!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {name!r}: {error}") from None
    if name.endswith(".json") and text.lstrip().startswith("["):
        items = _parsed(text, name)
        rows = [_row(item, f"{name}[{index}]") for index, item in enumerate(items)]
    else:
        rows = [
            _row(_parsed(line, f"{name}:{number}"), f"{name}:{number}")
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    if not rows:
        raise DataError(f"{name!r} has no rows, expected one JSON object a line; {_FIELDS}")
    return rows


def encode(
    row: Row,
    tokenizer: Any,
    *,
    max_length: int,
    template: Template = "plain",
    with_answer: bool = True,
) -> Example:
    """Token ids of a row, with an end-of-text token behind the answer.

    Args:
        max_length: the most tokens a row may have.
        template: how ``instruction`` rows become text: ``plain`` ("Question: ... Answer:"),
            ``alpaca``, or ``chat`` (the tokenizer's chat template).
        with_answer: False gives the prompt alone, for generation.

    Raises:
        TooLongError: the row has more than ``max_length`` tokens (says whether the prompt alone has).
        DataError: the row has nothing to learn from, or the chat template cannot be used.
    """
    if row.kind == "messages" or (row.kind == "instruction" and template == "chat"):
        ids, labels = _encode_chat(row, tokenizer, with_answer)
    else:
        prompt = _render(row, template)
        ids = tokenizer(prompt)["input_ids"]
        labels = [IGNORE_INDEX] * len(ids)
        if with_answer:
            answer = [*answer_ids(row, tokenizer, template), tokenizer.eos_token_id]
            ids, labels = ids + answer, labels + answer
    if len(ids) > max_length:
        prompt_length = next((i for i, x in enumerate(labels) if x != IGNORE_INDEX), len(ids))
        too_long = prompt_length >= max_length
        raise TooLongError(
            f"{row.where}: {'the prompt alone' if too_long else 'the row'} has "
            f"{prompt_length if too_long else len(ids)} tokens, more than max_length = {max_length} "
            "leaves room for. Raise max_length (the model's context permitting), shorten the row, "
            "or set too_long = 'skip'."
        )
    if with_answer and all(label == IGNORE_INDEX for label in labels[1:]):
        raise DataError(f"{row.where}: no token to learn from: the answer is empty")
    return Example(tuple(ids), tuple(labels), row.where)


def answer_ids(row: Row, tokenizer: Any, template: Template = "plain") -> list[int]:
    """Token ids of an answer as they follow the prompt of :func:`encode`, without an end of text.

    For rows with a prompt and a completion, not for messages.
    """
    space = " " if row.kind == "instruction" and template == "plain" else ""
    ids: list[int] = tokenizer(space + row.completion, add_special_tokens=False)["input_ids"]
    return ids


def encode_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int,
    template: Template = "plain",
    too_long: Literal["error", "skip"] = "error",
) -> tuple[list[Row], list[Example]]:
    """:func:`encode` for many rows; with ``too_long="skip"`` leaves longer rows out, and says so.

    Returns:
        the rows that were kept, and their examples.
    """
    kept, examples = [], []
    for row in rows:
        try:
            examples.append(encode(row, tokenizer, max_length=max_length, template=template))
            kept.append(row)
        except TooLongError:
            if too_long == "error":
                raise
    if skipped := len(rows) - len(kept):
        if not kept:
            raise DataError(f"all {skipped} rows are longer than max_length = {max_length} tokens")
        print(f"skipped {skipped} of {len(rows)} rows longer than {max_length} tokens")
    return kept, examples


def pack(examples: Sequence[Example], max_length: int) -> list[list[Example]]:
    """Rows that share one sequence of at most ``max_length`` tokens: first fit, longest first."""
    bins: list[list[Example]] = []
    room: list[int] = []
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i]), i))
    for index in order:
        example = examples[index]
        slot = next((i for i, left in enumerate(room) if left >= len(example)), None)
        if slot is None:
            bins.append([])
            room.append(max_length)
            slot = len(bins) - 1
        bins[slot].append(example)
        room[slot] -= len(example)
    return bins


def collate(sequences: Sequence[Sequence[Example]], pad_id: int) -> dict[str, Tensor]:
    """A batch of sequences, each of one or more examples, padded on the right.

    Padding is masked by position, since many tokenizers pad with their end-of-text token. Where a
    sequence holds several examples, none attends to another: positions restart, and the attention
    mask is block-diagonal, (B, 1, T, T) instead of (B, T).

    Returns:
        input_ids, labels, attention_mask and, if packed, position_ids.
    """
    length = max(sum(map(len, sequence)) for sequence in sequences)
    size = (len(sequences), length)
    ids = torch.full(size, pad_id, dtype=torch.long)
    labels = torch.full(size, IGNORE_INDEX, dtype=torch.long)
    owner = torch.full(size, -1, dtype=torch.long)
    positions = torch.zeros(size, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        at = 0
        for number, example in enumerate(sequence):
            end = at + len(example)
            ids[row, at:end] = torch.tensor(example.input_ids)
            # The first token of an example has nothing before it to be predicted from.
            labels[row, at + 1 : end] = torch.tensor(example.labels[1:], dtype=torch.long)
            owner[row, at:end] = number
            positions[row, at:end] = torch.arange(len(example))
            at = end
    batch = {"input_ids": ids, "labels": labels, "attention_mask": (owner >= 0).long()}
    if max(map(len, sequences)) > 1:
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        same = owner[:, :, None] == owner[:, None, :]
        batch["attention_mask"] = (same & causal)[:, None]
        batch["position_ids"] = positions
    return batch


class BatchOrder:
    """Which items make up each batch, as a function of seed and batch number alone.

    Every epoch is shuffled anew; items of like length share a batch, to save padding. A run can
    therefore go on at any batch.

    Args:
        lengths: of the items.
        batch_size: items a batch; the last batch of an epoch may be smaller.
        seed: of the shuffling.
    """

    # Lengths are sorted within this many batches: enough to pad little, few enough to stay random.
    _WINDOW = 16

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}, expected at least 1")
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self._epoch: tuple[int, list[list[int]]] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def __getitem__(self, batch: int) -> list[int]:
        epoch, index = divmod(batch, self.batches_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        return self._epoch[1][index]

    def from_batch(self, first: int) -> Iterator[list[int]]:
        """All batches from number ``first`` on, without end."""
        while True:
            yield self[first]
            first += 1

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


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None


def _row(data: Any, where: str) -> Row:
    if not isinstance(data, dict):
        raise DataError(f"{where}: a {type(data).__name__}, expected a JSON object; {_FIELDS}")
    answer = data.get("answer")
    answer = None if answer is None else str(answer)
    if "messages" in data:
        return Row(where, "messages", messages=_messages(data["messages"], where), answer=answer)
    if "prompt" in data and "completion" in data:
        prompt, completion = (_text(data, key, where) for key in ("prompt", "completion"))
        return Row(where, "prompt", prompt, completion, answer=answer)
    if "instruction" in data and "output" in data:
        extra = _text(data, "input", where) if data.get("input") else ""
        instruction = _text(data, "instruction", where)
        if not instruction.strip():
            raise DataError(f"{where}: 'instruction' is empty")
        prompt = f"{instruction}\n{extra}" if extra else instruction
        return Row(where, "instruction", prompt, _text(data, "output", where), answer=answer)
    raise DataError(f"{where}: has the fields {', '.join(map(repr, data)) or 'none'}; {_FIELDS}")


def _text(data: dict[str, Any], key: str, where: str) -> str:
    value = data[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is a {type(value).__name__}, expected text")
    return value


def _messages(value: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise DataError(f"{where}: 'messages' is no list of objects with 'role' and 'content'")
    for turn in value:
        for key in ("role", "content"):
            if not isinstance(turn.get(key), str):
                raise DataError(f"{where}: a message has no text under {key!r}")
    if not any(turn["role"] == "assistant" for turn in value):
        raise DataError(f"{where}: no message of the role 'assistant' to learn from")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in value)


def _render(row: Row, template: Template) -> str:
    if row.kind == "prompt":
        return row.prompt
    if template == "alpaca":
        return f"### Instruction:\n{row.prompt}\n\n### Response:\n"
    return f"Question: {row.prompt}\nAnswer:"


def _encode_chat(row: Row, tokenizer: Any, with_answer: bool) -> tuple[list[int], list[int]]:
    if tokenizer.chat_template is None:
        raise DataError(
            f"{row.where}: the tokenizer has no chat template for messages. Use 'prompt' and "
            "'completion' rows, template = 'plain', or a chat model."
        )
    turns = list(row.messages) or [
        {"role": "user", "content": row.prompt},
        {"role": "assistant", "content": row.completion},
    ]
    if not with_answer:
        last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
        ids = _chat_ids(tokenizer, turns[:last], generate=True)
        return ids, [IGNORE_INDEX] * len(ids)
    whole = _chat_ids(tokenizer, turns, generate=False)
    labels = [IGNORE_INDEX] * len(whole)
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant":
            before = _chat_ids(tokenizer, turns[:i], generate=True)
            through = _chat_ids(tokenizer, turns[: i + 1], generate=False)
            if whole[: len(through)] != through or through[: len(before)] != before:
                raise DataError(
                    f"{row.where}: the chat template changes earlier turns, so that the answers "
                    "cannot be told from the prompt. Use one question and one answer a row."
                )
            labels[len(before) : len(through)] = through[len(before) :]
    return whole, labels


def _chat_ids(tokenizer: Any, turns: list[dict[str, str]], *, generate: bool) -> list[int]:
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
