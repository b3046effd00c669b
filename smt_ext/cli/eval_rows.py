"""Rows of the paper's evaluation sets as documents of lm-eval, and when a generated answer is right.

The rows are those of LLM-Adapters (Hu et al., EMNLP 2023), which the SMT paper evaluates in: the options
stand inside the instruction (``Answer1: ... Answer2: ...``), and ``answer`` is a label or a number. The
task files in ``tasks/`` name the functions here.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError
from ..hf.rows import read_json
from ..hf.word_problems import equation_is_right

__all__ = ["SUITES", "EvalSet", "documents", "find_sets", "judge", "read_set"]

Kind = Literal["choice", "ending", "blank", "letter", "number"]


@dataclass(frozen=True)
class EvalSet:
    """One evaluation set.

    Attributes:
        name: its short name, and its file ``<name>.jsonl``; the task is ``smt_<name>``.
        folder: its folder in LLM-Adapters' own ``dataset/``, with ``test.json`` inside.
        kind: what a row asks: ``choice`` (an option answers a question), ``ending`` (an option ends
            the text), ``blank`` (an option fills the blank ``_``), ``letter`` (AQuA's lettered
            options), ``number``.
    """

    name: str
    folder: str
    kind: Kind

    @property
    def task(self) -> str:
        """Its name in lm-eval."""
        return f"smt_{self.name}"


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
_BLANK = re.compile(r"(?<!\w)_(?!\w)")
_LETTERS = re.compile(r"Answer Choices: \(A\) .*\(B\) ", re.DOTALL)


def find_sets(
    suite: str, data: str | os.PathLike[str] | None, names: Sequence[str] | None = None
) -> tuple[dict[EvalSet, Path], list[EvalSet]]:
    """The files of a suite's sets, and the sets that are absent.

    A set is looked for as ``<data>/<suite>/<name>.jsonl``, ``<data>/<name>.jsonl`` and
    ``<data>/<folder>/test.json`` (LLM-Adapters' own ``dataset`` folder).

    Args:
        suite: ``commonsense`` or ``math``.
        data: the folder; default the environment variable ``SMT_DATA``.
        names: only these sets, by short name.

    Raises:
        DataError: an unknown suite or set, no such folder, or none of the sets in it; a set that
            was asked for by name is absent.
    """
    if suite not in SUITES:
        raise DataError(f"suite is {suite!r}, expected {' or '.join(map(repr, SUITES))}")
    known = [one.name for one in SUITES[suite]]
    for name in names or ():
        if name not in known:
            raise DataError(f"suite {suite!r} has no set {name!r}, expected {', '.join(known)}")
    data = data or os.environ.get("SMT_DATA")
    if data is None:
        raise DataError("no folder with the sets is given: pass --data, or set SMT_DATA")
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


def documents(path: str | os.PathLike[str], kind: Kind) -> list[dict[str, Any]]:
    """A set's rows as lm-eval's documents, in the order of the file.

    Fields: ``where`` (file and line); ``question``, the whole instruction; ``answer``; and for sets
    with options ``stem``, ``options`` (of two with the same text the first), ``gold``, the right
    one's index. For a blank, ``options`` are the text up to and with each filling, and ``ending`` is the
    rest, whose likelihood is compared (Trinh and Le, 2018).

    Raises:
        DataError: a bad row; names file and line.
    """
    found = []
    for line, row in read_json(Path(path)):
        where = f"{path}:{line}"
        question, answer = (_text(row, key, where) for key in ("instruction", "answer"))
        document: dict[str, Any] = {"where": where, "question": question, "answer": answer}
        if kind == "number":
            if not _is_number(answer):
                raise DataError(f"{where}: 'answer' is {answer!r}, expected a number")
        elif kind == "letter":
            if not _LETTERS.search(question):
                raise DataError(f"{where}: expected 'Answer Choices: (A) ... (B) ...'")
            if f"({answer})" not in question or len(answer) != 1:
                raise DataError(f"{where}: 'answer' is {answer!r}, which is no option's letter")
        else:
            document |= _with_options(question, answer, kind, where)
        found.append(document)
    return found


def read_set(name: str, data: str | None = None, **metadata: Any) -> dict[str, Any]:
    """lm-eval's ``custom_dataset``: the set ``name`` in the folder ``data`` (default ``SMT_DATA``)."""
    from datasets import Dataset

    (suite,) = (suite for suite, sets in SUITES.items() if name in [one.name for one in sets])
    ((one, path),) = find_sets(suite, data, [name])[0].items()
    return {"test": Dataset.from_list(documents(path, one.kind))}


def judge(document: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's ``process_results`` of a generated answer.

    ``acc``: the last number in it is the gold number, as in LLM-Adapters; ``equation``: the left side
    of the equation in its first line evaluates to it. Of lettered options, ``acc``: the first letter.
    """
    text, gold = results[0], document["answer"]
    if gold.isalpha():
        return {"acc": float(letter_in(text) == gold)}
    return {
        "acc": float(number_is_right(text, gold)),
        "equation": float(equation_is_right(text, gold)),
    }


def letter_in(text: str) -> str | None:
    """The first capital letter A to E that stands alone in a generated text."""
    match = re.search(r"(?<![A-Za-z'])[A-E](?![A-Za-z'])", text)
    return match[0] if match else None


def last_number(text: str) -> float | None:
    """The last number in a generated text; ``1,200`` is one number, ``9-4`` are two."""
    numbers = re.findall(r"(?:(?<![\w.)])-)?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", text))
    return float(numbers[-1]) if numbers else None


def number_is_right(text: str, gold: str) -> bool:
    """Whether the last number in ``text`` is the gold number, within 0.001 as in LLM-Adapters."""
    value = last_number(text)
    # Gold answers are often rounded to three decimals; 1e-9 for the rounding of the subtraction.
    return value is not None and abs(value - float(gold.replace(",", ""))) <= 1e-3 + 1e-9


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key!r} is {value!r}, expected text")
    return value


def _with_options(question: str, answer: str, kind: Kind, where: str) -> dict[str, Any]:
    stem, labels, options = _split(question, where)
    if answer not in labels:
        raise DataError(f"{where}: answer is {answer!r}, expected {', '.join(labels)}")
    for label, option in zip(labels, options, strict=True):
        if not option:
            raise DataError(f"{where}: the option {label} is empty")
    gold = options[labels.index(answer)]
    if kind == "blank":
        parts = _BLANK.split(stem)
        if len(parts) != 2 or not parts[1].strip():
            raise DataError(f"{where}: expected one blank '_' and text behind it in {stem!r}")
        options, gold = [parts[0] + option for option in options], parts[0] + gold
        stem, ending = "", parts[1].rstrip()
        found = {"ending": ending}
    else:
        found = {}
    # Some rows have the same text under two labels.
    options = list(dict.fromkeys(options))
    return {"stem": stem, "options": options, "gold": options.index(gold), **found}


def _split(question: str, where: str) -> tuple[str, list[str], list[str]]:
    """Stem, labels and options of an instruction."""
    match = _CHOICE.fullmatch(question)
    if match is None:
        raise DataError(
            f"{where}: expected 'Please choose ... question: ... Answer format: a/b', got "
            f"{question[:80]!r}"
        )
    labels = match["labels"].split("/")
    if not labels[0][-1].isdigit():
        return match["body"], labels, labels  # true/false: the labels are the options
    parts, rest = [], match["body"]
    for label in labels:
        before, mark, rest = rest.partition(f"{label.capitalize()}:")
        if not mark:
            raise DataError(f"{where}: the option {label} is missing")
        parts.append(before.strip())
    stem, *options = [*parts, rest.strip()]
    return stem, labels, options


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text.replace(",", "")))
    except ValueError:
        return False
