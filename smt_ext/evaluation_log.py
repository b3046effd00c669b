"""The quality on the held-out rows by step: ``evaluations.jsonl`` in a run, a line an evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ._files import replace_file
from .errors import DataError

__all__ = ["Evaluation", "read_evaluations", "write_evaluations"]


@dataclass(frozen=True)
class Evaluation:
    """Loss in nats a token and, where it was asked for, share of right answers after ``step`` steps."""

    step: int
    loss: float
    accuracy: float | None = None


def read_evaluations(path: Path) -> list[Evaluation]:
    """The evaluations in a file, in the order of their steps; none if there is no file.

    Raises:
        DataError: the file is damaged.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Evaluation(**json.loads(line)) for line in lines]
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise DataError(
            f"{str(path)!r} is damaged, expected a JSON object a line: {error}"
        ) from None


def write_evaluations(path: Path, evaluations: Iterable[Evaluation]) -> None:
    """Write the file anew, whole or not at all."""
    lines = [json.dumps(asdict(evaluation)) for evaluation in evaluations]
    with replace_file(path) as new:
        new.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
