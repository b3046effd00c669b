"""The task that ships with the package, and the grading of its answers."""

from __future__ import annotations

import pytest

from smt_ext.hf.word_problems import (
    equation_is_right,
    evaluate_expression,
    make_problems,
)


def test_problems_are_right_distinct_and_reproducible():
    train, test = make_problems(300, split="train"), make_problems(100, split="test")
    assert train == make_problems(300, split="train")
    assert train != make_problems(300, split="train", seed=1)
    questions = [row["instruction"] for row in train + test]
    assert len(set(questions)) == 400
    assert all(equation_is_right(row["output"], row["answer"]) for row in train + test)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("(45 + 9) - 19", 35), ("2 * 3 / 4", 1.5), ("-3 + 1", -2), ("1 / 0", None), ("2 ** 9", None),
        ("__import__('os')", None), ("", None), ("1 +", None), ("True + 1", None), ("9" * 300, None),
        ("(" * 150, None),
    ],
)  # fmt: skip
def test_expressions(text, value):
    assert evaluate_expression(text) == value


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("2 + 3 = 5", "5", True), ("2 + 3 = 6", "5", True), ("2 + 3 = 5\nmore", "5", True),
        ("2 * 3 = 6", "5", False), ("five", "5", False), ("5", "5", True), ("", "5", False),
        ("1000 + 1", "1,001", True), ("2 + 3", "five", False),
    ],
)  # fmt: skip
def test_an_answer_is_right_if_its_expression_is(text, answer, right):
    assert equation_is_right(text, answer) is right
