"""Development losses of a YAML file's trials beside each other, as a Markdown table.

    python -m benchmarks.quality.plans                   # of plans.yaml, beside the grids
    python -m benchmarks.quality.plans FILE.yaml ...     # of these files alone

One seed a row. Without a file, runs of SMT with an automatic rate and the best of every grid at
0.84 % stand together. What has not run is listed as such. Forgetting is the loss on general text
after training less that before.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .matrix import Trial, load_matrix
from .run import RECORDS, Records, load_records

PLANS = Path(__file__).with_name("plans.yaml")
STEPS = 160  # of matrix.yaml
HEADER = ("task", "what trains", "percent", "learning rate", "development loss", "forgetting",
          "saved, MB", "step, s")  # fmt: skip


def title(trial: Trial) -> str:
    """What trains, and how."""
    parts = [trial.method, trial.metric, trial.unit, trial.allocation, trial.targets]
    options = {
        "base": trial.base, "L": trial.block_size, "upper": trial.depth, "beside": trial.also_train,
        "rates by": trial.matrix_lr, "by": trial.optimizer, "RMS clip": trial.rms_clip,
        "rotated every": trial.rotate_every, "warm-up": trial.warmup_steps,
        "beta1": None if trial.beta1 == 0.9 else trial.beta1,
        "beta2": None if trial.beta2 == 0.99 else trial.beta2,
        "decay": trial.weight_decay or None, "seed": trial.seed or None,
        "steps": None if trial.steps == STEPS else trial.steps,
        "rows": trial.split if trial.split != "dev" else None,
    }  # fmt: skip
    parts += [f"{name} {value}" for name, value in options.items() if value is not None]
    return ", ".join(part for part in parts if part).replace("|", "\\|")


def row(record: dict[str, Any]) -> tuple[str, float, list[str]]:
    """(task, loss, cells of the table)."""
    trial = Trial(**record["trial"])
    losses = record["held_out_loss"]
    loss = losses.get("dev", losses.get("test"))
    trained = record.get("trained", {})
    if trial.auto is not None:
        rate = f"{trained['lr']:.2g}, {trial.auto:g} x automatic"
    else:
        rate = "" if trial.lr is None else f"{trial.lr:.2g}"
    if "also_lr" in trained:
        rate += f"; beside {trained['also_lr']:.2g}"
    text = record.get("general_text", {})
    forgot = text["after"] - text["before"] if text.get("after") is not None else None
    memory = record.get("memory", {}).get("saved")
    cells = [
        trial.task, title(trial), f"{trained.get('percent', 0.0):.2f}", rate,
        "inf" if loss is None else f"{loss:.4f}", "" if forgot is None else f"{forgot:+.3f}",
        "" if memory is None else f"{memory / 1e6:.0f}",
        f"{record['seconds']['step']:.2f}" if "step" in record["seconds"] else "",
    ]  # fmt: skip
    return trial.task, float("inf") if loss is None else loss, cells


def beside_grids(records: Records) -> list[dict[str, Any]]:
    """Runs at an automatic rate, and the best of each grid, at 0.84 %."""
    found = []
    best: dict[Trial, dict[str, Any]] = {}
    for record in records.values():
        trial = Trial(**record["trial"])
        loss = record.get("held_out_loss", {}).get("dev")
        at_budget = (trial.budget or 0.84) == 0.84 and trial.steps == STEPS
        if trial.split != "dev" or loss is None or not at_budget:
            continue
        if trial.auto is not None:
            found.append(record)
        elif loss <= best.get(trial.of_any_seed, record)["held_out_loss"]["dev"]:
            best[trial.of_any_seed] = record
    return [*found, *best.values()]


def of_files(paths: Iterable[Path], records: Records) -> tuple[list[dict[str, Any]], list[Trial]]:
    """Records of the trials of the files, development runs of their grids too; and what has none."""
    found: dict[str, dict[str, Any]] = {}
    lacking = []
    for path in paths:
        matrix = load_matrix(path)
        for trial in (wanted.trial for wanted in matrix.wanted):
            resolved = matrix.resolve(trial, records)
            known = [one for one in matrix.dev_trials(trial, records) if one.id in records]
            if resolved is None or resolved.id not in records:
                lacking.append(trial)
            else:
                known.append(resolved)
            found |= {one.id: records[one.id] for one in known}
    return list(found.values()), lacking


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--records", type=Path, default=RECORDS)
    args = parser.parse_args()
    records = load_records(args.records)
    found, lacking = of_files(args.files or [PLANS], records)
    if not args.files:
        found = beside_grids(records)
    lines = [cells for *_, cells in sorted(map(row, found), key=lambda one: one[:2])]
    lines += [[trial.task, title(trial), "", "", "not run"] for trial in lacking]
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for cells in lines:
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
