"""A small task that ships with smt_ext: arithmetic word problems, answered by an equation.

Generated from a seed. Training and test problems use different stories, so that a gain on the test
set is not the memory of a template.
"""

from __future__ import annotations

import ast
import operator
import random

__all__ = ["equation_is_right", "evaluate_expression", "make_problems"]

# A story a line: its equation over a, b, c, p, s, and its text with these, {name} and {thing}.
_TRAIN_STORIES = """\
a + b | {name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?
a - b | {name} had {a} {thing} and gave {b} of them away. How many {thing} are left?
a * b | There are {a} {thing} in a box. {name} has {b} such boxes. How many {thing} is that?
p / b | {name} shares {p} {thing} equally among {b} friends. How many does each friend get?
a + b | {name} picked {a} {thing} on Monday and {b} on Tuesday. How many {thing} in all?
s - a | {name} needs {s} {thing} and has {a}. How many {thing} are missing?
(b * c) + a | {name} bought {b} bags with {c} {thing} each and already had {a}. How many \
{thing} does {name} have?
(s - a) + c | {name} had {s} {thing}, lost {a} of them and then found {c}. How many {thing} \
does {name} have now?
(a + c) - b | {name} made {a} {thing} and {c} more, then sold {b}. How many {thing} remain?
"""
_TEST_STORIES = """\
a + b | A shelf holds {a} {thing}. {name} puts {b} more {thing} on it. How many {thing} does \
the shelf hold now?
s - a | {name} collected {s} {thing}, but {a} of them were broken. How many {thing} were whole?
a * b | Each of {b} children brought {a} {thing} to {name}. How many {thing} did they bring \
together?
p / b | {name} packs {p} {thing} into {b} equal piles. How many {thing} are in one pile?
(s - a) - b | In the morning {name} counted {s} {thing}; {a} were taken away by noon and {b} \
more by the evening. How many {thing} were there at night?
(b * c) + a | {name} fills {b} jars with {c} {thing} each and keeps {a} {thing} aside. How many \
{thing} are there altogether?
"""
_NAMES = ("Mara", "Jonas", "Aiko", "Tomas", "Leila", "Victor", "Nina", "Samuel", "Priya", "Oskar")
_THINGS = ("apples", "marbles", "stamps", "books", "pencils", "shells", "cookies", "beads", "coins")


def make_problems(count: int, *, split: str, seed: int = 0) -> list[dict[str, str]]:
    """So many different rows with instruction, input, output (``(45 + 9) - 19 = 35``) and answer.

    ``split``: ``train`` or ``test``, which have no story in common. A seed gives the same everywhere.
    """
    stories = {"train": _TRAIN_STORIES, "test": _TEST_STORIES}[split].splitlines()
    draw = random.Random(f"smt_ext/{split}/{seed}")
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        formula, _, text = stories[len(rows) % len(stories)].partition(" | ")
        a, b, c = draw.randint(11, 60), draw.randint(2, 9), draw.randint(3, 12)
        p, s = b * draw.randint(3, 20), a + draw.randint(10, 40)
        numbers = {"a": a, "b": b, "c": c, "p": p, "s": s}
        expression = "".join(str(numbers.get(symbol, symbol)) for symbol in formula)
        value = f"{evaluate_expression(expression):g}"
        question = text.format(name=draw.choice(_NAMES), thing=draw.choice(_THINGS), **numbers)
        output = f"{expression} = {value}"
        row = {"instruction": question, "input": "", "output": output, "answer": value}
        rows.setdefault(question, row)
    problems = list(rows.values())
    draw.shuffle(problems)
    return problems


_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv
}  # fmt: skip


def evaluate_expression(text: str) -> float | None:
    """The value of an arithmetic expression (+ - * / and parentheses); None if it is none."""
    if len(text) > 200:
        return None
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return float(_OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    value = node.value if isinstance(node, ast.Constant) else None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    raise ValueError("not arithmetic")


def equation_is_right(text: str, answer: str) -> bool:
    """Whether the left side of the first equation in ``text`` evaluates to the gold answer."""
    value = evaluate_expression(text.strip().split("\n")[0].split("=")[0])
    try:
        gold = float(answer.replace(",", ""))
    except ValueError:
        return False
    return value is not None and abs(value - gold) <= 1e-3 * max(1.0, abs(gold))
