"""A page to look at: where a plan spends its budget, what a run reached, and what it needed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .._files import replace_directory, write_text
from ..errors import DataError, PlanError
from ..estimation.table import Estimate, estimate
from . import figures
from .page import Entry, Section, page
from .run_record import RunRecord, read_record

__all__ = ["write_report"]


def write_report(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    compare: Sequence[str | os.PathLike[str]] = (),
    model: str | None = None,
    batch: int | None = None,
    length: int | None = None,
) -> Path:
    """Write a folder with ``index.html``, which needs nothing but itself, and every figure as PNG.

    What is shown depends on what there is: a plan gives its shares and block maps; scores beside it
    (``plan.scores.safetensors``) their distribution and the cut; a run its loss and quality; a model
    whose configuration can be read the memory of every method.

    Args:
        path: a plan file, or the directory of a run.
        output: the folder; default ``report`` in the run, or beside the plan. Replaced.
        compare: directories of other runs (baselines) for the curves.
        model: for the estimate of memory; default the run's own.
        batch, length: for the estimate; default 1 and 2048.

    Returns:
        the path of index.html.

    Raises:
        PlanError, DataError: an input that cannot be read; says which.
        CheckpointError: the folder cannot be written.
    """
    path = Path(path)
    record = read_record(path)
    others = [read_record(Path(other)) for other in compare]
    for other in others:
        if not other.log:
            raise DataError(f"{other.name!r} holds no run to compare with")
    memory, note = _estimate(record, model, batch, length)
    if output is None:
        output = path / "report" if path.is_dir() else path.with_name(f"{path.stem}-report")
    modules = record.scores.modules if record.scores else None
    with figures.style():
        sections = [
            _budget(record),
            _scores(record),
            _training([record, *others]),
            _memory(record, memory, note),
        ]
        maps = figures.block_maps(record.plan, modules)
        with replace_directory(output) as folder:
            write_text(folder / "index.html", page(record, sections))
            for entry in (entry for section in sections for entry in section.entries):
                figures.to_png(entry.figure, folder / f"{entry.name}.png")
            figures.to_png(maps, folder / "block_maps.png")
    return Path(output) / "index.html"


def _budget(record: RunRecord) -> Section:
    plan, scores = record.plan, record.scores
    text = "of all parameters that train"
    if scores is not None:
        text += "; grey: the kind's share of the weights that the plan could choose from"
    entries = [
        Entry("share_by_kind", "Share by kind of matrix", text, figures.share_by_kind(plan, scores)),
        Entry(
            "share_by_depth", "Blocks by depth", "that train, layer by layer",
            figures.share_by_depth(plan),
        ),
    ]  # fmt: skip
    return Section("Where the budget went", entries)


def _scores(record: RunRecord) -> Section:
    if record.scores is None:
        return Section("Scores")
    title = figures.score_title(record.scores.metric)
    entries = [
        Entry(
            "score_by_depth", f"{title[:1].upper()}{title[1:]} by layer",
            "averaged over the blocks of a matrix", figures.score_by_depth(record.scores),
        ),
        Entry(
            "score_distribution", "Scores and the cut",
            "of all blocks; the dashed line is the lowest score that trains",
            figures.score_distribution(record.plan, record.scores),
        ),
    ]  # fmt: skip
    return Section("Scores", entries)


def _training(records: Sequence[RunRecord]) -> Section:
    entries = []
    runs = _by_name(records)
    if curves := {name: run.metrics for name, run in runs.items() if run.metrics}:
        figure = figures.loss_curves(curves)
        entries.append(Entry("loss", "Training loss", "smoothed; every step behind it", figure))
    if evaluations := {name: run.evaluations for name, run in runs.items() if run.evaluations}:
        between = max(map(len, evaluations.values())) > 2
        text = "before, during and after training" if between else "before and after training"
        entries.append(Entry("quality", "Held-out rows", text, figures.quality(evaluations)))
    return Section("Training", entries)


def _by_name(records: Sequence[RunRecord]) -> dict[str, RunRecord]:
    named: dict[str, RunRecord] = {}
    for record in records:
        name, number = record.name, 2
        while name in named:
            name, number = f"{record.name} ({number})", number + 1
        named[name] = record
    return named


def _estimate(
    record: RunRecord, model: str | None, batch: int | None, length: int | None
) -> tuple[Estimate | None, str]:
    """The estimate, or None and why there is none."""
    name = model or record.model
    if name is None:
        return None, "No estimate of memory: a plan file names no model. Pass --model."
    try:
        found = estimate(name, batch=batch or 1, length=length or 2048, plan=record.plan)
    except (DataError, PlanError) as error:
        if model is not None:
            raise
        return None, f"No estimate of memory: {error}"
    return found, ""


def _memory(record: RunRecord, memory: Estimate | None, note: str) -> Section:
    entries = []
    if memory is not None:
        text = f"{memory.batch} x {memory.length:,} tokens, {memory.dtype}; from shapes alone"
        figure = figures.memory_bars(memory)
        entries.append(Entry("memory", "Peak of a step, by method", text, figure))
    numbers = "" if memory is None else str(memory)
    return Section("Memory", entries, text=note, numbers=numbers)
