"""The sets that the SMT paper reports on: their files, what a row asks, when an answer is right.

The rows are those of LLM-Adapters (Hu et al., EMNLP 2023), which the paper evaluates in: the options
stand inside the instruction (``Answer1: ... Answer2: ...``), and ``answer`` is a label or a number.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .data import Row
from .errors import DataError

__all__ = [
    "SUITES",
    "EvalSet",
    "Question",
    "find_sets",
    "label_in",
    "last_number",
    "letter_in",
    "number_is_right",
    "parse_question",
    "scored_rows",
]

Kind = Literal["choice", "ending", "blank", "letter", "number"]


@dataclass(frozen=True)
class EvalSet:
    """One evaluation set.

    Attributes:
        name: its short name, and its file ``<name>.jsonl``.
        folder: its folder in LLM-Adapters' own ``dataset/``, with ``test.json`` inside.
        kind: what a row asks: ``choice`` (an option answers a question), ``ending`` (an option ends
            the text), ``blank`` (an option fills the blank ``_``), ``letter`` (AQuA's lettered
            options), ``number``.
    """

    name: str
    folder: str
    kind: Kind


SUITES: dict[str, tuple[EvalSet, ...]] = {
    "commonsense": (
        EvalSet("boolq", "boolq", "choice"),
        EvalSet("piqa", "piqa", "choice"),
        EvalSet("siqa", "social_i_qa", "choice"),
        EvalSet("hellaswag", "hellaswag", "ending"),
        EvalSet("winogrande", "winogrande", "blank"),
        EvalSet("arc-e", "ARC-Easy", "choice"),
        EvalSet("arc-c", "ARC-Challenge", "choice"),
        EvalSet("obqa", "openbookqa", "choice"),
    ),
    "math": (
        EvalSet("multiarith", "MultiArith", "number"),
        EvalSet("gsm8k", "gsm8k", "number"),
        EvalSet("addsub", "AddSub", "number"),
        EvalSet("aqua", "AQuA", "letter"),
        EvalSet("singleeq", "SingleEq", "number"),
        EvalSet("svamp", "SVAMP", "number"),
    ),
}

# "<lead-in>: <stem> Answer1: ... Answer2: ... Answer format: answer1/answer2"
_CHOICE = re.compile(
    r"Please (?:answer|choose) .*?(?:question|sentence): (?P<body>.*\S)\s+"
    r"Answer format: (?P<labels>\w+(?:/\w+)+)\s*",
    re.DOTALL,
)
_LETTERED = re.compile(r"(?P<body>.*\S)\s+Answer Choices: (?P<options>\(A\).*)", re.DOTALL)
_LETTER_OPTION = re.compile(r"\s*\(([A-Z])\) ")
_BLANK = re.compile(r"(?<!\w)_(?!\w)")


@dataclass(frozen=True)
class Question:
    """A row with options.

    Attributes:
        row: where it comes from; its prompt is the whole instruction.
        stem: the question without lead-in and options.
        labels: what the row calls its options: ``answer1``, ``true``, ``A``.
        options: their texts.
        gold: index of the right one.
    """

    row: Row
    stem: str
    labels: tuple[str, ...]
    options: tuple[str, ...]
    gold: int


def find_sets(
    suite: str, data: str | os.PathLike[str], names: Sequence[str] | None = None
) -> tuple[dict[EvalSet, Path], list[EvalSet]]:
    """The files of a suite's sets, and the sets that are absent.

    A set is looked for as ``<data>/<suite>/<name>.jsonl``, ``<data>/<name>.jsonl`` and
    ``<data>/<folder>/test.json`` (LLM-Adapters' own ``dataset`` folder).

    Args:
        suite: ``commonsense`` or ``math``.
        data: the folder.
        names: only these sets, by short name.

    Raises:
        DataError: an unknown suite or set, no such folder, or none of the sets in it; a set that
            was asked for by name is absent.
    """
    if suite not in SUITES:
        raise DataError(f"suite is {suite!r}, expected {' or '.join(map(repr, SUITES))}")
    known = [s.name for s in SUITES[suite]]
    for name in names or ():
        if name not in known:
            raise DataError(f"suite {suite!r} has no set {name!r}, expected {', '.join(known)}")
    root = Path(data)
    if not root.is_dir():
        raise DataError(f"data folder {os.fspath(data)!r} does not exist or is no folder")
    found: dict[EvalSet, Path] = {}
    absent = []
    for one in SUITES[suite]:
        if names and one.name not in names:
            continue
        places = (
            root / suite / f"{one.name}.jsonl",
            root / f"{one.name}.jsonl",
            root / one.folder / "test.json",
        )
        path = next((place for place in places if place.is_file()), None)
        if path is not None:
            found[one] = path
        elif names:
            raise DataError(f"the set {one.name!r} is in none of {', '.join(map(str, places))}")
        else:
            absent.append(one)
    if not found:
        raise DataError(
            f"data folder {os.fspath(data)!r} has no set of the suite {suite!r}: expected files such "
            f"as {suite}/{known[0]}.jsonl, or LLM-Adapters' {SUITES[suite][0].folder}/test.json"
        )
    return found, absent


def parse_question(row: Row, kind: Kind) -> Question:
    """The stem and the options inside a row's instruction.

    Raises:
        DataError: the row is not of the expected form; names file and line.
    """
    if kind == "letter":
        stem, labels, options = _parse_lettered(row)
    else:
        stem, labels, options = _parse_labelled(row)
    if row.answer not in labels:
        raise DataError(f"{row.where}: answer is {row.answer!r}, expected {', '.join(labels)}")
    for label, option in zip(labels, options, strict=True):
        if not option:
            raise DataError(f"{row.where}: the option {label} is empty")
    if kind == "blank" and len(_BLANK.findall(stem)) != 1:
        raise DataError(f"{row.where}: expected one blank '_' in {stem!r}")
    return Question(row, stem, labels, options, labels.index(row.answer))


def scored_rows(question: Question, kind: Kind) -> list[Row]:
    """For each option the prompt, and the completion whose likelihood speaks for the option.

    ``choice`` and ``letter``: the option's text answers the stem, which is put into the template.
    Options are not listed, and labels not scored: small models prefer one label whatever the
    question. ``ending``: the option continues the text. ``blank``: the option stands in the blank,
    and the rest of the sentence is scored (Trinh and Le, 2018).
    """
    where = question.row.where
    if kind == "ending":
        return [Row(where, "prompt", question.stem, f" {o}") for o in question.options]
    if kind == "blank":
        before, after = _BLANK.split(question.stem)
        return [Row(where, "prompt", before + o, after.rstrip()) for o in question.options]
    row = dataclasses.replace(question.row, kind="instruction", prompt=question.stem)
    return [dataclasses.replace(row, completion=option) for option in question.options]


def label_in(text: str, labels: Sequence[str]) -> str | None:
    """The first of the labels that occurs in a generated text, whatever its case."""
    pattern = "|".join(map(re.escape, labels))
    match = re.search(rf"\b(?:{pattern})\b", text, re.IGNORECASE)
    return match[0].lower() if match else None


def letter_in(text: str, letters: Sequence[str]) -> str | None:
    """The first capital letter among ``letters`` that stands alone in a generated text."""
    match = re.search(rf"(?<![A-Za-z'])[{''.join(letters)}](?![A-Za-z'])", text)
    return match[0] if match else None


def last_number(text: str) -> float | None:
    """The last number in a generated text; ``1,200`` is one number, ``9-4`` are two."""
    numbers = re.findall(r"(?:(?<![\w.)])-)?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", text))
    return float(numbers[-1]) if numbers else None


def number_is_right(text: str, gold: str) -> bool:
    """Whether the last number in ``text`` is the gold number, within 0.001 as in LLM-Adapters.

    Raises:
        ValueError: ``gold`` is no number.
    """
    value = last_number(text)
    # Gold answers are often rounded to three decimals; 1e-9 for the rounding of the subtraction.
    return value is not None and abs(value - float(gold.replace(",", ""))) <= 1e-3 + 1e-9


def _parse_labelled(row: Row) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    match = _CHOICE.fullmatch(row.prompt)
    if match is None:
        raise DataError(
            f"{row.where}: expected 'Please choose ... question: ... Answer format: a/b', got "
            f"{row.prompt[:80]!r}"
        )
    body, labels = match["body"], tuple(match["labels"].split("/"))
    if not labels[0][-1].isdigit():
        return body, labels, labels  # true/false: the labels are the options
    options = []
    rest = body
    stem = None
    for label in labels:
        before, mark, rest = rest.partition(f"{label.capitalize()}:")
        if not mark:
            raise DataError(f"{row.where}: the option {label} is missing")
        if stem is None:
            stem = before.strip()
        else:
            options.append(before.strip())
    assert stem is not None
    return stem, labels, (*options, rest.strip())


def _parse_lettered(row: Row) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    match = _LETTERED.fullmatch(row.prompt)
    if match is None:
        raise DataError(f"{row.where}: expected 'Answer Choices: (A) ...' in the instruction")
    # ["", "A", "text", "B", "text", ...]
    _, *parts = _LETTER_OPTION.split(match["options"])
    letters = tuple(parts[0::2])
    if letters != tuple("ABCDEFGHIJ"[: len(letters)]) or len(letters) < 2:
        raise DataError(f"{row.where}: expected options (A) (B) ..., got {', '.join(letters)}")
    return match["body"], letters, tuple(text.strip() for text in parts[1::2])
