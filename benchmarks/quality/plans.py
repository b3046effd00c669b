"""The runs of plans.yaml beside the best of the learning rate grids, as a Markdown table.

    python -m benchmarks.quality.plans

Development losses, one seed each. What has not run is listed as such.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .matrix import Trial, load_matrix
from .run import RECORDS, load_records

PLANS = Path(__file__).with_name("plans.yaml")


def title(trial: Trial) -> str:
    """What trains."""
    parts = [trial.method, trial.metric, trial.unit, trial.allocation, trial.targets]
    if trial.block_size is not None:
        parts.append(f"L = {trial.block_size}")
    if trial.depth is not None:
        parts.append(f"upper {trial.depth:g}")
    return ", ".join(part for part in parts if part)


def rows(records: dict[str, dict[str, Any]]) -> list[tuple[str, str, float, str, float]]:
    """(task, what trains, percent, rate and where it is from, loss), by task and loss."""
    found = []
    best: dict[Trial, dict[str, Any]] = {}
    for record in records.values():
        trial = Trial(**record["trial"])
        loss = record.get("held_out_loss", {}).get("dev")
        if trial.split != "dev" or loss is None or (trial.budget or 0.84) != 0.84:
            continue
        percent = record["trained"]["percent"]
        if trial.auto is not None:
            rate = f"{record['trained']['lr']:.2g}, {trial.auto:g} x automatic"
            found.append((trial.task, title(trial), percent, rate, loss))
        elif loss <= best.get(trial.of_any_seed, record)["held_out_loss"]["dev"]:
            best[trial.of_any_seed] = record
    for trial, record in best.items():
        rate, loss = f"{record['trial']['lr']:.2g}, of a grid", record["held_out_loss"]["dev"]
        found.append((trial.task, title(trial), record["trained"]["percent"], rate, loss))
    return sorted(found, key=lambda row: (row[0], row[-1]))


def main() -> None:
    records = load_records(RECORDS)
    print("| task | what trains | percent | learning rate | development loss |")
    print("|---|---|---|---|---|")
    for task, what, percent, rate, loss in rows(records):
        print(f"| {task} | {what} | {percent:.2f} | {rate} | {loss:.4f} |")
    for wanted in load_matrix(PLANS).wanted:
        if wanted.trial.id not in records:
            print(f"| {wanted.trial.task} | {title(wanted.trial)} | | | not run |")


if __name__ == "__main__":
    main()
