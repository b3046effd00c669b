"""A page to look at: where a plan spends its budget, what a run reached, and what it needed."""

from __future__ import annotations

import html
import os
from base64 import b64encode
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from .._files import replace_directory, write_text
from ..errors import DataError, PlanError
from ..estimation.table import Estimate, estimate
from . import figures
from .run_record import RunRecord, read_record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_report"]


def write_report(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    model: str | None = None,
    batch: int = 1,
    length: int = 2048,
) -> Path:
    """Write a folder with ``index.html``, which needs nothing but itself.

    What is shown depends on what there is: a plan gives its shares and block maps; scores beside it
    (``plan.scores.safetensors``) the score of each layer and shades in the maps; a run its loss and
    quality; a model whose configuration can be read the memory of every method, and what the run
    measured.

    Args:
        path: a plan file, or the directory of a run.
        output: the folder; default ``report`` in the run, or beside the plan. Replaced.
        model: for the estimate of memory; default the run's own.
        batch, length: for the estimate.

    Returns:
        the path of index.html.

    Raises:
        PlanError, DataError: an input that cannot be read; says which.
        CheckpointError: the folder cannot be written.
    """
    path = Path(path)
    name = path.absolute().name if path.is_dir() else path.stem
    record = read_record(path)
    memory, in_numbers = _estimate(record, model, batch, length)
    if output is None:
        output = path / "report" if path.is_dir() else path.with_name(f"{path.stem}-report")
    made = [f"{key}: {value}" for key, value in record.plan.provenance.items()]
    page = Template(files("smt_ext.report").joinpath("page.html").read_text("utf-8")).substitute(
        title=html.escape(name),
        figures="".join(_figure(*shown) for shown in _shown(record, memory)),
        plan=html.escape("\n".join([str(record.plan), "", *made])),
        memory=html.escape(in_numbers),
    )
    with replace_directory(output, "a report") as folder:
        write_text(folder / "index.html", page)
    return Path(output) / "index.html"


def _estimate(
    record: RunRecord, model: str | None, batch: int, length: int
) -> tuple[Estimate | None, str]:
    """The estimate and its table, or None and why there is none."""
    name = model or record.model
    if name is None:
        return None, "No estimate: a plan file names no model. Pass --model."
    try:
        found = estimate(name, batch=batch, length=length, plan=record.plan)
    except (DataError, PlanError) as error:
        if model is not None:
            raise
        return None, f"No estimate: {error}"
    return found, str(found)


def _shown(record: RunRecord, memory: Estimate | None) -> Iterator[tuple[str, str, Figure]]:
    """Name, caption and figure."""
    plan, scores = record.plan, record.scores
    yield "share_by_kind", "Where the budget went", figures.share_by_kind(plan, scores)
    if scores:
        yield "score_by_depth", "Mean score by layer", figures.score_by_depth(scores)
    for key, caption, unit in (
        ("loss", "Training loss", "nats a token"),
        ("eval_loss", "Loss on held-out rows", "nats a token"),
        ("eval_accuracy", "Right answers on held-out rows", "share of the rows"),
    ):
        if values := record.values(key):
            last = f"{caption}: {[*values.values()][-1]:.3g} in the end"
            yield key, last, figures.curve(unit, values)
    if memory:
        peaks = [*record.values("smt_peak_memory_mb").values()]
        measured = 1e6 * peaks[-1] if peaks else None
        caption = f"Memory by method, {memory.batch} x {memory.length:,} tokens, from shapes alone"
        if measured:
            caption += "; dashed: measured in this run, with its own batches"
        yield "memory", caption, figures.memory_bars(memory, measured)
    caption = "The blocks of each matrix; orange: trains, dark: a high score"
    yield "block_maps", caption, figures.block_maps(plan, scores.modules if scores else None)


def _figure(name: str, caption: str, figure: Figure) -> str:
    source = f"data:image/svg+xml;base64,{b64encode(figures.to_svg(figure)).decode()}"
    text = html.escape(caption)
    return (
        f'<figure id="{name}"><figcaption>{text}</figcaption>'
        f'<img alt="{text}" src="{source}"></figure>\n'
    )
