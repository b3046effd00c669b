"""The numbers in docs/memory.md are those of the record, and the record those of this version."""

from __future__ import annotations

import dataclasses
import json

from memory_tables import PAGE, RECORD, page_with_tables

from smt_ext.estimation.table import estimate


def test_the_tables_are_those_of_the_record():
    page = PAGE.read_text(encoding="utf-8")
    assert page == page_with_tables(page), (
        "docs/memory.md is out of date: python tests/docs/memory_tables.py"
    )


def test_the_record_is_what_is_estimated_now():
    paper = {"block_size": 256, "targets": "qkv"}
    found = estimate("llama-7b", batch=1, length=2048, methods=("full", "smt"), **paper)
    recorded = {
        row["bytes"]["method"]: row["bytes"]
        for row in json.loads(RECORD.read_text(encoding="utf-8"))["rows"]
        if (row.get("model"), row.get("batch x seq")) == ("llama-7b", "1 x 2048")
    }
    for entry in found.methods:
        now = json.loads(json.dumps(dataclasses.asdict(entry)))
        assert now == recorded[entry.method], "out of date: python benchmarks/memory.py"
