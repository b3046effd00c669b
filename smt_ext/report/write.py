"""A page to look at: where a plan spends its budget, what a run reached, and what it needed."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from matplotlib.figure import Figure

from .._files import replace_directory, write_text
from ..errors import DataError, PlanError
from ..estimation.table import Estimate, estimate
from ..plan import BlockPlan, kind_of
from . import figures
from .run_record import RunRecord, read_record

__all__ = ["write_report"]

# A figure: a name for its element and file, a title, a line of explanation.
Entry = tuple[str, str, str, Figure]


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
        sections: dict[str, tuple[str, Sequence[Entry], str]] = {
            "Where the budget went": (_leader(record.plan), [*_budget(record)], ""),
            "Blocks": ("", [_maps(record)], ""),
            "Training": ("", [*_training(_by_name([record, *others]))], ""),
            "Memory": (
                note, [*_memory(record, memory)],
                _details("In numbers", f"<pre>{html.escape(str(memory))}</pre>") if memory else "",
            ),
        }  # fmt: skip
        with replace_directory(output, "a report") as folder:
            write_text(folder / "index.html", _page(record, sections))
            for _, entries, _ in sections.values():
                for name, _, _, figure in entries:
                    figures.to_png(figure, folder / f"{name}.png")
    return Path(output) / "index.html"


def _budget(record: RunRecord) -> Iterator[Entry]:
    text = "of all parameters that train"
    if record.scores is not None:
        text += "; grey: the kind's share of the weights that the plan could choose from"
    figure = figures.share_by_kind(record.plan, record.scores)
    yield "share_by_kind", "Share by kind of matrix", text, figure
    if record.scores is not None:
        title = figures.score_title(record.scores.metric)
        text = "averaged over the blocks of a matrix"
        figure = figures.score_by_depth(record.scores)
        yield "score_by_depth", f"{title[:1].upper()}{title[1:]} by layer", text, figure


def _maps(record: RunRecord) -> Entry:
    text = "layer by layer, orange where they train" + (
        "; dark: a high score" * bool(record.scores)
    )
    modules = record.scores.modules if record.scores else None
    return "block_maps", "The blocks of each matrix", text, figures.block_maps(record.plan, modules)


def _training(runs: Mapping[str, RunRecord]) -> Iterator[Entry]:
    if curves := {name: run.metrics for name, run in runs.items() if run.metrics}:
        text = "smoothed; every step behind it"
        yield "loss", "Training loss", text, figures.loss_curves(curves)
    if evaluations := {name: run.evaluations for name, run in runs.items() if run.evaluations}:
        between = max(map(len, evaluations.values())) > 2
        text = "before, during and after training" if between else "before and after training"
        yield "quality", "Held-out rows", text, figures.quality(evaluations)


def _memory(record: RunRecord, memory: Estimate | None) -> Iterator[Entry]:
    if memory is not None:
        text = f"{memory.batch} x {memory.length:,} tokens, {memory.dtype}; from shapes alone"
        peak = record.logged("smt_peak_memory_mb")
        if peak is not None:
            text += "; the dashed line was measured in this run, with its own batches"
        figure = figures.memory_bars(memory, None if peak is None else 1e6 * peak)
        yield "memory", "Peak of a step, by method", text, figure


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


def _page(record: RunRecord, sections: Mapping[str, tuple[str, Sequence[Entry], str]]) -> str:
    parts = []
    for title, (text, entries, after) in sections.items():
        if text or entries:
            shown = "".join(map(_figure, entries))
            lead = f"<p>{html.escape(text)}</p>" if text else ""
            body = f'<h2>{title}</h2>{lead}<div class="figures">{shown}</div>{after}'
            parts.append(f"<section>{body}</section>")
    made = record.plan.provenance
    cells = {key: v if isinstance(v, str) else json.dumps(v) for key, v in made.items()}
    rows = (
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in cells.items()
    )
    parts.append(_details("How the plan was made", f"<table>{''.join(rows)}</table>"))
    return Template(files("smt_ext.report").joinpath("page.html").read_text("utf-8")).substitute(
        title=html.escape(record.name),
        subtitle=html.escape(_subtitle(record)),
        numbers="".join(
            f"<div><dt>{html.escape(title)}</dt><dd>{html.escape(value)}</dd></div>"
            for title, value in _numbers(record).items()
        ),
        sections="\n".join(parts),
    )


def _figure(entry: Entry) -> str:
    name, title, text, figure = entry
    label = f'<svg role="img" aria-label="{html.escape(title)}"'
    svg = figures.to_svg(figure, name).replace("<svg", label, 1)
    caption = f"<strong>{html.escape(title)}</strong>{html.escape(text)}"
    return f'<figure id="{name}"><figcaption>{caption}</figcaption>{svg}</figure>'


def _details(title: str, body: str) -> str:
    return f'<details><summary>{title}</summary><div class="scroll">{body}</div></details>'


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
        found = [line[key] for line in record.evaluations if key in line]
        if len(found) > 1:
            numbers[title] = f"{form.format(found[0])} \u2192 {form.format(found[-1])}"
    if (peak := record.logged("smt_peak_memory_mb")) is not None:
        numbers["peak memory"] = f"{peak / 1e3:.2f} GB"
    return numbers


def _subtitle(record: RunRecord) -> str:
    made = record.plan.provenance
    sizes = sorted({layer.block_size for layer in record.plan.layers.values()})
    parts = [f"blocks of {' and '.join(f'{size} x {size}' for size in sizes)}"]
    parts += [f"budget {made['budget']}"] * ("budget" in made)
    parts += [f"scored by {made['metric']}"] * ("metric" in made)
    parts += [f"{made['num_batches']} batches"] * bool(made.get("num_batches"))
    if (steps := record.logged("step")) is not None:
        parts.append(f"{steps:,} steps")
    return f"Sparse Matrix Tuning: {', '.join(parts)}"
