"""Held-out loss against what it costs, as pictures: bytes kept for backward, and time of a step.

    python -m benchmarks.quality.frontier [--step benchmarks/records/step_fp32.json]

A point is the best development loss that a method has reached with 160 steps and seed 0 in one
placement, over all its rates that have run, with at most 1 % of the parameters where the name says no
other share (full fine-tuning: all). Bytes are those that autograd kept in that run; times are ratios
to a step of the frozen model in step.py's record, where that has the method.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .matrix import TASKS, Trial
from .plans import STEPS
from .run import RECORDS, Records, load_records

__all__ = ["Point", "draw", "points"]

PICTURE = Path(__file__).parents[2] / "docs" / "frontier.png"
_ALL = {"targets": "all-linear"}
_SMT = {"method": "smt", "metric": "random", "allocation": "dims", **_ALL}
# What is drawn -> what its trials have in common, its name in step.py's record.
METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "full fine-tuning": ({"method": "full"}, "full fine-tuning"),
    "LoRA": ({"method": "lora", **_ALL}, "LoRA r=4"),
    "LoRA, Q, K, V": ({"method": "lora", "targets": "qkv"}, "LoRA r=14, qkv"),
    "SHiRA": ({"method": "shira", **_ALL}, "SHiRA r=4"),
    "SHiRA, Q, K, V": ({"method": "shira", "targets": "qkv"}, "SHiRA r=14, qkv"),
    "SMT, the paper's plan": (
        {"method": "smt", "metric": "mean_abs", "targets": "qkv", "block_size": 64, "unit": None},
        "SMT 0.84 % qkv",
    ),
    "SMT, L = 64": ({**_SMT, "block_size": 64, "depth": None}, "SMT 0.84 % recommended"),
    "SMT, L = 16": (
        {**_SMT, "block_size": 16, "depth": None},
        "SMT 0.84 % recommended, L=16",
    ),
    "SMT, L = 16, 2.5 %": ({**_SMT, "block_size": 16, "depth": None, "budget": 2.5}, ""),
    "SMT, L = 16, 4.91 %": ({**_SMT, "block_size": 16, "depth": None, "budget": 4.91}, ""),
    "LoRA, 2.5 %": ({"method": "lora", **_ALL, "budget": 2.5}, "LoRA r=11"),
    "SMT, L = 16, upper half": ({**_SMT, "block_size": 16, "depth": 0.5}, ""),
}


class Point(NamedTuple):
    """A method's best run on a task.

    Attributes:
        loss: development loss, nats a token. saved: bytes kept for backward.
        time: of a step, in those of a frozen model; None where it was not measured.
    """

    loss: float
    saved: float
    time: float | None


def points(records: Records, task: str, times: Mapping[str, float]) -> dict[str, Point]:
    """Method -> its best point; methods without a run are left out.

    Args:
        records: see :func:`~benchmarks.quality.run.load_records`.
        task: one of TASKS.
        times: name in step.py -> ratio to the floor.
    """
    found: dict[str, Point] = {}
    for record in records.values():
        trial = Trial(**record["trial"])
        loss = record.get("held_out_loss", {}).get("dev")
        where = (trial.task, trial.split, trial.seed, trial.steps)
        if where != (task, "dev", 0, STEPS) or loss is None:
            continue
        if trial.base or trial.also_train or trial.optimizer or trial.rotate_every:
            continue
        for name, (settings, step_name) in METHODS.items():
            if any(getattr(trial, key) != value for key, value in settings.items()):
                continue
            if "budget" not in settings and (trial.budget or 0) > 1:
                continue
            if name not in found or loss < found[name].loss:
                found[name] = Point(loss, record["memory"]["saved"], times.get(step_name))
    return found


def draw(by_task: Mapping[str, Mapping[str, Point]]) -> Any:
    """A row of pictures for each task: loss against bytes, and against time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.9 * len(by_task)), layout="constrained")
    grid = figure.subplots(len(by_task), 2, squeeze=False)
    for row, (task, found) in zip(grid, by_task.items(), strict=True):
        for axes, across, unit in zip(row, ("saved", "time"), (1e6, 1), strict=True):
            for name, point in found.items():
                place = getattr(point, across)
                if place is None:
                    continue
                ours = name.startswith("SMT")
                axes.scatter(place / unit, point.loss, s=36, color="#d96a0b" if ours else "#3568b0")
                axes.annotate(f" {name}", (place / unit, point.loss), va="center", fontsize=8)
            axes.margins(x=0.28)
            axes.grid(alpha=0.3)
            axes.set_ylabel(f"{task}: development loss")
        row[0].set_xlabel("MB kept for backward")
        row[1].set_xlabel("time of a step, in those of a frozen model")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--step", type=Path, default=RECORDS.parent / "step_fp32.json")
    parser.add_argument("--output", type=Path, default=PICTURE)
    args = parser.parse_args()
    records = load_records(args.records)
    rows = json.loads(args.step.read_text(encoding="utf-8"))["rows"]
    times = {row["method"]: row["x floor"] for row in rows if row.get("x floor")}
    by_task = {task: found for task in TASKS if (found := points(records, task, times))}
    for task, found in by_task.items():
        print(f"\n| {task} | loss | MB kept | time |\n|---|---|---|---|")
        for name, point in sorted(found.items(), key=lambda pair: pair[1].loss):
            time = "" if point.time is None else f"{point.time:.2f}"
            print(f"| {name} | {point.loss:.3f} | {point.saved / 1e6:.0f} | {time} |")
    draw(by_task).savefig(args.output, dpi=110)
    print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
