"""Rows of data in the formats that TRL's trainers take.

TRL takes ``text``, ``prompt`` and ``completion``, and ``messages`` (with ``tools``). Here the fields of
LLM-Adapters and Alpaca (``instruction``, ``input``, ``output``) become a prompt and its completion, and
ShareGPT's ``conversations`` become ``messages``. Every row is looked at once, so that one that cannot be
learnt from is named by file and line before anything is loaded.
"""

from __future__ import annotations

import copy
import csv
import glob
import io
import json
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any
from weakref import WeakSet

from ..errors import DataError

__all__ = [
    "TEMPLATES", "check_rows", "kind_of", "load_rows", "prepare_rows", "read_json", "to_trl"
]  # fmt: skip

TEMPLATES = ("plain", "alpaca", "chat")
_ENDINGS = ".jsonl, .json, .csv, .tsv, .txt or .parquet"
_DATA = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_ABOUT = ("dataset_info.json", "dataset_infos.json")  # datasets' own notes
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant",
          "observation": "tool", "function_response": "tool", "function_call": "assistant"}  # fmt: skip
_FIELDS = {"prompt": ("prompt", "completion"), "messages": ("messages",), "text": ("text",)}
_BESIDE = ("tools", "chat_template_kwargs")
# "text" beside them is often the same rendered; "prompt" alone a title, or the first message.
_FORMATS = (("instruction", "output"), ("conversations",), ("prompt", "completion"), ("messages",))
_EMPTY: tuple[Any, ...] = (None, False, "", "[]", [], {})
_IMAGES = ("images", "image", "videos", "audios")
_THOUGHTS = ("reasoning_content", "thinking")
_OTHER = "smt_ext_another_answer"  # beside which a template's own text is told
_WHERE = "__where"  # the row's file and line, for messages
_checked: WeakSet[Any] = WeakSet()  # what prepare_rows has made


def load_rows(name: str, *, config: str | None = None, split: str = "train",
              streaming: bool = False) -> Any:  # fmt: skip
    """A dataset from a file (JSON, JSON lines, CSV, Parquet, text), a folder, or a hub name.

    Several come with commas; a path is never read as a pattern. ``config``, ``split`` and ``streaming``
    are those of ``datasets.load_dataset``.

    Raises:
        DataError: none such, no row in it, or a line that cannot be read; names file and line.
    """
    import datasets

    if not isinstance(name, str):  # in YAML
        raise DataError(f"the data are {name!r}, expected text; several with commas: a.csv,b.csv")
    path = Path(name).expanduser()
    one_split = path.is_file() or (path / "state.json").is_file()
    # "test" is the default of held-out rows, which a file does not have either.
    if one_split and split not in ("train", "test"):
        raise DataError(f"split is {split!r}, and {name!r} has no splits")
    if one_split and config is not None:
        raise DataError(f"dataset_config is {config!r}, and {name!r} has none: leave it away")
    try:
        if "," in name and not path.exists():
            parts = [load_rows(part.strip(), config=config, split=split, streaming=streaming)
                     for part in name.split(",") if part.strip()]  # fmt: skip
            return datasets.concatenate_datasets(parts)
        if path.is_file() and path.suffix == ".parquet":
            file = glob.escape(str(path))
            return datasets.load_dataset(
                "parquet", data_files=file, split="train", streaming=streaming
            )
        if path.is_file():
            if not (read := list(_read_file(path))):
                raise DataError(f"{name!r} has no rows")
            read[:1] = [{**dict.fromkeys(key for row in read for key in row), **read[0]}]
            # Of the fields in the first row alone; values may differ in kind, as calls' arguments do.
            rows = datasets.Dataset.from_list(read, on_mixed_types="use_json")
            return rows.to_iterable_dataset() if streaming else rows
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            return loaded[split] if isinstance(loaded, dict) else loaded
        local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
        if local and not path.exists():
            raise DataError(f"cannot read {name!r}: no such file or directory")
        if path.is_dir() and glob.has_magic(name):
            raise DataError(f"the folder {name!r} would be a pattern: rename it without *?[")
        found = str(path) if path.is_dir() else name
        if path.is_dir():
            _refuse_unread(path, datasets.load_dataset_builder(found, config).config.data_files)
        return datasets.load_dataset(found, config, split=split, streaming=streaming)
    except DataError:
        raise
    except Exception as error:  # whatever a builder raises about the user's file
        reason = [*str(error.__cause__ or error).splitlines(), repr(error)][0]
        raise DataError(f"cannot read the data {name!r}: {reason}") from None


def _refuse_unread(folder: Path, read: Mapping[str, list[str]] | None) -> None:
    """datasets reads one kind of file, or those named after splits, and says nothing of the others."""
    card = folder / "README.md"
    if not read or (card.is_file() and "configs:" in _read(card)):  # whose choice it is
        return
    taken = {Path(file).resolve() for files in read.values() for file in files}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        hidden = any(part[0] in "._" for part in name.parts) or name.name in _ABOUT
        if file.suffix in _DATA and not hidden and file.resolve() not in taken:
            raise DataError(
                f"the folder {str(folder)!r} holds {str(name)!r}, which would not be read beside "
                f"{min(taken).name!r}. Name the files, with commas between; or keep files of one kind "
                "there, all or none named after a split (train, test)."
            )


def prepare_rows(
    dataset: Any, tokenizer: Any, *, template: str = "plain", name: str = "data"
) -> Any:
    """The dataset (also a streaming one) in TRL's formats, every row checked; see :func:`to_trl`.

    Raises:
        DataError: a row that cannot be learnt from, or the tokenizer has no end of text; names row
            ``name:number``, counted from 1.
    """
    import datasets

    if template not in TEMPLATES:
        raise DataError(f"template is {template!r}, expected one of {', '.join(TEMPLATES)}")
    first = next(iter(dataset), None)
    if first is None:
        raise DataError(f"{name!r} has no rows")
    if "input_ids" in first:
        return dataset

    def made(row: dict[str, Any], index: int) -> tuple[str, dict[str, Any]]:
        where = row.get(_WHERE) or f"{name}:{index + 1}"
        # A table has None where a row lacks a field that others have.
        given = {key: _without_filling(value, source.get(key)) for key, value in row.items()
                 if key != _WHERE and value is not None}  # fmt: skip
        return where, to_trl(given, where, template)

    source = getattr(dataset, "features", None) or {}
    structs = any(map(_is_struct, source.values()))
    features = None
    kind = kind_of(made(first, 0)[1])

    def prepare(row: dict[str, Any], index: int) -> dict[str, Any]:
        where, found = made(row, index)
        if kind_of(found) != kind:
            raise DataError(
                f"{where}: has {kind_of(found)!r}, and the rows before it {kind!r}: train on one kind"
            )
        _check(found, where, tokenizer)
        if "chat_template_kwargs" in row:
            found.setdefault("chat_template_kwargs", {})
        return dict.fromkeys(features or ()) | found

    # The first row may lack what later ones have.
    kept = {*made(first, 0)[1], *_BESIDE}
    dropped = [column for column in first if column not in kept]
    if structs:  # the table that is made is of none, or would be filled anew
        columns = made(first, 0)[1] | {name: [] for name in _BESIDE if name in first}
        features = datasets.Features({
            name: datasets.Value("string") if isinstance(value, str) else datasets.Json()
            for name, value in columns.items()
        })  # fmt: skip
    rows = dataset.map(prepare, with_indices=True, remove_columns=dropped, features=features)
    _checked.add(rows)
    return rows


def check_rows(
    rows: Any, tokenizer: Any, name: str, *, text_field: str = "text", preferences: bool = False
) -> Any:
    """Rows of text as TRL takes them, each checked; those of a stream as they are read.

    What :func:`prepare_rows` has made is not checked again. ``preferences``: rows have ``chosen`` and
    ``rejected``.

    Raises:
        DataError: as of :func:`prepare_rows`; names row ``name number``, counted from 0.
    """
    import datasets
    from trl.data_utils import maybe_convert_to_chatml

    if rows in _checked or hasattr(tokenizer, "tokenizer"):  # a processor, with its own templates
        return rows

    def look(row: dict[str, Any], index: int) -> dict[str, Any]:
        where = f"{name} {index}"
        row = {key: value for key, value in row.items() if value is not None}
        if preferences:
            asked = {key: row[key] for key in ("prompt", *_BESIDE) if key in row}
            for key in ("chosen", "rejected"):
                _check(asked | {"completion": row.get(key)}, f"{where}: {key!r}", tokenizer)
            if row["chosen"] == row["rejected"]:
                raise DataError(f"{where}: 'chosen' and 'rejected' are the same")
        else:
            row = maybe_convert_to_chatml(copy.deepcopy(row))  # which changes messages in place
            text = {"text": row[text_field]} if text_field in row else {}
            _check(_of_trl(row | text, where), where, tokenizer)
        return {}  # nothing new in the row

    if isinstance(rows, datasets.IterableDataset):
        return rows.map(look, with_indices=True)
    for index, row in enumerate(rows):
        look(row, index)
    return rows


def to_trl(row: dict[str, Any], where: str = "row", template: str = "plain") -> dict[str, Any]:
    """One row in TRL's formats; a row in one of them keeps the fields of that format alone.

    ``template``: how ``instruction``, ``input`` and ``output`` become text: ``plain`` (``Question: ...
    Answer:``), ``alpaca`` (the prompt of Alpaca and of LLM-Adapters), or ``chat`` (a user's and an
    assistant's message, by the tokenizer's chat template).

    Raises:
        DataError: fields that nothing is known of, of another type, or of two formats, or that would be
            left out or not obeyed; names the row.
    """
    formats = [fields for fields in _FORMATS if all(row.get(field) for field in fields)]
    if len(formats) > 1:
        both = " and ".join(map(repr, (fields[-1] for fields in formats)))
        raise DataError(f"{where}: has {both}, of which one is learnt. Leave the others away.")
    keys = ["history", "documents"] if formats else []
    if formats and "conversations" not in row:
        keys.append("system")
        if "messages" not in row and not isinstance(row.get("prompt"), list):
            keys.append("tools")
    if lost := next((key for key in (*keys, *_IMAGES) if row.get(key) not in _EMPTY), None):
        place = "Give it beside" if lost == "tools" else "Write it into"
        way = "Leave" if lost in _IMAGES else f"{place} 'messages', or leave"
        raise DataError(f"{where}: {lost!r} would be left out. {way} it away.")
    if row.get("label") is False and formats == [("prompt", "completion")]:
        raise DataError(
            f"{where}: 'label' is false: the completion is one that is not wanted, and would be learnt. "
            "Leave such rows away, or train on preferences."
        )
    if "instruction" in row and "output" in row:
        question, output = (_text(row, key, where) for key in ("instruction", "output"))
        extra = _text(row, "input", where) if row.get("input") else ""
        if not question.strip():
            raise DataError(f"{where}: 'instruction' is empty")
        if template == "alpaca":
            return {"prompt": _alpaca(question, extra), "completion": output}
        question = f"{question}\n{extra}" if extra else question
        if template == "chat":
            return {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": output}],
            }
        return {"prompt": f"Question: {question}\nAnswer:", "completion": f" {output}"}
    if "conversations" in row:
        turns = row["conversations"]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise DataError(f"{where}: 'conversations' is no list of objects")
        # LLaMA-Factory has "" where there are no tools.
        kept = {key: row[key] for key in _BESIDE if row.get(key)}
        system = row.get("system")
        first = [{"role": "system", "content": system}] if system else []
        return {"messages": first + [_turn(turn, where) for turn in turns], **kept}
    return _of_trl(row, where)


def _of_trl(row: dict[str, Any], where: str) -> dict[str, Any]:
    if kind := kind_of(row):
        # UltraChat has 'prompt' beside its 'messages', which TRL may take for the row's format; classes
        # of texts are 'labels', which it may take for tokens.
        return {key: row[key] for key in (*_FIELDS[kind.split()[0]], *_BESIDE) if key in row}
    raise DataError(
        f"{where}: has the fields {', '.join(map(repr, row)) or 'none'}; expected 'prompt' and "
        "'completion', 'messages', 'text', 'conversations', or 'instruction' and 'output'"
    )


def read_json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line and object of a file of JSON lines; number and object of one JSON array.

    Raises:
        DataError: not to be read, no JSON, no object or no row; names file and line.
    """
    text = _read(path)
    rows: Iterator[tuple[int, Any]]
    if text.lstrip().startswith("["):
        rows = enumerate(_parsed(text, str(path)), start=1)
    else:
        lines = enumerate(text.split("\n"), start=1)
        rows = ((n, _parsed(line, f"{path}:{n}")) for n, line in lines if line.strip())
    number = 0
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: a {type(row).__name__}, expected a JSON object")
        yield number, row
    if not number:
        raise DataError(f"{str(path)!r} has no rows, expected one JSON object a line")


def kind_of(row: Mapping[str, Any]) -> str | None:
    """The field by which TRL tells the format of rows, and whether a prompt is text or messages."""
    kind = next((kind for kind, fields in _FIELDS.items() if row.keys() >= {*fields}), None)
    return "prompt of messages" if kind == "prompt" and isinstance(row[kind], list) else kind


def _turn(turn: dict[str, Any], where: str) -> dict[str, Any]:
    rest = {key: turn[key] for key in turn if key not in ("from", "role", "value", "content")}
    role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    calls = content is None and rest.get("tool_calls")
    if not isinstance(role, str) or not (isinstance(content, str) or calls):
        raise DataError(f"{where}: a turn has no text under 'from' and 'value'")
    if role == "function_call":
        calls = _parsed(str(content), where)
        calls = calls if isinstance(calls, list) else [calls]
        for call in calls or [None]:
            if not (isinstance(call, dict) and "arguments" in call):
                raise DataError(f"{where}: a function_call has no 'arguments': {call!r}")
        content = ""
        rest["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return {"role": _ROLES.get(role, role), "content": content, **rest}


def _alpaca(instruction: str, extra: str) -> str:
    context = ", paired with an input that provides further context" if extra else ""
    middle = f"### Input:\n{extra}\n\n" if extra else ""
    return (
        f"Below is an instruction that describes a task{context}. Write a response that appropriately "
        f"completes the request.\n\n### Instruction:\n{instruction}\n\n{middle}### Response:\n"
    )


def _check(row: dict[str, Any], where: str, tokenizer: Any) -> None:
    """Refuse what the tokenizer or its chat template would, and rows without an answer."""
    if tokenizer.eos_token is None:
        raise DataError(
            "the tokenizer has no end-of-text token, by which the model learns to stop: set --eos_token"
        )
    answer = row.get("completion", row.get("messages", row.get("text")))
    if isinstance(answer, str) and "messages" not in row:
        prompt = _text(row, "prompt", where) if "prompt" in row else ""
        _encodable(prompt + answer, where)
        if not answer.strip():
            raise DataError(f"{where}: nothing to learn from: the answer is empty")
        return
    if not isinstance(answer, list) or not all(isinstance(turn, dict) for turn in answer):
        raise DataError(f"{where}: a {type(answer).__name__}, expected text or a list of messages")
    prompt = row.get("prompt", [])
    if not isinstance(prompt, list) or not all(isinstance(turn, dict) for turn in prompt):
        raise DataError(f"{where}: 'prompt' is text and 'completion' messages: give both alike")
    turns = [*prompt, *answer]
    spoken = [turn for turn in answer if turn.get("role") == "assistant"]
    if not spoken or not all(
        turn.get("tool_calls") or str(turn.get("content") or "").strip() for turn in spoken
    ):
        raise DataError(
            f"{where}: nothing to learn from: no message of 'assistant', or an empty one"
        )
    if tokenizer.chat_template is None:
        raise DataError(
            f"{where}: the tokenizer has no chat template for messages. Give one with "
            "--chat_template_path, or use 'prompt' and 'completion' rows."
        )
    for turn in spoken:
        if turn.get("weight", 1) not in (None, 1) or turn.get("train") is False:
            raise DataError(
                f"{where}: 'weight' or 'train' of an answer, which would be learnt all the same. Give "
                "what is not to be learnt as 'prompt', and the answer behind it as 'completion'."
            )
    calls = [call for turn in turns for call in turn.get("tool_calls") or ()]
    functions = [call.get("function", call) if isinstance(call, dict) else {} for call in calls]
    if not all(isinstance(called, dict) and called.get("name") for called in functions):
        raise DataError(f"{where}: a tool call without the name of a function")
    _check_template(turns, row, where, tokenizer)


def _check_template(turns: list[Any], row: Mapping[str, Any], where: str, tokenizer: Any) -> None:
    """Refuse a chat template that leaves out a part of the row, or writes no end of the last answer."""
    tools = row.get("tools")
    tools = _parsed(tools, where) if isinstance(tools, str) else tools
    options = {"tools": tools} | (row.get("chat_template_kwargs") or {})

    def render(turns: list[Any], **changed: Any) -> str:
        try:
            found: str = tokenizer.apply_chat_template(turns, tokenize=False, **options | changed)
        except Exception as error:  # what a template may raise is its own affair
            raise DataError(f"{where}: the chat template refuses it: {error}") from None
        return found

    text = render(turns)
    _encodable(text, where)
    last = max(index for index, turn in enumerate(turns) if turn.get("role") == "assistant")
    answer, final = turns[last], last == len(turns) - 1
    without: dict[str, str] = {}
    if tools:
        without["tools"] = render(turns, tools=None)
    if any(turn.get("tool_calls") for turn in turns):
        # Of other names: a message without calls and content may be refused.
        named = [_otherwise(turn) if turn.get("tool_calls") else turn for turn in turns]
        without["tool_calls"] = render(named)
    # Templates leave out on purpose what was thought before an earlier answer.
    if final and (thought := next(filter(answer.get, _THOUGHTS), None)):
        said = {key: value for key, value in answer.items() if key not in _THOUGHTS}
        without[thought] = render([*turns[:-1], said])
    if lost := next((part for part, rest in without.items() if rest == text), None):
        raise DataError(
            f"{where}: the chat template leaves out {lost!r}. Give another with "
            "--chat_template_path, or leave it away."
        )

    def holds_special(text: str) -> bool:
        begin = tokenizer.bos_token if tokenizer.bos_token != tokenizer.eos_token else None
        if any(token in text for token in tokenizer.all_special_tokens if token != begin):
            return True
        decoder = tokenizer.added_tokens_decoder  # hundreds, in some
        added = (str(token) for token in decoder.values() if token.special)
        return any(token in text for token in added if token != begin)

    content, end = answer.get("content"), ""
    # Else spaces or a part of it may be left out, and the rest be found elsewhere.
    whole = final and isinstance(content, str) and content == content.strip()
    if whole and content in text and not answer.get("tool_calls"):
        end = text.rpartition(content)[2]
    if not holds_special(end):
        text = text if final else render(turns[: last + 1])
        other = render([*turns[:last], _otherwise(answer)])
        if other == text:
            raise DataError(f"{where}: the chat template leaves out the last answer")
        ends = takewhile(
            lambda pair: pair[0] == pair[1], zip(text[::-1], other[::-1], strict=False)
        )
        end = "".join(character for character, _ in ends)[::-1]
    if not holds_special(end):
        raise DataError(
            f"{where}: the chat template writes no special token behind the last answer, so nothing "
            "would teach the model to stop. Give another with --chat_template_path."
        )


def _otherwise(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn that says something else; one that calls tools calls others."""
    other: Any = {"name": _OTHER}
    if calls := turn.get("tool_calls"):
        calls = [call | ({"function": call["function"] | other} if "function" in call else other)
                 for call in calls]  # fmt: skip
        return turn | {"tool_calls": calls}
    parts = [{"type": "text", "text": _OTHER}]
    return turn | {"content": parts if isinstance(turn.get("content"), list) else _OTHER}


def _is_struct(feature: Any) -> bool:
    """Whether a column of a table holds structs, maybe in lists: all have the same fields."""
    if isinstance(feature, dict):
        return True
    inner = getattr(feature, "feature", None)
    return inner is not None and _is_struct(inner)


def _without_filling(value: Any, feature: Any) -> Any:
    """What a row has itself: without the nulls of fields that other rows have, in structs alone."""
    if isinstance(feature, dict) and isinstance(value, dict):
        return {
            key: _without_filling(inner, feature.get(key))
            for key, inner in value.items()
            if inner is not None or key == "content"  # of a message that calls tools
        }
    inner = getattr(feature, "feature", None)
    if inner is not None and isinstance(value, list):
        return [_without_filling(item, inner) for item in value]
    return value


def _encodable(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: no valid Unicode text: {error}") from None


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is a {type(value).__name__}, expected text")
    return value


def _read_file(path: Path) -> Iterator[dict[str, Any]]:
    """Rows with their lines. Of a CSV all values are text: "007" and "None" are answers, too."""
    if path.suffix in (".json", ".jsonl"):
        for number, row in read_json(path):
            _encodable(json.dumps(row, ensure_ascii=False), where := f"{path}:{number}")
            yield {**row, _WHERE: where}
    elif path.suffix in (".csv", ".tsv"):
        yield from _read_csv(path)
    elif path.suffix == ".txt":
        for number, line in enumerate(_read(path).split("\n"), start=1):
            if line.strip():
                yield {"text": line.removesuffix("\r"), _WHERE: f"{path}:{number}"}
    else:
        raise DataError(f"{str(path)!r} ends with {path.suffix!r}, expected {_ENDINGS}")


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    lines = io.StringIO(_read(path), newline="")
    delimiter = "\t" if path.suffix == ".tsv" else ","
    csv.field_size_limit(2**31 - 1)  # Python's is 128 KB, less than a long text
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        names = reader.fieldnames or ()
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise DataError(f"{path}:1: two columns are named {twice!r}")
        for record in reader:
            where = f"{path}:{reader.line_num}"
            if None in record or None in record.values():
                raise DataError(f"{where}: another number of fields than the header has")
            yield {**record, _WHERE: where}
    except csv.Error as error:  # a quote that is never closed, say
        raise DataError(f"{path}:{reader.line_num}: {error}") from None


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None
