"""The table of an evaluation on a suite."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from .suite_eval import COLUMNS, Score, SuiteResults

__all__ = ["print_suite"]


def print_suite(results: SuiteResults, console: Console | None = None) -> None:
    """Accuracy in percent with its standard error, by set and column, and the average."""
    console = console or Console(soft_wrap=True)
    columns = [c for c in COLUMNS if any(c in one.scores for one in results.sets)]
    table = Table(
        title=f"{results.suite}: right answers in %, ± standard error",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in ("set", "rows", *columns):
        table.add_column(column, justify="left" if column == "set" else "right", no_wrap=True)
    for one in results.sets:
        table.add_row(one.name, f"{one.rows:,}", *(_cell(one.scores.get(c)) for c in columns))
    table.add_section()
    table.add_row("average", "", *(_cell(results.average.get(c)) for c in columns))
    console.print(table)
    if results.limit is not None:
        console.print(
            f"at most {results.limit:,} rows of each set, drawn with seed {results.seed}",
            highlight=False,
        )
    if results.absent:
        console.print(f"absent from the data folder: {', '.join(results.absent)}", highlight=False)
    if skipped := sum(one.skipped for one in results.sets):
        console.print(f"skipped as too long: {skipped:,} rows", highlight=False)


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    error = "" if score.stderr is None else f"±{100 * score.stderr:.1f}"
    return f"{100 * score.accuracy:.1f}{error}"
