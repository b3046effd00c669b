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
    console = Console(soft_wrap=True, highlight=False)
    history, state, what = trainer.state.log_history, trainer.state, status(trainer.model)
    quality = Table("", "before", "best", "after", title="held-out rows", title_justify="left")
    for key, (name, digits, best) in _QUALITY.items():
        found = [(entry[key], entry["step"]) for entry in history if key in entry]
        if found:
            value, step = best(found, key=lambda pair: pair[0])
            middle = f"{value:{digits}} (step {step:,})"
            quality.add_row(name, f"{found[0][0]:{digits}}", middle, f"{found[-1][0]:{digits}}")
    if quality.row_count:
        console.print(quality)
    last: dict[str, Any] = {key: value for entry in history for key, value in entry.items()}
    blocks = sum(module.num_blocks for module in what.modules)
    cost = Table(title="training", title_justify="left", show_header=False)
    for row in (
        ("steps", f"{state.global_step:,} ({last.get('smt_skipped_steps', 0)} skipped)"),
        ("trainable", f"{what.trainable:,} parameters in {blocks:,} blocks "
                      f"({what.percent:.2f} % of the model)"),
        ("seconds", f"{last.get('train_runtime', 0):,.0f}"),
        ("peak memory", f"{last.get('smt_peak_memory_mb', 0):,.0f} MB"),
        ("kept by SMT layers", f"{what.saved_bytes_per_token:,} bytes a token"),
    ):  # fmt: skip
        cost.add_row(*row)
    console.print(cost)
    console.print(f"trained blocks, plan and checkpoints are in {trainer.args.output_dir}/; next:")
    for command in next_commands:
        console.print(f"  {command}")
