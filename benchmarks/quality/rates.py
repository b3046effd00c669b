"""The automatic learning rate beside the grids: one planning pass a task, no training.

    python -m benchmarks.quality.rates           # writes benchmarks/records/quality_rates.json
    python -m benchmarks.quality.rates --table   # the table, from that record
    python -m benchmarks.quality.rates --fit     # how well other rules would fit it
    python -m benchmarks.quality.rates --multiples   # what half, twice and four times the rate cost

Every group of development runs of SMT that differ in their learning rate alone is a cell. Its blocks are
chosen anew from the scores of one pass over all linear layers; the record keeps what a rule for the
rate could be made of: the loss L0, and over the trained entries the sum of mean |gradient|
and the root of the sum of squares.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import commit
from smt_ext.hf.loading import load_model, load_tokenizer, resolve_model
from smt_ext.optim.learning_rate import rate
from smt_ext.planning.budget import Budget, Scores
from smt_ext.planning.scoring import score_blocks
from smt_ext.planning.selection import select_blocks
from smt_ext.planning.targets import select_targets

from .matrix import OPTIONS, Trial
from .plans import title
from .run import BENCHMARKS, RECORDS, load_records
from .tasks import data_folder, load_task
from .trial import _Run

RECORD = BENCHMARKS / "records" / "quality_rates.json"
PLAN_BATCHES = 20
BLOCK_SIZE = 64


def cells(records: Iterable[dict[str, Any]]) -> dict[Trial, dict[float, float]]:
    """Development runs of SMT by all but their rate -> learning rate -> loss."""
    found: dict[Trial, dict[float, float]] = {}
    for record in records:
        trial = Trial(**record["trial"])
        if (trial.split, trial.method) == ("dev", "smt") and trial.lr is not None and _plain(trial):
            loss = record["held_out_loss"]["dev"]
            found.setdefault(trial.of_any_seed, {})[trial.lr] = math.inf if loss is None else loss
    return {trial: losses for trial, losses in found.items() if len(losses) > 2}


def _plain(trial: Trial) -> bool:
    """Whether the choice of blocks below is the trial's: the paper's kind, with nothing else changed."""
    fields = ("unit", "allocation", "depth", *OPTIONS)
    return trial.block_size == BLOCK_SIZE and all(getattr(trial, name) is None for name in fields)


def measure(task: str, of_task: dict[Trial, dict[float, float]]) -> list[dict[str, Any]]:
    """One entry a cell of the task."""
    first = next(iter(of_task))
    torch.manual_seed(first.seed)
    name = resolve_model(first.model)
    tokenizer = load_tokenizer(name)
    data = load_task(first, data_folder(), tokenizer)
    model = load_model(name, torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    run = _Run(first, model, data, tokenizer.pad_token_id, torch.device("cpu"))
    linears = select_targets(model, "all-linear")
    size = first.block_size
    assert size is not None
    settings = {"block_size": size, "loss_fn": run.mean_loss, "num_batches": PLAN_BATCHES}
    squares = score_blocks(model, linears, run.batches(), metric="l2", **settings)  # type: ignore[arg-type]
    assert squares.loss is not None
    assert squares.gradient is not None
    means = {n: Scores(s.shape, size, squares.gradient[n]) for n, s in squares.scores.items()}
    by_metric: dict[str, dict[str, Scores]] = {"mean_abs": means}
    entries = []
    for trial, losses in of_task.items():
        assert trial.metric is not None
        assert trial.targets is not None
        if trial.metric not in by_metric:
            batches = run.batches() if trial.metric == "activation" else None
            by_metric[trial.metric] = score_blocks(
                model,
                linears,
                batches,
                metric=trial.metric,
                **settings,  # type: ignore[arg-type]
            ).scores
        wanted = select_targets(model, trial.targets.split("+"))
        assert trial.budget is not None
        layers = select_blocks(
            {n: by_metric[trial.metric][n] for n in wanted},
            Budget(trial.budget, "model"),
            model_parameters=parameters,
        )
        chosen = [(n, layer, block) for n, layer in layers.items() for block in layer.blocks]
        total = math.fsum(means[n].values[b] * layer.area(b) for n, layer, b in chosen)
        norm = math.sqrt(math.fsum(squares.scores[n].values[b] ** 2 for n, _, b in chosen))
        weight = [linears[n].weight.detach() for n, layer in layers.items() if layer.blocks]
        entries.append({
            "task": task, "metric": trial.metric, "targets": trial.targets, "budget": trial.budget,
            "loss": squares.loss, "gradient_sum": total, "gradient_norm": norm,
            "parameters": sum(layer.num_parameters for layer in layers.values()),
            "matrices": len(weight),
            "weight_rms": math.sqrt(sum(float(w.square().mean()) for w in weight) / len(weight)),
            "grid": sorted([lr, loss] for lr, loss in losses.items()),
        })  # fmt: skip
    return entries


def table(entries: Iterable[dict[str, Any]]) -> str:
    """Cells by task; beside the best rate of the grid, and the loss read off between its points."""
    lines = [
        "| task | blocks by | targets | percent | sum of abs. gradient | automatic rate "
        "| best of the grid | its loss | loss at the automatic rate, interpolated | above it |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for e in entries:
        auto = rate(e["loss"], e["gradient_sum"])
        best, least = min(e["grid"], key=lambda point: point[1])
        there = interpolated(e["grid"], auto)
        lines.append(
            f"| {e['task']} | {e['metric']} | {e['targets']} | {e['budget']:g} "
            f"| {e['gradient_sum']:.0f} | {auto:.2g} | {best:.2g} | {least:.3f} "
            + (
                "| outside the grid | |"
                if there is None
                else f"| {there:.3f} | {there - least:.3f} |"
            )
        )
    return "\n".join(lines)


def multiples(entries: Iterable[dict[str, Any]]) -> str:
    """Losses at multiples of the automatic rate, less the loss at that rate; read off the grids."""
    factors = (0.5, 1.0, 2.0, 4.0)
    lines = [
        "| task | blocks by | targets | percent | loss at the automatic rate | "
        + " | ".join(f"at {f:g} x" for f in factors if f != 1)
        + " |",
        "|---|---|---|---|---|" + "---|" * (len(factors) - 1),
    ]
    for e in entries:
        auto = rate(e["loss"], e["gradient_sum"])
        losses = {f: interpolated(e["grid"], f * auto) for f in factors}
        if (middle := losses.pop(1.0)) is not None:
            cells = ["" if y is None else f"{y - middle:+.3f}" for y in losses.values()]
            lines.append(
                f"| {e['task']} | {e['metric']} | {e['targets']} | {e['budget']:g} | {middle:.3f} | "
                f"{' | '.join(cells)} |"
            )
    return "\n".join(lines)


def measured(records: Iterable[dict[str, Any]]) -> str:
    """Losses of runs at multiples of the automatic rate, where there are several of one plan."""
    found: dict[Trial, dict[float, float | None]] = {}
    for record in records:
        trial = Trial(**record["trial"])
        if trial.auto is not None and trial.split == "dev":
            losses = found.setdefault(dataclasses.replace(trial, auto=None), {})
            losses[trial.auto] = record["held_out_loss"]["dev"]
    factors = sorted({factor for losses in found.values() for factor in losses})
    lines = [
        f"| task | what trains | {' | '.join(f'{f:g} x' for f in factors)} |",
        "|---|---|" + "---|" * len(factors),
    ]
    for trial, losses in found.items():
        if len(losses) > 1:
            cells = (
                "" if f not in losses else "inf" if losses[f] is None else f"{losses[f]:.3f}"
                for f in factors
            )
            lines.append(f"| {trial.task} | {title(trial)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def interpolated(grid: list[list[float]], lr: float) -> float | None:
    """Loss between two rates of the grid, straight in the logarithm of the rate; None outside."""
    for (low, first), (high, second) in itertools.pairwise(grid):
        if low <= lr <= high:
            share = math.log(lr / low) / math.log(high / low)
            return first + share * (second - first)
    return None


def best_rate(grid: list[list[float]]) -> float:
    """Where a parabola through the lowest point and its neighbours is lowest, over log(rate)."""
    at = min(range(len(grid)), key=lambda i: grid[i][1])
    at = min(max(at, 1), len(grid) - 2)
    points = grid[at - 1 : at + 2]
    square, slope, _ = np.polyfit([math.log(lr) for lr, _ in points], [y for _, y in points], 2)
    return math.exp(-slope / (2 * square))


def fits(entries: list[dict[str, Any]]) -> str:
    """Forms of a rule, each with its best constant: how far off they are, as a factor."""
    forms: dict[str, Callable[[dict[str, Any]], float]] = {
        "sqrt(L0) / S": lambda e: math.sqrt(e["loss"]) / e["gradient_sum"],
        "L0 / S": lambda e: e["loss"] / e["gradient_sum"],
        "1 / S": lambda e: 1 / e["gradient_sum"],
        "sqrt(L0) / norm": lambda e: math.sqrt(e["loss"] / e["parameters"]) / e["gradient_norm"],
        "sqrt(L0 / S)": lambda e: math.sqrt(e["loss"] / e["gradient_sum"]),
    }
    lines = ["| rule | constant | off by, worst cell | root mean square |", "|---|---|---|---|"]
    for name, form in forms.items():
        logs = np.log([best_rate(e["grid"]) / form(e) for e in entries])
        off = np.abs(logs - logs.mean())
        lines.append(
            f"| {name} | {math.exp(logs.mean()):.3g} | {math.exp(off.max()):.2f} "
            f"| {math.exp(math.sqrt((off**2).mean())):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--table", action="store_true", help="print the table of what was measured")
    parser.add_argument("--fit", action="store_true", help="print how well forms of a rule fit it")
    parser.add_argument(
        "--multiples", action="store_true", help="print losses at 0.5 to 4 x the rate"
    )
    args = parser.parse_args()
    if not (args.table or args.fit or args.multiples):
        found = cells(load_records(RECORDS).values())
        entries = []
        for task in dict.fromkeys(trial.task for trial in found):
            entries += measure(task, {t: grid for t, grid in found.items() if t.task == task})
        text = json.dumps({"commit": commit(), "cells": entries}, indent=1)
        args.record.write_text(text + "\n", encoding="utf-8")
    entries = json.loads(args.record.read_text(encoding="utf-8"))["cells"]
    for asked, shown in ((args.fit, fits), (args.multiples, multiples)):
        if asked:
            print(shown(entries))
            if shown is multiples:
                print(f"\n{measured(load_records(RECORDS).values())}")
            return
    print(table(entries))


if __name__ == "__main__":
    main()
