"""JSON lines -> rows, with the file and line of whatever is wrong."""

from __future__ import annotations

import json

import pytest

from smt_ext import DataError
from smt_ext.data import read_rows


def write(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n",
        encoding="utf-8",
    )
    return path


def test_the_three_forms(tmp_path):
    rows = read_rows(
        write(
            tmp_path,
            {"instruction": "Add.", "input": "1 2", "output": "3", "answer": 3},
            "",
            {"prompt": "one ", "completion": "two", "answer": "two"},
            {"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "b"}]},
        )
    )
    assert [row.kind for row in rows] == ["instruction", "prompt", "messages"]
    assert [row.answer for row in rows] == ["3", "two", None]
    assert rows[0].prompt == "Add.\n1 2"
    assert rows[1].completion == "two"
    assert rows[2].messages[0]["content"] == "é"
    assert rows[1].where.endswith("rows.jsonl:3"), "empty lines count"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'a': 1}", "not valid JSON"),
        ('{"prompt": "a", "completion": ', "not valid JSON"),
        ("[1]", "a list, expected a JSON object"),
        ({"prompt": "a"}, r"has the fields 'prompt'; expected 'instruction' and 'output'"),
        ({}, "has the fields none"),
        ({"prompt": "a", "completion": 3}, "'completion' is a int, expected text"),
        ({"instruction": None, "output": "a"}, "'instruction' is a NoneType"),
        ({"instruction": "  ", "output": "a"}, "'instruction' is empty"),
        ({"messages": "a"}, "'messages' is no list"),
        ({"messages": [{"role": "user"}]}, "no text under 'content'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message of the role 'assistant'"),
    ],
)
def test_a_bad_line_names_file_and_line(tmp_path, line, message):
    path = write(tmp_path, {"prompt": "a", "completion": "b"}, line)
    with pytest.raises(DataError, match=rf"rows.jsonl:2: .*{message}"):
        read_rows(path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*nowhere.jsonl"):
        read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="has no rows"):
        read_rows(write(tmp_path, "", "  "))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl"):
        read_rows(tmp_path / "latin.jsonl")


def test_the_papers_sets_are_read(smt_data):
    files = sorted(smt_data.rglob("*.jsonl"))
    assert files, f"{smt_data} holds no .jsonl file"
    read = 0
    for path in files:
        first = json.loads(path.open(encoding="utf-8").readline())
        if {"instruction", "output"} <= first.keys():
            assert read_rows(path)
            read += 1
    assert read
