"""The figures of a report, drawn once with matplotlib, for the page (SVG) and as PNG."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from .._extras import require
from ..architectures import ROLES
from ..estimation.table import Estimate
from ..plan import BlockPlan, depth_of, kind_of
from ..planning.budget import Scores
from ..planning.score_file import SavedScores

require("a report", "matplotlib")
import matplotlib  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

__all__ = [
    "PALETTE", "block_maps", "color_of", "curves", "kind_order", "memory_bars", "mosaic",
    "score_by_depth", "share_by_kind", "style", "to_png", "to_svg",
]  # fmt: skip

# Roles and their colours on a light page. Every colour of a figure is one of these, so that the page
# can give each its own value on a dark screen.
PALETTE = {
    "surface": "#ffffff", "ink": "#1c2330", "muted": "#5c6878", "grid": "#dde2e9", "quiet": "#9aa5b4",
    "c0": "#3568b0", "c1": "#178a80", "c2": "#d96a0b", "c3": "#7f50b5", "c4": "#4f9130",
    "c5": "#a97c08", "c6": "#c43d70",
}  # fmt: skip
# The roles of matrices, each in the colour at its place.
_COLORED = ("q", "k", "v", "o", "gate", "up", "down")
_PARTS = {"weights": "c0", "optimizer": "c3", "gradients": "c1", "saved": "c2", "working": "quiet"}
# Inches. Narrow, so that text keeps its size on a phone.
_WIDTH, _HEIGHT = 4.2, 2.9
_MARKED = 50  # points; of more, none is marked


def color_of(kind: str) -> str:
    """The palette's role for a kind of module, such as ``v_proj``."""
    role = next((role for role, ends in ROLES.items() if kind in ends), None)
    role = "gate" if role == "in" else role  # of an MLP without a gate
    return f"c{_COLORED.index(role)}" if role else "quiet"


def kind_order(kind: str) -> tuple[str, str]:
    """Sorts kinds as they come in a layer: q, k, v, o, gate, up, down, others by name."""
    return color_of(kind), kind


def style() -> AbstractContextManager[None]:
    """matplotlib's settings while figures are made and written."""
    ink, muted, grid = PALETTE["ink"], PALETTE["muted"], PALETTE["grid"]
    settings: dict[str, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "smt_ext", "axes.edgecolor": grid,
        "axes.labelcolor": muted, "axes.titlesize": 10, "axes.titlecolor": ink,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.axisbelow": True, "grid.color": grid, "text.color": ink, "xtick.color": muted,
        "ytick.color": muted, "legend.frameon": False, "lines.linewidth": 1.8,
    }  # fmt: skip
    return matplotlib.rc_context(settings)  # type: ignore[arg-type]  # keys as a literal type


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element: no request, text as text, colours from the page's CSS."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    svg = "<svg" + buffer.getvalue().partition("<svg")[2]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Several figures share a page: their ids must differ.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for role, color in PALETTE.items():
        svg = svg.replace(color, f"var(--{role})")
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)


def to_png(figure: Figure, path: Path) -> None:
    """The figure on a light ground, for slides and papers."""
    figure.savefig(path, format="png", dpi=200)


def share_by_kind(plan: BlockPlan, scores: SavedScores | None) -> Figure:
    """Share of the budget by kind of module; a mark at the kind's share of the target weights."""
    budget = plan.share_by(kind_of)
    held: dict[str, int] = defaultdict(int)
    for name, score in (scores.modules if scores else {}).items():
        held[kind_of(name)] += score.shape[0] * score.shape[1]
    kinds = sorted({*budget, *held}, key=lambda kind: budget.get(kind, 0))
    figure, axes = _axes("share of the trained parameters, percent", rows=len(kinds))
    share = [100 * budget.get(kind, 0) / plan.num_parameters for kind in kinds]
    rows = [f"{kind}  {value:.1f} %" for kind, value in zip(kinds, share, strict=True)]
    axes.barh(rows, share, 0.62, color=[PALETTE[color_of(kind)] for kind in kinds])
    if held:
        marks = [100 * held[kind] / sum(held.values()) for kind in kinds]
        axes.scatter(marks, rows, s=200, color=PALETTE["ink"], marker="|",
                     label="share of the target weights")  # fmt: skip
        _legend(figure, axes)
    axes.set_xlim(0, 100)
    return figure


def curves(
    title: str, lines: Mapping[str, Mapping[int, float]], *, across: str = "step",
    roles: Sequence[str] = ("c2", "c0", "c1", "c3", "c4", "c5", "c6"),
) -> Figure:  # fmt: skip
    """Name -> place -> value, as lines."""
    figure, axes = _axes(across, title)
    for (name, line), role in zip(lines.items(), cycle(roles), strict=False):
        marker = "o" if len(line) <= _MARKED else None
        axes.plot(list(line), list(line.values()), marker=marker, markersize=3,
                  color=PALETTE[role], label=name)  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    _legend(figure, axes)
    return figure


def score_by_depth(scores: SavedScores) -> Figure:
    """Mean score of the blocks of each kind by layer (SMT paper, figure 5, for ``mean_abs``)."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(scores.modules, key=_order):
        found[kind_of(name)][_depth(name)].append(float(np.mean(scores.modules[name].values)))
    lines = {
        kind: {depth: float(np.mean(means)) for depth, means in by_depth.items()}
        for kind, by_depth in found.items()
    }
    roles = [*map(color_of, lines)]
    figure = curves(f"mean score by {scores.metric}", lines, across="layer", roles=roles)
    if all(mean > 0 for line in lines.values() for mean in line.values()):
        figure.axes[0].set_yscale("log")
    return figure


def block_maps(plan: BlockPlan, modules: Mapping[str, Scores] | None) -> Figure:
    """Every matrix as a picture of its blocks, by kind and layer: dark scores high, orange trains."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in sorted(modules or plan.layers, key=_order):
        kinds[kind_of(name)].append(name)
    sheets = {kind: mosaic(plan, modules, names) for kind, names in kinds.items()}
    width = 1.5 * _WIDTH
    heights = [0.96 * width * sheet.shape[0] / sheet.shape[1] for sheet in sheets.values()]
    figure = Figure((width, sum(heights) + 0.35 * len(sheets)), layout="constrained")
    grids = figure.subplots(len(sheets), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (kind, sheet) in zip(grids, sheets.items(), strict=True):
        axes.imshow(sheet, interpolation="nearest", clip_on=False)  # clip paths have random names
        first, last = kinds[kind][0], kinds[kind][-1]
        axes.set_title(f"{kind}, {depth_of(first)} to {depth_of(last)}", loc="left")
        axes.set_axis_off()
    return figure


def mosaic(
    plan: BlockPlan, modules: Mapping[str, Scores] | None, names: Sequence[str]
) -> np.ndarray:
    """The blocks of several matrices, eight side by side, one block of space between; RGBA."""
    scores = modules or {}
    # Shade by rank among all blocks, so that a few large scores do not wash out the rest.
    ranked = np.sort(np.concatenate([s.values.ravel() for s in scores.values()] or [np.zeros(1)]))
    grids = [scores[n].values.shape if scores else plan.layers[n].grid for n in names]
    height, width = (1 + max(grid[axis] for grid in grids) for axis in (0, 1))
    across = min(8, len(names))
    sheet = np.zeros((height * -(-len(names) // across), width * across, 4))
    for index, (name, grid) in enumerate(zip(names, grids, strict=True)):
        image = np.full((*grid, 4), matplotlib.colors.to_rgba(PALETTE["grid"]))
        if scores:
            level = np.searchsorted(ranked, scores[name].values) / len(ranked)
            image[..., :3] = 0.94 - 0.55 * level[..., None] ** 2
        for row, col in plan.layers[name].blocks if name in plan.layers else ():
            image[row, col] = matplotlib.colors.to_rgba(PALETTE["c2"])
        top, left = height * (index // across), width * (index % across)
        sheet[top : top + grid[0], left : left + grid[1]] = image
    return sheet


def memory_bars(estimate: Estimate, measured: float | None = None) -> Figure:
    """What is in memory at the peak of a step, by method; a line at the bytes that a run measured."""
    methods = list(reversed(estimate.methods))
    scale, unit = (1e9, "GB") if max(e.peak for e in methods) >= 1e9 else (1e6, "MB")
    figure, axes = _axes(f"{unit} at the peak of a step", rows=len(methods))
    left = np.zeros(len(methods))
    for part, role in _PARTS.items():
        widths = np.array([entry.at_peak[part] / scale for entry in methods])
        axes.barh([entry.title for entry in methods], widths, 0.62, left, color=PALETTE[role],
                  label=part)  # fmt: skip
        left += widths
    for index, total in enumerate(left):
        axes.annotate(f" {total:.3g}", (total, index), va="center")
    if measured is not None:
        axes.axvline(measured / scale, color=PALETTE["ink"], linewidth=1, linestyle=(0, (4, 3)),
                     label="measured")  # fmt: skip
    axes.set_xlim(0, 1.12 * max(left.max(), (measured or 0) / scale))
    _legend(figure, axes)
    return figure


def _axes(x: str, y: str = "", rows: int = 0) -> tuple[Figure, Axes]:
    """For lines, or for so many bars that lie."""
    figure = Figure((_WIDTH, 0.9 + 0.42 * rows if rows else _HEIGHT), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(axis="y", visible=not rows)
    return figure, axes


def _legend(figure: Figure, axes: Axes) -> None:
    across = min(len(axes.get_legend_handles_labels()[1]), 4)
    figure.legend(loc="outside upper left", ncols=across, handlelength=1.2, columnspacing=1.2)


def _order(name: str) -> tuple[tuple[str, str], int]:
    return kind_order(kind_of(name)), _depth(name)


def _depth(name: str) -> int:
    number = depth_of(name).removeprefix("layer ")
    return int(number) if number.isdigit() else 0
