"""What a row asks, and when a generated answer is right: on every row of the sets, and by hand."""

from __future__ import annotations

import re

import pytest

from smt_ext import DataError
from smt_ext.data import Row, read_rows
from smt_ext.suites import (
    SUITES,
    find_sets,
    label_in,
    last_number,
    letter_in,
    number_is_right,
    parse_question,
    scored_rows,
)
from smt_ext.task import equation_is_right

KINDS = {one.name: one.kind for sets in SUITES.values() for one in sets}
SETS = [(suite, one.name) for suite, sets in SUITES.items() for one in sets]


def row(instruction: str, answer: str, output: str = "") -> Row:
    return Row("f:1", "instruction", instruction, output, answer=answer)


def collapsed(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(("suite", "name"), SETS, ids=[name for _, name in SETS])
def test_every_row_of_the_sets(smt_data, suite, name):
    """The parts that a row falls into, put together again, are the row."""
    found, absent = find_sets(suite, smt_data)
    if name in [one.name for one in absent]:
        pytest.skip(f"{name} is not in {smt_data}")
    ((one, path),) = [(one, path) for one, path in found.items() if one.name == name]
    rows = read_rows(path)
    assert len(rows) >= 254
    for this in rows:
        if one.kind == "number":
            assert number_is_right(this.completion, this.answer), this.where
            if "=" in this.completion:
                assert equation_is_right(this.completion, this.answer), this.where
            continue
        question = parse_question(this, one.kind)
        assert 2 <= len(question.options) == len(question.labels) <= 5
        assert question.labels[question.gold] == this.answer
        for text in (question.stem, *question.options):
            assert text == text.strip() != ""
            assert not re.search(r"\b(Answer|Solution|Option|Ending)\d:", text), this.where
        if one.kind == "letter":
            assert not any(re.search(r"\([A-E]\) ", option) for option in question.options)
            assert letter_in(this.completion, question.labels) == this.answer
            options = " ".join(
                f"({a}) {b}" for a, b in zip(question.labels, question.options, strict=True)
            )
            whole = f"{question.stem} Answer Choices: {options}"
        else:
            assert label_in(this.completion, question.labels) == this.answer
            options = (
                ""
                if question.labels == ("true", "false")
                else " ".join(
                    f"{a.capitalize()}: {b}"
                    for a, b in zip(question.labels, question.options, strict=True)
                )
            )
            lead = this.prompt[: this.prompt.index(question.stem)]
            assert re.fullmatch(r"Please (answer|choose) [a-z, ]*(question|sentence): ", lead)
            whole = f"{lead}{question.stem} {options} Answer format: {'/'.join(question.labels)}"
        assert collapsed(whole) == collapsed(this.prompt), this.where
        scored = scored_rows(question, one.kind)
        assert len(scored) == len(question.options)
        assert all(s.completion.strip() for s in scored), this.where


CHOICE = row(
    "Please choose the correct answer to the question: Where is fog?\n\n"
    "Answer1: a marsh Answer2: the plains, mostly Answer3: (a) desert\n\n"
    "Answer format: answer1/answer2/answer3",
    "answer3",
)
SOLUTIONS = row(
    "Please choose the correct solution to the question: dresser\n\nSolution1: replace drawer \n\n"
    "Solution2: two\nlines\n\nAnswer format: solution1/solution2",
    "solution1",
)
BLANK = row(
    "Please choose the correct answer to fill in the blank to complete the given sentence: Sarah beat "
    "Maria, so _ smiled.\n\nOption1: Sarah Option2: Maria Answer format: option1/option2",
    "option1",
)
ENDING = row(
    "Please choose the correct ending to complete the given sentence: Skiing: A man goes up. He\n\n"
    "Ending1: goes down. Ending2: is a fish. Ending3: eats it. Ending4: flies.\n\n"
    "Answer format: ending1/ending2/ending3/ending4",
    "ending1",
)
TRUTH = row(
    "Please answer the following question with true or false, question: is a question: hard?\n\n"
    "Answer format: true/false",
    "false",
)
LETTER = row("What is 2(x)? Answer Choices: (A) 8 (B) -3/2 (C) None (of these)", "B", "B")


@pytest.mark.parametrize(
    ("this", "kind", "stem", "options"),
    [
        (CHOICE, "choice", "Where is fog?", ("a marsh", "the plains, mostly", "(a) desert")),
        (SOLUTIONS, "choice", "dresser", ("replace drawer", "two\nlines")),
        (BLANK, "blank", "Sarah beat Maria, so _ smiled.", ("Sarah", "Maria")),
        (
            ENDING,
            "ending",
            "Skiing: A man goes up. He",
            ("goes down.", "is a fish.", "eats it.", "flies."),
        ),
        (TRUTH, "choice", "is a question: hard?", ("true", "false")),
        (LETTER, "letter", "What is 2(x)?", ("8", "-3/2", "None (of these)")),
    ],
    ids=["choice", "solutions", "blank", "ending", "truth", "letter"],
)
def test_stem_and_options(this, kind, stem, options):
    question = parse_question(this, kind)
    assert (question.stem, question.options) == (stem, options)
    assert question.labels[question.gold] == this.answer


def test_what_is_scored():
    def scored(this, kind):
        return [
            (s.kind, s.prompt, s.completion) for s in scored_rows(parse_question(this, kind), kind)
        ]

    assert scored(CHOICE, "choice")[1] == ("instruction", "Where is fog?", "the plains, mostly")
    assert scored(LETTER, "letter")[0] == ("instruction", "What is 2(x)?", "8")
    assert scored(ENDING, "ending")[3] == ("prompt", "Skiing: A man goes up. He", " flies.")
    assert scored(BLANK, "blank") == [
        ("prompt", "Sarah beat Maria, so Sarah", " smiled."),
        ("prompt", "Sarah beat Maria, so Maria", " smiled."),
    ]


@pytest.mark.parametrize(
    ("this", "kind", "message"),
    [
        (row("What is up?", "answer1"), "choice", "expected 'Please choose"),
        (row(CHOICE.prompt, "answer4"), "choice", "answer is 'answer4', expected answer1, answer2"),
        (
            row(CHOICE.prompt.replace("Answer2:", ""), "answer1"),
            "choice",
            "option answer2 is missing",
        ),
        (row(CHOICE.prompt.replace("a marsh", ""), "answer1"), "choice", "option answer1 is empty"),
        (row(BLANK.prompt.replace("_", "she"), "option1"), "blank", "one blank '_'"),
        (row("What? (A) 1 (B) 2", "A"), "letter", "Answer Choices"),
        (row("What? Answer Choices: (A) 1 (C) 2", "A"), "letter", r"got A, C"),
    ],
)
def test_a_row_of_another_form_is_named(this, kind, message):
    with pytest.raises(DataError, match=rf"f:1: .*{message}"):
        parse_question(this, kind)


def test_labels_and_letters_in_texts():
    labels = ("answer1", "answer2", "answer10")
    assert label_in("The correct answer is ANSWER2, not answer1", labels) == "answer2"
    assert label_in("answer10", labels) == "answer10"
    assert label_in("the answer is 2", labels) is None
    assert label_in("untrue", ("true", "false")) is None
    assert letter_in("The answer is (C).", "ABCDE") == "C"
    assert letter_in("Because of A's size: B", "ABCDE") == "B"
    assert letter_in("ABC", "ABCDE") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("49 - 44 = 5", 5),
        ("it costs $1,234.50.", 1234.5),
        ("9-4", 4),
        ("x = -4", -4),
        ("(3)-4", 4),
        ("-15", -15),
        ("1,2", 2),
        ("12,345,678 apples", 12345678),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == number


def test_numbers_within_a_thousandth():
    assert number_is_right("so 1.833", "1.834")
    assert not number_is_right("so 1.83", "1.8333")
    assert number_is_right("1200", "1,200.0")
    assert not number_is_right("no idea", "0")


def test_where_sets_are_looked_for(tmp_path):
    for place in ("math/gsm8k.jsonl", "svamp.jsonl", "AQuA/test.json"):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    found, absent = find_sets("math", tmp_path)
    assert {one.name for one in found} == {"gsm8k", "svamp", "aqua"}
    assert {one.name for one in absent} == {"multiarith", "addsub", "singleeq"}
    assert [one.name for one in find_sets("math", tmp_path, ["svamp"])[0]] == ["svamp"]
    with pytest.raises(DataError, match=r"'addsub' is in none of .*AddSub/test\.json"):
        find_sets("math", tmp_path, ["addsub"])
    with pytest.raises(DataError, match=r"no set 'svam', expected multiarith"):
        find_sets("math", tmp_path, ["svam"])
    with pytest.raises(
        DataError, match=r"no set of the suite 'commonsense'.*commonsense/boolq\.jsonl"
    ):
        find_sets("commonsense", tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        find_sets("math", tmp_path / "nowhere")
    with pytest.raises(DataError, match="expected 'commonsense' or 'math'"):
        find_sets("mmlu", tmp_path)


def test_llm_adapters_own_files(tmp_path):
    path = tmp_path / "test.json"
    path.write_text(
        '[{"instruction": "One?", "input": "", "output": "1", "answer": "1.0"},\n'
        ' {"instruction": "Two?", "input": "", "output": "2", "answer": 2}]'
    )
    rows = read_rows(path)
    assert [(r.prompt, r.answer) for r in rows] == [("One?", "1.0"), ("Two?", "2")]
    assert rows[1].where.endswith("test.json[1]")
    path.write_text('[{"instruction": "One?"}]')
    with pytest.raises(DataError, match=r"test\.json\[0\]: has the fields 'instruction'"):
        read_rows(path)
