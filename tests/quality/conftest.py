"""Makes the benchmarks importable, and a model and rows that are small enough to train in a test."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from models import save_checkpoint
from smt_ext.hf.word_problems import make_problems
from suite_rows import write_sets

sys.path.insert(0, str(Path(__file__).parents[2]))


def write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def quality_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of both tasks: 80 problems to train on, 12 to test on, of which the last 3 are twins."""
    root = tmp_path_factory.mktemp("quality_data")
    train = make_problems(80, split="train")
    test = make_problems(12, split="test")
    write_lines(
        root / "math" / "split" / "train.jsonl",
        [{**row, "source": ("addsub", "svamp")[i % 2]} for i, row in enumerate(train)],
    )
    write_lines(
        root / "math" / "split" / "test.jsonl",
        [
            {**row, "source": ("addsub", "svamp")[i % 2], "near_dup": i >= 9}
            for i, row in enumerate(test)
        ],
    )
    write_sets(root)
    questions = []
    for i, thing in enumerate(("oak", "fog", "ink", "bread") * 15):
        options = (thing, f"not {thing}", f"{thing} and more")
        text = " ".join(f"Answer{k}: {option}" for k, option in enumerate(options, start=1))
        questions.append(
            {
                "instruction": "Please choose the correct answer to the question: What is the "
                f"{thing} in room {chr(97 + i % 26)}{chr(97 + i // 26)}?\n\n{text}\n\n"
                "Answer format: answer1/answer2/answer3",
                "input": "",
                "output": "the correct answer is answer1",
                "answer": "answer1",
                "source": ("arc-e", "obqa")[i % 2],
            }
        )
    write_lines(root / "commonsense" / "train.jsonl", questions)
    return root


@pytest.fixture(scope="session")
def quality_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("quality_model") / "model")
