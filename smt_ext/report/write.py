"""A page to look at: where a plan spends its budget, and what a run reached."""

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
from ..plan import BlockPlan
from ..planning.score_file import SavedScores
from . import figures
from .run_record import Log, read_record, values_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_report"]


def write_report(
    path: str | os.PathLike[str], output: str | os.PathLike[str] | None = None
) -> Path:
    """Write a folder with ``index.html``, which needs nothing but itself.

    A plan gives its shares and block maps; scores beside it (``plan.scores.safetensors``) the score of
    each layer and shades in the maps; a run its loss and quality.

    Args:
        path: a plan file, or the directory of a run.
        output: the folder; default ``report`` in the run, or beside the plan. Replaced.

    Returns:
        the path of index.html.

    Raises:
        PlanError, DataError: an input that cannot be read; says which.
        CheckpointError: the folder cannot be written.
    """
    path = Path(path)
    plan, scores, log = read_record(path)
    if output is None:
        output = path / "report" if path.is_dir() else path.with_name(f"{path.stem}-report")
    made = [f"{key}: {value}" for key, value in plan.provenance.items()]
    page = Template(files("smt_ext.report").joinpath("page.html").read_text("utf-8")).substitute(
        title=html.escape(path.absolute().name if path.is_dir() else path.stem),
        figures="".join(_figure(*shown) for shown in _shown(plan, scores, log)),
        plan=html.escape("\n".join([str(plan), "", *made])),
    )
    with replace_directory(output, "a report") as folder:
        write_text(folder / "index.html", page)
    return Path(output) / "index.html"


def _shown(
    plan: BlockPlan, scores: SavedScores | None, log: Log
) -> Iterator[tuple[str, str, Figure]]:
    """Name, caption and figure."""
    yield "share_by_kind", "Where the budget went", figures.share_by_kind(plan, scores)
    if scores:
        yield "score_by_depth", "Mean score by layer", figures.score_by_depth(scores)
    for key, caption, unit in (
        ("loss", "Training loss", "nats a token"),
        ("eval_loss", "Loss on held-out rows", "nats a token"),
        ("eval_accuracy", "Right answers on held-out rows", "share of the rows"),
    ):
        if values := values_of(log, key):
            last = f"{caption}: {[*values.values()][-1]:.3g} in the end"
            yield key, last, figures.curve(unit, values)
    caption = "The blocks of each matrix; orange: trains, dark: a high score"
    yield "block_maps", caption, figures.block_maps(plan, scores.modules if scores else None)


def _figure(name: str, caption: str, figure: Figure) -> str:
    source = f"data:image/svg+xml;base64,{b64encode(figures.to_svg(figure)).decode()}"
    text = html.escape(caption)
    return (
        f'<figure id="{name}"><figcaption>{text}</figcaption>'
        f'<img alt="{text}" src="{source}"></figure>\n'
    )
