"""Rows -> ids: the loss is on the answer alone, whatever the template."""

from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from smt_ext import DataError
from smt_ext.data import IGNORE_INDEX, Row, encode, encode_rows
from smt_ext.errors import TooLongError

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character; <end>, <user>, <assistant> are tokens too."""
    marks = ["<end>", "<user>", "<assistant>"]
    vocabulary = {t: i for i, t in enumerate(["<unk>", *marks, *map(chr, range(32, 127)), "\n"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<unk>")
    made.add_special_tokens({"additional_special_tokens": marks})
    made.chat_template = CHAT
    return made


def text_of(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(list(ids)))


def learnt(tokenizer, example):
    return text_of(tokenizer, [x for x in example.labels if x != IGNORE_INDEX])


INSTRUCTION = Row("f:1", "instruction", "2 + 3?", "5")


@pytest.mark.parametrize(
    ("row", "template", "whole", "answer"),
    [
        (INSTRUCTION, "plain", "Question: 2 + 3?\nAnswer: 5<end>", " 5<end>"),
        (
            INSTRUCTION,
            "alpaca",
            "### Instruction:\n2 + 3?\n\n### Response:\n5<end>",
            "5<end>",
        ),
        (INSTRUCTION, "chat", "<user>2 + 3?<end><assistant>5<end>", "5<end>"),
        (Row("f:1", "prompt", "a b ", "c"), "plain", "a b c<end>", "c<end>"),
    ],
)
def test_templates(tokenizer, row, template, whole, answer):
    example = encode(row, tokenizer, max_length=100, template=template)
    assert text_of(tokenizer, example.input_ids) == whole
    assert learnt(tokenizer, example) == answer
    prompt = encode(row, tokenizer, max_length=100, template=template, with_answer=False)
    assert prompt.input_ids == example.input_ids[: len(prompt)]
    assert set(prompt.labels) == {IGNORE_INDEX}


def turns(*contents):
    roles = ("user", "assistant")
    return tuple({"role": roles[i % 2], "content": c} for i, c in enumerate(contents))


def test_every_answer_of_a_conversation_is_learnt(tokenizer):
    row = Row("f:1", "messages", messages=turns("a", "b", "c", "d"))
    example = encode(row, tokenizer, max_length=100)
    assert text_of(tokenizer, example.input_ids) == (
        "<user>a<end><assistant>b<end><user>c<end><assistant>d<end>"
    )
    assert learnt(tokenizer, example) == "b<end>d<end>"
    prompt = encode(row, tokenizer, max_length=100, with_answer=False)
    assert text_of(tokenizer, prompt.input_ids).endswith("<user>c<end><assistant>")


def test_a_chat_template_that_rewrites_the_past_is_refused(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages | length }}" + CHAT
    row = Row("f:7", "messages", messages=turns("a", "b", "c", "d"))
    with pytest.raises(DataError, match="f:7: the chat template changes earlier turns"):
        encode(row, other, max_length=100)
    other.chat_template = None
    with pytest.raises(DataError, match="f:7: the tokenizer has no chat template"):
        encode(row, other, max_length=100)


def test_rows_that_are_too_long(tokenizer):
    with pytest.raises(
        TooLongError, match=r"f:1: the row has 27 tokens, more than max_length = 26"
    ):
        encode(INSTRUCTION, tokenizer, max_length=26)
    with pytest.raises(TooLongError, match="f:1: the prompt alone has"):
        encode(INSTRUCTION, tokenizer, max_length=10)
    assert len(encode(INSTRUCTION, tokenizer, max_length=27)) == 27


def test_too_long_rows_are_skipped_on_request(tokenizer, capsys):
    rows = [INSTRUCTION, Row("f:2", "instruction", "x" * 50, "5")]
    kept, examples = encode_rows(rows, tokenizer, max_length=30, too_long="skip")
    assert kept == [INSTRUCTION]
    assert len(examples) == 1
    assert "skipped 1 of 2 rows longer than 30 tokens" in capsys.readouterr().out
    with pytest.raises(DataError, match="all 2 rows are longer than max_length = 5"):
        encode_rows(rows, tokenizer, max_length=5, too_long="skip")
    with pytest.raises(TooLongError, match="f:2"):
        encode_rows(rows, tokenizer, max_length=30)


def test_an_empty_answer_teaches_to_stop(tokenizer):
    example = encode(Row("f:1", "prompt", "a", ""), tokenizer, max_length=10)
    assert learnt(tokenizer, example) == "<end>"
