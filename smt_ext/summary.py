"""What a run says at its end."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .train import Results

__all__ = ["print_results"]


def print_results(results: Results, next_commands: list[str]) -> None:
    """A table of quality, cost and artefacts, and what to type next."""
    console = Console(soft_wrap=True)
    quality = Table(title="held-out rows", title_justify="left")
    for column in ("", "before", "after"):
        quality.add_column(column, justify="right" if column else "left")
    before, after = results.before, results.after
    if before.loss is not None and after.loss is not None:
        quality.add_row("loss (nats a token)", f"{before.loss:.3f}", f"{after.loss:.3f}")
    if before.accuracy is not None and after.accuracy is not None:
        quality.add_row("right answers", f"{before.accuracy:.1%}", f"{after.accuracy:.1%}")
    if quality.rows:
        console.print(quality)

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
        "results.json, config.yaml, state/ (for --resume)",
        highlight=False,
    )
    console.print("next:", highlight=False)
    for command in next_commands:
        console.print(f"  {command}", highlight=False)
