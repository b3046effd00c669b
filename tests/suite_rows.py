"""Small evaluation sets in the form of the paper's, of every kind but ``ending``."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = ("oak", "a long river", "seven", "fog", "no", "the blue one", "ink", "warm bread")
PLACES = ("attic", "barn", "cellar", "den", "field", "garden", "harbor")


def write_sets(root: Path) -> None:
    """20 rows each: commonsense/arc-e, commonsense/winogrande, math/svamp, math/aqua."""
    files: dict[str, list[dict[str, str]]] = {
        "arc-e": [],
        "winogrande": [],
        "svamp": [],
        "aqua": [],
    }
    for i in range(20):
        a, b, c = (WORDS[(i + k) % len(WORDS)] for k in (0, 3, 5))
        place = PLACES[i % len(PLACES)]
        files["arc-e"].append(
            {
                "instruction": "Please choose the correct answer to the question: What is in the "
                f"{place} {i}?\n\nAnswer1: {a} Answer2: {b} Answer3: {c}\n\n"
                "Answer format: answer1/answer2/answer3",
                "answer": f"answer{i % 3 + 1}",
            }
        )
        files["winogrande"].append(
            {
                "instruction": "Please choose the correct answer to fill in the blank to complete the "
                f"given sentence: In {place} {i} _ was happy.\n\nOption1: Ann Option2: Bob Answer "
                "format: option1/option2",
                "answer": f"option{i % 2 + 1}",
            }
        )
        files["svamp"].append({"instruction": f"What is {i} plus 2?", "answer": str(i + 2)})
        files["aqua"].append(
            {
                "instruction": f"What is {i} + 1? Answer Choices: (A) {i} (B) {i + 1} (C) {2 * i + 3}",
                "answer": "B",
            }
        )
    for name, rows in files.items():
        suite = "math" if name in ("svamp", "aqua") else "commonsense"
        path = root / suite / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(json.dumps({**r, "input": "", "output": r["answer"]}) + "\n" for r in rows)
        )
