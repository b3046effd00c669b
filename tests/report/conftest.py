"""A short real run on a tiny model, and a browser if there is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from browsers import find_browser
from models import save_checkpoint
from smt_ext.config import make_config
from smt_ext.report.write import write_report
from smt_ext.task import make_problems
from smt_ext.train import train


def _rows(path: Path, split: str, count: int) -> str:
    chosen = [r for r in make_problems(400, split=split) if len(r["instruction"]) < 85][:count]
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return str(path)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two finished runs: plans made by the paper's metric and at random."""
    root = tmp_path_factory.mktemp("report")
    model = save_checkpoint(root / "model")
    data, held_out = (_rows(root / f"{s}.jsonl", s, n) for s, n in (("train", 40), ("test", 8)))
    made = []
    for metric in ("mean_abs", "random"):
        config = make_config(
            {
                "model": str(model), "data": data, "eval": held_out,
                "output": str(root / metric), "metric": metric, "block_size": 32,
                "budget": "6 blocks", "targets": ("q", "k", "v", "o"), "plan_batches": 2,
                "batch_size": 4, "steps": 12, "lr": 1e-2, "precision": "fp32", "max_length": 120,
                "score": "equation", "max_new_tokens": 4, "eval_every": 4,
            }
        )  # fmt: skip
        train(config, progress=False)
        made.append(root / metric)
    return made[0], made[1]


@pytest.fixture(scope="session")
def page(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the first run beside the second."""
    output = tmp_path_factory.mktemp("page") / "report"
    return write_report(runs[0], output, compare=[runs[1]])


@pytest.fixture(scope="session")
def browser() -> str:
    return find_browser()
