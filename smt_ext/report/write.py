"""A page to look at: where a plan spends its budget, what a run reached, and what it needed."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import NamedTuple

from matplotlib.figure import Figure

from .._files import replace_directory, write_text
from ..errors import DataError, PlanError
from ..estimation.table import Estimate, estimate
from . import figures
from .run_record import RunRecord, read_record

__all__ = ["write_report"]


class Shown(NamedTuple):
    """A figure on the page: a name for its element and file, a title, a line to explain it."""

    name: str
    title: str
    text: str
    figure: Figure


def write_report(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    compare: Sequence[str | os.PathLike[str]] = (),
    model: str | None = None,
    batch: int = 1,
    length: int = 2048,
) -> Path:
    """Write a folder with ``index.html``, which needs nothing but itself, and every figure as PNG.

    What is shown depends on what there is: a plan gives its shares and block maps; scores beside it
    (``plan.scores.safetensors``) the score of each layer and shades in the maps; a run its loss and
    quality; a model whose configuration can be read the memory of every method, and what the run
    measured.

    Args:
        path: a plan file, or the directory of a run.
        output: the folder; default ``report`` in the run, or beside the plan. Replaced.
        compare: directories of other runs (baselines) for the curves.
        model: for the estimate of memory; default the run's own.
        batch, length: for the estimate.

    Returns:
        the path of index.html.

    Raises:
        PlanError, DataError: an input that cannot be read; says which.
        CheckpointError: the folder cannot be written.
    """
    path = Path(path)
    record = read_record(path)
    runs = {record.name: record}
    for other in map(read_record, map(Path, compare)):
        if not other.log:
            raise DataError(f"{other.name!r} holds no run to compare with")
        name = other.name if other.name not in runs else f"{other.name} ({len(runs) + 1})"
        runs[name] = other
    memory, why_not = _estimate(record, model, batch, length)
    if output is None:
        output = path / "report" if path.is_dir() else path.with_name(f"{path.stem}-report")
    with figures.style():
        shown = [*_shown(record, runs, memory)]
        with replace_directory(output, "a report") as folder:
            write_text(folder / "index.html", _page(record, shown, memory, why_not))
            for entry in shown:
                figures.to_png(entry.figure, folder / f"{entry.name}.png")
    return Path(output) / "index.html"


def _estimate(
    record: RunRecord, model: str | None, batch: int, length: int
) -> tuple[Estimate | None, str]:
    """The estimate, or None and why there is none."""
    name = model or record.model
    if name is None:
        return None, "No estimate of memory: a plan file names no model. Pass --model."
    try:
        return estimate(name, batch=batch, length=length, plan=record.plan), ""
    except (DataError, PlanError) as error:
        if model is not None:
            raise
        return None, f"No estimate of memory: {error}"


def _shown(
    record: RunRecord, runs: Mapping[str, RunRecord], memory: Estimate | None
) -> Iterator[Shown]:
    plan, scores = record.plan, record.scores
    text = "share of all parameters that train"
    if scores:
        text += "; the mark: the kind's share of the weights that the plan could choose from"
    figure = figures.share_by_kind(plan, scores)
    yield Shown("share_by_kind", "Where the budget went", text, figure)
    if scores:
        text = "averaged over the blocks of a matrix"
        yield Shown("score_by_depth", "Score by layer", text, figures.score_by_depth(scores))
    for key, name, title, unit in (
        ("loss", "loss", "Training loss", "nats a token"),
        ("eval_loss", "held_out_loss", "Loss on held-out rows", "nats a token"),
        ("eval_accuracy", "accuracy", "Right answers on held-out rows", "share of the rows"),
    ):
        found = {run: line for run, of in runs.items() if (line := of.values(key))}
        if found:
            # Runs are compared by where they end.
            lines = {f"{run}, {[*line.values()][-1]:.3g}": line for run, line in found.items()}
            text = "by step, the last value above"
            yield Shown(name, title, text, figures.curves(unit, lines))
    if memory:
        text = f"{memory.batch} x {memory.length:,} tokens, {memory.dtype}; from shapes alone"
        if record.peak_bytes:
            text += "; the dashed line was measured in this run, with its own batches"
        figure = figures.memory_bars(memory, record.peak_bytes)
        yield Shown("memory", "Memory at the peak of a step, by method", text, figure)
    text = "layer by layer, orange where they train" + "; dark: a high score" * bool(scores)
    figure = figures.block_maps(plan, scores.modules if scores else None)
    yield Shown("block_maps", "The blocks of each matrix", text, figure)


def _page(record: RunRecord, shown: Sequence[Shown], memory: Estimate | None, why_not: str) -> str:
    plan = str(record.plan)
    made = [f"{key}: {value}" for key, value in record.plan.provenance.items()]
    texts = {"How the plan was made": "\n".join([plan, "", *made])}
    if memory:
        texts["Memory in numbers"] = str(memory)
    return Template(files("smt_ext.report").joinpath("page.html").read_text("utf-8")).substitute(
        title=html.escape(record.name),
        subtitle=html.escape(plan.partition("\nkind")[0]),
        colors="".join(f"--{role}: {color}; " for role, color in figures.PALETTE.items()),
        figures="".join(map(_figure, shown)),
        note=html.escape(why_not),
        texts="".join(
            f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>"
            for title, text in texts.items()
        ),
    )


def _figure(entry: Shown) -> str:
    title = html.escape(entry.title)
    label = f'<svg role="img" aria-label="{title}"'
    svg = figures.to_svg(entry.figure, entry.name).replace("<svg", label, 1)
    caption = f"<strong>{title}</strong>{html.escape(entry.text)}"
    return f'<figure id="{entry.name}"><figcaption>{caption}</figcaption>{svg}</figure>'
