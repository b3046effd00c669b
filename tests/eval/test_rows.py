"""What a row asks, and when a generated answer is right: on every row of the sets, and by hand."""

from __future__ import annotations

import json
import re

import pytest

from smt_ext import DataError
from smt_ext.cli.eval_rows import (
    SUITES,
    documents,
    find_sets,
    judge,
    number_is_right,
)
from smt_ext.hf.word_problems import equation_is_right

SETS = [(suite, one.name) for suite, sets in SUITES.items() for one in sets]


def collapsed(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(("suite", "name"), SETS, ids=[name for _, name in SETS])
def test_every_row_of_the_sets(smt_data, suite, name):
    """The parts that a row falls into, put together again, are the row."""
    found, absent = find_sets(suite, smt_data)
    if name in [one.name for one in absent]:
        pytest.skip(f"{name} is not in {smt_data}")
    ((one, path),) = [(one, path) for one, path in found.items() if one.name == name]
    rows = documents(path, one.kind)
    lines = [json.loads(line) for line in path.read_text().split("\n") if line]
    assert len(rows) == len(lines) >= 254
    for this, line in zip(rows, lines, strict=True):
        where = this["where"]
        assert this["question"] == line["instruction"], where
        if one.kind in ("number", "letter"):
            judged = judge(this, [line["output"]])
            assert judged["acc"] == 1, where
            if "=" in line["output"]:
                assert judged["equation"] == 1, where
            continue
        options, gold = this["options"], this["gold"]
        assert 1 <= len(options) <= 5, where
        assert len(set(options)) == len(options), where
        parts = [*options, this.get("ending", this["stem"])]
        for text in parts:
            assert text.strip(), where
            assert not re.search(r"\b(Answer|Solution|Option|Ending)\d:", text), where
            if one.kind != "blank":
                assert collapsed(text) in collapsed(this["question"]), where
        if one.kind == "blank":
            (before, filling, _) = re.split(
                r"_|(?<=Option.: )", this["question"].partition("sentence: ")[2], maxsplit=2
            )
            assert all(option.startswith(before) for option in options), where
            assert filling.startswith(this["ending"]), where
        label = line["answer"]
        text = options[gold] if one.kind != "blank" else options[gold][len(before) :]
        shown = label if label in ("true", "false") else f"{label.capitalize()}: {text}"
        assert collapsed(shown) in collapsed(this["question"]), where


CHOICE = (
    "Please choose the correct answer to the question: Where is fog?\n\n"
    "Answer1: a marsh Answer2: the plains, mostly Answer3: (a) desert\n\n"
    "Answer format: answer1/answer2/answer3"
)
SOLUTIONS = (
    "Please choose the correct solution to the question: dresser\n\nSolution1: replace drawer \n\n"
    "Solution2: two\nlines\n\nAnswer format: solution1/solution2"
)
BLANK = (
    "Please choose the correct answer to fill in the blank to complete the given sentence: Sarah beat "
    "Maria, so _ smiled.\n\nOption1: Sarah Option2: Maria Answer format: option1/option2"
)
ENDING = (
    "Please choose the correct ending to complete the given sentence: Skiing: A man goes up. He\n\n"
    "Ending1: goes down. Ending2: is a fish. Ending3: eats it. Ending4: flies.\n\n"
    "Answer format: ending1/ending2/ending3/ending4"
)
TRUTH = (
    "Please answer the following question with true or false, question: is a question: hard?\n\n"
    "Answer format: true/false"
)
TWICE = CHOICE.replace("(a) desert", "a marsh")


def read_one(tmp_path, instruction, answer, kind):
    path = tmp_path / "set.jsonl"
    path.write_text("\n" + json.dumps({"instruction": instruction, "answer": answer}) + "\n")
    (found,) = documents(path, kind)
    return found


@pytest.mark.parametrize(
    ("instruction", "answer", "kind", "stem", "options", "gold"),
    [
        (CHOICE, "answer3", "choice", "Where is fog?",
         ["a marsh", "the plains, mostly", "(a) desert"], 2),
        (SOLUTIONS, "solution1", "choice", "dresser", ["replace drawer", "two\nlines"], 0),
        (ENDING, "ending4", "choice", "Skiing: A man goes up. He",
         ["goes down.", "is a fish.", "eats it.", "flies."], 3),
        (TRUTH, "false", "choice", "is a question: hard?", ["true", "false"], 1),
        (BLANK, "option2", "blank", "",
         ["Sarah beat Maria, so Sarah", "Sarah beat Maria, so Maria"], 1),
        # The right text has two labels, and is one option.
        (TWICE, "answer3", "choice", "Where is fog?", ["a marsh", "the plains, mostly"], 0),
    ],
    ids=["choice", "solutions", "ending", "truth", "blank", "twice"],
)  # fmt: skip
def test_stem_and_options(tmp_path, instruction, answer, kind, stem, options, gold):
    found = read_one(tmp_path, instruction, answer, kind)
    assert (found["stem"], found["options"], found["gold"]) == (stem, options, gold)
    assert found.get("ending") == (" smiled." if kind == "blank" else None)


@pytest.mark.parametrize(
    ("instruction", "answer", "kind", "message"),
    [
        ("What is up?", "answer1", "choice", "expected 'Please choose"),
        (CHOICE, "answer4", "choice", "one of the labels as 'answer'; got"),
        (CHOICE.replace("Answer2:", ""), "answer1", "choice", "expected 'Please choose"),
        (CHOICE.replace("a marsh", ""), "answer1", "choice", "no option empty"),
        (CHOICE.replace("(a) desert", ""), "answer1", "choice", "no option empty"),
        (BLANK.replace("_", "she"), "option1", "blank", "one blank '_'"),
        (BLANK.replace(" smiled.", ""), "option1", "blank", "text behind it"),
        ("What? (A) 1 (B) 2", "A", "letter", "Answer Choices"),
        ("What? Answer Choices: (A) 1 (B) 2", "C", "letter", "one of the letters as 'answer'; got"),
        (
            "What is 2 + 2?",
            "four",
            "number",
            "a number as 'answer'; got 'What is 2 + 2?' and 'four'",
        ),
        ("What is 2 + 2?", None, "number", "a number as 'answer'"),
        ("What is 2 + 2?", "nan", "number", "a number as 'answer'"),
        ("", "4", "number", "a question, and"),
        (None, "4", "number", "a question, and"),
        (["What is 2 + 2?"], "4", "number", "a question, and"),
        ("What is 2 + 2?", True, "number", "a number as 'answer'"),
        # In another order than the labels: "a marsh" would go by the name of answer2.
        (
            CHOICE.replace("Answer1", "AnswerX")
            .replace("Answer2", "Answer1")
            .replace("AnswerX", "Answer2"),
            "answer1",
            "choice",
            "expected 'Please choose",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, instruction, answer, kind, message):
    with pytest.raises(DataError, match=rf"set\.jsonl:2: .*{re.escape(message)}"):
        read_one(tmp_path, instruction, answer, kind)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"instruction": "a", "answer": 1}\n{"instr', r"set\.jsonl:2: not valid JSON"),
        ("[1]", r"row|set\.jsonl:1: a int, expected a JSON object"),
        ("3\n", r"set\.jsonl:1: a int, expected a JSON object"),
        ("\n", r"has no rows"),
        (b"\xff\xfe", r"cannot read .*set\.jsonl"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "set.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        documents(path, "number")


def test_llm_adapters_own_layout(tmp_path, monkeypatch):
    folder = tmp_path / "AddSub"
    folder.mkdir()
    rows = [{"instruction": "What is 1 + 1?", "answer": 2.0}]
    (folder / "test.json").write_text(json.dumps(rows, indent=1))
    monkeypatch.setenv("SMT_DATA", str(tmp_path))
    found, absent = find_sets("math", None)
    ((one, path),) = found.items()
    assert one.name == "addsub"
    assert documents(path, one.kind)[0]["answer"] == "2.0"
    assert [a.name for a in absent] == ["multiarith", "gsm8k", "aqua", "singleeq", "svamp"]


def test_what_is_absent_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("SMT_DATA", raising=False)
    with pytest.raises(DataError, match="pass --data, or set SMT_DATA"):
        find_sets("math", None)
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            DataError, match=r"sets of the suite 'math': expected .*multiarith.json"
        ):
            find_sets("math", folder)
    with pytest.raises(DataError, match="the set 'svamp' is in none of"):
        find_sets("math", tmp_path, ["svamp"])
    with pytest.raises(DataError, match="has no set 'boolq', expected multiarith"):
        find_sets("math", tmp_path, ["boolq"])
    with pytest.raises(DataError, match="suite is 'maths'"):
        find_sets("maths", tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("9 - 4 = 5", 5), ("9-4", 4), ("is 1,200 dollars", 1200), ("-3.5", -3.5), ("(-3)", -3),
        ("none", None), ("7.", 7), ("x-2", 2),
    ],
)  # fmt: skip
def test_the_last_number(text, value):
    assert number_is_right(text, str(5 if value is None else value)) is (value is not None)


@pytest.mark.parametrize(
    ("text", "letter"),
    [("The answer is (B)", "B"), ("A", "A"), ("I'd say C.", "C"), ("Because", None), ("b", None)],
)
def test_the_first_letter(text, letter):
    for gold in "ABCDE":
        assert judge({"answer": gold}, [text]) == {"acc": gold == letter}


def test_numbers_within_a_thousandth():
    assert number_is_right("0.333", "0.3333")
    assert number_is_right("1200", "1,200")
    assert not number_is_right("0.33", "0.3333")


def test_an_equation_and_the_number_it_ends_with_are_judged_apart():
    document = {"answer": "5"}
    assert judge(document, ["9 - 4 = 6"]) == {"acc": 0, "equation": 1}
    assert judge(document, ["It is 5"]) == {"acc": 1, "equation": 0}
    assert equation_is_right("9 - 4 = 6\nno", "5")
    assert judge({"answer": "B"}, ["(B), not (A)"]) == {"acc": 1}
