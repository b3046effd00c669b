"""The HTML of a report: one file with its figures, styles, script and data in it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..plan import BlockPlan, depth_of, kind_of, natural_order
from . import figures
from .run_record import RunRecord

__all__ = ["Entry", "Section", "page"]

# More blocks than this would make the page slow to open.
_MAX_BLOCKS = 400_000


@dataclass(frozen=True)
class Entry:
    """A figure: a name for its element and file, a title, a line of explanation."""

    name: str
    title: str
    text: str
    figure: Figure


@dataclass(frozen=True)
class Section:
    """Figures under a title; ``numbers`` is plain text to unfold. Not shown if there is nothing."""

    title: str
    entries: Sequence[Entry] = ()
    text: str = ""
    numbers: str = ""


def page(record: RunRecord, sections: Sequence[Section]) -> str:
    """The whole page. The block maps come before the section about training."""
    budget, scores, *others = sections
    plan = record.plan
    data, maps = _maps(record)
    parts = [_section(budget, lead=_leader(plan), after=_kind_table(plan)), _section(scores), maps]
    parts += [_section(section) for section in others]
    text = files("smt_ext.report").joinpath("page.html").read_text("utf-8")
    return Template(text).substitute(
        policy=_policy(text),
        title=_escape(record.name),
        subtitle=_escape(_subtitle(record)),
        numbers=_numbers(record),
        sections="\n".join(parts),
        provenance="".join(
            f"<tr><td>{_escape(key)}</td><td>{_escape(_plain(value))}</td></tr>"
            for key, value in plan.provenance.items()
        ),
        maps=data,
    )


def _policy(template: str) -> str:
    """Nothing is loaded from anywhere, and the page's own script is all that runs."""
    start, end = template.rindex("<script>") + len("<script>"), template.rindex("</script>")
    script = Template(template[start:end]).substitute()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _section(section: Section, *, lead: str = "", after: str = "") -> str:
    if not (section.entries or section.text):
        return ""
    shown = "".join(
        f'<figure id="{entry.name}"><figcaption><strong>{_escape(entry.title)}</strong>'
        f"{_escape(entry.text)}</figcaption>{_labelled(entry)}</figure>"
        for entry in section.entries
    )
    if section.numbers:
        after += _details(f"<pre>{_escape(section.numbers)}</pre>")
    text = _escape(section.text or lead)
    return (
        f"<section><h2>{_escape(section.title)}</h2>{f'<p>{text}</p>' if text else ''}"
        f'<div class="figures">{shown}</div>{after}</section>'
    )


def _labelled(entry: Entry) -> str:
    label = f'<svg role="img" aria-label="{_escape(entry.title)}"'
    return figures.to_svg(entry.figure, entry.name).replace("<svg", label, 1)


def _details(body: str, title: str = "In numbers") -> str:
    return f'<details><summary>{title}</summary><div class="scroll">{body}</div></details>'


def _leader(plan: BlockPlan) -> str:
    shares = plan.share_by(kind_of)
    kind = max(shares, key=lambda k: shares[k])
    share = 100 * shares[kind] / plan.num_parameters
    return f"{share:.1f} % of the trained parameters are in {kind}."


def _kind_table(plan: BlockPlan) -> str:
    modules: defaultdict[str, int] = defaultdict(int)
    blocks: defaultdict[str, int] = defaultdict(int)
    for name, layer in plan.layers.items():
        modules[kind_of(name)] += 1
        blocks[kind_of(name)] += len(layer.blocks)
    shares = plan.share_by(kind_of)
    rows = "".join(
        f"<tr><td>{_escape(kind)}</td><td>{modules[kind]:,}</td><td>{blocks[kind]:,}</td>"
        f"<td>{shares[kind]:,}</td><td>{100 * shares[kind] / plan.num_parameters:.1f} %</td></tr>"
        for kind in sorted(shares, key=figures.kind_order)
    )
    titles = ("kind", "modules", "blocks", "parameters", "share")
    head = "".join(f"<th>{title}</th>" for title in titles)
    return _details(f"<table><tr>{head}</tr>{rows}</table>")


def _maps(record: RunRecord) -> tuple[str, str]:
    """The block maps' data as JSON, and the section that shows them."""
    plan = record.plan
    scores = record.scores.modules if record.scores else {}
    matrices: list[dict[str, Any]] = []
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for index, name in enumerate(sorted(scores or plan.layers, key=natural_order)):
        layer, score = plan.layers.get(name), scores.get(name)
        source = score or layer
        assert source is not None
        rows, cols = (-(-side // source.block_size) for side in source.shape)
        blocks = [row * cols + col for row, col in layer.blocks] if layer else []
        matrices.append(
            {
                "name": name,
                "shape": source.shape,
                "size": source.block_size,
                "rows": rows,
                "cols": cols,
                "blocks": blocks,
                "scores": None if score is None else _float32(score.values),
                "color": figures.color_of(kind_of(name)),
            }
        )
        label = _escape(f"{name}: {len(blocks)} of {rows * cols} blocks train")
        kinds[kind_of(name)].append(
            f'<div class="map"><canvas id="map-{index}" role="img" aria-label="{label}"></canvas>'
            f"{_escape(depth_of(name))}</div>"
        )
    if sum(m["rows"] * m["cols"] for m in matrices) > _MAX_BLOCKS:
        text = "<p>There are too many to show one by one: see block_maps.png.</p>"
        return _script_json(
            {"metric": "", "matrices": []}
        ), f"<section><h2>Blocks</h2>{text}</section>"
    key = "".join(
        f'<span><i style="background:var(--{figures.color_of(kind)})"></i>trains, {_escape(kind)}</span>'
        for kind in sorted(kinds, key=figures.kind_order)
    )
    if scores:
        key += '<span><i class="ramp"></i>frozen, from low to high score</span>'
    body = "".join(
        f'<figure class="kind"><h3>{_escape(kind)}</h3>'
        f'<div class="maps">{"".join(kinds[kind])}</div></figure>'
        for kind in sorted(kinds, key=figures.kind_order)
    )
    metric = figures.score_title(record.scores.metric) if record.scores else ""
    text = "Each matrix as a picture of its blocks. Point at one, or tap it, for its place"
    text += " and score." if scores else "."
    section = f'<section><h2>Blocks</h2><p>{text}</p><p class="key">{key}</p>{body}</section>'
    return _script_json({"metric": metric, "matrices": matrices}), section


def _numbers(record: RunRecord) -> str:
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
    return "".join(
        f"<div><dt>{_escape(title)}</dt><dd>{_escape(value)}</dd></div>"
        for title, value in numbers.items()
    )


def _subtitle(record: RunRecord) -> str:
    plan = record.plan
    sizes = sorted({layer.block_size for layer in plan.layers.values()})
    made = plan.provenance
    parts = [f"blocks of {' and '.join(f'{size} x {size}' for size in sizes)}"]
    if "budget" in made:
        parts.append(f"budget {made['budget']}")
    if "metric" in made:
        parts.append(f"scored by {made['metric']}")
    if made.get("num_batches"):
        parts.append(f"{made['num_batches']} batches")
    if (steps := record.logged("step")) is not None:
        parts.append(f"{steps:,} steps")
    return f"Sparse Matrix Tuning: {', '.join(parts)}"


def _float32(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode("ascii")


def _script_json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
