"""Timing side by side, and JSON records, for all benchmarks."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from smt_ext.env import environment

RECORDS = Path(__file__).parent / "records"


@dataclass(frozen=True)
class Timing:
    """Seconds of each sample."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def percentile(self, percent: float) -> float:
        ordered = sorted(self.samples)
        return ordered[round(percent / 100 * (len(ordered) - 1))]


def side_by_side(
    contestants: Mapping[str, Callable[[], Any]], *, samples: int = 11, seconds: float = 0.03
) -> dict[str, Timing]:
    """Time the contestants in turns, so that a slow moment of the machine hits all of them.

    A sample calls its contestant as often as fills ``seconds``, after one call that is not counted:
    short operators are measured as they run in a training step, on data that was just used.
    """
    calls = {}
    for name, run in contestants.items():
        run()
        begin = time.perf_counter()
        run()
        calls[name] = max(1, round(seconds / (time.perf_counter() - begin)))
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(samples):
        for name, run in contestants.items():
            run()
            begin = time.perf_counter()
            for _ in range(calls[name]):
                run()
            taken[name].append((time.perf_counter() - begin) / calls[name])
    return {name: Timing(tuple(times)) for name, times in taken.items()}


def save_record(name: str, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write one run's numbers, every sample included, to ``records/<name>.json``."""
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / f"{name}.json"
    record = {
        "benchmark": name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "environment": {**environment(), "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "")},
        "settings": dict(settings),
        "rows": list(rows),
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Columns aligned; numbers as they are in the rows."""
    cells = [list(columns)] + [[_text(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(text.rjust(w) if i else text.ljust(w)
                        for i, (text, w) in enumerate(zip(line, widths, strict=True))))  # fmt: skip


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def dtype_of(name: str) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
