"""A short real run on a tiny model, and a browser if there is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from browsers import find_browser
from models import save_checkpoint
from smt_ext.cli import main
from smt_ext.hf.word_problems import make_problems
from smt_ext.report.write import write_report


def _rows(path: Path, split: str, count: int) -> str:
    chosen = [r for r in make_problems(400, split=split) if len(r["instruction"]) < 85][:count]
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return str(path)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    root = tmp_path_factory.mktemp("report")
    model = save_checkpoint(root / "model")
    data, held_out = (_rows(root / f"{s}.jsonl", s, n) for s, n in (("train", 40), ("test", 8)))
    flags = {
        "model": model, "data": data, "eval": held_out, "output": root / "run",
        "metric": "mean_abs", "block_size": 32, "budget": "6 blocks", "targets": "q,k,v,o",
        "plan_batches": 2, "per_device_train_batch_size": 4, "max_steps": 12, "lr": 1e-2,
        "precision": "fp32", "max_length": 120, "eval_strategy": "steps", "eval_steps": 4,
        "logging_steps": 1, "report_to": "none", "use_cpu": "true", "disable_tqdm": "true",
        "gradient_checkpointing": "false",
    }  # fmt: skip
    pairs = ((f"--{name}", str(value)) for name, value in flags.items())
    assert main(["train", *(text for pair in pairs for text in pair)]) == 0
    return root / "run"


@pytest.fixture(scope="session")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the run."""
    output = tmp_path_factory.mktemp("page") / "report"
    return write_report(run, output)


@pytest.fixture(scope="session")
def browser() -> str:
    return find_browser()
