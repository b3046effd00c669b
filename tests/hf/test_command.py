"""``smt-ext train`` and ``plan``: TRL's flags and formats, ours, and what they refuse."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import smt_ext
from quick_runs import dump, sums
from smt_ext.cli import main
from smt_ext.cli import train as train_command
from smt_ext.cli.program import program
from smt_ext.cli.train import parse
from smt_ext.errors import DataError

trl = pytest.importorskip("trl")

QUICK = [
    "--block-size", "32", "--budget", "6 blocks", "--plan_batches", "1", "--max_steps", "2",
    "--per_device_train_batch_size", "2", "--max_length", "64", "--disable_tqdm", "true",
    "--report_to", "none", "--use_cpu", "true", "--precision", "fp32", "--logging_steps", "1",
    "--save_steps", "1", "--gradient_checkpointing", "false", "--threads", "1", "--lr", "1e-2",
]  # fmt: skip


def test_the_program_by_the_name_that_starts_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    for started, name in (
        (str(tmp_path / "venv" / "bin" / "smt-ext"), "venv/bin/smt-ext"),
        ("train.py", "smt-ext"), ("-c", "smt-ext"), ("", "smt-ext"),
    ):  # fmt: skip
        monkeypatch.setattr("sys.argv", [started])
        assert program() == name


def lines(rows=None):
    return [json.dumps(row) for row in rows or sums()]


def log(folder):
    return json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]


@pytest.fixture
def data(tmp_path):
    return dump(tmp_path, "rows.jsonl", lines())


def train(model, data, output, *more):
    return main(
        ["train", "--model", model, "--data", str(data), "--output", str(output), *QUICK, *more]
    )


def test_text_of_another_name(checkpoint, tmp_path):
    """TRL's own flag: the same rows, the same run."""
    blocks = {}
    for name in ("text", "content"):
        rows = [{name: f"the sum of {i} and 1 is {i + 1}", "source": "a"} for i in range(8)]
        run = tmp_path / name
        given = dump(tmp_path, f"{name}.jsonl", lines(rows))
        assert train(checkpoint, given, run, "--dataset_text_field", name) == 0
        blocks[name] = (run / "blocks.safetensors").read_bytes()
    assert blocks["text"] == blocks["content"]


def test_a_run_from_flags(checkpoint, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(checkpoint, data, out, "--eval", data) == 0
    found = [entry["eval_loss"] for entry in log(out) if "eval_loss" in entry]
    assert len(found) == 2
    assert found[-1] < found[0]
    said = capsys.readouterr()
    assert "held-out rows" in said.out
    assert "%|" not in said.err  # a progress bar, of whomever
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    smt_ext.load_blocks(base, out)
    merged = tmp_path / "merged"
    export = ["export", "--model", checkpoint, "--blocks", str(out), "--output", str(merged)]
    assert main(export) == 0
    assert main(["info", str(out)]) == 0
    assert "before" in capsys.readouterr().out


def test_yaml_with_numbers_and_comma_lists(checkpoint, data, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model_name_or_path: {checkpoint}\ndataset_name: {data}\nbudget: 0.05\nblock_size: 16\n"
        "targets: q,v\nlr: 1e-2\nprecision: fp32\n"
    )
    keep = [
        a for a in QUICK if a not in ("--block-size", "32", "--budget", "6 blocks", "--lr", "1e-2")
    ]
    keep = keep[: keep.index("--precision")] + keep[keep.index("--precision") + 2 :]
    out = str(tmp_path / "run")
    assert main(["train", "--config", str(config), "--output_dir", out, *keep]) == 0
    plan = smt_ext.BlockPlan.load(tmp_path / "run" / "plan.json")
    assert plan.provenance["budget"] == "5%"
    assert {name.rpartition(".")[2] for name in plan.layers} <= {"q_proj", "v_proj"}


def test_a_flag_overrules_a_file_whose_keys_are_the_long_names(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("model_name_or_path: m\nmax_steps: 5\ndisable_tqdm: true\n")
    _, args, model = parse([f"--config={config}", "--steps", "7", "--output", "o"])[:3]
    assert model.model_name_or_path == "m"
    assert (args.max_steps, args.disable_tqdm) == (7, True)
    config.write_text("steps: 5\n")
    with pytest.raises(DataError, match="steps"):
        parse(["--config", str(config)])


@pytest.mark.parametrize("rate", ["3e-3", "2e-5"])
def test_learning_rate_is_trls_flag_too(checkpoint, data, tmp_path, rate):
    """Also where it is TRL's own default."""
    at = QUICK.index("--lr")
    flags = [*QUICK[:at], "--learning_rate", rate, "--lr_scheduler_type", "constant"]
    out = str(tmp_path / "run")
    common = ["--model", checkpoint, "--data", data, "--output", out]
    assert main(["train", *common, *flags]) == 0
    assert [e["learning_rate"] for e in log(out) if "loss" in e] == [float(rate)] * 2


def test_no_rate_is_the_automatic_one(checkpoint, data, tmp_path):
    at = QUICK.index("--lr")
    arguments = ["--model", checkpoint, "--data", data, "--output", str(tmp_path / "run")]
    from smt_ext.cli.train import build, parse

    made = build(parse([*arguments, *QUICK[:at]]))
    assert made.learning_rate == "auto"
    assert made.args.learning_rate == trl.SFTConfig(str(tmp_path), bf16=False).learning_rate


@pytest.mark.parametrize("kind", ["csv", "parquet", "txt", "json", "folder", "saved", "two files"])
def test_kinds_of_data(checkpoint, data, tmp_path, kind):
    import datasets

    table = datasets.Dataset.from_list(sums())
    files = ("csv", "parquet", "txt", "json")
    name = tmp_path / f"data{'[1]' * (kind in files)}.{kind}"  # never read as a pattern
    if kind == "csv":
        table.to_csv(name)
    elif kind == "parquet":
        table.to_parquet(name)
    elif kind == "txt":
        name.write_text("one and one\ntwo and two\n" * 3)
    elif kind == "json":
        name.write_text(json.dumps(sums()), encoding="utf-8-sig")
    elif kind == "folder":
        name.mkdir()
        table.to_json(name / "train.jsonl")
    elif kind == "saved":
        table.save_to_disk(name)
    else:
        name = f"{data},{data}"
    assert train(checkpoint, name, tmp_path / "run") == 0


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize(("rows", "accumulate"), [(9, 1), (3, 1), (9, 4)])
def test_an_epoch_sees_every_row(checkpoint, tmp_path, rows, accumulate, epochs, monkeypatch):
    from smt_ext.hf.trainers import SMTSFTTrainer

    seen = []
    plain = SMTSFTTrainer.training_step

    def step(self, model, inputs, *rest):
        seen.extend(map(tuple, inputs["input_ids"].tolist()))
        return plain(self, model, inputs, *rest)

    monkeypatch.setattr(SMTSFTTrainer, "training_step", step)
    data = dump(tmp_path, "rows.jsonl", lines(sums(rows)))
    more = ("--max_steps", "-1", "--num_train_epochs", str(epochs), "--save_strategy", "no",
            "--gradient_accumulation_steps", str(accumulate))  # fmt: skip
    assert train(checkpoint, data, tmp_path / "run", *more) == 0
    assert len(seen) == epochs * rows


def test_resume_goes_on_with_the_command_that_began(
    checkpoint, data, tmp_path, monkeypatch, capsys
):
    """A signal ends the run after the step at hand, with a checkpoint."""
    from smt_ext.hf.trainers import SMTSFTTrainer

    assert train(checkpoint, data, tmp_path / "whole", "--max_steps", "4") == 0
    plain, steps = SMTSFTTrainer.training_step, []

    def step(self, *rest):
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGTERM)
        return plain(self, *rest)

    monkeypatch.setattr(SMTSFTTrainer, "training_step", step)
    out = tmp_path / "run"
    assert train(checkpoint, data, out, "--max_steps", "4", "--save_steps", "50") == 130
    assert "--resume" in capsys.readouterr().err
    assert main(["train", "--resume", str(out)]) == 0
    one, two = (load_file(tmp_path / n / "blocks.safetensors") for n in ("whole", "run"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    Path(data).write_text("".join(line + "\n" for line in lines(sums(offset=3))))
    assert main(["train", "--resume", str(out)]) == 2
    assert "data is another" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given", [["--hub_token=hf_S3"], ["--hub-token", "hf_S3", "--seed", "42"], "hub_token: hf_S3"]
)
def test_the_hubs_token_is_in_no_file_of_a_run(checkpoint, data, tmp_path, given):
    """All of which may be uploaded; the run goes on without it, or with it given again."""
    again, out = given, tmp_path / "run"
    if isinstance(given, str):
        (tmp_path / "config.yaml").write_text(given)
        given, again = ["--config", str(tmp_path / "config.yaml")], []
    assert train(checkpoint, data, out, "--eos_token", "~", *given) == 0
    resume = ["train", "--resume", str(out), "--max_steps"]
    assert main([*resume, "3"]) == 0
    assert main([*resume, "4", *again]) == 0
    assert len([entry for entry in log(out) if "loss" in entry]) == 4
    files = [path for path in out.rglob("*") if path.is_file()]
    assert out / "training_args.bin" in files
    assert not [path for path in files if b"hf_S3" in path.read_bytes()]


def test_the_logged_rate_is_the_one_that_the_step_used(checkpoint, data, tmp_path, monkeypatch):
    used = []
    plain = smt_ext.SparseAdamW.step

    def step(self, *rest):
        used.append(self.param_groups[0]["lr"])
        return plain(self, *rest)

    monkeypatch.setattr(smt_ext.SparseAdamW, "step", step)
    more = ("--max_steps", "4", "--warmup_steps", "2", "--lr_scheduler_type", "cosine")
    assert train(checkpoint, data, tmp_path / "run", *more) == 0
    assert used == [e["learning_rate"] for e in log(tmp_path / "run") if "loss" in e]


def test_plan_writes_a_plan_that_train_takes(checkpoint, data, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    arguments = ["--model", checkpoint, "--data", data, *QUICK]
    assert main(["plan", *arguments, "--output", str(plan)]) == 0
    assert plan.with_name("plan.scores.safetensors").exists()
    assert train(checkpoint, data, tmp_path / "run", "--plan", str(plan)) == 0
    for more, says in (
        (("--targets", "q"), "targets is ['q'], and the plan"),
        (("--budget", "7 blocks"), "made with '6 blocks'"),
    ):
        assert train(checkpoint, data, tmp_path / "other", "--plan", str(plan), *more) == 2
        assert says in capsys.readouterr().err
    estimate = ["estimate", "--model", checkpoint, "--plan", str(plan)]
    assert main([*estimate, "--budget", "7 blocks"]) == 2
    assert "made with '6 blocks'" in capsys.readouterr().err
    assert main(["plan", *arguments, "--output", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main(["plan", *arguments, "--output", str(plan)]) == 0  # in place of its own
    for name in ("notes.txt", "notes.scores.safetensors"):
        notes = dump(tmp_path, name, ["mine"])
        assert main(["plan", *arguments, "--output", str(tmp_path / "notes.txt")]) == 2
        assert f"{name}' is not smt_ext's" in capsys.readouterr().err
        assert Path(notes).read_text() == "mine\n"
        Path(notes).unlink()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--budget", "lots"], "budget is 'lots'"),
        (["--lr", "fast"], "lr is 'fast'"),
        (["--lr", "0x auto"], "lr is '0x auto'"),
        (["--template", "none"], "template is 'none'"),
        (["--use_peft", "true"], "--use_peft"),
        (["--dataset_name", "/no/such/file.jsonl"], "no such file"),
        (["--output_dir", "/dev/null/run"], "cannot make the output folder"),
        (["--eval_strategy", "epoch"], "pass --eval_data"),
        (["--eval_on_start", "true"], "pass --eval_data"),
        (["--activation_offloading", "true"], "there is none"),
        (["--max_steps", "-1", "--num_train_epochs", "0"], "nothing would be trained"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps is 0"),
        (["--max_steps", "0"], "max_steps is 0, expected at least 1"),
        (["--max_length", "0"], "max_length is 0, expected at least 1"),
        (["--max_length", "-1"], "max_length is -1, expected at least 1"),
        (["--max_grad_norm", "nan"], "max_grad_norm is nan, expected at least 0"),
        (["--max_grad_norm", "-1"], "max_grad_norm is -1.0, expected at least 0"),
        (["--template", "alpaca"], "template is 'alpaca', and no training row has 'instruction'"),
        (["--dataset_text_field", "t"], "dataset_text_field is 't', no field of "),
        (["--dataset_config", "en"], "dataset_config is 'en', and "),
        (["--model_revision", "v2"], "model_revision is 'v2', and the model "),
        (["--bf16", "true"], "bf16 is True, and --precision fp32 rules: False holds"),
        (["--model_init_kwargs", '{"dtype": "f"}'], "dtype is 'f', expected one of torch's"),
        (["--model_init_kwargs", '{"token": "hf_S3"}'], "set HF_TOKEN instead"),
        (["--dtype", "bfloat16"], "dtype is torch.bfloat16, and --precision fp32 rules"),
        (
            ["--chat_template_path", "/no/such.jinja"],
            "No such file or directory: '/no/such.jinja'",
        ),
        (
            ["--chat_template_path", "/no/such/folder"],
            "cannot load the tokenizer '/no/such/folder'",
        ),
    ],
)
def test_what_cannot_be_done_is_said(checkpoint, data, tmp_path, capsys, more, says):
    assert train(checkpoint, data, tmp_path / "run", *more) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.glob("run/*"))


def test_a_file_as_output(checkpoint, data, tmp_path, capsys):
    assert train(checkpoint, data, data) == 2
    assert "cannot make the output folder" in capsys.readouterr().err


def copy_of(checkpoint, folder, drop=()):
    import shutil

    shutil.copytree(checkpoint, folder)
    file = folder / "model.safetensors"
    weights = {k: v for k, v in load_file(file).items() if k not in drop}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def test_unusable_checkpoints_are_refused(checkpoint, data, tmp_path, capsys):
    missing = "model.layers.1.mlp.up_proj.weight"
    folders = {
        "lacks": copy_of(checkpoint, tmp_path / "lacks", [missing]),
        "pointer": copy_of(checkpoint, tmp_path / "pointer"),
        "cut": copy_of(checkpoint, tmp_path / "cut"),
        "gptq": copy_of(checkpoint, tmp_path / "gptq"),
        "shapes": copy_of(checkpoint, tmp_path / "shapes"),
    }
    (folders["pointer"] / "model.safetensors").write_text("version https://git-lfs.github.com\n")
    file = folders["cut"] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    for name, change in (
        ("gptq", {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}),
        ("shapes", {"vocab_size": 999}),
    ):
        config = folders[name] / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    for name, folder in folders.items():
        assert train(str(folder), data, tmp_path / "run") == 2, name
        said = capsys.readouterr().err
        assert str(folder) in said
        assert name != "lacks" or missing in said


def test_tokenizers_that_cannot_be_trained_with(checkpoint, data, tmp_path, capsys):
    for name, settings in (
        ("none", {"eos_token": None, "pad_token": None}),
        ("new", {"pad_token": "[NEW]"}),
    ):
        folder = copy_of(checkpoint, tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if name == "new":
            tokenizer.add_special_tokens(
                {"additional_special_tokens": [f"[{i}]" for i in range(40)]}
            )
        for key, value in settings.items():
            setattr(tokenizer, key, value)
        tokenizer.save_pretrained(folder)
        if name == "none":
            config = folder / "tokenizer_config.json"
            kept = json.loads(config.read_text())
            config.write_text(json.dumps({k: v for k, v in kept.items() if k not in settings}))
        assert train(str(folder), data, tmp_path / "run") == 2
        said = capsys.readouterr().err
        assert ("no end-of-text token" if name == "none" else "embedding has") in said


def test_a_bad_row_is_named_by_file_and_line(checkpoint, tmp_path, capsys):
    bad = dump(tmp_path, "bad.jsonl", [*lines()[:2], "", '{"prompt": "q", "completion": ""}'])
    assert train(checkpoint, bad, tmp_path / "run") == 2
    assert "bad.jsonl:4: nothing to learn from" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["llama", "gemma2", "bloom"])
def test_packed_rows_do_not_see_each_other_or_are_refused(checkpoint, data, tmp_path, capsys, kind):
    """Nothing has been trained at the first step: packed or not, the rows have one loss."""
    from transformers import AutoConfig

    folder = copy_of(checkpoint, tmp_path / kind)
    if kind != "llama":
        sizes = {"gemma2": {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
            "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 64,
        }, "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4}}[kind]  # fmt: skip
        config = AutoConfig.for_model(kind, vocab_size=128, **sizes)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.2)
        (folder / "model.safetensors").unlink()
        (folder / "config.json").unlink()
        model.save_pretrained(folder)
    more = ("--max_steps", "1", "--block_size", "16", "--per_device_train_batch_size", "64",
            "--targets", "all-linear")  # fmt: skip
    assert train(str(folder), data, tmp_path / "plain", *more) == 0
    status = train(str(folder), data, tmp_path / "packed", *more, "--packing", "true")
    if status != 0:
        assert kind != "llama"
        assert "lets rows of one sequence see each other" in capsys.readouterr().err
        return
    one, two = (log(tmp_path / name)[0]["loss"] for name in ("plain", "packed"))
    assert one == pytest.approx(two, rel=1e-3)


def test_under_deepspeed_its_configuration_rules_the_dtype(tmp_path, monkeypatch):
    """Its engine converts the model: to float32 unless bf16 is enabled there, whatever was loaded."""
    monkeypatch.setattr(train_command, "training_dtype", lambda device: torch.bfloat16)

    def dtype_of(*flags):
        parsed = parse(["--output", str(tmp_path), "--use_cpu", "true", *flags])
        parsed[1].deepspeed_plugin = object()
        return train_command._precision(parsed[4], parsed[1], parsed[2])

    assert dtype_of() == torch.float32
    assert dtype_of("--dtype", "bfloat16") == torch.bfloat16
    with pytest.raises(DataError, match="under DeepSpeed its configuration rules"):
        dtype_of("--precision", "bf16")


def test_the_precision_that_auto_came_to_is_kept(checkpoint, data, tmp_path, monkeypatch):
    from smt_ext.cli import train as command

    out = tmp_path / "run"
    found = [torch.bfloat16, torch.float32]
    monkeypatch.setattr(command, "training_dtype", lambda device: found.pop(0))
    assert train(checkpoint, data, out, "--precision", "auto") == 0
    assert main(["train", "--resume", str(out), "--max_steps", "3"]) == 0
    blocks = json.loads((out / "smt_blocks.json").read_text())["base"].values()
    assert {block["dtype"] for block in blocks} == {"bfloat16"}
    assert found == [torch.float32]


def test_settings_that_were_edited_are_refused_by_name(checkpoint, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(checkpoint, data, out) == 0
    command = out / "command.json"
    begun = command.read_text()
    for name, old, new in (("budget", "6 blocks", "3 blocks"), ("learning_rate", "1e-2", "0.5")):
        command.write_text(begun.replace(old, new))
        assert main(["train", "--resume", str(out), "--max_steps", "3"]) == 2
        assert f"{name} is" in capsys.readouterr().err
    assert main(["train", "--resume", str(out), "--allow_changed", "learning_rat"]) == 2
    assert "allow_changed names 'learning_rat', expected learning_rate" in capsys.readouterr().err
    more = ("--allow_changed", "learning_rate", "--max_steps", "3")
    assert main(["train", "--resume", str(out), *more]) == 0


def test_a_stream_trains_and_goes_on(checkpoint, data, tmp_path):
    more = ("--dataset_streaming", "true")
    assert train(checkpoint, data, tmp_path / "whole", *more, "--max_steps", "4") == 0
    assert train(checkpoint, data, tmp_path / "parts", *more) == 0
    resume = ("--max_steps", "4", "--resume_from_checkpoint", "true")
    assert train(checkpoint, data, tmp_path / "parts", *more, *resume) == 0
    assert len([entry for entry in log(tmp_path / "parts") if "loss" in entry]) == 4


def test_held_out_rows_at_the_end_alone(checkpoint, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(checkpoint, data, out, "--eval", data, "--eval_on_start", "false") == 0
    assert [entry["step"] for entry in log(out) if "eval_loss" in entry] == [2]
    (row,) = [line for line in capsys.readouterr().out.split("\n") if "loss (nats" in line]
    assert not row.split("│")[2].strip()  # before


def test_other_held_out_rows_at_a_resume_are_refused(checkpoint, data, tmp_path, capsys):
    """The table would have a loss of the ones before, and of the others after."""
    out = tmp_path / "run"
    assert train(checkpoint, data, out, "--eval", data) == 0
    other = dump(tmp_path, "other.jsonl", [json.dumps({"prompt": "q", "completion": "a"})])
    resume = ["train", "--resume", str(out), "--max_steps", "3", "--eval", other]
    assert main(resume) == 2
    assert "the eval_data is another" in capsys.readouterr().err
    assert main([*resume, "--allow_changed", "eval_data"]) == 0


def test_a_share_of_the_rows_is_held_out_and_the_same_at_a_resume(checkpoint, data, tmp_path):
    split = ("--test_split_size", "0.25")
    more = (*split, "--max_steps", "4")
    assert train(checkpoint, data, tmp_path / "run", *split) == 0
    assert [entry for entry in log(tmp_path / "run") if "eval_loss" in entry]
    resume = (*more, "--resume_from_checkpoint", "true")
    assert train(checkpoint, data, tmp_path / "run", *resume) == 0
    config = tmp_path / "mixture.yaml"
    config.write_text(f"datasets:\n  - path: json\n    data_files: {data}\n    split: train\n")
    for more, code in ((split, 0), ((*split, "--resume_from_checkpoint", "true"), 0),
                       (("--test_split_size", "2.5", "--overwrite", "true"), 2)):  # fmt: skip
        arguments = ["--model", checkpoint, "--output", str(tmp_path / "mixed"), *QUICK, *more]
        assert main(["train", "--config", str(config), *arguments]) == code


@pytest.mark.parametrize(
    "given", [["--model_revision", "v2"], "model_init_kwargs:\n  revision: v2\n"]
)
def test_the_tokenizer_is_of_the_models_revision(checkpoint, data, tmp_path, monkeypatch, given):
    asked = []
    for kind in (AutoTokenizer, AutoModelForCausalLM):
        plain = kind.from_pretrained

        def from_pretrained(name, plain=plain, **settings):
            asked.append(settings.pop("revision", None))
            return plain(checkpoint if name == "me/x" else name, **settings)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
    if isinstance(given, str):
        (tmp_path / "config.yaml").write_text(given)
        given = ["--config", str(tmp_path / "config.yaml")]
    assert train("me/x", data, tmp_path / "run", *given) == 0
    assert asked[:2] == ["v2", "v2"]


def test_a_run_goes_on_from_another_folder_and_with_its_project_moved(
    checkpoint, data, tmp_path, monkeypatch, capsys
):
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    shutil.copytree(checkpoint, home / "model")
    shutil.copy(data, home / "rows.jsonl")
    monkeypatch.chdir(home)
    assert train("model", "rows.jsonl", "run") == 0
    monkeypatch.chdir(away)
    assert main(["train", "--resume", "../home/run", "--max_steps", "3"]) == 0
    assert Path.cwd() == away
    home.rename(tmp_path / "moved")
    shutil.copy(data, away / "mine.jsonl")
    resume = ["train", "--resume", "../moved/run/checkpoint-3", "--max_steps", "4"]
    assert main([*resume, "--eval", "mine.jsonl"]) == 0
    (tmp_path / "moved" / "archive").mkdir()
    run = (tmp_path / "moved" / "run").rename(tmp_path / "moved" / "archive" / "run")  # alone
    monkeypatch.chdir(tmp_path / "moved")
    assert main(["train", "--resume", "archive/run", "--max_steps", "5"]) == 0
    assert [entry["step"] for entry in log(run) if "loss" in entry] == [1, 2, 3, 4, 5]


def test_a_finished_run_takes_epochs_in_place_of_its_steps(checkpoint, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(checkpoint, data, out) == 0
    steps = len(log(out))
    assert main(["train", "--resume", str(out), "--epochs", "1"]) == 0
    assert len(log(out)) > steps
    for more, says in (
        (["--epochs", "2", "--max_steps", "2"], "num_train_epochs is '2', and max_steps rules"),
        (["--lr", "1e-2", "--learning_rate", "0.1"], "learning_rate is '0.1', and lr rules"),
    ):
        assert train(checkpoint, data, tmp_path / "other", *more) == 2
        assert says in capsys.readouterr().err


def test_a_flag_overrules_what_a_file_says_under_the_other_name(tmp_path):
    config = tmp_path / "config.yaml"
    for text, flags in (
        ("max_steps: 3\nlr: 1e-2\n", ["--epochs", "2", "--learning_rate", "0.1"]),
        ("num_train_epochs: 2\nlearning_rate: 0.1\n", []),
    ):
        config.write_text(text)
        args, _, _, smt = parse([f"--config={config}", *flags, "--output", "o"])[1:5]
        assert (args.max_steps, args.num_train_epochs) == (-1, 2.0)
        assert (smt.lr, args.rate_asked) == (None, 0.1)
    args, _, _, smt = parse([f"--config={config}", "--max_steps", "2", "--lr", "1e-2"])[1:5]
    assert (args.max_steps, float(smt.lr)) == (2, 0.01)


def test_held_out_rows_are_of_the_configuration_of_the_training_rows(tmp_path):
    folder = tmp_path / "cf"
    folder.mkdir()
    configs = "".join(
        f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("easy", "hard")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name in ("easy", "hard"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"prompt": "q", "completion": name}))
    flags = ["--data", str(folder), "--dataset_config", "hard", "--eval", str(folder),
             "--output", "run", "--dataset_test_split", "train"]  # fmt: skip
    script, args, _, mixture, _, run = parse(flags)
    for rows in train_command._data(script, args, mixture, run):
        assert rows["completion"] == ["hard"]


def test_a_refused_run_leaves_the_command_of_the_one_before(checkpoint, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(checkpoint, data, out) == 0
    before = (out / "command.json").read_text()
    assert train(checkpoint, data, out, "--seed", "7") == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(["train", "--resume", str(out), "--seed", "7"]) == 2
    assert "seed is 7" in capsys.readouterr().err
    assert (out / "command.json").read_text() == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "trainer_state.json"])
def test_a_folder_of_a_model_or_of_another_trainer_is_no_output(checkpoint, data, tmp_path, name):
    folder = copy_of(checkpoint, tmp_path / "model")
    for path in folder.iterdir():
        if path.name != name and name != "config.json":
            path.unlink()
    (folder / name).touch()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert train(checkpoint, data, folder) == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_files_of_others_in_the_output_stay(checkpoint, data, tmp_path, capsys):
    """Those that a run would write over are named before it; all others it leaves alone."""
    out = tmp_path / "run[1]*"
    (out / "notes").mkdir(parents=True)
    (out / "notes" / "thesis.txt").write_text("precious")
    (out / "README.md").write_text("my project")
    assert train(checkpoint, data, out) == 2
    assert "README.md' is not smt_ext's" in capsys.readouterr().err
    (out / "README.md").unlink()
    link = tmp_path / "link"
    link.symlink_to(out)
    assert train(checkpoint, data, link) == 0
    assert link.is_symlink()
    for form in ("hf", "peft-lora", "delta"):
        export = ["export", "--model", checkpoint, "--blocks", str(out), "--format", form]
        for target in (out, out / "notes", out / "checkpoint-2", checkpoint):
            assert main([*export, "--output", str(target)]) == 2
            assert "Nothing was changed" in capsys.readouterr().err
        for target in (out, tmp_path, checkpoint):
            assert main([*export, "--output", str(target), "--overwrite"]) == 2
            assert "Nothing was changed" in capsys.readouterr().err
        for _ in range(2):
            assert main([*export, "--output", str(tmp_path / form)]) == 0
        (tmp_path / form / "mine.txt").touch()
        assert main([*export, "--output", str(tmp_path / form)]) == 2
        assert main([*export, "--output", str(tmp_path / form), "--overwrite"]) == 0
    assert (out / "notes" / "thesis.txt").read_text() == "precious"
    assert (out / "checkpoint-2").is_dir()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            ["--push_to_hub", "true", "--hub_model_id", "me/x"],
            "nothing has been trained: Cannot reach",
        ),
        (["--assistant_only_loss", "true"], "nothing has been trained: You set"),
        (["--use_liger_kernel", "true"], "pip install liger-kernel"),
        (["--config", "/no/such.yaml"], "No such file"),
    ],
)
def test_what_trl_refuses_is_a_message(checkpoint, data, tmp_path, capsys, monkeypatch, more, says):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if "liger" in more[0]:
        monkeypatch.setattr("smt_ext.cli.train.find_spec", lambda name: None)
    assert train(checkpoint, data, tmp_path / "run", *more) == 2
    assert says in capsys.readouterr().err


def test_the_blocks_are_saved_where_the_push_fails(checkpoint, data, tmp_path, capsys, monkeypatch):
    """The hub was there when the run began."""
    from smt_ext.hf.trainers import SMTSFTTrainer

    def push(self, *args, **kwargs):
        raise ConnectionError("the hub is gone")

    monkeypatch.setattr(SMTSFTTrainer, "init_hf_repo", lambda self, *rest, **more: None)
    monkeypatch.setattr(SMTSFTTrainer, "_push_from_checkpoint", lambda self, folder: None)
    monkeypatch.setattr(SMTSFTTrainer, "push_to_hub", push)
    assert train(checkpoint, data, tmp_path / "run", "--push_to_hub", "true") == 2
    assert "and not on the hub: the hub is gone" in capsys.readouterr().err
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    smt_ext.load_blocks(base, tmp_path / "run")


def test_no_room_for_the_tokenizer_is_a_message(checkpoint, data, tmp_path, capsys, monkeypatch):
    def full(self, *args, **kwargs):
        raise Exception("No space left on device (os error 28)")  # as tokenizers does

    monkeypatch.setattr(type(AutoTokenizer.from_pretrained(checkpoint)), "save_pretrained", full)
    assert train(checkpoint, data, tmp_path / "run", "--save_strategy", "no") == 2
    assert "No space left on device" in capsys.readouterr().err


def test_broken_yaml_is_a_message(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("model: [1\n")
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 2
    assert "flow sequence" in capsys.readouterr().err
    assert main(["plan", "--output", "/dev/null/plan.json"]) == 2
    assert "cannot make the output folder" in capsys.readouterr().err
    assert main(["demo", "--output", "/dev/null/demo"]) == 2
    assert "cannot make the output folder" in capsys.readouterr().err
    assert main(["demo", "--data", "mine.jsonl"]) == 2
    assert "makes its rows itself" in capsys.readouterr().err


def test_the_demo_is_train_with_rows_of_its_own(checkpoint, tmp_path, capsys):
    out = tmp_path / "demo"
    flags = ["--model", checkpoint, *QUICK, "--max_length", "256", "--output", str(out)]
    assert main(["demo", *flags]) == 0
    said = capsys.readouterr().out
    assert "loss (nats a token)" in said
    assert "right answers" in said
    assert [entry["step"] for entry in log(out) if "eval_accuracy" in entry] == [0, 2]
    assert main(["train", "--resume", str(out), "--max_steps", "3"]) == 0


def test_a_dtype_that_is_named_is_taken(checkpoint, data, tmp_path, monkeypatch):
    from smt_ext.cli import train as command

    monkeypatch.setattr(command, "training_dtype", lambda device: torch.bfloat16)
    init = ("--model_init_kwargs", '{"dtype": "float32"}')
    for name, more in (("auto", ()), ("float32", ("--dtype", "float32")), ("init", init)):
        out = tmp_path / name
        assert train(checkpoint, data, out, "--precision", "auto", *more) == 0
        blocks = json.loads((out / "smt_blocks.json").read_text())["base"].values()
        assert {block["dtype"] for block in blocks} == {"float32" if more else "bfloat16"}


def test_an_export_has_the_tokenizer_that_was_trained_with(checkpoint, data, tmp_path):
    from transformers import AutoTokenizer

    out = tmp_path / "run"
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert train(checkpoint, data, out, "--chat_template_path", str(tmp_path / "t.jinja")) == 0
    merged = str(tmp_path / "merged")
    assert main(["export", "--model", checkpoint, "--blocks", str(out), "--output", merged]) == 0
    assert "m['content']" in AutoTokenizer.from_pretrained(merged).chat_template


@pytest.mark.parametrize("ending", ["jinja", "jinja2", "j2"])
def test_a_byte_order_mark_is_no_part_of_a_template(checkpoint, tmp_path, ending):
    from smt_ext.cli.train import build

    turns = [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"}]
    data = dump(tmp_path, "chat.jsonl", [json.dumps({"messages": turns})])
    file, text = (
        tmp_path / f"t.{ending}",
        "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
    )
    file.write_text(text, encoding="utf-8-sig")
    more = ["--model", checkpoint, "--data", data, "--chat_template_path", str(file)]
    made = build(parse([*more, "--output", str(tmp_path / "run"), *QUICK]))
    assert made.processing_class.chat_template == text


def turned(checkpoint, folder, tokens=()):
    """A copy of the checkpoint's tokenizer, with a chat template of its own."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    end = tokens[0] if tokens else "{{ eos_token }}"
    tokenizer.add_tokens(["<|unused|>", *tokens], special_tokens=True)
    if tokens:
        tokenizer.eos_token = tokens[0]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_chat_template_of_another_tokenizer(checkpoint, tmp_path, capsys):
    """Rows are checked by it; what it needs no token for leaves the embedding as it is."""
    turns = [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"}]
    data = dump(tmp_path, "chat.jsonl", [json.dumps({"messages": turns})] * 4)
    template = ("--chat_template_path", turned(checkpoint, tmp_path / "same"))
    out, merged = tmp_path / "run", str(tmp_path / "merged")
    assert train(checkpoint, data, out, *template) == 0
    assert main(["export", "--model", checkpoint, "--blocks", str(out), "--output", merged]) == 0
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert "m.content" in tokenizer.chat_template
    assert AutoModelForCausalLM.from_pretrained(merged).vocab_size == 128
    capsys.readouterr()
    template = ("--chat_template_path", turned(checkpoint, tmp_path / "other", ["<|end|>"]))
    assert train(checkpoint, data, tmp_path / "no", *template) == 2
    assert (
        "needs the token '<|end|>', which the model's tokenizer has not" in capsys.readouterr().err
    )
    assert not list((tmp_path / "no").iterdir())


def test_what_ends_an_answer_ends_it_in_the_export_too(checkpoint, data, tmp_path):
    out, merged = tmp_path / "run", str(tmp_path / "merged")
    assert train(checkpoint, data, out, "--eos_token", "~") == 0
    assert main(["export", "--model", checkpoint, "--blocks", str(out), "--output", merged]) == 0
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(merged),
        AutoTokenizer.from_pretrained(merged),
    )
    assert tokenizer.eos_token == "~"
    ends = model.generation_config.eos_token_id
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])


def test_a_checkpoint_to_go_back_to(checkpoint, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(checkpoint, data, out, "--max_steps", "4") == 0
    whole = load_file(out / "blocks.safetensors")
    assert main(["train", f"--resume={out / 'checkpoint-2'}"]) == 0
    parts = load_file(out / "blocks.safetensors")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    names = {path.name for path in out.glob("*-*")}
    assert names == {
        *(f"checkpoint-{i}" for i in range(1, 5)),
        "checkpoint-3-superseded",
        "checkpoint-4-superseded",
    }
    assert main(["train", "--resume", str(out)]) == 0
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "holds no run to resume" in capsys.readouterr().err
    for more in (["--output", "other"], [f"--resume-from-checkpoint={out / 'checkpoint-2'}"]):
        assert main(["train", "--resume", str(out), *more]) == 2
        assert f"and --resume {out} rules" in capsys.readouterr().err
    assert main(["train", "--resume", str(out), "--output", f"{out}/"]) == 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--lr_scheduler_kwargs", '{"nonsense": 1}'], "nonsense"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "steps",
          "--eval_steps", "1", "--metric_for_best_model", "nonsense"], "eval_nonsense"),
        (["--optim", "lomo"], "lomo"),
        (["--optim_args", "nonsense", "--optim", "adafactor"], "unpack"),
    ],
)  # fmt: skip
def test_what_transformers_refuses_when_it_trains_is_a_message(
    checkpoint, data, tmp_path, capsys, more, says
):
    assert train(checkpoint, data, tmp_path / "run", "--eval", data, *more) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("smt-ext: the run could not be finished: ")
    assert says in said


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--no_such_flag", "1"], "['--no_such_flag', '1']\n"),
        (["--data", "a.jsonl", "b.jsonl"], "--data a.jsonl,b.jsonl"),
        (["--optim", "none"], "invalid choice: 'none'"),
        (["--lr_scheduler_kwargs", "{broken"], "Expecting property name"),
        (["--warmup_steps", "-3"], "warmup_steps"),
        (["--threads", "0"], "threads is 0, expected at least 1"),
        (["--config"], "argument --config: expected one argument"),
    ],
)
def test_an_argument_that_is_none_is_a_line(tmp_path, capsys, more, says):
    assert main(["train", "--output", str(tmp_path / "run"), *more]) == 2
    said = capsys.readouterr().err
    assert said.startswith("smt-ext: ")
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("accelerator", [False, True])
def test_without_an_accelerator_processes_are_connected(tmp_path, monkeypatch, accelerator):
    """As torchrun starts them: where use_cpu is not set, accelerate leaves each of them alone."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *args, **more: accelerator)
    args = parse(["--output", str(tmp_path)])[1]
    assert args.use_cpu is not accelerator


def test_a_stopped_run_of_blocks_alone_can_go_on(checkpoint, data, tmp_path, monkeypatch, capsys):
    """What save_only_model leaves away is in the checkpoint that Ctrl-C makes."""
    from smt_ext.hf.trainers import SMTSFTTrainer

    plain, steps = SMTSFTTrainer.training_step, []

    def step(self, *rest):
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return plain(self, *rest)

    monkeypatch.setattr(SMTSFTTrainer, "training_step", step)
    out, more = tmp_path / "run", ("--save_only_model", "true", "--max_steps", "4")
    assert train(checkpoint, data, out, *more) == 130
    assert "--resume" in capsys.readouterr().err
    assert (out / "checkpoint-2" / "optimizer.pt").exists()
    assert not (out / "checkpoint-1" / "optimizer.pt").exists()
    assert main(["train", "--resume", str(out)]) == 0
    assert len([entry for entry in log(out) if "loss" in entry]) == 4


def test_the_demo_writes_over_nothing_but_an_earlier_demo(checkpoint, data, tmp_path, capsys):
    flags = ["--model", checkpoint, *QUICK, "--max_length", "256"]
    project, run, own = tmp_path / "project", tmp_path / "run", tmp_path / "own"
    (project / "data").mkdir(parents=True)
    (project / "data" / "train.jsonl").write_text("mine")
    assert train(checkpoint, data, run) == 0
    for folder in (project, run):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert main(["demo", *flags, "--output", str(folder)]) == 2
        assert "is not the demo's" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    for _ in range(2):
        assert main(["demo", *flags, "--output", str(own)]) == 0


def test_blocks_are_saved_before_the_last_evaluation(checkpoint, data, tmp_path, monkeypatch):
    from smt_ext.hf.trainers import SMTSFTTrainer

    def fail(self, *args, **more):
        if self.state.global_step:
            raise RuntimeError("out of memory")
        return {}

    monkeypatch.setattr(SMTSFTTrainer, "evaluate", fail)
    out = tmp_path / "run"
    assert train(checkpoint, data, out, "--eval", str(data), "--save_strategy", "no") == 2
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    smt_ext.load_blocks(base, out)


def test_two_names_of_one_setting_in_a_file_are_refused(checkpoint, data, tmp_path, capsys):
    for text, says in (
        ("lr: 1e-3\nlearning_rate: 2e-3\n", "learning_rate is '2e-3', and lr rules"),
        ("max_steps: 2\nnum_train_epochs: 3\n", "num_train_epochs is 3, and max_steps rules"),
    ):
        (tmp_path / "run.yaml").write_text(text)
        assert (
            train(checkpoint, data, tmp_path / "run", "--config", str(tmp_path / "run.yaml")) == 2
        )
        assert says in capsys.readouterr().err


def test_a_precision_that_was_asked_for_is_kept_where_it_stands(checkpoint, data, tmp_path):
    """An edit of a file must not be overruled in silence by what the run noted of it."""
    assert train(checkpoint, data, tmp_path / "run") == 0
    noted = json.loads((tmp_path / "run" / "command.json").read_text())["arguments"]
    assert noted.count("--precision") == 1
