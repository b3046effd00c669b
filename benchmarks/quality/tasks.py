"""The tasks: their rows, what is held out for development, and how a model is judged.

Rows of two come from the folder ``SMT_DATA`` (default ``../shared/data`` beside the project):

    math/split/train.jsonl, math/split/test.jsonl
    commonsense/train.jsonl, commonsense/{arc-e,arc-c,obqa,boolq,piqa,siqa,winogrande}.jsonl

Math is answered by an equation, which is evaluated. Test questions that have a twin in the training
set up to numbers and names (``near_dup``) are a set of their own, outside of every average.
Commonsense trains on the text of the right option after the question, and compares the options by
their likelihood. Stories are the demo's word problems, answered as math is; all held-out ones tell
stories that training never sees.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smt_ext._files import sha256_of_file
from smt_ext.cli.eval import evaluate
from smt_ext.cli.eval_rows import documents, find_sets, number_is_right
from smt_ext.errors import DataError
from smt_ext.hf.score_callback import generate_answers
from smt_ext.hf.word_problems import equation_is_right, make_problems

from .matrix import Trial
from .rows import Autocast, Example, Row, encode, held_out_loss, read_rows

__all__ = ["MAIN_COLUMN", "TWINS", "Judgement", "TaskData", "data_folder", "load_task"]

ROOT = Path(__file__).parents[2]
DEV_SHARE = 10  # one training question in so many is held out for development
DEV_ROWS = 300
IN_DOMAIN = ("arc-e", "arc-c", "obqa", "boolq")  # commonsense sets with training rows
TWINS = "near twins"
# The accuracy that tables and plots show; records have the others too.
MAIN_COLUMN = {"math": "equation", "commonsense": "likelihood", "stories": "equation"}
EVAL_BATCH = 32


Right = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Judgement:
    """What the test rows say.

    Attributes:
        loss: group of rows -> mean cross entropy in nats an answer token.
        right: set -> column -> one 0 or 1 a row, in the order of the file.
    """

    loss: dict[str, float]
    right: Right

    def accuracy(self) -> dict[str, dict[str, dict[str, float | int | None]]]:
        """Set -> column -> accuracy, its standard error and the number of rows."""
        return {
            name: {column: _accuracy(bits) for column, bits in columns.items()}
            for name, columns in self.right.items()
        }


@dataclass(frozen=True)
class TaskData:
    """Rows of a task, encoded.

    Attributes:
        train, dev: examples. groups: name -> examples of the test sets, for the held-out loss.
        sets: name -> test rows to be answered; empty for commonsense.
        checksums: file -> sha256.
    """

    task: str
    folder: Path
    train: list[Example]
    dev: list[Example]
    groups: dict[str, list[Example]]
    sets: dict[str, list[Row]]
    checksums: dict[str, str]

    def judge(
        self, trial: Trial, model: nn.Module, tokenizer: Any, autocast: Autocast
    ) -> Judgement:
        """Held-out loss and accuracies of a model on the test sets."""
        loss = {n: self.loss(g, model, tokenizer, autocast) for n, g in self.groups.items()}
        if self.sets:
            with autocast():
                right = _answer(self.sets, trial, model, tokenizer)
        else:
            right = _compare_options(self.folder, trial, model, tokenizer)
        return Judgement(loss, right)

    def loss(
        self, examples: Sequence[Example], model: nn.Module, tokenizer: Any, autocast: Autocast
    ) -> float:
        return held_out_loss(
            model, examples, pad_id=tokenizer.pad_token_id, batch_size=EVAL_BATCH,
            autocast=autocast,
        )  # fmt: skip


def data_folder() -> Path:
    """The folder with the tasks' rows.

    Raises:
        DataError: there is none; says where it was looked for.
    """
    folder = Path(os.environ.get("SMT_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        raise DataError(
            f"the tasks' data is absent: {str(folder)!r} is no folder. Set SMT_DATA to the folder "
            "that holds math/split/train.jsonl and commonsense/train.jsonl."
        )
    return folder


def load_task(trial: Trial, folder: Path, tokenizer: Any) -> TaskData:
    """Read and encode a trial's rows; rows longer than ``trial.max_length`` tokens are left out."""
    load = {"math": _load_math, "commonsense": _load_commonsense, "stories": _load_stories}
    train, test_groups, sets, files = load[trial.task](trial, folder)
    if files:
        dev = [row for row in train if _is_dev(row)]
        dev = sorted(dev, key=lambda row: _digest(row.question))[:DEV_ROWS]
        train = [row for row in train if not _is_dev(row)]
        if not dev or not train:
            raise DataError(f"{files[0]}: {len(train)} rows to train on and {len(dev)} to hold out")
    else:
        dev = _problems(DEV_ROWS, "test", seed=1)

    def encoded(rows: list[Row]) -> list[Example]:
        return encode(rows, tokenizer, trial.max_length)

    return TaskData(
        task=trial.task,
        folder=folder,
        train=encoded(train),
        dev=encoded(dev),
        groups={name: encoded(rows) for name, rows in test_groups.items() if rows},
        sets=sets,
        checksums={str(path.relative_to(folder)): sha256_of_file(path) for path in files},
    )


Loaded = tuple[list[Row], dict[str, list[Row]], dict[str, list[Row]], list[Path]]


def _load_math(trial: Trial, folder: Path) -> Loaded:
    files = [folder / "math" / "split" / name for name in ("train.jsonl", "test.jsonl")]
    train = _limited(read_rows(files[0]), trial.train_rows)
    sets: dict[str, list[Row]] = {}
    for row in read_rows(files[1]):
        sets.setdefault(TWINS if row["near_dup"] else row["source"], []).append(_row(row))
    sets = {name: rows[: trial.limit] for name, rows in sorted(sets.items())}
    groups = {
        "test": [row for name, rows in sets.items() if name != TWINS for row in rows],
        TWINS: sets.get(TWINS, []),
    }
    return [_row(row) for row in train], groups, sets, files


def _load_commonsense(trial: Trial, folder: Path) -> Loaded:
    source = folder / "commonsense" / "train.jsonl"
    # The question alone, answered by the text of its right option.
    rows = [
        {**row, "gold": _gold(document)}
        for row, document in zip(read_rows(source), documents(source, "choice"), strict=True)
    ]
    rows = _limited(rows, trial.train_rows)
    paths = {eval_set.name: path for eval_set, path in find_sets("commonsense", folder)[0].items()}
    held_out = []
    for name in IN_DOMAIN:
        if name in paths:
            drawn = [_gold(row) for row in documents(paths[name], "choice")]
            random.Random(f"quality/{name}").shuffle(drawn)
            held_out += drawn[: trial.limit]
    return [row["gold"] for row in rows], {"test": held_out}, {}, [source, *paths.values()]


def _load_stories(trial: Trial, folder: Path) -> Loaded:
    test = _problems(trial.limit or DEV_ROWS, "test", seed=0)
    return _problems(trial.train_rows or 1000, "train", seed=0), {"test": test}, {"test": test}, []


def _problems(count: int, split: str, seed: int) -> list[Row]:
    return [_row(problem) for problem in make_problems(count, split=split, seed=seed)]


def _row(row: Mapping[str, str]) -> Row:
    return Row(row["instruction"], row["output"], row["answer"])


def _gold(document: Mapping[str, Any]) -> Row:
    return Row(document["stem"], document["options"][document["gold"]], document["answer"])


def _answer(sets: Mapping[str, list[Row]], trial: Trial, model: nn.Module, tokenizer: Any) -> Right:
    """Of the answers generated to math questions."""
    prompts = [row.prompt for of_set in sets.values() for row in of_set]
    texts = iter(generate_answers(model, tokenizer, prompts, trial.max_new_tokens, EVAL_BATCH))
    found = {}
    for name, of_set in sets.items():
        right: dict[str, list[bool]] = {"equation": [], "number": []}
        for row in of_set:
            text = next(texts).split("\n")[0]
            right["equation"].append(equation_is_right(text, row.answer))
            right["number"].append(number_is_right(text, row.answer))
        found[name] = {column: _bits(values) for column, values in right.items()}
    return found


def _compare_options(folder: Path, trial: Trial, model: nn.Module, tokenizer: Any) -> Right:
    """Of the likeliest options of commonsense questions."""
    sets = find_sets("commonsense", folder)[0]
    drawn = {}
    for one, path in sets.items():
        order = list(range(len(documents(path, one.kind))))
        if trial.limit is not None:
            random.Random(f"0/{one.name}").shuffle(order)
        drawn[one.task] = sorted(order[: trial.limit])
    results = evaluate(
        model, tokenizer, "commonsense", str(folder), samples=drawn, batch_size=EVAL_BATCH,
        autocast=torch.bfloat16 if trial.precision == "bf16-mixed" else None,
    )  # fmt: skip
    found = {}
    for one in sets:
        rows = sorted(results["samples"][one.task], key=lambda sample: sample["doc_id"])
        found[one.name] = {"likelihood": _bits([sample["acc"] == 1 for sample in rows])}
    return found


def _is_dev(row: Row) -> bool:
    return int(_digest(row.question)[:8], 16) % DEV_SHARE == 0


def _digest(question: str) -> str:
    """Of the question up to numbers, so that such twins are held out together."""
    template = re.sub(r"\d+(?:\.\d+)?", "#", " ".join(question.lower().split()))
    return hashlib.sha256(template.encode()).hexdigest()


def _limited(rows: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    """At most ``limit`` rows of each source, the same ones always."""
    if limit is None:
        return rows
    taken: dict[Any, int] = {}
    kept = set()
    for index in sorted(range(len(rows)), key=lambda i: _digest(rows[i]["instruction"])):
        source = rows[index]["source"]
        if taken.get(source, 0) < limit:
            taken[source] = taken.get(source, 0) + 1
            kept.add(index)
    return [row for index, row in enumerate(rows) if index in kept]


def _bits(values: Sequence[bool]) -> str:
    return "".join("1" if value else "0" for value in values)


def _accuracy(bits: str) -> dict[str, float | int | None]:
    rows, share = len(bits), bits.count("1") / len(bits)
    error = math.sqrt(share * (1 - share) / (rows - 1)) if rows > 1 else None
    return {"accuracy": share, "stderr": error, "rows": rows}
