"""The figures of a report, drawn with matplotlib."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from .._extras import require
from ..architectures import ROLES
from ..plan import BlockPlan, depth_of, kind_of
from ..planning.budget import Scores
from ..planning.score_file import SavedScores

require("a report", "matplotlib")
import matplotlib  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

__all__ = [
    "block_maps", "color_of", "curve", "kind_order", "mosaic", "score_by_depth", "share_by_kind",
    "to_svg",
]  # fmt: skip

# The roles of matrices, each in matplotlib's colour of its place.
_COLORED = ("q", "k", "v", "o", "gate", "up", "down")
_WIDTH, _HEIGHT = 4.2, 2.9  # inches
_TRAINS, _EMPTY = to_rgb("C1"), to_rgb("0.9")


def color_of(kind: str) -> str:
    """matplotlib's colour for a kind of module, such as ``v_proj``; grey for unknown ones."""
    role = next((role for role, ends in ROLES.items() if kind in ends), None)
    role = "gate" if role == "in" else role  # of an MLP without a gate
    return f"C{_COLORED.index(role) if role else 7}"


def kind_order(kind: str) -> tuple[str, str]:
    """Sorts kinds as they come in a layer: q, k, v, o, gate, up, down, others by name."""
    return color_of(kind), kind


def to_svg(figure: Figure) -> bytes:
    """An SVG file; the same for the same figure."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "smt_ext"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def share_by_kind(plan: BlockPlan, scores: SavedScores | None) -> Figure:
    """Share of the budget by kind of module; a mark at the kind's share of the target weights."""
    budget = plan.share_by(kind_of)
    held: dict[str, int] = defaultdict(int)
    for name, score in (scores.modules if scores else {}).items():
        held[kind_of(name)] += score.shape[0] * score.shape[1]
    kinds = sorted({*budget, *held}, key=lambda kind: budget.get(kind, 0))
    figure, axes = _axes("share of the trained parameters, percent", bars=len(kinds))
    share = [100 * budget.get(kind, 0) / plan.num_parameters for kind in kinds]
    rows = [f"{kind}  {value:.1f} %" for kind, value in zip(kinds, share, strict=True)]
    axes.barh(rows, share, 0.62, color=[color_of(kind) for kind in kinds])
    if held:
        marks = [100 * held[kind] / sum(held.values()) for kind in kinds]
        axes.scatter(marks, rows, 200, "k", marker="|", label="share of the target weights")
        _legend(figure)
    axes.set_xlim(0, 100)
    return figure


def curve(unit: str, values: Mapping[int, float]) -> Figure:
    """Step -> value, as a line."""
    figure, axes = _axes("step", unit)
    axes.plot(list(values), list(values.values()), marker=".")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return figure


def score_by_depth(scores: SavedScores) -> Figure:
    """Mean score of the blocks of each kind by layer (SMT paper, figure 5, for ``mean_abs``)."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(scores.modules, key=_order):
        found[kind_of(name)][_depth(name)].append(float(np.mean(scores.modules[name].values)))
    figure, axes = _axes("layer", f"mean score by {scores.metric}")
    for kind, by_depth in found.items():
        means = [float(np.mean(values)) for values in by_depth.values()]
        axes.plot(list(by_depth), means, marker=".", color=color_of(kind), label=kind)
    if all(values.min() > 0 for values in (score.values for score in scores.modules.values())):
        axes.set_yscale("log")
    _legend(figure)
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
        image = np.full((*grid, 4), (*_EMPTY, 1))
        if scores:
            level = np.searchsorted(ranked, scores[name].values) / len(ranked)
            image[..., :3] = 0.94 - 0.55 * level[..., None] ** 2
        for row, col in plan.layers[name].blocks if name in plan.layers else ():
            image[row, col, :3] = _TRAINS
        top, left = height * (index // across), width * (index % across)
        sheet[top : top + grid[0], left : left + grid[1]] = image
    return sheet


def _axes(x: str, y: str = "", bars: int = 0) -> tuple[Figure, Axes]:
    """For lines, or for so many bars that lie."""
    figure = Figure((_WIDTH, 0.9 + 0.42 * bars if bars else _HEIGHT), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y, axisbelow=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x" if bars else "both", alpha=0.4)
    return figure, axes


def _legend(figure: Figure) -> None:
    figure.legend(
        loc="outside upper left", ncols=4, frameon=False, fontsize="small", handlelength=1.2
    )


def _order(name: str) -> tuple[tuple[str, str], int]:
    return kind_order(kind_of(name)), _depth(name)


def _depth(name: str) -> int:
    number = depth_of(name).removeprefix("layer ")
    return int(number) if number.isdigit() else 0
