"""A whole evaluation: accuracies, standard errors, going on after a stop, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from pathlib import Path

import pytest
import torch

import smt_ext
from models import llama_plan, save_checkpoint
from smt_ext import CheckpointError, DataError
from smt_ext.cli import entry as cli
from smt_ext.data import read_rows
from smt_ext.errors import Interrupted, TooLongError
from smt_ext.hf.loading import load_model, load_tokenizer
from smt_ext.likelihood import OptionScorer
from smt_ext.suite_eval import evaluate_suite
from suite_rows import write_sets


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights large enough that options differ."""
    folder = save_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    model = load_model(str(folder), torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small sets of every kind but ``ending``."""
    root = tmp_path_factory.mktemp("sets")
    write_sets(root)
    return root


@pytest.fixture(scope="module")
def loaded(checkpoint: Path):
    return load_model(str(checkpoint), torch.float32), load_tokenizer(str(checkpoint))


def evaluate(loaded, data, output, suite="commonsense", **settings):
    settings = {"max_new_tokens": 3, "batch_size": 7, "progress": False, **settings}
    return evaluate_suite(*loaded, suite, data, output, **settings)


def test_accuracies_are_those_of_one_option_at_a_time(loaded, sets, tmp_path):
    model, tokenizer = loaded
    results = evaluate(loaded, sets, tmp_path, sets=["arc-e"], measures=["likelihood"])
    right = {"likelihood": [], "per token": [], "per byte": []}
    for row in read_rows(sets / "commonsense" / "arc-e.jsonl"):
        stem = row.prompt.split("question: ")[1].split("\n")[0]
        texts = (
            row.prompt.split("\n")[2].replace("Answer1: ", "").replace(" Answer3: ", " Answer2: ")
        )
        options = texts.split(" Answer2: ")
        assert len(options) == 3
        sums, tokens = [], []
        for option in options:
            prompt = tokenizer(f"Question: {stem}\nAnswer:")["input_ids"]
            answer = tokenizer(f" {option}")["input_ids"]
            with torch.no_grad():
                log_p = model(torch.tensor([prompt + answer])).logits.log_softmax(-1)[0]
            sums.append(sum(float(log_p[len(prompt) + i - 1, t]) for i, t in enumerate(answer)))
            tokens.append(len(answer))
        sizes = [len(option) for option in options]
        for column, norm in (("likelihood", [1] * 3), ("per token", tokens), ("per byte", sizes)):
            values = [s / n for s, n in zip(sums, norm, strict=True)]
            right[column].append(values.index(max(values)) == int(row.answer[-1]) - 1)
    scores = results.sets[0].scores
    assert set(scores) == set(right)
    assert len({tuple(r) for r in right.values()}) > 1, "the normalisations must differ somewhere"
    for column, hits in right.items():
        assert scores[column].accuracy == pytest.approx(statistics.mean(hits))
        error = statistics.stdev(map(float, hits)) / math.sqrt(len(hits))
        assert scores[column].stderr == pytest.approx(error)


def test_generated_answers_are_judged(loaded, sets, tmp_path, monkeypatch):
    """What the model writes is given here; which of it counts is under test."""
    written = {
        "arc-e": lambda i: f"the correct answer is answer{i % 3 + 1 if i < 12 else 9}",
        "winogrande": lambda i: "Option1, not option2",
        "svamp": lambda i: f"{i} + 2 = {i + 2 if i < 5 else 0}\nQuestion: What is 1 plus 999?",
        "aqua": lambda i: "The answer is (B)" if i else "A",
    }

    def answers(model, tokenizer, rows, *, title, **settings):
        write = written[title.split(":")[0]]
        for position in reversed(range(len(rows))):
            yield position, write(int(rows[position].where.rpartition(":")[2]) - 1)

    monkeypatch.setattr("smt_ext.suite_eval.iter_answers", answers)
    found = {}
    for suite in ("commonsense", "math"):
        results = evaluate(loaded, sets, tmp_path / suite, suite, measures=["generation"])
        for one in results.sets:
            found[one.name] = {c: s.accuracy for c, s in one.scores.items()}
        averages = [one.scores["generated"].accuracy for one in results.sets]
        assert results.average["generated"].accuracy == pytest.approx(statistics.mean(averages))
        errors = [one.scores["generated"].stderr for one in results.sets]
        assert results.average["generated"].stderr == pytest.approx(
            math.hypot(*errors) / len(errors)
        )
        assert "equation" not in results.average, "a set without equations has no share in it"
    assert found == {
        "arc-e": {"generated": 12 / 20},
        "winogrande": {"generated": 10 / 20},
        # The equation's left side is right even where its right side is not.
        "svamp": {"generated": 5 / 20, "equation": 1.0},
        "aqua": {"generated": 19 / 20},
    }


def test_goes_on_where_it_was_stopped(loaded, sets, tmp_path, monkeypatch):
    whole = evaluate(loaded, sets, tmp_path / "whole")
    score = OptionScorer.score
    asked = []

    def stopping(self, requests, **settings):
        asked.append(len(requests))
        for count, result in enumerate(score(self, requests, **settings)):
            if len(asked) == 1 and count == 9:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(OptionScorer, "score", stopping)
    with pytest.raises(Interrupted, match=r"4 results are in"):
        evaluate(loaded, sets, tmp_path / "stopped")
    rows = tmp_path / "stopped" / "rows.jsonl"
    with rows.open("a") as file:
        file.write('{"set": "arc-e", "measure": "likel')  # as kill -9 would leave it
    again = evaluate(loaded, sets, tmp_path / "stopped")
    # winogrande asks once an option: of nine sums four rows were complete. Then arc-e.
    assert asked == [40, 40 - 2 * 4, 20]
    assert again.sets == whole.sets
    # Padding differs with the batches, so that the last digits of a sum may; nothing else does.
    lines = [
        sorted(((r["set"], r["measure"], r["row"]), r.get("text")) for r in map(json.loads, file)
               if "row" in r)
        for file in (rows.open(), (tmp_path / "whole" / "rows.jsonl").open())
    ]  # fmt: skip
    assert lines[0] == lines[1]
    assert len(lines[0]) == 2 * 2 * 20
    evaluate(loaded, sets, tmp_path / "stopped")
    assert asked[3:] == [0, 0], "a finished evaluation computes nothing"


def test_more_rows_sets_and_measures_use_what_is_there(loaded, sets, tmp_path, monkeypatch):
    asked = []
    score = OptionScorer.score

    def counting(self, requests, **settings):
        asked.append(len(requests))
        return score(self, requests, **settings)

    monkeypatch.setattr(OptionScorer, "score", counting)
    first = evaluate(loaded, sets, tmp_path, sets=["arc-e"], measures=["likelihood"], limit=5)
    second = evaluate(loaded, sets, tmp_path, sets=["arc-e"], measures=["likelihood"], limit=12)
    evaluate(loaded, sets, tmp_path)
    assert asked == [5, 7, 40, 8]
    assert (first.sets[0].rows, second.sets[0].rows, first.sets[0].rows_in_file) == (5, 12, 20)
    assert first.limit == 5
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["limit"] is None
    assert [one["name"] for one in stored["sets"]] == ["winogrande", "arc-e"]
    assert stored["absent"] == ["boolq", "piqa", "siqa", "hellaswag", "arc-c", "obqa"]


def test_the_seed_draws_the_rows(loaded, sets, tmp_path):
    drawn = []
    for output, seed in (("a", 0), ("b", 0), ("c", 1)):
        evaluate(loaded, sets, tmp_path / output, sets=["arc-e"], measures=["likelihood"], limit=8,
                 seed=seed)  # fmt: skip
        lines = map(json.loads, (tmp_path / output / "rows.jsonl").read_text().splitlines())
        drawn.append({line["row"] for line in lines if "row" in line})
    assert drawn[0] == drawn[1] != drawn[2]


def test_another_model_other_data_other_settings_are_refused(loaded, sets, tmp_path):
    settings = {"sets": ["arc-e"], "measures": ["likelihood"]}
    output, data = tmp_path / "out", tmp_path / "data"
    shutil.copytree(sets, data)
    model, _ = loaded
    evaluate(loaded, data, output, **settings)
    before = (output / "rows.jsonl").read_bytes()
    with pytest.raises(DataError, match=r"begun with template = 'plain', .* 'alpaca'.*--overwrite"):
        evaluate(loaded, data, output, **settings, template="alpaca")
    with pytest.raises(DataError, match="begun with max_new_tokens = 3"):
        evaluate(loaded, data, output, **settings, max_new_tokens=4)
    with pytest.raises(DataError, match="begun with suite = 'commonsense'"):
        evaluate(loaded, data, output, "math")
    weight = model.model.layers[1].mlp.up_proj.weight
    value = weight.data[3, 5].item()
    try:
        weight.data[3, 5] = value * (1 + 2**-20)
        with pytest.raises(DataError, match="begun with another model: its weights"):
            evaluate(loaded, data, output, **settings)
    finally:
        weight.data[3, 5] = value
    path = data / "commonsense" / "arc-e.jsonl"
    path.write_text(path.read_text().replace("attic", "shed"))
    with pytest.raises(DataError, match=r"file of the set 'arc-e' is another one"):
        evaluate(loaded, data, output, **settings)
    assert (output / "rows.jsonl").read_bytes() == before, "a refused call writes nothing"
    evaluate(loaded, data, output, **settings, overwrite=True)


def test_a_damaged_journal_is_named(loaded, sets, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"format": "smt_ext.suite_rows"\n{}\n')
    with pytest.raises(CheckpointError, match=r"rows\.jsonl' is damaged"):
        evaluate(loaded, sets, tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(CheckpointError, match="is no smt_ext"):
        evaluate(loaded, sets, tmp_path)


def test_rows_that_are_too_long(loaded, sets, tmp_path):
    with pytest.raises(TooLongError, match=r"arc-e\.jsonl:\d+: .*max_length = 140"):
        evaluate(loaded, sets, tmp_path, sets=["arc-e"], max_length=140)
    results = evaluate(loaded, sets, tmp_path, sets=["arc-e"], max_length=175, too_long="skip")
    (one,) = results.sets
    assert one.skipped > 0
    assert one.rows + one.skipped == one.rows_in_file == 20
    with pytest.raises(DataError, match="all 20 rows of 'arc-e'"):
        evaluate(loaded, sets, tmp_path, sets=["arc-e"], max_length=10, too_long="skip")


def test_bad_arguments(loaded, sets, tmp_path):
    with pytest.raises(DataError, match="measures is empty"):
        evaluate(loaded, sets, tmp_path, measures=["loss"])
    with pytest.raises(DataError, match="limit is 0"):
        evaluate(loaded, sets, tmp_path, limit=0)
    assert not list(tmp_path.iterdir())


def test_the_command(checkpoint, sets, tmp_path, capsys):
    def run(*arguments: str) -> int:
        return cli.main(["eval", "--quiet", "--precision", "fp32", *arguments])

    # Blocks on the base and the exported model are the same model: the second run computes nothing.
    model = load_model(str(checkpoint), torch.float32)
    smt_ext.patch(model, llama_plan(model))
    with torch.no_grad():
        for module in smt_ext.smt_modules(model).values():
            module.blocks.add_(0.1)
    smt_ext.sync_weights(model)
    smt_ext.save_blocks(model, tmp_path / "blocks")
    smt_ext.export(model, tmp_path / "exported", load_tokenizer(str(checkpoint)))
    out = str(tmp_path / "out")
    suite = ["--suite", "math", "--data", str(sets), "--output", out, "--limit", "6",
             "--max-new-tokens", "3"]  # fmt: skip
    assert run("--model", str(checkpoint), "--blocks", str(tmp_path / "blocks"), *suite) == 0
    text = capsys.readouterr().out
    for expected in ("svamp", "aqua", "equation", "average", "±",
                     "at most 6 rows of each set, drawn with seed 0",
                     "absent from the data folder: multiarith, gsm8k, addsub, singleeq"):  # fmt: skip
        assert expected in text
    rows = (tmp_path / "out" / "rows.jsonl").read_bytes()
    assert run("--model", str(tmp_path / "exported"), *suite) == 0
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == rows
    capsys.readouterr()
    assert run("--model", str(checkpoint), *suite) == 2
    assert "begun with another model" in capsys.readouterr().err
    assert run("--model", str(checkpoint), "--data", str(sets), "--limit", "3") == 2
    assert "--limit belongs to --suite" in capsys.readouterr().err
    assert run("--model", str(checkpoint), *suite, "--score", "exact") == 2
    assert "--measures" in capsys.readouterr().err
