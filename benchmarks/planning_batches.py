"""How many batches a plan needs: the blocks chosen after 1, 2, 3, 5, 10 and 20 of them.

    python benchmarks/planning_batches.py

SmolLM2-135M on the math rows of ``SMT_DATA`` (default ``../shared/data``), eight rows a batch, L = 64.
Two draws of 20 batches that share no row. ``same`` is the share of blocks that the plan has in
common with the plan of all 20 batches of its draw, ``other`` with that of the other draw: as much as
two plans of that many rows differ by chance. Writes ``records/planning_batches.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import print_table, save_record
from torch import Tensor, nn

from smt_ext.hf.loading import load_model, load_tokenizer, resolve_model
from smt_ext.planning.budget import Budget, Scores, select_blocks
from smt_ext.planning.scoring import score_blocks
from smt_ext.planning.targets import select_targets

ROOT = Path(__file__).parents[1]
COUNTS = (1, 2, 3, 5, 10, 20)
ROWS, BLOCK_SIZE, BUDGET = 8, 64, "0.84%"
PLANS = {
    "q, k, v; global (the paper)": ("qkv", "global"),
    "all-linear; uniform": ("all-linear", "uniform"),
}

Blocks = set[tuple[str, tuple[int, int]]]


def batches(tokenizer: Any, rows: list[dict[str, str]]) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(rows), ROWS):
        ids, labels = [], []
        for row in rows[start : start + ROWS]:
            prompt = tokenizer(f"{row['instruction']}\n").input_ids
            answer = [*tokenizer(row["output"]).input_ids, tokenizer.eos_token_id]
            ids.append(prompt + answer)
            labels.append([-100] * len(prompt) + answer)
        length = max(map(len, ids))
        yield {
            "input_ids": torch.tensor([i + [0] * (length - len(i)) for i in ids]),
            "labels": torch.tensor([i + [-100] * (length - len(i)) for i in labels]),
            "attention_mask": torch.tensor([[1] * len(i) + [0] * (length - len(i)) for i in ids]),
        }


def score_each(
    model: nn.Module, tokenizer: Any, rows: list[dict[str, str]]
) -> list[dict[str, Scores]]:
    """The scores of every batch by itself; those of several batches are their mean."""
    linears = select_targets(model, "all-linear")
    scored = []
    for number, batch in enumerate(batches(tokenizer, rows), 1):
        print(f"batch {number} of {len(rows) // ROWS}", flush=True)
        scored.append(
            score_blocks(model, linears, [batch], block_size=BLOCK_SIZE, metric="mean_abs",
                         progress=False).scores
        )  # fmt: skip
    return scored


def choose(
    model: nn.Module, scored: list[dict[str, Scores]], targets: str, allocation: Any
) -> Blocks:
    wanted = select_targets(model, targets)
    mean = {
        name: Scores(one.shape, one.block_size, np.mean([s[name].values for s in scored], axis=0))
        for name, one in scored[0].items()
        if name in wanted
    }
    layers = select_blocks(
        mean,
        Budget.parse(BUDGET),
        model_parameters=sum(p.numel() for p in model.parameters()),
        allocation=allocation,
    )
    return {(name, block) for name, layer in layers.items() for block in layer.blocks}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # type: ignore[union-attr]
    data = Path(os.environ.get("SMT_DATA", ROOT / "../shared/data")) / "math/split/train.jsonl"
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    name = resolve_model("smollm2")
    model, tokenizer = load_model(name), load_tokenizer(name)
    most = ROWS * COUNTS[-1]
    draws = [score_each(model, tokenizer, rows[i * most : (i + 1) * most]) for i in range(2)]
    table: list[dict[str, Any]] = []
    for title, (targets, allocation) in PLANS.items():
        plans = [
            {count: choose(model, draw[:count], targets, allocation) for count in COUNTS}
            for draw in draws
        ]
        for count in COUNTS:
            row: dict[str, Any] = {"plan": title, "batches": count, "blocks": len(plans[0][count])}
            for what, flip in (("same", 0), ("other", 1)):
                row[what] = [
                    len(plans[i][count] & plans[i ^ flip][COUNTS[-1]]) / len(plans[i][count])
                    for i in range(2)
                ]
            table.append(row)
    settings = {"model": "SmolLM2-135M-Instruct", "dtype": str(model.dtype), "rows a batch": ROWS,
                "block_size": BLOCK_SIZE, "budget": BUDGET, "data": data.name}  # fmt: skip
    print("written to", save_record("planning_batches", settings, table, row_a_line=True))
    means = [{**row, **{k: float(np.mean(row[k])) for k in ("same", "other")}} for row in table]
    print_table(means, ("plan", "batches", "blocks", "same", "other"))


if __name__ == "__main__":
    main()
