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
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..errors import DataError
from ..hf.rows import read_json, to_trl
from ..hf.word_problems import equation_is_right

__all__ = ["SUITES", "EvalSet", "documents", "find_sets", "judge", "read_set"]

# An option answers a question or ends a text, or fills the blank "_"; AQuA's lettered options; a number.
Kind = Literal["choice", "blank", "letter", "number"]


class EvalSet(NamedTuple):
    """A set: its name, its folder in LLM-Adapters' own ``dataset/``, and what its rows ask."""

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
        EvalSet("hellaswag", "hellaswag", "choice"),
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

_OPTIONS = (
    "'Please choose ... question: ... Answer1: ... Answer2: ... Answer format: answer1/answer2'"
)
_FORMS = {
    "choice": f"{_OPTIONS}, no option empty, and one of the labels",
    "blank": f"{_OPTIONS} with one blank '_' and text behind it, and one of the labels",
    "letter": "'Answer Choices: (A) ... (B) ...', and one of the letters",
    "number": "a question, and a number",
}
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
    """The files of a suite's sets (of ``names`` where given), and the sets that are absent.

    Looked for as ``<data>/<suite>/<name>.jsonl``, ``<data>/<name>.jsonl`` and
    ``<data>/<folder>/test.json`` (LLM-Adapters' own ``dataset`` folder).

    Raises:
        DataError: an unknown suite or set, none of the sets in the folder, or one of ``names`` absent.
    """
    if suite not in SUITES:
        raise DataError(f"suite is {suite!r}, expected {' or '.join(map(repr, SUITES))}")
    sets = {one.name: one for one in SUITES[suite]}
    if unknown := [name for name in names or () if name not in sets]:
        raise DataError(f"suite {suite!r} has no set {unknown[0]!r}, expected {', '.join(sets)}")
    data = data or os.environ.get("SMT_DATA")
    if data is None:
        raise DataError("no folder with the sets is given: pass --data, or set SMT_DATA")
    found = {}
    for name in names or sets:
        places = f"{suite}/{name}.jsonl", f"{name}.jsonl", f"{sets[name].folder}/test.json"
        paths = [Path(data, place) for place in places]
        if path := next(filter(Path.is_file, paths), None):
            found[sets[name]] = path
        elif names:
            raise DataError(f"the set {name!r} is in none of {', '.join(map(str, paths))}")
    if not found:
        raise DataError(
            f"{os.fspath(data)!r} is no folder with sets of the suite {suite!r}: expected files such as "
            f"{suite}/{next(iter(sets))}.jsonl, or LLM-Adapters' {SUITES[suite][0].folder}/test.json"
        )
    return found, [] if names else [one for one in sets.values() if one not in found]


def documents(
    path: str | os.PathLike[str], kind: Kind, template: str = "plain"
) -> list[dict[str, Any]]:
    """A set's rows as lm-eval's documents, in the order of the file.

    Fields: ``where`` (file and line); ``question``, the whole instruction; ``answer``; ``prompt``, the
    question (without its options) as ``template`` trains it, for ``chat`` the user's message; and for
    sets with options ``stem``, ``options`` (of two with the same text the first), ``gold``, the right
    one's index. For a blank, ``options`` are the text up to and with each filling, and ``ending`` is the
    rest, whose likelihood is compared (Trinh and Le, 2018).

    Raises:
        DataError: a bad row; names file and line.
    """
    found = []
    for line, row in read_json(Path(path)):
        where = f"{path}:{line}"
        question, answer = row.get("instruction"), row.get("answer")
        if type(answer) in (int, float):
            answer = str(answer)
        try:
            if not (isinstance(question, str) and isinstance(answer, str) and question.strip()):
                raise ValueError
            parts = _parts(question, answer, kind)
        except ValueError:
            raise DataError(
                f"{where}: expected {_FORMS[kind]} as 'answer'; got {str(question)[:80]!r} and "
                f"{answer!r}"
            ) from None
        asked = {"instruction": parts.get("stem") or question, "output": answer}
        prompt = to_trl(asked, where, template)["prompt"]
        prompt = prompt[0]["content"] if template == "chat" else prompt
        found.append(
            {"where": where, "question": question, "answer": answer, "prompt": prompt, **parts}
        )
    return found


def read_set(
    name: str, data: str | None = None, template: str = "plain", **metadata: Any
) -> dict[str, Any]:
    """lm-eval's ``custom_dataset``: the set ``name`` in the folder ``data`` (default ``SMT_DATA``)."""
    from datasets import Dataset

    (suite,) = (suite for suite, sets in SUITES.items() if name in [one.name for one in sets])
    ((one, path),) = find_sets(suite, data, [name])[0].items()
    return {"test": Dataset.from_list(documents(path, one.kind, template))}


def judge(document: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's ``process_results`` of a generated answer.

    ``acc``: the last number in it is the gold number, as in LLM-Adapters; ``equation``: the left side
    of the equation in its first line evaluates to it. Of lettered options, ``acc``: the first capital
    letter A to E that stands alone.
    """
    text, gold = results[0], document["answer"]
    if gold.isalpha():
        letter = re.search(r"(?<![A-Za-z'])[A-E](?![A-Za-z'])", text)
        return {"acc": float(letter is not None and letter[0] == gold)}
    acc, equation = number_is_right(text, gold), equation_is_right(text, gold)
    return {"acc": float(acc), "equation": float(equation)}


def number_is_right(text: str, gold: str) -> bool:
    """Whether the last number in ``text`` is the gold number, within 0.001 as in LLM-Adapters.

    ``1,200`` is one number, ``9-4`` are two.
    """
    numbers = re.findall(r"(?:(?<![\w.)])-)?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", text))
    # Gold answers are often rounded to three decimals; 1e-9 for the rounding of the subtraction.
    return bool(numbers) and abs(float(numbers[-1]) - float(gold.replace(",", ""))) <= 1e-3 + 1e-9


def _parts(question: str, answer: str, kind: Kind) -> dict[str, Any]:
    """What a row with options falls into; ValueError where it is not of its kind."""
    if kind == "number":
        if not math.isfinite(float(answer.replace(",", ""))):
            raise ValueError
        return {}
    if kind == "letter":
        if not _LETTERS.search(question) or f"({answer})" not in question or len(answer) != 1:
            raise ValueError
        return {}
    match = _CHOICE.fullmatch(question)
    if match is None:
        raise ValueError
    stem, labels = match["body"], match["labels"].split("/")
    options = labels  # of true/false
    if labels[0][-1].isdigit():
        # In the order of the labels, each at its first place behind the one before.
        marked = "".join(f"{re.escape(label.capitalize())}:(.*?)" for label in labels)
        parts = re.fullmatch(f"(.*?){marked}", stem, re.DOTALL)
        if parts is None:
            raise ValueError
        stem, *options = (part.strip() for part in parts.groups())
    if not all(options):
        raise ValueError
    gold = options[labels.index(answer)]
    more = {}
    if kind == "blank":
        before, after = _BLANK.split(stem)
        if not after.strip():
            raise ValueError
        options, gold = [before + option for option in options], before + gold
        stem, more = "", {"ending": after.rstrip()}
    options = list(dict.fromkeys(options))  # some rows have the same text under two labels
    return {"stem": stem, "options": options, "gold": options.index(gold), **more}
