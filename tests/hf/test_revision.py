"""Blocks know the revision of the hub's model that they were trained on; eval and export take it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

import smt_ext
from smt_ext.checkpoint.blocks import read_blocks_info
from smt_ext.cli import main
from smt_ext.hf.loading import load_model

NAME, MAIN, OLDER = "org/tiny", "a" * 40, "b" * 40
QUICK = [
    "--block_size", "32", "--budget", "6 blocks", "--plan_batches", "1", "--max_steps", "1",
    "--batch-size", "4", "--quiet", "--report_to", "none", "--use_cpu", "true", "--precision", "fp32",
]  # fmt: skip


@pytest.fixture
def hub(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the hub leaves on the disk of a model with two revisions, of other weights; no network."""
    repository = tmp_path / "cache" / "models--org--tiny"
    for commit, branch in ((MAIN, "main"), (OLDER, "v1")):
        folder = repository / "snapshots" / commit
        shutil.copytree(checkpoint, folder)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    weights = load_file(folder / "model.safetensors")
    changed = {name: 1.5 * value for name, value in weights.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.fixture
def run(hub: Path) -> Path:
    """Trained on the branch that is not main."""
    (hub / "rows.jsonl").write_text('{"prompt": "1 + 2 =", "completion": " 3"}\n' * 4)
    arguments = ["--model", NAME, "--model_revision", "v1", "--data", str(hub / "rows.jsonl")]
    assert main(["train", *arguments, "--output", str(hub / "run"), *QUICK]) == 0
    return hub / "run"


def export(run: Path, form: str, *more: str) -> int:
    out = ["--output", str(run.parent / form), "--format", form, "--overwrite"]
    return main(["export", "--model", NAME, "--blocks", str(run), *out, *more])


def test_export_takes_the_revision_of_training(run, capsys):
    about = read_blocks_info(run)["metadata"]
    assert (about["base_model"], about["base_revision"]) == (NAME, OLDER)
    assert f"revision={OLDER!r}" in (run / "README.md").read_text()
    assert export(run, "hf") == 0
    merged = load_model(str(run.parent / "hf"), torch.float32)
    base = load_model(NAME, torch.float32, revision="v1")
    assert base.config._commit_hash == OLDER
    for one, other in ((merged, base), (base, load_model(NAME, torch.float32))):
        embeddings = [m.get_input_embeddings().weight for m in (one, other)]
        assert torch.equal(*embeddings) == (one is merged)
    assert export(run, "peft-lora") == 0
    adapter = json.loads((run.parent / "peft-lora" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (NAME, OLDER)
    assert export(run, "hf", "--model_revision", "main") == 2
    assert "holds other values" in capsys.readouterr().err


def test_eval_takes_the_revision_of_training(run, monkeypatch, capsys):
    from smt_ext.cli import eval as command

    seen = []

    def evaluate(model, *_, **__):
        seen.append(model.config._commit_hash)
        return {}

    monkeypatch.setattr(command, "evaluate", evaluate)
    arguments = ["eval", "--tasks", "x", "--model", NAME, "--output", str(run.parent / "out")]
    of_blocks = ["--blocks", str(run)]
    for more in (of_blocks, [], ["--model_revision", "v1"]):
        assert main([*arguments, *more]) == 0
    assert seen == [OLDER, MAIN, OLDER]
    arguments[4] = str(run.parent / "cache" / "models--org--tiny" / "snapshots" / MAIN)
    assert main([*arguments, "--model_revision", "v1"]) == 2
    assert "model_revision is 'v1', and the model" in capsys.readouterr().err


def test_a_loop_of_ones_own_keeps_the_commit_too(hub):
    model = load_model(NAME, torch.float32, revision="v1")
    plan = smt_ext.make_plan(
        model, None, budget="2 blocks", block_size=32, targets="v", metric="random"
    )
    smt_ext.patch(model, plan)
    smt_ext.save_blocks(model, hub / "blocks", metadata={"note": 1})
    noted = read_blocks_info(hub / "blocks")["metadata"]
    assert {**noted, "base_config": None} == {
        "base_model": NAME, "base_revision": OLDER, "base_config": None, "note": 1
    }  # fmt: skip


def test_trls_loading_of_a_name_keeps_it_as_well(hub):
    import datasets
    from trl import SFTConfig

    rows = datasets.Dataset.from_list([{"prompt": "1 + 2 =", "completion": " 3"}])
    args = SFTConfig(
        str(hub / "sft"), model_init_kwargs={"revision": "v1"}, bf16=False, report_to=[]
    )
    made = smt_ext.SMTSFTTrainer(NAME, args, train_dataset=rows)
    assert made.model.config._commit_hash == OLDER
