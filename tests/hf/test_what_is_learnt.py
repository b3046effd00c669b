"""Which tokens are learnt, for tokenizers and chat templates that public models have.

From a file to the token ids that a batch is made of: the rows as ``smt-ext train`` prepares them, and
TRL's tokenization behind it.
"""

from __future__ import annotations

import json

import pytest
import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from models import tiny_llama
from quick_runs import SETTINGS, dump
from smt_ext import DataError
from smt_ext.hf import rows as data_rows
from smt_ext.hf.config import SMTConfig
from smt_ext.hf.loading import load_tokenizer
from smt_ext.hf.rows import load_rows, prepare_rows, to_trl
from smt_ext.hf.score_callback import generate_answers
from smt_ext.hf.trainers import SMTSFTTrainer

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

CHATML = (
    "{% if tools %}<|im_start|>system\nTOOLS {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.reasoning_content %}THINK {{ m.reasoning_content }}{% endif %}"
    "{% if m.tool_calls %}CALL {{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"name": "get_weather", "arguments": {"city": "Oslo"}}


def byte_level(chat=CHATML, eos="<|im_end|>", bos=None):
    """Byte-level BPE of about 320 tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    text = ["Question: what is 2 + 3?\nAnswer: 5", "assistant:\n\n the quick brown fox"] * 20
    core.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        pad_token="<pad>",
        **({"bos_token": bos} if bos else {}),
    )
    made.chat_template = chat
    return made


def pieces():
    """As SentencePiece cuts text for Llama 2 and Mistral: a space in front of each."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    text = ["def add(a, b): return a + b", "Question: what is 2 + 3?\nAnswer: 5", "0123456789"] * 20
    core.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )


def learnt(tmp_path, tokenizer, rows, **settings):
    """Of each row: the text of its token ids, and the text of those that are learnt."""
    data = load_rows(dump(tmp_path, "rows.jsonl", [json.dumps(row) for row in rows]))
    made = SMTSFTTrainer(
        tiny_llama(vocab_size=len(tokenizer)),
        trl.SFTConfig(str(tmp_path), **{**SETTINGS, "max_length": 500, **settings}),
        train_dataset=prepare_rows(data, tokenizer),
        processing_class=tokenizer,
    )
    return [
        (
            tokenizer.decode(row["input_ids"]),
            tokenizer.decode([i for i in row["labels"] if i != -100]),
        )
        for row in made.train_dataset
    ]


def chat(*turns, **more):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


@pytest.mark.parametrize("saved", [True, False])
def test_a_tokenizer_that_ends_every_text(tmp_path, saved):
    """One end of text, behind the answer; none behind a prompt that is to be continued."""
    tokenizer = byte_level(eos="</s>", bos="<s>")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    rows = [{"instruction": "what is 2?", "output": "5"}, {"prompt": "2 +", "completion": " 3"}]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    if saved:
        tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
        assert tokenizer("2")["input_ids"] == [1, *tokenizer.convert_tokens_to_ids(["2"])]
        found = learnt(tmp_path, tokenizer, rows)
        assert found[0] == ("<s>Question: what is 2?\nAnswer: 5</s>", " 5</s>")
        assert found[1] == ("<s>2 + 3</s>", " 3</s>")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, eos_token_id=2,
    )  # fmt: skip
    model, seen = transformers.LlamaForCausalLM(config), []
    plain = model.forward

    def forward(*args, **kwargs):
        seen.append(kwargs["input_ids"][0].tolist())
        return plain(*args, **kwargs)

    model.forward = forward
    generate_answers(model, tokenizer, ["2 + "], max_new_tokens=1)
    assert seen[0][-1] != tokenizer.eos_token_id


def test_pieces_add_no_space_before_the_answer(tmp_path):
    rows = [
        {"prompt": "def add(", "completion": "a, b): return a + b"},
        {"prompt": "12", "completion": "34"},
        {"instruction": "what is 2 + 3?", "output": "5"},
    ]
    texts = [text for text, _ in learnt(tmp_path, pieces(), rows)]
    wanted = "def add(a, b): return a + b", "1234", "Question: what is 2 + 3?\nAnswer: 5"
    assert [text.removeprefix("<s>").removesuffix("</s>").strip() for text in texts] == list(wanted)


@pytest.mark.parametrize("answer", ["the fox", "\n\nthe fox", " the fox", "fox\n"])
@pytest.mark.parametrize("kind", ["messages", "prompt", "plain"])
def test_an_answer_that_merges_with_the_end_of_the_prompt(tmp_path, answer, kind):
    """Its first token may begin in the prompt: the row is learnt, and read back, as it is."""
    tokenizer = byte_level(eos="</s>", chat=(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"))  # fmt: skip
    user, spoken = {"role": "user", "content": "q"}, {"role": "assistant", "content": answer}
    row = {
        "messages": {"messages": [user, spoken]},
        "prompt": {"prompt": [user], "completion": [spoken]},
        "plain": {"prompt": "assistant:\n", "completion": answer},
    }[kind]
    ((text, labels),) = learnt(tmp_path, tokenizer, [row])
    begin = "assistant:\n" if kind == "plain" else "user: q</s>assistant: "
    assert text == begin + answer + "</s>"
    assert labels.endswith(answer.strip() + ("\n" if answer.endswith("\n") else "") + "</s>")
    assert kind == "messages" or "q</s>" not in labels


def test_tools_calls_and_reasoning_are_in_the_text_and_learnt(tmp_path):
    call = {"type": "function", "function": CALL}
    spoken = {"role": "assistant", "content": "", "tool_calls": [call]}
    thought = {"role": "assistant", "content": "5", "reasoning_content": "2 and 3"}
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
    shared = [
        {"from": "human", "value": "weather?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "It rains."},
    ]
    rows = [
        {"messages": [{"role": "user", "content": "weather?"}, spoken], "tools": tools},
        {"conversations": shared, "tools": json.dumps(tools), "system": "be kind"},
        {"prompt": [{"role": "user", "content": "2 + 3?"}], "completion": [thought]},
    ]
    plain = chat(("user", "q"), ("assistant", "a"))  # a first row without the fields of the second
    assert "TOOLS" in learnt(tmp_path, byte_level(), [plain, rows[0]])[1][0]
    for row in rows:
        ((text, labels),) = learnt(tmp_path, byte_level(), [row])
        if "tools" in row:
            assert "TOOLS" in text
            assert '"city": "Oslo"' in labels
        else:
            assert "THINK 2 and 3" in labels
        if "conversations" in row:
            assert "be kind" in text
            assert "<|im_start|>tool\nrain<|im_end|>" in text


@pytest.mark.parametrize("stream", [False, True])
def test_a_table_fills_nothing_in(tmp_path, stream):
    """Structs of Parquet have all fields of all rows: arguments of other tools, as null."""
    rows = []
    for name, given in (("weather", {"city": "Oslo"}), ("time", {"zone": 2})):
        call = {"type": "function", "function": {"name": name, "arguments": given}}
        tools = [{"type": "function", "function": {"name": name, "parameters": given}}]
        spoken = {"role": "assistant", "content": None, "tool_calls": [call]}
        rows.append({"messages": [{"role": "user", "content": name}, spoken], "tools": tools})
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    found = prepare_rows(load_rows(str(tmp_path / "rows.parquet"), streaming=stream), byte_level())
    assert [*found] == rows
    rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["day"] = None  # its own
    path = dump(tmp_path, "rows.jsonl", map(json.dumps, rows))
    assert [*prepare_rows(load_rows(path, streaming=stream), byte_level())] == rows


def test_every_answer_ends(tmp_path):
    rows = [{"prompt": "q", "completion": "a"}, {"instruction": "q", "output": "yes"}]
    for text, labels in learnt(tmp_path, byte_level(), rows):
        assert labels.endswith("<|im_end|>")
        assert text.count("<|im_end|>") == 1
    ((_, labels),) = learnt(tmp_path, byte_level(), [{"text": "the fox"}])
    assert labels == "the fox<|im_end|>"


def test_rows_that_are_cut_are_counted(tmp_path, caplog):
    rows = [{"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "the fox " * 9},
            {"prompt": "long " * 9, "completion": "a"}]  # fmt: skip
    found = learnt(tmp_path, byte_level(), rows, max_length=12)
    assert len(found) == 2
    assert "1 of 3 rows are cut there, without their ends, and 1 left out" in caplog.text
    with pytest.raises(DataError, match="no row has an answer within max_length = 12"):
        learnt(tmp_path, byte_level(), rows[2:], max_length=12)


LONG = [{"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "the fox " * 9},
        {"prompt": "long " * 9, "completion": "a"}]  # fmt: skip
CUT = "1 of 3 rows are cut there, without their ends, and 1 left"


def cutting(tmp_path, rows=LONG, held_out=None, **settings):
    """A trainer whose model embeds all of its tokenizer's tokens."""
    tokenizer = byte_level()
    model = tiny_llama(vocab_size=len(tokenizer))
    settings = {**SETTINGS, "max_length": 12, "max_steps": 3, "save_strategy": "no", **settings}
    return SMTSFTTrainer(
        model, trl.SFTConfig(str(tmp_path / "run"), **settings),
        train_dataset=rows if hasattr(rows, "map") else datasets.Dataset.from_list(rows),
        eval_dataset=held_out, processing_class=tokenizer,
        smt_config=SMTConfig(budget="6 blocks", block_size=32, plan_batches=1),
    )  # fmt: skip


@pytest.mark.parametrize("packing", [False, True])
def test_a_row_of_exactly_max_length_is_whole(tmp_path, caplog, packing):
    made = cutting(tmp_path, LONG[:2], max_length=500)
    longest = max(len(row["input_ids"]) for row in made.train_dataset)
    cutting(tmp_path, LONG[:2], max_length=longest, packing=packing)
    assert "max_length" not in caplog.text
    cutting(tmp_path, LONG[:2], max_length=longest - 1, packing=packing)
    assert "1 of 2 rows are cut there" in caplog.text


def test_rows_that_packing_cuts_are_counted(tmp_path, caplog):
    cutting(tmp_path, packing=True)
    assert f"train: max_length = 12: {CUT} without an answer" in caplog.text
    caplog.clear()
    cutting(tmp_path, packing=True, packing_strategy="bfd_split")  # which cuts nothing off
    assert "max_length" not in caplog.text
    with pytest.raises(DataError, match="no row has an answer within max_length = 12"):
        cutting(tmp_path, LONG[2:], packing=True)


def test_held_out_rows_that_are_cut_are_counted(tmp_path, caplog):
    cutting(tmp_path, LONG[:1], datasets.Dataset.from_list(LONG))
    assert f"eval: max_length = 12: {CUT} out" in caplog.text
    assert "train: max_length" not in caplog.text


def test_what_is_cut_off_the_beginning_is_said(tmp_path, caplog):
    cutting(tmp_path, truncation_mode="keep_end")
    assert "2 of 3 rows are cut there, without their beginnings, and 0 left out" in caplog.text


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
WRITTEN = {"prompt": "q", "completion": "a"}
SPOKEN = {
    "prompt": [{"role": "user", "content": "q"}],
    "completion": [{"role": "assistant", "content": "a"}],
}
SHARED = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}


def talk(content="a", **more):
    asked = {"role": "user", "content": "q or not"}
    turns = [asked, {"role": "assistant", "content": content, **more}]
    return {"messages": turns}


def called(*values):
    asked = {"from": "human", "value": "q"}
    calls = [{"from": "function_call", "value": json.dumps(value)} for value in values]
    return {"conversations": [asked, *calls, {"from": "gpt", "value": "a"}]}


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([{"prompt": "q", "completion": "a"}, chat(("user", "q"), ("assistant", "a"))],
         r"rows\.jsonl:2: has 'messages', and the rows before it 'prompt'"),
        ([{"instruction": "q", "output": "a", "history": [["x", "y"]]}], "1: 'history' would be"),
        ([chat(("user", "q"), ("assistant", " "))], "1: nothing to learn from"),
        ([{"conversations": [{"from": "function_call", "value": "{"}]}], "1: not valid JSON"),
        ([WRITTEN, SPOKEN], "2: has 'prompt of messages', and the rows before it 'prompt'"),
        ([SPOKEN, WRITTEN], "2: has 'prompt', and the rows before it 'prompt of messages'"),
        ([called(3)], "1: a function_call has no 'arguments': 3"),
        ([called([])], "1: a function_call has no 'arguments': None"),
        ([called({"name": "f", "parameters": {}})], "1: a function_call has no 'arguments'"),
        ([called({"name": "", "arguments": {}})], "1: a tool call without the name"),
        ([talk(tool_calls=["f"])], "1: a tool call without the name"),
        ([WRITTEN | {"tools": TOOLS}], "1: 'tools' would be left out"),
        ([{"instruction": "q", "output": "a", "tools": TOOLS}], "1: 'tools' would be left out"),
        ([WRITTEN | {"documents": ["d"]}], "1: 'documents' would be left out"),
        ([talk() | {"documents": ["d"]}], "1: 'documents' would be left out"),
        ([{"text": "t", "images": ["a.png"]}], "1: 'images' would be left out"),
        ([talk() | {"image": "a.png"}], "1: 'image' would be left out"),
        ([WRITTEN | {"label": False}], "1: 'label' is false"),
        ([talk(weight=0)], "1: 'weight' or 'train' of an answer"),
        ([talk(weight=0.5)], "1: 'weight' or 'train' of an answer"),
        ([talk(train=False)], "1: 'weight' or 'train' of an answer"),
        ([SHARED | {"conversations": [*SHARED["conversations"][:1], {"from": "gpt", "value": "a",
          "weight": 0}]}], "1: 'weight' or 'train' of an answer"),
    ],
)  # fmt: skip
def test_rows_that_would_lose_something(tmp_path, lines, says):
    path = dump(tmp_path, "rows.jsonl", [json.dumps(line) for line in lines])
    with pytest.raises(DataError, match=says):
        prepare_rows(load_rows(path), byte_level(), name=path)


@pytest.mark.parametrize("row", [WRITTEN, {"text": "t"}, SPOKEN, talk(), SHARED])
def test_columns_that_are_empty_or_of_others_pass(tmp_path, row):
    """What is about a row is no part of it."""
    more = {"id": 7, "source": "s", "score": 0.5, "label": 1, "weight": 2, "images": [],
            "documents": None, "tools": "[]", "image": "", "system": ""}  # fmt: skip
    path = dump(tmp_path, "rows.jsonl", [json.dumps(row | more)] * 2)
    (made, _) = prepare_rows(load_rows(path), byte_level())
    made = {key: value for key, value in made.items() if key != "tools"}
    assert made == to_trl(row)


def test_turns_of_sharegpt_keep_what_they_have(tmp_path):
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": 2}}]
    wrapped = [{"type": "function", "function": call} for call in calls]
    several = called(calls)
    thought = {"from": "gpt", "value": "a", "reasoning_content": "R", "weight": 1}
    spoken = {"from": "gpt", "value": "let me look", "tool_calls": wrapped}
    silent = {"role": "assistant", "content": None, "tool_calls": wrapped}
    asked = SHARED["conversations"][:1]
    rows = [SHARED, several, {"conversations": [*asked, spoken]}, {"conversations": [*asked, silent]},
            {"conversations": [*asked, thought]}]  # fmt: skip
    path = dump(tmp_path, "rows.jsonl", [json.dumps(row) for row in rows])
    plain, *made = [row["messages"][1] for row in prepare_rows(load_rows(path), byte_level())]
    assert plain == {"role": "assistant", "content": "a"}  # nothing of the others
    assert [turn.get("tool_calls") for turn in made] == [wrapped, wrapped, wrapped, None]
    assert [turn["content"] for turn in made] == ["", "let me look", None, "a"]
    assert made[-1] == {
        "role": "assistant", "content": "a", "reasoning_content": "R", "weight": 1
    }  # fmt: skip


BARE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CALLS = talk("", tool_calls=[{"type": "function", "function": CALL}])


@pytest.mark.parametrize(
    ("row", "lost"),
    [
        (talk() | {"tools": TOOLS}, "tools"),
        (SPOKEN | {"tools": json.dumps(TOOLS)}, "tools"),
        (CALLS, "tool_calls"),
        (talk("a", tool_calls=[CALL]), "tool_calls"),
        ({"messages": [*CALLS["messages"], *talk()["messages"]]}, "tool_calls"),
        (talk(reasoning_content="R"), "reasoning_content"),
        (talk(thinking="R"), "thinking"),
    ],
)
def test_what_a_chat_template_leaves_out_is_refused(row, lost):
    rows = datasets.Dataset.from_list([row])
    with pytest.raises(DataError, match=rf"rows:1: the chat template leaves out '{lost}'"):
        prepare_rows(rows, byte_level(BARE), name="rows")
    template = CHATML.replace("m.reasoning_content", "(m.reasoning_content or m.thinking)")
    prepare_rows(rows, byte_level(template))


def test_what_was_thought_before_an_earlier_answer_may_be_left_out():
    """As Qwen3's template does."""
    turns = [*talk(reasoning_content="R")["messages"], *talk()["messages"]]
    prepare_rows(datasets.Dataset.from_list([{"messages": turns}]), byte_level(BARE))


BEGUN = "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
# A trimmed answer may be found in the question, with what ends that.
USERS = BARE.replace("<|im_end|>", "{% if m.role != 'assistant' %}<|im_end|>{% endif %}")
TURNS = BARE.replace("<|im_end|>", "")
CALLED = (
    "{% for m in messages %}{{ m.role }}: {% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
LATER = {"messages": [*talk()["messages"], {"role": "user", "content": "bye"}]}


@pytest.mark.parametrize(
    ("template", "row", "ends"),
    [
        (BEGUN.replace("m.content", "m.content | trim"), talk("a "), False),
        (BARE.replace("m.content", "m.content | trim"), talk(" a\n"), True),
        (BEGUN.replace("m.content", "m.content.split('</think>')[-1]"),
         talk("<think>b</think>a"), False),
        (BARE.replace("m.content", "m.content.split('</think>')[-1]"),
         talk("<think>b</think>a"), True),
        (USERS.replace("m.content", "m.content | trim"), talk("q "), False),
        (USERS, LATER, False), (TURNS, LATER, False), (BARE, LATER, True),
        (USERS.replace("!=", "=="), LATER, True),
        (BARE.replace("m.content", "m.content if m.role == 'user'"), talk("yes"), False),
        (CALLED, CALLS, False), (CHATML, CALLS, True),
        (BEGUN, talk("say </s> now"), False),
        (BARE, talk("end"), True), (BARE, talk("im_end"), True),  # also the name of the end
    ],
)  # fmt: skip
@pytest.mark.parametrize("eos", ["</s>", "<|im_end|>"])  # the template's end may be another token
def test_the_end_is_looked_for_behind_the_last_answer(template, row, ends, eos):
    rows = datasets.Dataset.from_list([row])
    if ends:
        prepare_rows(rows, byte_level(template, eos))
        return
    with pytest.raises(DataError, match=r"behind the last answer|leaves out"):
        prepare_rows(rows, byte_level(template, eos))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("row", "says", "settings"),
    [
        ({"prompt": "q", "completion": " "}, "training row 0: nothing to learn from", {}),
        ({"prompt": "q", "completion": None}, "training row 0: has the fields 'prompt'", {}),
        ({"content": "\n"}, "row 0: nothing to learn", {"dataset_text_field": "content"}),
        (talk(""), "training row 0: nothing to learn from", {}),
        (talk(), "training row 0: the chat template writes no special token", {}),
        ({"conversations": [{"from": "user", "value": "q"}]}, "row 0: nothing to learn from", {}),
        (WRITTEN, "the tokenizer has no end-of-text", {}),
    ],
)
def test_rows_of_a_trainer_in_python_are_checked(tmp_path, row, says, settings, stream):
    rows = datasets.Dataset.from_list([row])
    tokenizer = byte_level(BEGUN, None if "end-of-text" in says else "</s>")
    with pytest.raises(DataError, match=says):
        SMTSFTTrainer(
            tiny_llama(vocab_size=len(tokenizer)),
            trl.SFTConfig(str(tmp_path), **SETTINGS, **settings),
            train_dataset=rows.to_iterable_dataset() if stream else rows,
            processing_class=tokenizer,
            smt_config=SMTConfig(budget="6 blocks", block_size=32),
        ).train()


def test_a_stream_that_is_checked_stays_what_it_is():
    turns = [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]
    rows = datasets.Dataset.from_list([{"conversations": turns}]).to_iterable_dataset()
    checked = data_rows.check_rows(rows, byte_level(), "row")
    assert [*checked] == [{"conversations": turns}]


def test_rows_of_another_kind_are_not_held_out(tmp_path):
    for rows, held_out in (([WRITTEN], [SPOKEN]), ([SPOKEN], [WRITTEN])):
        with pytest.raises(DataError, match=r"eval_dataset has 'prompt.* in one format"):
            cutting(tmp_path, rows, datasets.Dataset.from_list(held_out), max_length=64)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_row_is_checked_once(tmp_path, monkeypatch, prepared):
    """Where the command line reads it, or in the trainer."""
    checked, plain = [], data_rows._check

    def check(row, where, tokenizer):
        checked.append(where)
        plain(row, where, tokenizer)

    monkeypatch.setattr(data_rows, "_check", check)
    made = datasets.Dataset.from_list([WRITTEN] * 3)
    made = prepare_rows(made, byte_level()) if prepared else made
    cutting(tmp_path, made, max_length=64)
    named = ["data:1", "data:2", "data:3"] if prepared else [f"training row {i}" for i in range(3)]
    assert checked == named


def test_lines_of_tables_and_texts_are_named(tmp_path):
    csv = dump(tmp_path, "rows.csv", ["prompt,completion", '"q\nq",a', "q,"])
    with pytest.raises(DataError, match=r"rows\.csv:4: nothing to learn from"):
        prepare_rows(load_rows(csv), byte_level(), name=csv)
    ragged = dump(tmp_path, "ragged.csv", ["prompt,completion", "q,a,b"])
    with pytest.raises(DataError, match=r"ragged\.csv:2: another number of fields"):
        load_rows(ragged)
    text = dump(tmp_path, "rows.txt", ["one", "", "two"])
    assert load_rows(text)["text"] == ["one", "two"]
    one = dump(tmp_path, "a.jsonl", [json.dumps({"prompt": "p", "completion": "c"})])
    other = dump(tmp_path, "b.tsv", ["instruction\toutput", "q\ta"])
    made = prepare_rows(load_rows(f"{one},{other}"), byte_level())
    assert [row["completion"] for row in made] == ["c", " a"]
