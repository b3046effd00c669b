"""A few rows, and arguments for runs of a second."""

from __future__ import annotations

from pathlib import Path

SETTINGS = {
    "per_device_train_batch_size": 2,
    "max_steps": 6,
    "save_steps": 2,
    "logging_steps": 1,
    "max_length": 64,
    "learning_rate": 1e-2,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def sums(count: int = 9, offset: int = 1) -> list[dict[str, str]]:
    """Prompts with their completions."""
    return [
        {"prompt": f"{a} + {a + offset} =", "completion": f" {2 * a + offset}"}
        for a in range(count)
    ]


def dump(folder: Path, name: str, lines: list[str]) -> str:
    path = folder / name
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)
