"""Rows become TRL's formats, and one that cannot be learnt from is named by file and line."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer, Trainer, TrainingArguments

from models import tiny_llama
from quick_runs import dump
from smt_ext import DataError
from smt_ext.hf.mixin import SMTMixin
from smt_ext.hf.rows import load_rows, prepare_rows, to_trl

datasets = pytest.importorskip("datasets")
pytest.importorskip("trl")

CHATML = (
    "{% if tools %}<tools>{{ tools | tojson }}{{ eos_token }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + CHATML
)


@pytest.fixture
def tokenizer(checkpoint):
    made = AutoTokenizer.from_pretrained(checkpoint)
    made.chat_template = CHATML
    return made


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_instruction_rows_in_three_templates():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "answer": "3"}
    assert to_trl(row) == {"prompt": "Question: Add.\n1 2\nAnswer:", "completion": " 3"}
    alpaca = to_trl(row, template="alpaca")
    assert alpaca["prompt"] == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "Add.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert alpaca["completion"] == "3"
    short = to_trl({**row, "input": ""}, template="alpaca")["prompt"]
    assert "paired" not in short
    assert "### Input" not in short
    assert to_trl(row, template="chat")["completion"] == [{"role": "assistant", "content": "3"}]


def test_sharegpt_rows_become_messages():
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    made = to_trl({"conversations": turns, "system": "be kind", "tools": "[]", "id": 7})
    assert made == {
        **chat(("system", "be kind"), ("user", "hi"), ("assistant", "yes")),
        "tools": "[]",
    }


@pytest.mark.parametrize(
    "row",
    [
        {"text": "t"},
        {"prompt": "p", "completion": "c"},
        chat(("user", "q")),
        {**chat(("user", "q")), "tools": "[]", "chat_template_kwargs": {}},
    ],
)
def test_formats_of_trl_pass_as_they_are(row):
    """Without other columns, of which TRL would take some for tokens."""
    assert to_trl({**row, "labels": 1, "assistant_masks": 0, "id": 1}) == row


def test_fields_of_another_format_do_not_count():
    """UltraChat has the first question beside its messages."""
    row = {**chat(("user", "1 + 1 ="), ("assistant", "2")), "prompt": "1 + 1 =", "prompt_id": "7"}
    assert to_trl(row) == {"messages": row["messages"]}
    assert to_trl({"prompt": "a", "completion": "b", "text": "ab"}) == {
        "prompt": "a",
        "completion": "b",
    }


ASKED = {"instruction": "q", "output": "a"}
WRITTEN = {"prompt": "q", "completion": "a"}
TALKED = chat(("user", "q"), ("assistant", "a"))


@pytest.mark.parametrize("row", [ASKED, WRITTEN, TALKED], ids=["asked", "written", "talked"])
def test_what_would_be_left_out_is_refused(row):
    for key in ("system", "history"):
        assert to_trl({**row, key: ""}) == to_trl(row)
        with pytest.raises(DataError, match=f"row: '{key}' would be left out"):
            to_trl({**row, key: "be kind"})
    turns = {"conversations": [{"from": "human", "value": "q"}]}
    for other in (ASKED, WRITTEN, TALKED, turns):
        if other != row:
            with pytest.raises(DataError, match="of which one is learnt"):
                to_trl({**row, **other})


def test_tool_calls_keep_their_own_arguments(tmp_path, tokenizer):
    """A table of equal fields would give each call the arguments of all others, as null."""
    rows = []
    for arguments in ({"city": "Oslo"}, {"unit": "C", "days": 3}):
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        row = chat(("user", "weather?"))
        row["messages"].append({"role": "assistant", "content": "", "tool_calls": [call]})
        rows.append({**row, "tools": [{"type": "function", "function": {"name": "weather"}}]})
    path = dump(tmp_path, "tools.jsonl", [json.dumps(row) for row in rows])
    made = prepare_rows(load_rows(path), tokenizer)
    for found, row in zip(made, rows, strict=True):
        text = tokenizer.apply_chat_template(
            found["messages"], tools=found["tools"], tokenize=False
        )
        assert json.dumps(row["messages"][1]["tool_calls"]) in text.replace("'", '"')
        assert "null" not in text


GOOD = json.dumps(chat(("user", "q"), ("assistant", "a")))
BAD = {
    "an empty completion": '{"prompt": "q", "completion": ""}',
    "an empty output": '{"instruction": "q", "output": " "}',
    "an empty answer": json.dumps(chat(("user", "q"), ("assistant", ""))),
    "no answer": json.dumps(chat(("user", "q"))),
    "an empty instruction": '{"instruction": "", "output": "x"}',
    "a number for text": '{"instruction": "q", "output": 5}',
    "messages as text": json.dumps({"messages": json.dumps(chat(("user", "q"))["messages"])}),
    "text before messages": json.dumps(
        {"prompt": "q", "completion": chat(("assistant", "a"))["messages"]}
    ),
    "unknown fields": '{"question": "q"}',
    "a role that the template refuses": json.dumps(chat(("system", "s"), ("assistant", "a"))),
    "half a surrogate pair": '{"instruction": "hi \\ud83d there", "output": "x"}',
    "a huge integer": '{"instruction": "hi", "output": "x", "id": ' + "9" * 5000 + "}",
    "deep nesting": '{"instruction": "hi", "output": "x", "m": '
    + "[" * 100000
    + "]" * 100000
    + "}",
    "no JSON": "hello",
    "no object": "[1]",
}


@pytest.mark.parametrize("line", BAD.values(), ids=BAD)
@pytest.mark.parametrize("alone", [False, True])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, tokenizer, line, alone):
    tokenizer.chat_template = STRICT
    lines = ["", line] if alone and not line.startswith("[") else [GOOD, line]
    path = dump(tmp_path, "rows.jsonl", lines)
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        prepare_rows(load_rows(path), tokenizer, name=path)


def test_of_several_files_the_one_with_the_bad_row_is_named(tmp_path, tokenizer):
    good = dump(tmp_path, "good.jsonl", [GOOD] * 2)
    bad = dump(tmp_path, "bad.jsonl", [GOOD, json.dumps(chat(("user", "q")))])
    with pytest.raises(DataError, match=rf"^{bad}:2: nothing to learn"):
        prepare_rows(load_rows(f"{good},{bad}"), tokenizer, name=f"{good},{bad}")


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    row = {"prompt": "q", "completion": "a"}
    for name, text in (("a.jsonl", json.dumps(row)), ("b.json", json.dumps([row]))):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert load_rows(str(tmp_path / name))[0]["prompt"] == "q"
    (tmp_path / "c.csv").write_text("prompt,completion\nq,007\n", encoding="utf-8-sig")
    row = load_rows(str(tmp_path / "c.csv"))[0]
    assert (row["prompt"], row["completion"]) == ("q", "007")


def test_what_would_not_teach_an_end_is_refused(tmp_path, tokenizer):
    path = dump(tmp_path, "rows.jsonl", [GOOD])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(DataError, match="no special token behind the last answer"):
        prepare_rows(load_rows(path), tokenizer)
    tokenizer.bos_token = "<s>"
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<s>{% endfor %}"
    with pytest.raises(DataError, match="no special token behind the last answer"):
        prepare_rows(load_rows(path), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        prepare_rows(load_rows(path), tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        prepare_rows(load_rows(path), tokenizer)


@pytest.mark.parametrize(
    "name",
    ["/no/such/rows.jsonl", "./rows", "rows.xyz", ["rows.jsonl"], "rows.jsonl,rows.csv", ","],
)
def test_files_that_cannot_be_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.xyz").write_text("x")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "a", "id": 1}\n')
    (tmp_path / "rows.csv").write_text("prompt,completion,id\nq,a,x\n")
    with pytest.raises(DataError, match=r"rows|the data ','"):
        load_rows(name)


def test_a_trainer_without_rows(tmp_path):
    class MyTrainer(SMTMixin, Trainer):
        """Two lines."""

    trainer = MyTrainer(tiny_llama(), TrainingArguments(tmp_path, report_to=[], use_cpu=True))
    with pytest.raises(DataError, match="no train_dataset"):
        trainer.train()


def test_an_empty_file(tmp_path):
    with pytest.raises(DataError, match="no rows"):
        load_rows(dump(tmp_path, "rows.jsonl", []))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("open.csv", 'prompt,completion\nq1,a1\nq2,"a2\nq3,a3\n', "unexpected end of data"),
        ("quote.tsv", 'prompt\tcompletion\nq\t"Yes" he said\n', "expected after"),
        (
            "twice.csv",
            "prompt,completion,completion\nq,a,b\n",
            "two columns are named 'completion'",
        ),
    ],
)
def test_a_table_that_would_be_read_otherwise_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=rf"{name}:\d+: .*{message}"):
        load_rows(str(tmp_path / name))


def test_a_long_text_of_a_table(tmp_path):
    text = "word " * 40_000
    (tmp_path / "long.csv").write_text(f"prompt,completion\nq,{text}\n")
    assert load_rows(str(tmp_path / "long.csv"))[0]["completion"] == text


def test_lines_of_windows_end_where_they_end(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"one\r\ntwo\r\n")
    assert list(load_rows(str(tmp_path / "t.txt"))["text"]) == ["one", "two"]


def test_a_split_of_what_has_none_is_refused(tmp_path):
    (tmp_path / "s.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    datasets.load_dataset("json", data_files=str(tmp_path / "s.jsonl"))["train"].save_to_disk(
        str(tmp_path / "disk")
    )
    for name in ("s.jsonl", "disk"):
        for split in ("train[:1]", "validation"):
            with pytest.raises(DataError, match=r"has no splits"):
                load_rows(str(tmp_path / name), split=split)


@pytest.mark.parametrize(
    ("files", "unread"),
    [
        (("a.jsonl", "b.csv"), "b.csv"),  # of another kind
        (("train_1.jsonl", "more.jsonl"), "more.jsonl"),  # not named after a split
        (("train/a.jsonl", "deep/b.json"), "deep/b.json"),
        (("a.jsonl", "b.jsonl", "README.md", ".cache/c.csv"), None),
        (("train.jsonl", "test.jsonl", "LICENSE.txt"), None),
    ],
)
def test_a_folder_of_which_a_part_would_not_be_read_is_refused(tmp_path, files, unread):
    """datasets takes one kind of file, or those named after splits, and says nothing of the others."""
    row = {"prompt": "a b", "completion": " c"}
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = "prompt,completion\na b, c\n" if name.endswith(".csv") else json.dumps(row) + "\n"
        (tmp_path / name).write_text(text)
    if unread is not None:
        with pytest.raises(DataError, match=rf"holds '{unread}', which would not be read"):
            load_rows(str(tmp_path))
        return
    assert len(load_rows(str(tmp_path))) == sum(
        n.endswith("jsonl") for n in files if "test" not in n
    )
