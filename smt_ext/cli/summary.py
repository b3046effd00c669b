"""What a run says at its end."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .program import program

__all__ = ["print_quality", "print_summary"]

_CONSOLE = Console(soft_wrap=True, highlight=False)
_QUALITY = {
    "eval_loss": ("loss (nats a token)", ".3f", min),
    "eval_accuracy": ("right answers", ".1%", max),
}


def print_quality(history: Sequence[dict[str, Any]]) -> None:
    """A table of held-out quality before and after; nothing where none was measured."""
    table = Table("", "before", "best", "after", title="held-out rows", title_justify="left")
    for key, (name, digits, best) in _QUALITY.items():
        found = [(entry[key], entry["step"]) for entry in history if key in entry]
        if found:
            value, step = best(found, key=lambda pair: pair[0])
            before, begun = found[0]
            table.add_row(
                name, "" if begun else f"{before:{digits}}", f"{value:{digits}} (step {step:,})",
                f"{found[-1][0]:{digits}}",
            )  # fmt: skip
    if table.row_count:
        _CONSOLE.print(table)


def print_summary(trainer: Any, model: str) -> None:
    """Quality before and after, and what to type next."""
    out = trainer.args.output_dir
    print_quality(trainer.state.log_history)
    _CONSOLE.print(f"trained blocks, plan and checkpoints are in {out}/; next:")
    export = ["export", "--model", model, "--blocks", out, "--output", f"{out}-merged"]
    for command in (export, ["report", out]):
        _CONSOLE.print(f"  {shlex.join([program(), *command])}")
