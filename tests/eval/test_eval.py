"""``smt-ext eval``: lm-eval on a tiny model, its numbers by hand, stopped and gone on with."""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import smt_ext
from models import llama_plan, save_checkpoint
from smt_ext import DataError
from smt_ext.cli import entry
from smt_ext.cli import eval as command
from smt_ext.cli.eval_rows import SUITES, documents
from smt_ext.errors import Interrupted
from smt_ext.hf.loading import load_model, load_tokenizer
from smt_ext.hf.rows import to_trl
from suite_rows import write_sets

pytest.importorskip("lm_eval", reason="lm-eval absent: pip install 'smt_ext[eval]'")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_sets(root)
    rows = [
        {
            "instruction": "Please choose the correct ending to complete the given sentence: In "
            f"room {i}, he\n\nEnding1: sat. Ending2: ran {i} miles.\n\nAnswer format: ending1/ending2",
            "answer": "ending2",
        }
        for i in range(4)
    ]
    path = root / "commonsense" / "hellaswag.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = save_checkpoint(tmp_path_factory.mktemp("base"))
    model = load_model(str(folder), torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)  # else all options are equally likely
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blocks(base, tmp_path_factory) -> Path:
    """Trained on the base in bfloat16."""
    model = load_model(str(base), torch.bfloat16)
    smt_ext.patch(model, llama_plan(model))
    with torch.no_grad():
        for module in smt_ext.smt_modules(model).values():
            module.blocks.add_(0.5 * torch.randn_like(module.blocks))
    smt_ext.sync_weights(model)
    folder = tmp_path_factory.mktemp("trained") / "blocks"
    smt_ext.save_blocks(model, folder)
    return folder


def run(*arguments: object) -> None:
    command.run(entry._parser().parse_args(["eval", *map(str, arguments)]))


def results(path: Path) -> dict:
    return json.loads(path.read_text())["results"]


def test_every_set_has_a_task_file():
    names = {one.name for sets in SUITES.values() for one in sets}
    files = {path.stem for path in command.TASKS.glob("[!_]*.yaml")}
    assert files == names
    for name in names:
        assert re.search(rf"^task: smt_{name}$", (command.TASKS / f"{name}.yaml").read_text(), re.M)


@torch.no_grad()
def log_p(model, tokenizer, context, continuation):
    prompt, whole = (tokenizer(t)["input_ids"] for t in (context, context + continuation))
    values = model(input_ids=torch.tensor([whole])).logits.double().log_softmax(-1)[0]
    return sum(float(values[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))


def test_options_are_compared_as_by_hand(base, data):
    model, tokenizer = load_model(str(base), torch.float32), load_tokenizer(str(base))
    found = command.evaluate(model, tokenizer, "commonsense", str(data), batch_size=5)
    by_set = {}
    for name, kind in (("arc-e", "choice"), ("winogrande", "blank"), ("hellaswag", "choice")):
        right = {"acc": [], "acc_norm": [], "acc_bytes": []}
        rows = documents(data / "commonsense" / f"{name}.jsonl", kind)
        samples = sorted(found["samples"][f"smt_{name}"], key=lambda s: s["doc_id"])
        assert len(samples) == len(rows)
        for row, sample in zip(rows, samples, strict=True):
            if kind == "blank":
                pairs = [(option, row["ending"]) for option in row["options"]]
            elif name == "hellaswag":
                pairs = [(row["stem"], f" {option}") for option in row["options"]]
            else:
                prompt = f"Question: {row['stem']}\nAnswer:"
                pairs = [(prompt, f" {option}") for option in row["options"]]
            sums = [log_p(model, tokenizer, *pair) for pair in pairs]
            # float32, sums of up to a dozen log-probabilities of magnitude 10.
            got = [answer[0] for answer in sample["filtered_resps"]]
            assert got == pytest.approx(sums, rel=1e-4, abs=1e-3)
            for metric, size in (
                ("acc", lambda o: 1), ("acc_norm", len), ("acc_bytes", lambda o: len(o.encode())),
            ):  # fmt: skip
                scaled = [s / size(o) for s, o in zip(sums, row["options"], strict=True)]
                right[metric].append(scaled.index(max(scaled)) == row["gold"])
        by_set[name] = right
        of_set = found["results"][f"smt_{name}"]
        for metric in ("acc", "acc_norm", "acc_bytes") if kind != "blank" else ("acc",):
            share = sum(right[metric]) / len(right[metric])
            assert of_set[f"{metric},none"] == pytest.approx(share), (name, metric)
    assert any(0 < sum(right["acc"]) < len(right["acc"]) for right in by_set.values())
    means = [sum(right["acc"]) / len(right["acc"]) for right in by_set.values()]
    assert found["results"]["commonsense"]["acc,none"] == pytest.approx(sum(means) / 3)


def test_the_command_with_blocks(base, blocks, data, tmp_path, capsys):
    out = tmp_path / "out"
    suite = ("--suite", "math", "--data", data, "--output", out, "--limit", 6, "--batch_size", 4,
             "--max_new_tokens", 3)  # fmt: skip
    run("--model", base, "--blocks", blocks, *suite)
    text = capsys.readouterr().out
    for expected in ("svamp", "aqua", "equation", "±", "the first 6 rows of each set alone",
                     "absent from the data folder: multiarith, gsm8k, addsub, singleeq"):  # fmt: skip
        assert expected in text
    (file,) = out.glob("math-*.json")
    written = json.loads(file.read_text())
    assert written["config"]["model_dtype"] == "torch.bfloat16", "that of the blocks' base"
    assert written["n-samples"]["smt_svamp"]["effective"] == 6
    assert written["smt_ext"]["blocks"] == str(blocks)
    run("--model", base, *suite, "--precision", "fp32")  # another model's, in a file of its own
    assert json.loads(file.read_text()) == written
    (other,) = set(out.glob("math-*.json")) - {file}
    assert json.loads(other.read_text())["config"]["model_dtype"] == "torch.float32"


def test_answers_are_of_a_model_that_computes_alike(base, data, tmp_path):
    """Values do not tell models apart whose configurations differ."""
    other, out = shutil.copytree(base, tmp_path / "other"), tmp_path / "out"
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    for model in (base, other, base):
        run("--model", model, "--suite", "math", "--data", data, "--output", out, "--limit", 1,
            "--max_new_tokens", 1, "--sets", "svamp")  # fmt: skip
    assert len([*out.glob("math-*.json")]) == len([*out.glob("answers-*.db")]) == 2


def test_an_exported_model_is_its_base_with_the_blocks(base, blocks, data, tmp_path):
    model = smt_ext.load_blocks(load_model(str(base), torch.bfloat16), blocks)
    exported = tmp_path / "exported"
    smt_ext.export(model, exported, tokenizer=load_tokenizer(str(base)))
    digests = {command.model_digest(smt_ext.unpatch(model))}
    digests.add(command.model_digest(load_model(str(exported), torch.bfloat16)))
    assert len(digests) == 1
    assert command.model_digest(load_model(str(base), torch.bfloat16)) not in digests


def test_the_digest_of_a_model_that_stays_patched_counts_its_blocks(base):
    """As one on a quantised base does, whose weights cannot take them."""
    model = load_model(str(base), torch.float32)
    smt_ext.patch(model, llama_plan(model))
    before = command.model_digest(model)
    with torch.no_grad():
        next(iter(smt_ext.smt_modules(model).values())).blocks[0, 0, 0] += 1
    assert command.model_digest(model) != before


def test_goes_on_where_it_was_stopped(base, data, tmp_path, monkeypatch):
    suite = ("--model", base, "--suite", "commonsense", "--data", data, "--sets", "arc-e",
             "--batch_size", 4, "--precision", "fp32", "--output")  # fmt: skip
    seen = []

    def loading(stop):
        seen.clear()

        def load(name, dtype, device):
            model = load_model(name, dtype, device)

            def count(*_):
                if len(seen) == stop:
                    raise KeyboardInterrupt
                seen.append(1)

            model.register_forward_pre_hook(count)
            return model

        monkeypatch.setattr(command, "load_model", load)

    loading(stop=None)
    run(*suite, tmp_path / "whole")
    whole = len(seen)
    loading(stop=10)
    with pytest.raises(Interrupted, match="The same command goes on from there"):
        run(*suite, tmp_path / "parts")
    assert not list((tmp_path / "parts").glob("*.json"))
    loading(stop=None)
    run(*suite, tmp_path / "parts")
    assert len(seen) == whole - 10
    parts, one = (next((tmp_path / name).glob("*.json")) for name in ("parts", "whole"))
    assert parts.name == one.name
    assert results(parts) == results(one)
    loading(stop=0)
    run(*suite, tmp_path / "parts")  # computes nothing


def test_bad_arguments_are_named_before_the_model_loads(tmp_path):
    for arguments, message in (
        (("--suite", "math", "--data", tmp_path / "no"), "is no folder with sets"),
        (("--suite", "math", "--data", tmp_path, "--limit", 0), "--limit is 0"),
        (("--suite", "math", "--data", tmp_path, "--batch_size", 0), "--batch_size is 0"),
        (("--suite", "math", "--data", tmp_path, "--threads", -2), "--threads is -2"),
        (("--suite", "math", "--data", tmp_path, "--max_new_tokens", -1), "--max_new_tokens is -1"),
        (("--tasks", "arc_easy", "--sets", "svamp"), "expected --suite"),
        ((), "expected --suite"),
        (("--tasks", "arc_easy", "--output", "/dev/null/out"), "cannot make the output folder"),
    ):
        with pytest.raises(DataError, match=message):
            run("--model", "no/such", *arguments)


def test_unknown_tasks_are_named(base, tmp_path, monkeypatch):
    from lm_eval import tasks

    # Reading its thousands of task files takes lm-eval half a minute.
    few = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", few)
    with pytest.raises(DataError, match="lm-eval has no task 'arc_hard'"):
        run("--model", base, "--tasks", "arc_hard", "--output", tmp_path)


def test_a_bad_row_stops_the_command(base, data, tmp_path):
    folder = tmp_path / "math"
    folder.mkdir()
    (folder / "svamp.jsonl").write_text('{"instruction": "What is 1?", "answer": "one"}\n')
    with pytest.raises(DataError, match=r"svamp\.jsonl:1: expected .* a number as 'answer'.*'one'"):
        run("--model", base, "--suite", "math", "--data", tmp_path, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.json"))


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_prompts_are_those_that_the_blocks_were_trained_with(
    base, blocks, data, tmp_path, capsys, template
):
    run_folder = tmp_path / "run"
    shutil.copytree(blocks, run_folder)
    begun = ["--model", str(base), "--data", "rows.jsonl", "--output", "run"]
    if template == "chat":
        (tmp_path / "run.yaml").write_text("template: chat\n")
        begun += ["--config", "run.yaml"]
    else:
        begun += ["--template", template]
    (run_folder / "command.json").write_text(json.dumps({"arguments": begun, "folder": ".."}))
    tokenizer = load_tokenizer(str(base))
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(run_folder)
    suite = ("--suite", "math", "--data", data, "--sets", "svamp", "--limit", 1)
    given = ("--model", base, "--blocks", run_folder, *suite, "--max_new_tokens", 2)
    run(*given, "--output", tmp_path / "out")
    assert f"template {template!r}" in capsys.readouterr().out
    (file,) = (tmp_path / "out").glob("math-*.json")
    assert json.loads(file.read_text())["smt_ext"]["template"] == template

    asked = documents(data / "math" / "svamp.jsonl", "number")[0]["question"]
    expected = f"<user>{asked}" if template == "chat" else to_trl(
        {"instruction": asked, "output": "1"}, template="alpaca"
    )["prompt"]  # fmt: skip
    found = command.evaluate(
        load_model(str(base), torch.float32), tokenizer, "math", str(data), sets=["svamp"], limit=1,
        template=template, apply_chat_template=template == "chat", gen_kwargs={"max_gen_toks": 2},
    )  # fmt: skip
    assert found["samples"]["smt_svamp"][0]["arguments"][0][0] == expected
    choice = command.evaluate(
        load_model(str(base), torch.float32), tokenizer, "commonsense", str(data), sets=["arc-e"],
        limit=1, template=template, apply_chat_template=template == "chat",
    )  # fmt: skip
    context, answer = choice["samples"]["smt_arc-e"][0]["arguments"][0]
    assert "Question:" not in context
    assert not answer.startswith(" ")


def test_a_template_that_cannot_be_told_is_asked_for(base, blocks, data, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-2"
    shutil.copytree(blocks, checkpoint)
    begun = {"arguments": ["--config", "gone.yaml"], "folder": ".."}
    (tmp_path / "run" / "command.json").write_text(json.dumps(begun))
    given = ("--model", base, "--blocks", checkpoint, "--suite", "math", "--data", data)
    with pytest.raises(DataError, match=r"gone.yaml.*Pass --template"):
        run(*given, "--output", tmp_path / "out")
    with pytest.raises(DataError, match="'alpaca': leave --apply_chat_template away"):
        run(*given, "--template", "alpaca", "--apply_chat_template")
    with pytest.raises(DataError, match="--template is of a suite's prompts"):
        run("--model", base, "--tasks", "gsm8k", "--template", "chat")


def test_training_does_not_notice_an_evaluation(base, data):
    model, tokenizer = load_model(str(base), torch.float32).train(), load_tokenizer(str(base))
    model.model.layers[0].eval()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    command.evaluate(model, tokenizer, "commonsense", str(data), sets=["arc-e"], limit=1)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert not model.model.layers[0].training


def test_lm_eval_runs_the_task_files_by_itself(base, data, tmp_path, monkeypatch):
    """With the folder of the sets in SMT_DATA and nothing of this package's command."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("SMT_DATA", str(data))
    found = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(base), "dtype": "float32"},
        tasks=["smt_arc-e", "smt_svamp"], limit=2, device="cpu",
        gen_kwargs={"max_gen_toks": 2}, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(command.TASKS), include_defaults=False),
    )  # fmt: skip
    assert found["results"].keys() == {"smt_arc-e", "smt_svamp"}


def test_prompts_that_do_not_fit_are_told(base, data, tmp_path, caplog):
    """lm-eval leaves their beginnings away; the model reads 256 tokens."""
    options = {"commonsense/hellaswag": "In room {}{}, he\n\nEnding1: sat. Ending2: ran.\n\n"
               "Answer format: ending1/ending2", "math/svamp": "What is {} + 1{}?"}  # fmt: skip
    for name, text in options.items():
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir()
        path.write_text("".join(
            json.dumps({
                "instruction": ("Please choose the correct ending to complete the given sentence: "
                                if "he" in name else "") + text.format(i, " really" * (40 * (i == 1))),
                "answer": "ending2" if "he" in name else str(i + 1),
            }) + "\n"
            for i in range(3)
        ))  # fmt: skip
    common = ("--model", base, "--data", tmp_path, "--precision", "fp32", "--batch_size", 4)
    for suite, said in (
        ("commonsense", "exceeds model's maximum length"),
        ("math", "Left truncation"),
    ):
        out = tmp_path / f"out-{suite}"
        run(*common, "--suite", suite, "--output", out, "--max_new_tokens", 3)
        assert said in caplog.text
        caplog.clear()
    with pytest.raises(DataError, match=r"generate \(256\) must be less than .*max_new_tokens"):
        run(*common, "--suite", "math", "--output", tmp_path / "long")
