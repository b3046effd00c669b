"""A tiny checkpoint with a tokenizer and a few rows of data, on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models import save_checkpoint
from smt_ext import cli
from smt_ext.task import make_problems

LIMITS = ["--max-length", "120", "--precision", "fp32"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A two-layer Llama over single characters."""
    folder = save_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    return str(folder)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Training and held-out word problems short enough for the tiny model."""
    folder = tmp_path_factory.mktemp("rows")
    paths = []
    for split, count in (("train", 40), ("test", 8)):
        path = folder / f"{split}.jsonl"
        chosen = [r for r in make_problems(400, split=split) if len(r["instruction"]) < 85][:count]
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
        paths.append(str(path))
    return paths[0], paths[1]


@pytest.fixture
def arguments(checkpoint: str, rows: tuple[str, str], tmp_path: Path) -> list[str]:
    """`smt-ext train` with everything that a quick run needs."""
    return [
        "train", "--quiet", "--model", checkpoint, "--data", rows[0], "--eval", rows[1],
        "--output", str(tmp_path / "run"), "--block-size", "32", "--budget", "4 blocks",
        "--plan-batches", "2", "--batch-size", "4", "--steps", "6", "--save-every", "2",
        "--lr", "1e-2", *LIMITS,
    ]  # fmt: skip


def run(*arguments: str) -> int:
    """The command line, in this process."""
    return cli.main(list(arguments))
