"""The tables of docs/memory.md, made from the record of benchmarks/memory.py.

    python benchmarks/memory.py && python tests/docs/memory_tables.py

estimates anew and writes them between the marks in the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "memory.md"
RECORD = ROOT / "benchmarks" / "records" / "memory.json"
# Of the record's three shapes: all numbers of the first, the peak of the second.
SHAPE, OTHER_SHAPE = "1 x 2048", "16 x 512"
PARTS = ("weights", "gradients", "optimizer", "saved", "peak")


def page_with_tables(page: str) -> str:
    """The page with its tables replaced by those of the record."""
    rows = json.loads(RECORD.read_text(encoding="utf-8"))["rows"]
    estimates = [row for row in rows if "model" in row]
    statements = [row for row in rows if "the paper" in row]
    largest = [row for row in rows if "GB" in row]
    page = _replace(page, "estimates", _estimates(estimates))
    page = _replace(page, "largest", _largest(largest))
    return _replace(page, "statements", _statements(statements))


def _replace(page: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{PAGE} has no {begin.strip()} followed by {end.strip()}")
    return before + begin + table + end + after


def _estimates(rows: Iterable[dict[str, Any]]) -> str:
    by_key = {(row["model"], row["batch x seq"], row["method"]): row for row in rows}
    lines = [["model", "method", *PARTS, f"peak, {OTHER_SHAPE}"]]
    lines.append(["---", "---", *["--:"] * (len(PARTS) + 1)])
    for (model, shape, method), row in by_key.items():
        if shape == SHAPE:
            other = by_key[model, OTHER_SHAPE, method]["peak"]
            lines.append([model, method, *(f"{row[part]:.2f}" for part in PARTS), f"{other:.2f}"])
    return _markdown(lines)


def _largest(rows: Sequence[dict[str, Any]]) -> str:
    head = [str(title) for title in rows[0]]
    return _markdown([head, ["--:"] * len(head), *([str(v) for v in row.values()] for row in rows)])


def _statements(rows: Iterable[dict[str, str]]) -> str:
    lines = [["the paper", "estimated here"], ["---", "---"]]
    lines += [[row["the paper"], row["estimated"]] for row in rows]
    return _markdown(lines)


def _markdown(lines: Iterable[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    text = page_with_tables(PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(text, encoding="utf-8")
