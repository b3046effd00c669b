"""What a run says at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ..nn.patching import status

__all__ = ["print_summary"]

_QUALITY = {
    "eval_loss": ("loss (nats a token)", ".3f", min),
    "eval_accuracy": ("right answers", ".1%", max),
}


def print_summary(trainer: Any, next_commands: Sequence[str]) -> None:
    """A table of quality before and after, one of cost, and what to type next."""
    console = Console(soft_wrap=True)
    history, state = trainer.state.log_history, trainer.state
    table = Table(title="held-out rows", title_justify="left")
    for column in ("", "before", "best", "after"):
        table.add_column(column, justify="right" if column else "left")
    for key, (name, digits, best) in _QUALITY.items():
        found = [(entry[key], entry["step"]) for entry in history if key in entry]
        if found:
            value = best(v for v, _ in found)
            step = next(s for v, s in found if v == value)
            cells = [f"{found[0][0]:{digits}}", f"{value:{digits}} (step {step:,})"]
            table.add_row(name, *cells, f"{found[-1][0]:{digits}}")
    if table.row_count:
        console.print(table)
    what = status(trainer.model)
    last: dict[str, Any] = {}
    for entry in history:
        last.update(entry)
    rows = {
        "steps": f"{state.global_step:,} ({last.get('smt_skipped_steps', 0)} skipped)",
        "trainable": f"{what.trainable:,} parameters in {sum(m.num_blocks for m in what.modules):,} "
        f"blocks ({what.percent:.2f} % of the model)",
        "seconds": f"{last.get('train_runtime', 0):,.0f}",
        "peak memory": f"{last.get('smt_peak_memory_mb', 0):,.0f} MB",
        "kept by SMT layers": f"{what.saved_bytes_per_token:,} bytes a token",
    }
    cost = Table(title="training", title_justify="left", show_header=False)
    cost.add_column()
    cost.add_column(justify="right")
    for name, value in rows.items():
        cost.add_row(name, value)
    console.print(cost)
    out = trainer.args.output_dir
    console.print(f"trained blocks, plan and checkpoints are in {out}/; next:", highlight=False)
    for command in next_commands:
        console.print(f"  {command}", highlight=False)
