"""Markdown tables and plots of the records; nothing is run, and what is missing is said."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smt_ext.plan import depth_of, kind_of
from smt_ext.report.figures import color_of, kind_order

from .estimates import Difference, Estimate, Line
from .matrix import Matrix, Trial
from .tasks import TWINS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["lines_of", "overlap", "write_tables"]

STEP_RECORD = Path(__file__).parents[1] / "records" / "step_bf16.json"
NAMES = {"base": "untrained", "full": "full fine-tuning", "smt": "SMT", "lora": "LoRA",
         "dora": "DoRA", "shira": "SHiRA", "spiel": "SpIEL-AG"}  # fmt: skip
METRIC_NAMES = {"mean_abs": "gradient", "weight": "magnitude"}
METHOD_COLORS = {
    "full": "C7",
    "smt": "C1",
    "lora": "C0",
    "dora": "C4",
    "shira": "C2",
    "spiel": "C9",
}
NOT_RUN = "not yet run"
NOTES = """\
`a ± b` is a mean over seeds and its standard error. For an accuracy the error holds that of the drawn
test rows, and that between seeds where there are two or more; for a loss, that between seeds. A
difference is taken row by row (accuracy) or seed by seed (loss), and is *none* where chance explains it
at 95 %. "?" stands where a single seed cannot tell. Questions with a near twin in the training set are
outside of every accuracy but their own column.

Under a heading stands the option with which `python -m benchmarks.quality run MATRIX.yaml` makes its
runs, development runs for the learning rates included.
"""

Records = Mapping[str, Mapping[str, Any]]


def write_tables(matrix: Matrix, records: Records, output: Path) -> Path:
    """Write ``tables.md`` and its plots; returns its path."""
    output.mkdir(parents=True, exist_ok=True)
    page = _Page(matrix, records, output)
    parts = [f"# Tables\n\n{NOTES}", page.runs()]
    for table, heading, body in _SECTIONS:
        if table in matrix.tables:
            parts.append(f"{heading}\n\n`--only {table}`\n\n{body(page)}")
    parts += [page.cost(), page.learning_rates()]
    path = output / "tables.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def lines_of(matrix: Matrix, records: Records, table: str) -> list[Line]:
    """The rows of a table in the matrix's order, with the records that there are."""
    lines: dict[Trial, Line] = {}
    for trial in matrix.of_table(table):
        line = lines.setdefault(trial.of_any_seed, Line(trial.of_any_seed))
        line.seeds += 1
        resolved = matrix.resolve(trial, records)
        if resolved is not None and resolved.id in records:
            line.records[trial.seed] = records[resolved.id]
    return list(lines.values())


def overlap(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Share of the blocks of the smaller of two plans that are in both."""
    mine, theirs = (
        {(name, *block) for name, blocks in record["blocks"].items() for block in blocks}
        for record in (one, other)
    )
    return len(mine & theirs) / min(len(mine), len(theirs))


class _Page:
    """What the sections share."""

    def __init__(self, matrix: Matrix, records: Records, output: Path) -> None:
        self.matrix = matrix
        self.records = records
        self.output = output

    def lines(self, table: str) -> list[Line]:
        return lines_of(self.matrix, self.records, table)

    def by_task(self, table: str) -> dict[str, list[Line]]:
        tasks: dict[str, list[Line]] = {}
        for line in self.lines(table):
            tasks.setdefault(line.trial.task, []).append(line)
        return tasks

    def plot(self, figure: Figure, name: str, text: str) -> str:
        figure.savefig(self.output / f"{name}.png", dpi=200)
        return f"![{text}]({name}.png)\n"

    def runs(self) -> str:
        """Where the records come from, and what is missing."""
        lines = [line for table in self.matrix.tables for line in self.lines(table)]
        used = {r["id"]: r for line in lines for r in line.records.values()}
        for wanted in self.matrix.wanted:
            for dev in self.matrix.dev_trials(wanted.trial, self.records):
                if dev.id in self.records:
                    used[dev.id] = self.records[dev.id]
        wanted = sum(line.seeds for line in lines)
        done = sum(len(line.records) for line in lines)
        text = [
            f"{len(used)} records; {done} of the {wanted} entries of the tables below have run."
        ]
        commits = sorted({record["commit"] for record in used.values()})
        if commits:
            text.append(f"Commits: {', '.join(commits)}.")
        # Each task has its own files; all of its runs must have read the same.
        data = {(r["trial"]["task"], json.dumps(r["data"], sort_keys=True)) for r in used.values()}
        if len(data) > len({task for task, _ in data}):
            text.append("**Records of one task were made from different data.**")
        environments = [record["environment"] for record in used.values()]
        if len({json.dumps(one, sort_keys=True) for one in environments}) > 1:
            text.append("**The records were made in different environments.**")
        text += dict.fromkeys(
            f"{one['CPU']}, {one['threads']}, torch {one['torch']}." for one in environments
        )
        edges = set()
        for wanted in self.matrix.wanted:
            choice = self.matrix.choose(wanted.trial, self.records)
            if choice is not None and choice.at_edge:
                edges.add(f"{wanted.trial.task} {_title(wanted.trial)} ({choice.lr:g})")
        if edges:
            text.append("Chosen at the edge of the grid of learning rates, where a wider one might "
                        f"do better: {', '.join(sorted(edges))}.")  # fmt: skip
        return "\n".join(text) + "\n" + self.hours()

    def hours(self) -> str:
        """How long the runs took, by task and table; a run counts where it is asked for first."""
        rows: list[list[str]] = []
        counted: set[str] = set()
        for task in dict.fromkeys(wanted.trial.task for wanted in self.matrix.wanted):
            times: dict[str, list[float]] = {}
            for wanted in self.matrix.wanted:
                if wanted.trial.task != task:
                    continue
                trial = self.matrix.resolve(wanted.trial, self.records)
                devs = self.matrix.dev_trials(wanted.trial, self.records)
                for table, one in [("learning rates", d) for d in devs] + [(wanted.table, trial)]:
                    if one is not None and one.id in self.records and one.id not in counted:
                        counted.add(one.id)
                        times.setdefault(table, []).append(self.records[one.id]["seconds"]["all"])
            rows += [
                [task, table, str(len(of)), f"{sum(of) / 3600:.2f}"] for table, of in times.items()
            ]
        if not rows:
            return ""
        whole = sum(float(hours) for *_, hours in rows)
        text = f"\nHours of the trials, summed ({whole:.1f}):\n\n"
        return text + _table(["task", "table", "trials", "hours"], rows)

    def learning_rates(self) -> str:
        """What each rate was chosen from; an unfinished search has what has run."""
        rows: dict[str, dict[float, str]] = {}
        for wanted in self.matrix.wanted:
            devs = self.matrix.dev_trials(wanted.trial, self.records)
            found = {dev: self.records[dev.id] for dev in devs if dev.id in self.records}
            choice = self.matrix.choose(wanted.trial, self.records)
            for dev, record in found.items():
                budget = "" if dev.budget is None else f", {dev.budget:g} %"
                row = rows.setdefault(f"{dev.task}, {_title(dev)}{budget}", {})
                assert dev.lr is not None
                loss = record["held_out_loss"]["dev"]
                cell = "not finite" if loss is None else f"{loss:.4f}"
                best = choice is not None and choice.lr == dev.lr
                row[dev.lr] = f"**{cell}**" if best else cell
        if not rows:
            return ""
        rates = sorted({lr for row in rows.values() for lr in row})
        return (
            "## Learning rates\n\nLoss on the development rows by learning rate; the bold one was taken."
            "\n\n"
            + _table(
                ["method", *(f"{lr:g}" for lr in rates)],
                [[name, *(row.get(lr, "") for lr in rates)] for name, row in rows.items()],
            )
        )

    def cost(self) -> str:
        """Table 6."""
        tasks = self.by_task("methods") if "methods" in self.matrix.tables else {}
        rows = []
        for line in (line for lines in tasks.values() for line in lines):
            if line.records and line.trial.method != "base":
                # Of one seed: its batches are the same for all, and peaks depend on them.
                record = line.first
                rows.append([
                    line.trial.task, _title(line.trial), f"{record['trained']['percent']:.2f}",
                    f"{record['memory']['peak'] / 1e6:,.0f}",
                    f"{record['memory']['saved'] / 1e6:,.0f}",
                ])  # fmt: skip
        text = "## 6. Time and memory\n\n"
        if rows:
            text += (
                "In the runs of table 1, of the whole process, model and planning included. Each ran at "
                "its own hour, so that times are compared below.\n\n"
            )
            text += _table(
                ["task", "method", "trains %", "peak, MB", "saved for backward, MB"], rows
            )
        if STEP_RECORD.exists():
            record = json.loads(STEP_RECORD.read_text(encoding="utf-8"))
            keys = ["method", "trainable %", "seconds", "x floor", "peak MB", "saved MB"]
            settings = record["settings"]
            text += (
                f"\nSide by side in one run (`benchmarks/step.py`, {record['commit']}): "
                f"{settings['batch']} x {settings['length']} tokens, {settings['dtype']}.\n\n"
            )
            text += _table(
                keys, [[str(row.get(key, "")) for key in keys] for row in record["rows"]]
            )
        return text


def _quality(lines: Sequence[Line], reference: Line | None, *, budget: bool = False,
             block_size: bool = False) -> str:  # fmt: skip
    """Losses and accuracies, and their difference to a reference line."""
    header = ["method", *(["budget %"] if budget else []), *(["L"] if block_size else []),
              "trains %", "lr", "seeds", "held-out loss", "accuracy %", "near twins %"]  # fmt: skip
    if reference is not None:
        header += ["loss beyond the first", "accuracy beyond the first"]
    rows = []
    for line in lines:
        trial = line.trial
        row = [_title(trial), *([f"{trial.budget:g}"] if budget else []),
               *([str(trial.block_size)] if block_size else [])]  # fmt: skip
        if not line.records:
            rows.append([*row, NOT_RUN])
            continue
        record = line.first
        twins = line.accuracy([TWINS]) if TWINS in line.sets() else None
        rates = sorted({r["trial"]["lr"] for r in line.records.values()} - {None})
        row += [f"{record['trained']['percent']:.2f}", ", ".join(f"{lr:g}" for lr in rates),
                f"{len(line.records)} of {line.seeds}", _number(line.loss(), 4),
                _percent(line.accuracy()), _percent(twins)]  # fmt: skip
        if reference is not None and line is not reference:
            row += _beyond(line, reference)
        rows.append(row)
    return _table(header, rows)


def _reference(lines: list[Line], **fields: Any) -> Line | None:
    """The line of SMT by gradient that others are compared with, moved to the front."""
    for line in lines:
        wanted = {"method": "smt", "metric": "mean_abs", **fields}
        if all(getattr(line.trial, name) == value for name, value in wanted.items()):
            lines.remove(line)
            lines.insert(0, line)
            return line
    return None


def _methods(page: _Page) -> str:
    parts = []
    for task, lines in page.by_task("methods").items():
        reference = _reference(lines, targets="qkv")
        parts += [f"### {task}\n", _quality(lines, reference)]
        done = [line for line in lines if line.records]
        if done:
            sets = done[0].sets()
            rows = [
                [_title(line.trial), *(_percent(line.accuracy([name])) for name in sets)]
                for line in done
            ]
            parts.append(_table(["method", *sets], rows))
        trained = [line for line in done if line.trial.method != "base"]
        if trained:
            curves = _loss_curves(trained)
            parts.append(page.plot(curves, f"curves-{task}", f"training loss, {task}"))
    return "\n".join(parts)


def _plateau(page: _Page) -> str:
    parts = []
    for task, lines in page.by_task("plateau").items():
        parts += [f"### {task}\n", _quality(lines, None, budget=True)]
        if any(line.records for line in lines):
            plot = _budget_plot(lines)
            parts.append(page.plot(plot, f"plateau-{task}", f"quality by budget, {task}"))
    return "\n".join(parts)


def _largest(page: _Page) -> str:
    """Against SMT; then against full fine-tuning, and against the same method's row in table 1."""
    parts = []
    small = page.lines("methods")
    for task, lines in page.by_task("largest").items():
        parts += [f"### {task}\n", _quality(lines, _reference(lines))]
        full = next((line for line in lines if line.trial.method == "full"), None)
        rows = []
        for line in lines:
            if line is not full:
                title = _title(line.trial)
                same = (
                    one for one in small if (one.trial.task, _title(one.trial)) == (task, title)
                )
                rows.append([title, *_beyond(line, full), *_beyond(line, next(same, None))])
        header = ["method", "loss beyond full fine-tuning", "accuracy beyond full fine-tuning"]
        header += ["loss beyond table 1", "accuracy beyond table 1"]
        parts.append(_table(header, rows))
    return "\n".join(parts)


def _qkv(page: _Page) -> str:
    return "\n".join(
        f"### {task}\n\n{_quality(lines, _reference(lines, targets='qkv'))}"
        for task, lines in page.by_task("qkv").items()
    )


def _allocation(page: _Page) -> str:
    """Share of the budget against share of the targets, by kind."""
    rows = []
    kinds: dict[str, None] = {}
    for line in page.lines("allocation"):
        for record in line.records.values():
            kinds |= dict.fromkeys(record["plan"]["targets_by_kind"])
    ordered = sorted(kinds, key=kind_order)
    for line in page.lines("allocation"):
        if not line.records:
            rows.append([f"{line.trial.task}, {_title(line.trial)}", NOT_RUN])
            continue
        plan = line.first["plan"]
        held, spent = plan["targets_by_kind"], plan["by_kind"]
        rows.append([
            f"{line.trial.task}, {_title(line.trial)}",
            *(f"{100 * spent.get(kind, 0) / sum(spent.values()):.1f} of "
              f"{100 * held[kind] / sum(held.values()):.1f}" if kind in held else ""
              for kind in ordered),
        ])  # fmt: skip
    return (
        "Percent of the budget, of percent of the target "
        "weights: equal shares would mean that selection does not prefer the kind. With "
        "grouped-query attention keys and values hold fewer weights than queries.\n\n"
        + _table(["plan", *ordered], rows)
    )


def _gradients(page: _Page) -> str:
    rows = []
    plots = ""
    kinds: list[str] = []
    for line in page.lines("gradients"):
        if not line.records:
            rows.append([line.trial.task, NOT_RUN])
            continue
        means = line.first["mean_score"]
        kinds = sorted({kind_of(name) for name in means}, key=kind_order)
        # Matrices of one kind have one size.
        rows.append([line.trial.task, *(
            f"{statistics.mean(v for n, v in means.items() if kind_of(n) == kind):.2g}"
            for kind in kinds)])  # fmt: skip
        task = line.trial.task
        plots += page.plot(_gradient_plot(means, kinds), f"gradients-{task}",
                           f"mean |gradient| by layer, {task}")  # fmt: skip
    return _table(["task", *kinds], rows) + "\n" + plots


def _block_size(page: _Page) -> str:
    return "\n".join(
        f"{task}\n\n{_quality(lines, _reference(lines, block_size=64), block_size=True)}"
        for task, lines in page.by_task("block_size").items()
    )


def _plans(page: _Page) -> str:
    """Overlap of each plan with the reference plan and with the one of most batches."""
    found = [(line, record) for line in page.lines("plans") for record in line.records.values()]
    by_gradient = [
        (line.trial, record) for line, record in found
        if line.trial.metric == "mean_abs" and line.trial.task == "math"
        and record["trial"]["seed"] == 0
    ]  # fmt: skip
    text = "Share of blocks in common with the plan by gradient"
    if not by_gradient:
        return f"{text}: {NOT_RUN}.\n"
    sizes = {trial.plan_batches or 0: record for trial, record in by_gradient}
    most = max(sizes)
    usual = int(page.matrix.reference.get("plan_batches", most))
    columns = [size for size in dict.fromkeys((usual, most)) if size in sizes]
    plan = sizes[most]["plan"]
    chance = sum(plan["by_kind"].values()) / sum(plan["targets_by_kind"].values())
    rows = []
    for line, record in found:
        trial = line.trial
        batches = "" if trial.plan_batches is None else f", {trial.plan_batches} batches"
        what = f"{trial.task}, {_title(trial)}{batches}, seed {record['trial']['seed']}"
        rows.append([what, *(f"{100 * overlap(record, sizes[size]):.1f}" for size in columns)])
    lacking = sum(line.seeds - len(line.records) for line in page.lines("plans"))
    text += f" of so many batches, percent; by chance it would be {100 * chance:.1f}."
    if lacking:
        text += f" {lacking} plans are {NOT_RUN}."
    return f"{text}\n\n" + _table(["plan", *(f"{size} batches" for size in columns)], rows)


# Table of the matrix, its heading, and what makes the text below it.
_SECTIONS: tuple[tuple[str, str, Callable[[_Page], str]], ...] = (
    ("methods", "## 1. Methods at one budget", _methods),
    ("plateau", "## 2. More budget", _plateau),
    ("largest", "## The largest budget", _largest),
    ("qkv", "## 3. Queries, keys or values alone", _qkv),
    ("allocation", "### Where selection puts the budget", _allocation),
    ("gradients", "## 4. Mean |gradient|", _gradients),
    ("block_size", "## 5. Ablations\n\n### Block size", _block_size),
    ("plans", "### Plans", _plans),
)


def _loss_curves(lines: Sequence[Line]) -> Figure:
    """Of the first seed: the methods on the left, SMT's ways to choose blocks on the right.

    All saw the same batches, so that a curve less full fine-tuning's is free of what is hard or easy
    about a batch.
    """
    from matplotlib.figure import Figure

    full = next((line.first["loss_curve"] for line in lines if line.trial.method == "full"), None)
    methods: dict[str, Line] = {}
    for line in lines:
        methods.setdefault(line.trial.method, line)
    smt = [line for line in lines if line.trial.method == "smt"]
    panels = (
        ("methods", [(line, _color(line.trial)) for line in methods.values()]),
        ("SMT: which blocks", [(one, f"C{n}") for n, one in enumerate(smt)]),
    )
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for axes, (title, drawn) in zip(both, panels, strict=True):
        for line, color in drawn:
            points = [
                (step, loss - (other or 0.0))
                for step, (loss, other) in enumerate(
                    zip(line.first["loss_curve"], full or [0.0] * line.trial.steps, strict=True),
                    start=1,
                )
                if loss is not None and other is not None
            ]
            width = max(1, len(points) // 16)
            parts = [points[at : at + width] for at in range(0, len(points), width)]
            axes.plot(
                [statistics.mean(step for step, _ in part) for part in parts],
                [statistics.mean(loss for _, loss in part) for part in parts],
                color=color, label=_title(line.trial),
            )  # fmt: skip
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.legend(fontsize=7)
    both[0].set_ylabel("training loss" + (" beyond full fine-tuning's" if full else ""))
    return figure


def _budget_plot(lines: Sequence[Line]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, scale in ((left, "held-out loss", 1.0), (right, "accuracy, %", 100.0)):
        for method in dict.fromkeys(line.trial.method for line in lines):
            points = []
            for line in lines:
                value = line.loss() if axes is left else line.accuracy()
                if line.trial.method == method and value is not None:
                    percent = line.first["trained"]["percent"]
                    points.append((percent, scale * value.mean, scale * (value.error or 0.0)))
            if points:
                x, y, error = zip(*sorted(points), strict=True)
                axes.errorbar(x, y, error, marker="o", markersize=4, capsize=2,
                              color=METHOD_COLORS[method], label=NAMES[method])  # fmt: skip
        axes.set_xlabel("parameters that train, % of the model")
        axes.set_ylabel(name)
    left.legend()
    return figure


def _gradient_plot(means: Mapping[str, float], kinds: Sequence[str]) -> Figure:
    figure, axes = _axes()
    for kind in kinds:
        points = sorted(
            (int(depth_of(name).split()[-1]), value)
            for name, value in means.items()
            if kind_of(name) == kind
        )
        axes.plot(*zip(*points, strict=True), color=color_of(kind), label=kind)
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("mean |gradient| of a weight")
    axes.legend(fontsize=7, ncols=2)
    return figure


def _axes() -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    return figure, figure.subplots()


def _color(trial: Trial) -> str:
    return METHOD_COLORS[trial.method]


def _title(trial: Trial) -> str:
    parts = [NAMES[trial.method]]
    if trial.metric is not None:
        parts.append(METRIC_NAMES.get(trial.metric, trial.metric))
    if trial.targets is not None:
        parts.append(trial.targets)
    return ", ".join(parts)


def _number(value: Estimate | None, digits: int, scale: float = 1.0) -> str:
    if value is None:
        return ""
    error = "" if value.error is None else f" ± {scale * value.error:.{digits}f}"
    return f"{scale * value.mean:.{digits}f}{error}"


def _percent(value: Estimate | None) -> str:
    return _number(value, 1, 100.0)


def _beyond(line: Line, other: Line | None) -> list[str]:
    """Loss and accuracy of a line less another's; empty cells where there is no other."""
    if other is None:
        return ["", ""]
    return [_verdict(line.loss_beyond(other), 1, 4), _verdict(line.accuracy_beyond(other), 100, 1)]


def _verdict(value: Difference | None, scale: float, digits: int) -> str:
    if value is None:
        return ""
    number = f"{scale * value.mean:+.{digits}f}"
    if value.error is None:
        return f"{number} ?"
    number += f" ± {scale * value.error:.{digits}f}"
    return number if value.is_real else f"none ({number})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; short rows are filled up."""
    filled = [[*row, *[""] * (len(header) - len(row))] for row in rows]
    lines = [header, ["---"] * len(header), *filled]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n"
                   for line in lines)  # fmt: skip
