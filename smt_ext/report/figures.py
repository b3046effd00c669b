"""The figures of a report, drawn once with matplotlib, for the page (SVG) and as PNG."""

from __future__ import annotations

import io
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._extras import require
from ..architectures import ROLES
from ..estimation.table import Estimate
from ..plan import BlockPlan, depth_of, kind_of
from ..planning.budget import Scores
from ..planning.score_file import SavedScores

require("a report", "matplotlib")
import matplotlib  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "PALETTE", "block_maps", "color_of", "kind_order", "loss_curves", "memory_bars", "mosaic", "quality",
    "score_by_depth", "score_title", "share_by_kind", "style", "to_png", "to_svg",
]  # fmt: skip

# Roles and their colours on a light page. Every colour of a figure is one of these, so that the page
# can give each its own value on a dark screen.
PALETTE = {
    "surface": "#ffffff", "ink": "#1c2330", "muted": "#5c6878", "grid": "#dde2e9", "quiet": "#9aa5b4",
    "c0": "#3568b0", "c1": "#178a80", "c2": "#d96a0b", "c3": "#7f50b5", "c4": "#4f9130",
    "c5": "#a97c08", "c6": "#c43d70",
}  # fmt: skip
# The roles of matrices, each in the colour at its place; the in-matrix of an MLP without a gate takes
# the gate's.
_COLORED = ("q", "k", "v", "o", "gate", "up", "down")
_RUNS = ("c2", "c0", "c1", "c3", "c4", "c5", "c6")
_PARTS = {"weights": "c0", "optimizer": "c3", "gradients": "c1", "saved": "c2", "working": "quiet"}
# Inches. Narrow, so that text keeps its size on a phone.
_WIDTH, _HEIGHT = 4.2, 2.9
_METRICS = {
    "mean_abs": "mean |gradient|",
    "abs_mean": "|mean gradient|",
    "l1": "sum of |gradient|",
    "l2": "L2 norm of the gradient",
    "activation": "mean |input|",
    "wanda": "mean |weight| x rms of the input",
    "weight": "mean |weight|",
    "random": "random score",
}


def color_of(kind: str) -> str:
    """The palette's role for a kind of module, such as ``v_proj``."""
    role = next((role for role, ends in ROLES.items() if kind in ends), None)
    role = "gate" if role == "in" else role
    return f"c{_COLORED.index(role)}" if role else "quiet"


def kind_order(kind: str) -> tuple[int, str]:
    """Sorts kinds as they come in a layer: q, k, v, o, gate, up, down, others by name."""
    return list(PALETTE).index(color_of(kind)) if color_of(kind) != "quiet" else len(PALETTE), kind


def score_title(metric: str) -> str:
    """The metric in words, for an axis."""
    return _METRICS.get(metric, metric)


def style() -> AbstractContextManager[None]:
    """matplotlib's settings while figures are made and written."""
    ink, muted, grid = PALETTE["ink"], PALETTE["muted"], PALETTE["grid"]
    settings: dict[str, Any] = {
        "font.family": "sans-serif", "font.size": 10, "svg.fonttype": "none",
        "svg.hashsalt": "smt_ext", "figure.facecolor": PALETTE["surface"],
        "axes.facecolor": PALETTE["surface"], "axes.edgecolor": grid, "axes.labelcolor": muted,
        "axes.titlesize": 10, "axes.titlecolor": ink, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": grid,
        "text.color": ink, "xtick.color": muted, "ytick.color": muted, "legend.frameon": False,
        "legend.fontsize": 10, "lines.linewidth": 1.8,
    }  # fmt: skip
    return matplotlib.rc_context(settings)  # type: ignore[arg-type]  # keys as a literal type


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element: no request, text as text, colours from the page's CSS."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
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
    """Share of the budget by kind of module, beside the kind's share of the target weights."""
    budget = plan.share_by(kind_of)
    held: dict[str, int] = defaultdict(int)
    for name, score in (scores.modules if scores else {}).items():
        held[kind_of(name)] += score.shape[0] * score.shape[1]
    kinds = sorted({*budget, *held}, key=lambda kind: budget.get(kind, 0))
    figure, axes = _axes(height=0.9 + 0.42 * len(kinds))
    place = np.arange(len(kinds))
    share = [100 * budget.get(kind, 0) / plan.num_parameters for kind in kinds]
    thickness = 0.42 if held else 0.7
    bars = axes.barh(place + (thickness / 2 if held else 0), share, thickness,
                     color=[PALETTE[color_of(kind)] for kind in kinds])  # fmt: skip
    axes.bar_label(bars, [f"{value:.1f} %" for value in share], padding=3)
    if held:
        whole = sum(held.values())
        axes.barh(place - thickness / 2, [100 * held[kind] / whole for kind in kinds], thickness,
                  color=PALETTE["grid"], label="share of the target weights")  # fmt: skip
        _legend(figure, axes)
    axes.set_yticks(place, kinds)
    axes.set_xlim(0, 114)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("share of the trained parameters, percent")
    axes.grid(axis="y", visible=False)
    return figure


def score_by_depth(scores: SavedScores) -> Figure:
    """Mean score of the blocks of each kind by layer (SMT paper, figure 5, for ``mean_abs``)."""
    lines: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, score in scores.modules.items():
        lines[kind_of(name)][_depth(name)].append(float(np.mean(score.values)))
    figure, axes = _axes("layer", score_title(scores.metric))
    lowest = math.inf
    for kind in sorted(lines, key=kind_order):
        depths = sorted(lines[kind])
        means = [float(np.mean(lines[kind][depth])) for depth in depths]
        lowest = min(lowest, *means)
        axes.plot(
            depths, means, marker="o", markersize=3, color=PALETTE[color_of(kind)], label=kind
        )
    axes.set_yscale("log" if lowest > 0 else "linear")
    _legend(figure, axes)
    return figure


def block_maps(plan: BlockPlan, modules: Mapping[str, Scores] | None) -> Figure:
    """Every matrix as a picture of its blocks, by kind and layer: dark scores high, orange trains."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in sorted(modules or plan.layers, key=lambda n: (kind_order(kind_of(n)), _depth(n))):
        kinds[kind_of(name)].append(name)
    sheets = {kind: mosaic(plan, modules, names) for kind, names in kinds.items()}
    width = 1.5 * _WIDTH
    heights = [0.96 * width * sheet.shape[0] / sheet.shape[1] for sheet in sheets.values()]
    size = (width, sum(heights) + 0.35 * len(sheets))
    figure = Figure(figsize=size, layout="constrained")
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


def loss_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Training loss by step, smoothed over about a tenth of the run; the raw one behind it."""
    figure, axes = _axes("step", "training loss, nats a token")
    for (name, lines), role in zip(runs.items(), cycle(_RUNS), strict=False):
        steps = [line["step"] for line in lines]
        losses = np.array([line["loss"] for line in lines])
        axes.plot(steps, losses, color=PALETTE[role], alpha=0.25, linewidth=1)
        axes.plot(steps, _smooth(losses), color=PALETTE[role], label=name,
                  marker="o" if len(steps) == 1 else None)  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    _legend(figure, axes)
    return figure


def quality(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Held-out loss and, where it was measured, accuracy, by step; the last value is written out."""
    keys = {"loss": ("loss, nats a token", 1), "accuracy": ("right answers, %", 100)}
    shown = [key for key in keys if any(key in line for lines in runs.values() for line in lines)]
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        title, scale = keys[key]
        for (name, lines), role in zip(runs.items(), cycle(_RUNS), strict=False):
            points = [(line["step"], scale * line[key]) for line in lines if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3,
                          color=PALETTE[role], label=name)  # fmt: skip
        axes.margins(x=0.04, y=0.12)
        if key == "accuracy":
            axes.set_ylim(0, max(1, axes.get_ylim()[1]))
        _write_ends(axes)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_xlabel("step")
        axes.set_title(title, loc="left")
    _legend(figure, figure.axes[0])
    return figure


def memory_bars(estimate: Estimate, measured: float | None = None) -> Figure:
    """What is in memory at the peak of a step, by method; a line at the bytes that a run measured."""
    methods = list(reversed(estimate.methods))
    figure, axes = _axes(height=1.2 + 0.4 * len(methods))
    scale, unit = (1e9, "GB") if max(e.peak for e in methods) >= 1e9 else (1e6, "MB")
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
    axes.set_xlabel(f"{unit} at the peak of a step")
    axes.grid(axis="y", visible=False)
    _legend(figure, axes)
    return figure


def _axes(x: str = "", y: str = "", height: float = _HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    across = min(len(labels), 4)
    # matplotlib fills columns first; a legend is read by rows.
    order = [i for first in range(across) for i in range(first, len(labels), across)]
    figure.legend(
        [handles[i] for i in order], [labels[i] for i in order], loc="outside upper left",
        ncols=across, handlelength=1.2, columnspacing=1.2,
    )  # fmt: skip


def _depth(name: str) -> int:
    number = depth_of(name).removeprefix("layer ")
    return int(number) if number.isdigit() else 0


def _smooth(values: np.ndarray) -> list[float]:
    """Exponential mean with a memory of a tenth of the run, without a bias at its start."""
    weight = 1 - 1 / max(1.0, len(values) / 10)
    total = norm = 0.0
    out = []
    for value in values:
        total, norm = weight * total + value, weight * norm + 1
        out.append(total / norm)
    return out


def _write_ends(axes: Axes) -> None:
    """The last value of every line beside its end, in the line's colour, none over another."""
    low, high = axes.get_ylim()
    ends = [(*np.asarray(line.get_xydata())[-1], line.get_color()) for line in axes.lines]
    place = -math.inf
    for x, y, color in sorted(ends, key=lambda end: end[1]):
        place = max(y, place + 0.075 * (high - low))
        axes.annotate(f"{y:#.3g}", (x, place), (5, 0), textcoords="offset points", va="center",
                      color=color, annotation_clip=False)  # fmt: skip
