"""A page to look at: where a plan spends its budget, what a run reached, and what it needed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from .._extras import require
from .._files import replace_directory, write_text
from ..errors import DataError, PlanError
from ..estimation.table import Estimate, estimate
from ..plan import BlockPlan, kind_of
from . import figures
from .run_record import RunRecord, read_record

require("a report", "jinja2")
from jinja2 import Template  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

__all__ = ["write_report"]


@dataclass(frozen=True)
class Picture:
    """A figure with the name of its element and file, a title, and a line of explanation."""

    name: str
    title: str
    text: str
    figure: Figure

    def svg(self) -> str:
        return figures.to_svg(self.figure, self.name, self.title)


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
    others = [read_record(Path(other)) for other in compare]
    for other in others:
        if not other.log:
            raise DataError(f"{other.name!r} holds no run to compare with")
    memory, note = _estimate(record, model, batch, length)
    if output is None:
        output = path / "report" if path.is_dir() else path.with_name(f"{path.stem}-report")
    with figures.style():
        *shares, maps = _plan(record)
        sections = (
            ("Where the budget went", _leader(record.plan), shares),
            ("Blocks", "", [maps]),
            ("Training", "", [*_training(_by_name([record, *others]))]),
            ("Memory", note, [_memory(record, memory)] if memory else []),
        )
        template = files("smt_ext.report").joinpath("page.html").read_text("utf-8")
        page = Template(template, autoescape=True, trim_blocks=True).render(
            name=record.name,
            subtitle=_subtitle(record),
            numbers=_numbers(record),
            sections=sections,
            memory=memory,
            provenance={
                key: value if isinstance(value, str) else json.dumps(value)
                for key, value in record.plan.provenance.items()
            },
        )
        with replace_directory(output, "a report") as folder:
            write_text(folder / "index.html", page)
            for _, _, pictures in sections:
                for picture in pictures:
                    figures.to_png(picture.figure, folder / f"{picture.name}.png")
    return Path(output) / "index.html"


def _plan(record: RunRecord) -> Iterator[Picture]:
    plan, scores = record.plan, record.scores
    text = "of all parameters that train"
    if scores is not None:
        text += "; grey: the kind's share of the weights that the plan could choose from"
    figure = figures.share_by_kind(plan, scores)
    yield Picture("share_by_kind", "Share by kind of matrix", text, figure)
    text = "layer by layer, orange where they train"
    if scores is not None:
        title = f"{figures.score_title(scores.metric)} by layer"
        averaged = "averaged over the blocks of a matrix"
        figure = figures.score_by_depth(scores)
        yield Picture("score_by_depth", f"{title[:1].upper()}{title[1:]}", averaged, figure)
        text += "; dark: a high score"
    figure = figures.block_maps(plan, scores.modules if scores else None)
    yield Picture("block_maps", "The blocks of each matrix", text, figure)


def _training(runs: Mapping[str, RunRecord]) -> Iterator[Picture]:
    if any(run.series("loss") for run in runs.values()):
        text = "smoothed; every step behind it"
        yield Picture("loss", "Training loss", text, figures.loss_curves(runs))
    times = max(len(run.series(key)) for run in runs.values() for key in figures.QUALITY)
    if times:
        text = "before, during and after training" if times > 2 else "before and after training"
        yield Picture("quality", "Held-out rows", text, figures.quality(runs))


def _memory(record: RunRecord, memory: Estimate) -> Picture:
    text = f"{memory.batch} x {memory.length:,} tokens, {memory.dtype}; from shapes alone"
    peak = record.last("smt_peak_memory_mb")
    if peak is not None:
        text += "; the dashed line was measured in this run, with its own batches"
    figure = figures.memory_bars(memory, None if peak is None else 1e6 * peak)
    return Picture("memory", "Peak of a step, by method", text, figure)


def _by_name(records: Sequence[RunRecord]) -> dict[str, RunRecord]:
    named: dict[str, RunRecord] = {}
    for record in records:
        name, number = record.name, 2
        while name in named:
            name, number = f"{record.name} ({number})", number + 1
        named[name] = record
    return named


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


def _leader(plan: BlockPlan) -> str:
    shares = plan.share_by(kind_of)
    kind = max(shares, key=lambda k: shares[k])
    share = 100 * shares[kind] / plan.num_parameters
    return f"{share:.1f} % of the trained parameters are in {kind}."


def _numbers(record: RunRecord) -> dict[str, str]:
    plan = record.plan
    numbers = {"blocks": f"{plan.num_blocks:,}", "trained parameters": f"{plan.num_parameters:,}"}
    percent = plan.provenance.get("percent_of_model")
    if isinstance(percent, (int, float)):
        numbers["of the model"] = f"{percent:.2f} %"
    forms = (("loss", "held-out loss", "{:.3f}"), ("accuracy", "right answers", "{:.1%}"))
    for key, title, form in forms:
        found = [*record.series(f"eval_{key}").values()]
        if len(found) > 1:
            numbers[title] = f"{form.format(found[0])} \u2192 {form.format(found[-1])}"
    if (peak := record.last("smt_peak_memory_mb")) is not None:
        numbers["peak memory"] = f"{peak / 1e3:.2f} GB"
    return numbers


def _subtitle(record: RunRecord) -> str:
    made = record.plan.provenance
    sizes = sorted({layer.block_size for layer in record.plan.layers.values()})
    parts = [f"blocks of {' and '.join(f'{size} x {size}' for size in sizes)}"]
    parts += [f"budget {made['budget']}"] * ("budget" in made)
    parts += [f"scored by {made['metric']}"] * ("metric" in made)
    parts += [f"{made['num_batches']} batches"] * bool(made.get("num_batches"))
    if (steps := record.last("step")) is not None:
        parts.append(f"{steps:,} steps")
    return f"Sparse Matrix Tuning: {', '.join(parts)}"
