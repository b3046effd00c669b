"""Rows of token ids as trainers batch them: what a model cannot take, and what ``max_length`` costs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from ..errors import DataError

__all__ = ["CheckedCollator", "Limits", "check_hidden", "check_row", "say_what_is_cut"]

logger = logging.getLogger("smt_ext")

# TRL's names for what is embedded: of SFT, and of preferences.
_IDS = ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids")
_MASKS = ("attention_mask", "completion_mask", "assistant_masks")
_NO_LOSS = -100


class Limits(NamedTuple):
    """How many token ids a model embeds, and predicts; None where labels are no token ids."""

    ids: float = math.inf
    labels: int | None = None

    @classmethod
    def of(cls, model: Any) -> Limits:
        """Of a language model; of any other that has a token embedding, that alone."""
        try:
            embedding = model.get_input_embeddings()
        except (AttributeError, NotImplementedError):  # images, say
            return cls()
        if not isinstance(embedding, nn.Embedding):
            return cls()
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None or getattr(model.config, "is_encoder_decoder", False):
            return cls(embedding.num_embeddings)
        return cls(
            embedding.num_embeddings, getattr(head, "out_features", None) or len(head.weight)
        )


def check_row(row: Any, where: str, limits: Limits) -> bool:
    """Whether a row has token ids, all of which the model can take.

    Raises:
        DataError: an id without an embedding, which on a GPU would end in an assert of a kernel; a label
            that is none; columns of different lengths. Names row, column and value.
    """
    if not isinstance(row, Mapping):
        return False
    columns = {name: _line(row[name]) for name in (*_IDS, *_MASKS, "labels") if name in row}
    found = {name: values for name, values in columns.items() if values is not None}
    embedded = (
        f"a token id below {limits.ids}, the rows that the model's embedding has. Use the model's own "
        "tokenizer; or call model.resize_token_embeddings(len(tokenizer)), save the model, and load that"
    )
    for name in _IDS:
        if name in found:
            _check_values(found[name], f"{where}: {name}", limits.ids, None, embedded)
    if (ids := found.get("input_ids")) is None:
        return bool(found)
    if limits.labels is None:
        found.pop("labels", None)
    for name in (*_MASKS, "labels"):
        if name in found and len(found[name]) != len(ids):
            lengths = f"{len(found[name])} values and input_ids {len(ids)}"
            raise DataError(f"{where}: {name} has {lengths}, expected as many")
    if "labels" in found and limits.labels is not None:
        expected = f"{_NO_LOSS} (nothing to learn there) or a token id below {limits.labels}"
        _check_values(found["labels"], f"{where}: labels", limits.labels, _NO_LOSS, expected)
    return True


def check_hidden(row: Mapping[str, Any], where: str) -> None:
    """Refuse padding that the ``attention_mask`` of a row hides, and TRL, which reads none, does not.

    Raises:
        DataError: it would be learnt, or seen by what stands behind it; names row and position.
    """
    mask, labels = (_line(row.get(name)) for name in ("attention_mask", "labels"))
    if mask is None or labels is None or (mask != 0).all():
        return
    first = int((mask == 0).argmax())
    if (mask[first:] != 0).any() or (labels[first:] != _NO_LOSS).any():
        raise DataError(
            f"{where}: attention_mask holds 0 at position {first}, which TRL does not read: the token "
            "would be seen, or learnt. Leave padding away: the trainer pads itself."
        )


def _line(values: Any) -> np.ndarray[Any, Any] | None:
    """One value a token, or None: a class, several choices, no column."""
    try:
        line = np.asarray(values)
    except (TypeError, ValueError):  # of several lengths; on a GPU
        return None
    return line if line.ndim == 1 else None


def _check_values(
    line: np.ndarray[Any, Any], what: str, limit: float, other: int | None, expected: str
) -> None:
    if not len(line):
        return
    if line.dtype.kind in "iu":
        bad = ((line < 0) | (line >= limit)) & (line != other)
    else:
        bad = np.array([not isinstance(value, int) for value in line.tolist()])
    if bad.any():
        at = int(bad.argmax())
        raise DataError(f"{what} holds {line[at]} at position {at}, expected {expected}.")


def say_what_is_cut(rows: Any, name: str, most: int, *, end: str, lost: str) -> None:
    """Warn of the rows of a table that TRL cuts at ``max_length``, or loses, without a word.

    Args:
        rows: token ids of whole rows, of SFT or of preferences.
        name: of the rows, for the message.
        most: ``max_length``.
        end: what is cut off: ``ends`` or ``beginnings``.
        lost: what happens to a row without an answer.

    Raises:
        DataError: no row has an answer left.
    """
    cut = gone = 0
    for row in rows:
        if "prompt_ids" in row:
            prompt = len(row["prompt_ids"])
            length = prompt + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
            is_lost = prompt >= most and end == "ends"
        else:
            length, labels = len(row["input_ids"]), row["labels"]
            kept = labels[:most] if end == "ends" else labels[-most:]
            is_lost = all(label == _NO_LOSS for label in kept)
        gone += is_lost
        cut += length > most and not is_lost
    if gone == len(rows):
        raise DataError(f"{name}: no row has an answer within max_length = {most} tokens: raise it")
    if cut or gone:
        logger.warning(
            "%s: max_length = %d: %d of %d rows are cut there, without their %s, and %d %s",
            name, most, cut, len(rows), end, gone, lost,
        )  # fmt: skip


class CheckedCollator:
    """A collator that first checks the rows of a stream, numbered as this process reads them."""

    def __init__(self, collate: Callable[[Any], Any], name: str, limits: Limits) -> None:
        self.collate, self.name, self.limits, self.read = collate, name, limits, 0

    def __call__(self, rows: list[Any]) -> Any:
        for row in rows:
            check_row(row, f"{self.name} {self.read}", self.limits)
            self.read += 1
        return self.collate(rows)
