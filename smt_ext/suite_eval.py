"""Run a model through the paper's evaluation sets, batched and resumable (SMT paper, section 4)."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ._files import sha256_of_file
from .data import Row, Template, answer_ids, encode, read_rows
from .errors import DataError, Interrupted, TooLongError
from .evaluate import Autocast, iter_answers
from .likelihood import OptionScorer, Request
from .suite_journal import Journal, model_digest
from .suites import (
    EvalSet,
    Kind,
    Question,
    find_sets,
    label_in,
    letter_in,
    number_is_right,
    parse_question,
    scored_rows,
)
from .task import equation_is_right

__all__ = ["COLUMNS", "MEASURES", "Score", "SetResult", "SuiteResults", "evaluate_suite"]

MEASURES = ("likelihood", "generation")
# Accuracies that a measure gives. "equation" is for number sets alone.
COLUMNS = ("likelihood", "per token", "per byte", "generated", "equation")
# What models write that go on with a question of their own after their answer.
_NEXT_TURN: dict[str, str] = {"plain": "\nQuestion:", "alpaca": "\n### "}
_NEW_TOKENS = {"commonsense": 32, "math": 256}  # as in LLM-Adapters


@dataclass(frozen=True)
class Score:
    """A share of right answers (0 to 1) and its standard error; None for a single row."""

    accuracy: float
    stderr: float | None


@dataclass(frozen=True)
class SetResult:
    """One set's scores.

    Attributes:
        rows: evaluated.
        rows_in_file: in the set.
        skipped: of the chosen rows, longer than ``max_length``.
        scores: by column, see :data:`COLUMNS`.
    """

    name: str
    rows: int
    rows_in_file: int
    skipped: int
    scores: dict[str, Score]


@dataclass(frozen=True)
class SuiteResults:
    """What :func:`evaluate_suite` found; also in ``results.json``.

    Attributes:
        sets: in the suite's order.
        absent: names of sets that the data folder does not have.
        average: unweighted mean over the sets, for columns that every set has.
        limit, seed: rows of a set, and which: None for all.
        settings: what decides the results: digest of the model, template, and so on.
    """

    suite: str
    sets: tuple[SetResult, ...]
    absent: tuple[str, ...]
    average: dict[str, Score]
    limit: int | None
    seed: int
    settings: dict[str, Any]


@dataclass
class _Task:
    """A set's chosen rows that fit ``max_length``, by their index in the file."""

    eval_set: EvalSet
    rows_in_file: int
    skipped: int = 0
    rows: dict[int, Row] = field(default_factory=dict)
    questions: dict[int, Question] = field(default_factory=dict)
    requests: dict[int, list[Request]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.eval_set.name

    @property
    def kind(self) -> Kind:
        return self.eval_set.kind


def evaluate_suite(
    model: nn.Module,
    tokenizer: Any,
    suite: str,
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    sets: Sequence[str] | None = None,
    measures: Sequence[str] = MEASURES,
    limit: int | None = None,
    seed: int = 0,
    template: Template = "plain",
    max_length: int = 512,
    max_new_tokens: int | None = None,
    too_long: Literal["error", "skip"] = "error",
    batch_size: int = 32,
    autocast: Autocast = nullcontext,
    overwrite: bool = False,
    progress: bool = True,
) -> SuiteResults:
    """Accuracy of a model on the sets of a suite that are in a folder.

    Measures: ``likelihood`` compares the options of a question by log p(option | question), summed,
    per token, and per byte of the option's text (the ``acc`` and ``acc_norm`` of lm-eval).
    ``generation`` lets the model answer the whole instruction greedily and looks for the label
    (commonsense, AQuA) or compares the last number (math), as LLM-Adapters does; ``equation``
    evaluates the left side of the equation in the same text.

    Every row's result is appended to ``<output>/rows.jsonl`` as soon as it is there. The same call
    goes on where an earlier one was stopped; more sets, more measures and a larger ``limit`` use
    what is there. ``<output>/results.json`` is written at the end.

    Args:
        model: a causal language model of transformers, on its device.
        tokenizer: its tokenizer, with a padding token.
        suite: ``commonsense`` or ``math``.
        data: folder with the sets, see :func:`smt_ext.suites.find_sets`.
        output: folder of the results.
        sets: only these, by short name.
        limit: at most so many rows of each set, drawn by ``seed``; smaller draws are part of larger.
        template: how a question becomes text; the one the model was trained with.
        max_length: most tokens of a prompt with an option.
        max_new_tokens: of a generated answer; default 32 for commonsense, 256 for math.
        too_long: ``skip`` leaves longer rows out, and counts them.
        batch_size: rows of a batch; does not change results but by rounding.
        overwrite: begin anew.

    Raises:
        DataError: bad arguments or rows, or ``output`` was begun with another model, other data or
            other settings.
        CheckpointError: ``output`` is damaged.
        Interrupted: Ctrl-C; what was evaluated is kept.
    """
    measures = tuple(m for m in MEASURES if m in measures)
    if not measures:
        raise DataError(f"measures is empty, expected some of {', '.join(MEASURES)}")
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}, expected at least 1 row of each set")
    found, absent = find_sets(suite, data, sets)
    new_tokens = max_new_tokens or _NEW_TOKENS[suite]
    tasks = []
    for eval_set, path in found.items():
        task = _read_task(eval_set, path, limit, seed)
        _encode_task(task, tokenizer, template, max_length, too_long, measures)
        tasks.append(task)
    settings = {
        "suite": suite,
        "model": model_digest(model),
        "compute": _compute(model, autocast),
        "template": template,
        "max_new_tokens": new_tokens,
    }
    root = Path(output)
    rows_file, results_file = root / "rows.jsonl", root / "results.json"
    if overwrite:
        rows_file.unlink(missing_ok=True)
        results_file.unlink(missing_ok=True)
    journal = Journal(rows_file, settings)
    try:
        for eval_set, path in found.items():
            journal.check_data(eval_set.name, sha256_of_file(path))
        scorer = OptionScorer(model, tokenizer.pad_token_id, autocast)
        for task in tasks:
            if "likelihood" in measures and task.questions:
                _run_likelihood(task, scorer, journal, batch_size, progress)
            if "generation" in measures:
                answers = _todo(task.rows, task, "generation", journal)
                texts = iter_answers(
                    model,
                    tokenizer,
                    list(answers.values()),
                    template=template,
                    max_length=max_length,
                    max_new_tokens=new_tokens,
                    batch_size=batch_size,
                    autocast=autocast,
                    title=f"{task.name}: answers",
                    progress=progress,
                )
                indices = list(answers)
                for at, text in texts:
                    answer = text.split(_NEXT_TURN.get(template, "\0"))[0]
                    journal.add((task.name, "generation", indices[at]), {"text": answer})
                    journal.flush()
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; {len(journal.results):,} results are in {str(rows_file)!r}. The same command "
            "goes on from there."
        ) from None
    finally:
        journal.close()
    results = tuple(_set_result(task, measures, journal) for task in tasks)
    summary = SuiteResults(
        suite=suite,
        sets=results,
        absent=tuple(one.name for one in absent),
        average=_average(results),
        limit=limit,
        seed=seed,
        settings=settings,
    )
    _write_json(results_file, dataclasses.asdict(summary))
    return summary


def _read_task(eval_set: EvalSet, path: Path, limit: int | None, seed: int) -> _Task:
    rows = read_rows(path)
    order = list(range(len(rows)))
    if limit is not None:
        random.Random(f"{seed}/{eval_set.name}").shuffle(order)
        order = sorted(order[:limit])
    task = _Task(eval_set, len(rows))
    for index in order:
        row = rows[index]
        task.rows[index] = row
        if eval_set.kind != "number":
            task.questions[index] = parse_question(row, eval_set.kind)
        elif not _is_number(row.answer):
            raise DataError(f"{row.where}: 'answer' is {row.answer!r}, expected a number")
    return task


def _encode_task(
    task: _Task,
    tokenizer: Any,
    template: Template,
    max_length: int,
    too_long: str,
    measures: Sequence[str],
) -> None:
    """Make the requests; leave out rows that are too long, from every measure alike."""
    for index, row in list(task.rows.items()):
        try:
            if "generation" in measures:
                encode(row, tokenizer, max_length=max_length, template=template, with_answer=False)
            if "likelihood" in measures and index in task.questions:
                task.requests[index] = _requests(
                    scored_rows(task.questions[index], task.kind), tokenizer, template, max_length
                )
        except TooLongError:
            if too_long == "error":
                raise
            task.skipped += 1
            del task.rows[index]
            task.questions.pop(index, None)
    if not task.rows:
        raise DataError(
            f"all {task.skipped} rows of {task.name!r} are longer than max_length = {max_length}"
        )


def _requests(
    rows: Sequence[Row], tokenizer: Any, template: Template, max_length: int
) -> list[Request]:
    """One request for each different prompt, the options in order."""
    answers: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for row in rows:
        prompt = encode(
            row, tokenizer, max_length=max_length, template=template, with_answer=False
        ).input_ids
        answer = tuple(answer_ids(row, tokenizer, template))
        if len(prompt) + len(answer) > max_length:
            raise TooLongError(
                f"{row.where}: the prompt and an option have {len(prompt) + len(answer)} tokens, more "
                f"than max_length = {max_length}. Raise max_length (the model's context "
                "permitting), or set too_long = 'skip'."
            )
        answers.setdefault(prompt, []).append(answer)
    return [Request(prompt, tuple(options)) for prompt, options in answers.items()]


def _run_likelihood(
    task: _Task, scorer: OptionScorer, journal: Journal, batch_size: int, progress: bool
) -> None:
    todo = _todo(task.requests, task, "likelihood", journal)
    owners = [index for index, requests in todo.items() for _ in requests]
    flat = [request for requests in todo.values() for request in requests]
    # A row with several prompts (a blank filled in) is complete when all of them have come.
    starts: dict[int, int] = {}
    for position, index in enumerate(owners):
        starts.setdefault(index, position)
    sums: dict[int, list[float]] = {}
    scored = scorer.score(
        flat, batch_size=batch_size, title=f"{task.name}: likelihood", progress=progress
    )
    for position, values in scored:
        sums[position] = values
        index = owners[position]
        parts = range(starts[index], starts[index] + len(todo[index]))
        if all(part in sums for part in parts):
            result = {
                "log_p": [value for part in parts for value in sums.pop(part)],
                "tokens": [len(a) for request in todo[index] for a in request.answers],
            }
            journal.add((task.name, "likelihood", index), result)
            journal.flush()


def _todo(items: Mapping[int, Any], task: _Task, measure: str, journal: Journal) -> dict[int, Any]:
    return {i: x for i, x in items.items() if (task.name, measure, i) not in journal.results}


def _set_result(task: _Task, measures: Sequence[str], journal: Journal) -> SetResult:
    right: dict[str, list[bool]] = {}
    for index, row in task.rows.items():
        question = task.questions.get(index)
        if "likelihood" in measures and question is not None:
            result = journal.results[task.name, "likelihood", index]
            for column, chosen in _chosen(question, task.kind, result).items():
                # Some rows have the same text under two labels.
                same = question.options[chosen] == question.options[question.gold]
                right.setdefault(column, []).append(same)
        if "generation" in measures:
            text = journal.results[task.name, "generation", index]["text"]
            for column, is_right in _judged(text, row, question, task.kind).items():
                right.setdefault(column, []).append(is_right)
    return SetResult(
        name=task.name,
        rows=len(task.rows),
        rows_in_file=task.rows_in_file,
        skipped=task.skipped,
        scores={column: _score(right[column]) for column in COLUMNS if column in right},
    )


def _chosen(question: Question, kind: Kind, result: Mapping[str, Any]) -> dict[str, int]:
    """Index of the likeliest option by sum, per token, and per byte of the scored text."""
    rows = scored_rows(question, kind)
    size = [len(row.completion.strip().encode()) for row in rows]
    log_p, tokens = result["log_p"], result["tokens"]
    by_column: dict[str, Callable[[int], float]] = {
        "likelihood": lambda i: log_p[i],
        "per token": lambda i: log_p[i] / tokens[i],
        "per byte": lambda i: log_p[i] / size[i],
    }
    return {column: max(range(len(log_p)), key=value) for column, value in by_column.items()}


def _judged(text: str, row: Row, question: Question | None, kind: Kind) -> dict[str, bool]:
    if question is None:
        assert row.answer is not None
        return {
            "generated": number_is_right(text, row.answer),
            "equation": equation_is_right(text, row.answer),
        }
    find = letter_in if kind == "letter" else label_in
    return {"generated": find(text, question.labels) == question.labels[question.gold]}


def _score(right: Sequence[bool]) -> Score:
    count, share = len(right), sum(right) / len(right)
    # Of a mean: the sample's standard deviation over the root of the number of rows.
    error = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
    return Score(share, error)


def _average(sets: Sequence[SetResult]) -> dict[str, Score]:
    """Unweighted, as in the paper; the sets' errors are independent."""
    average = {}
    for column in COLUMNS:
        scores = [s.scores[column] for s in sets if column in s.scores]
        if len(scores) < len(sets):
            continue
        errors = [s.stderr for s in scores if s.stderr is not None]
        spread = math.sqrt(sum(e * e for e in errors)) / len(scores)
        mean = sum(s.accuracy for s in scores) / len(scores)
        average[column] = Score(mean, spread if len(errors) == len(scores) else None)
    return average


def _is_number(text: str | None) -> bool:
    try:
        return text is not None and math.isfinite(float(text.replace(",", "")))
    except ValueError:
        return False


def _compute(model: nn.Module, autocast: Autocast) -> str:
    parameter = next(model.parameters())
    kind = parameter.device.type
    with autocast():
        if torch.is_autocast_enabled(kind):
            return f"{parameter.dtype} under autocast to {torch.get_autocast_dtype(kind)}"
    return str(parameter.dtype)


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
