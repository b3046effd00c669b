"""What a run says at its end."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ..evaluation_log import Evaluation
from ..train import Results

__all__ = ["print_results"]


def print_results(results: Results, next_commands: list[str]) -> None:
    """A table of quality, cost and artefacts, and what to type next."""
    console = Console(soft_wrap=True)
    if results.evaluations:
        console.print(_quality(results.evaluations))

    cost = Table(title="training", title_justify="left", show_header=False)
    cost.add_column()
    cost.add_column(justify="right")
    steps = f"{results.steps:,}"
    if results.skipped_steps:
        steps += f" ({results.skipped_steps} skipped: inf or NaN gradients)"
    rows = {
        "steps": steps,
        "trainable": f"{results.trainable:,} parameters in {results.blocks:,} blocks "
        f"({results.trainable_percent:.2f} % of the model)",
        "seconds": f"{results.seconds:.0f} ({results.tokens / max(results.seconds, 1e-9):,.0f} "
        "tokens/s)",
        "peak memory": f"{results.peak_memory_bytes / 1e6:,.0f} MB (whole process)",
        "kept for backward": f"{results.saved_bytes / 1e6:,.1f} MB in all, first batch",
        "  by SMT layers": f"{results.smt_saved_bytes / 1e6:,.1f} MB "
        f"(whole inputs: {results.full_saved_bytes / 1e6:,.1f} MB)",
    }
    for name, value in rows.items():
        cost.add_row(name, value)
    console.print(cost)
    console.print(
        f"artefacts in {results.output}/: blocks/ (trained blocks), plan.json, metrics.jsonl, "
        "evaluations.jsonl, results.json, config.yaml, state/ (for --resume)",
        highlight=False,
    )
    console.print("next:", highlight=False)
    for command in next_commands:
        console.print(f"  {command}", highlight=False)


def _quality(evaluations: Sequence[Evaluation]) -> Table:
    """Before and after training and, where the run was evaluated in between, its best."""
    first, last = evaluations[0], evaluations[-1]
    between = len(evaluations) > 2
    table = Table(title="held-out rows", title_justify="left")
    for column in ("", "before", *(["best"] if between else []), "after"):
        table.add_column(column, justify="right" if column else "left")
    best = min(evaluations, key=lambda e: e.loss)
    cells = [f"{best.loss:.3f} (step {best.step:,})"] if between else []
    table.add_row("loss (nats a token)", f"{first.loss:.3f}", *cells, f"{last.loss:.3f}")
    scored = [(e.accuracy, e.step) for e in evaluations if e.accuracy is not None]
    if scored:
        share, step = max(scored, key=lambda pair: (pair[0], -pair[1]))
        cells = [f"{share:.1%} (step {step:,})"] if between else []
        table.add_row("right answers", f"{scored[0][0]:.1%}", *cells, f"{scored[-1][0]:.1%}")
    return table
