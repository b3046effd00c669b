"""The two tasks: their rows, what is held out for development, and how a model is judged.

Rows come from the folder ``SMT_DATA`` (default ``../shared/data`` beside the project):

    math/split/train.jsonl, math/split/test.jsonl
    commonsense/train.jsonl, commonsense/{arc-e,arc-c,obqa,boolq,piqa,siqa,winogrande}.jsonl

Math is answered by an equation, which is evaluated. Test questions that have a twin in the training
set up to numbers and names (``near_dup``) are a set of their own, outside of every average.
Commonsense trains on the text of the right option after the question, and compares the options by
their likelihood.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from smt_ext._files import sha256_of_file
from smt_ext.data import Example, Row, encode_rows, read_rows
from smt_ext.errors import DataError
from smt_ext.evaluate import Autocast, generate_answers, held_out_loss
from smt_ext.suite_eval import evaluate_suite
from smt_ext.suites import find_sets, number_is_right, parse_question, scored_rows
from smt_ext.task import equation_is_right

from .matrix import Trial

__all__ = ["MAIN_COLUMN", "TWINS", "Judgement", "TaskData", "data_folder", "load_task"]

ROOT = Path(__file__).parents[2]
DEV_SHARE = 10  # one training question in so many is held out for development
DEV_ROWS = 300
IN_DOMAIN = ("arc-e", "arc-c", "obqa", "boolq")  # commonsense sets with training rows
TWINS = "near twins"
# The accuracy that tables and plots show; records have the others too.
MAIN_COLUMN = {"math": "equation", "commonsense": "likelihood"}
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
        sets: name -> test rows to be answered (math); empty for commonsense.
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
        settings = {"batch_size": EVAL_BATCH, "autocast": autocast, "progress": False}
        if self.task == "math":
            right = _answer(self.sets, trial, model, tokenizer, settings)
        else:
            right = _compare_options(self.folder, trial, model, tokenizer, settings)
        return Judgement(loss, right)

    def loss(
        self, examples: Sequence[Example], model: nn.Module, tokenizer: Any, autocast: Autocast
    ) -> float:
        return held_out_loss(
            model, examples, pad_id=tokenizer.pad_token_id, batch_size=EVAL_BATCH,
            autocast=autocast, progress=False,
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
    load = _load_math if trial.task == "math" else _load_commonsense
    train, test_groups, sets, files = load(trial, folder)
    dev = [row for row in train if _is_dev(row)]
    dev = sorted(dev, key=_digest)[:DEV_ROWS]
    train = [row for row in train if not _is_dev(row)]
    if not dev or not train:
        raise DataError(f"{files[0]}: {len(train)} rows to train on and {len(dev)} to hold out")

    def encoded(rows: list[Row]) -> list[Example]:
        return encode_rows(rows, tokenizer, max_length=trial.max_length, too_long="skip")[1]

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
    train = _limited(read_rows(files[0]), _field(files[0], "source"), trial.train_rows)
    test = read_rows(files[1])
    sources, twins = _field(files[1], "source"), _field(files[1], "near_dup")
    names = [TWINS if twin else source for source, twin in zip(sources, twins, strict=True)]
    sets: dict[str, list[Row]] = {}
    for row, name in zip(test, names, strict=True):
        sets.setdefault(name, []).append(row)
    sets = {name: rows[: trial.limit] for name, rows in sorted(sets.items())}
    groups = {
        "test": [row for name, rows in sets.items() if name != TWINS for row in rows],
        TWINS: sets.get(TWINS, []),
    }
    return train, groups, sets, files


def _load_commonsense(trial: Trial, folder: Path) -> Loaded:
    source = folder / "commonsense" / "train.jsonl"
    rows = _limited(read_rows(source), _field(source, "source"), trial.train_rows)
    paths = {eval_set.name: path for eval_set, path in find_sets("commonsense", folder)[0].items()}
    held_out = []
    for name in IN_DOMAIN:
        if name in paths:
            drawn = read_rows(paths[name])
            random.Random(f"quality/{name}").shuffle(drawn)
            held_out += drawn[: trial.limit]
    groups = {"test": [_gold(row) for row in held_out]}
    return [_gold(row) for row in rows], groups, {}, [source, *paths.values()]


def _gold(row: Row) -> Row:
    """The question alone, answered by the text of its right option."""
    question = parse_question(row, "choice")
    return scored_rows(question, "choice")[question.gold]


def _answer(
    sets: Mapping[str, list[Row]],
    trial: Trial,
    model: nn.Module,
    tokenizer: Any,
    settings: Mapping[str, Any],
) -> Right:
    """Of the answers generated to math questions."""
    rows = [row for of_set in sets.values() for row in of_set]
    texts = iter(
        generate_answers(
            model,
            tokenizer,
            rows,
            template="plain",
            max_length=trial.max_length,
            max_new_tokens=trial.max_new_tokens,
            **settings,
        )
    )
    found = {}
    for name, of_set in sets.items():
        right: dict[str, list[bool]] = {"equation": [], "number": []}
        for row in of_set:
            text = next(texts).split("\n")[0]
            assert row.answer is not None
            right["equation"].append(equation_is_right(text, row.answer))
            right["number"].append(number_is_right(text, row.answer))
        found[name] = {column: _bits(values) for column, values in right.items()}
    return found


def _compare_options(
    folder: Path, trial: Trial, model: nn.Module, tokenizer: Any, settings: Mapping[str, Any]
) -> Right:
    """Of the likeliest options of commonsense questions."""
    paths = find_sets("commonsense", folder)[0]
    with tempfile.TemporaryDirectory() as output:
        evaluate_suite(
            model, tokenizer, "commonsense", folder, output, measures=["likelihood"],
            limit=trial.limit, max_length=512, too_long="skip", **settings,
        )  # fmt: skip
        journal = (Path(output) / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    results: dict[str, dict[int, list[float]]] = {}
    for line in map(json.loads, journal):
        if "log_p" in line:
            results.setdefault(line["set"], {})[line["row"]] = line["log_p"]
    found = {}
    for eval_set, path in paths.items():
        rows = read_rows(path)
        right = []
        for index, log_p in sorted(results[eval_set.name].items()):
            question = parse_question(rows[index], eval_set.kind)
            chosen = max(range(len(log_p)), key=lambda i: log_p[i])
            right.append(question.options[chosen] == question.options[question.gold])
        found[eval_set.name] = {"likelihood": _bits(right)}
    return found


def _is_dev(row: Row) -> bool:
    return int(_digest(row)[:8], 16) % DEV_SHARE == 0


def _digest(row: Row) -> str:
    """Of the question up to numbers, so that such twins are held out together."""
    template = re.sub(r"\d+(?:\.\d+)?", "#", " ".join(row.prompt.lower().split()))
    return hashlib.sha256(template.encode()).hexdigest()


def _limited(rows: list[Row], sources: list[Any], limit: int | None) -> list[Row]:
    """At most ``limit`` rows of each source, the same ones always."""
    if limit is None:
        return rows
    taken: dict[Any, int] = {}
    kept = set()
    for index in sorted(range(len(rows)), key=lambda i: _digest(rows[i])):
        if taken.get(sources[index], 0) < limit:
            taken[sources[index]] = taken.get(sources[index], 0) + 1
            kept.add(index)
    return [row for index, row in enumerate(rows) if index in kept]


def _field(path: Path, name: str) -> list[Any]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line).get(name) for line in lines if line.strip()]


def _bits(values: Sequence[bool]) -> str:
    return "".join("1" if value else "0" for value in values)


def _accuracy(bits: str) -> dict[str, float | int | None]:
    rows, share = len(bits), bits.count("1") / len(bits)
    error = math.sqrt(share * (1 - share) / (rows - 1)) if rows > 1 else None
    return {"accuracy": share, "stderr": error, "rows": rows}
