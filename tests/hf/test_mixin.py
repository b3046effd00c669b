"""SMT in a trainer: planning, patching, the optimizer, logs, checkpoints and resuming."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint import crash
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import smt_ext
from quick_runs import SETTINGS, sums
from smt_ext import CheckpointError, DataError, PatchError
from smt_ext.hf import resuming, saving
from smt_ext.hf.config import SMTConfig
from smt_ext.hf.mixin import SMTMixin
from smt_ext.hf.resuming import one_run
from smt_ext.hf.run_binding import CHECKPOINT_INFO, checkpoints_in, verify_checkpoint
from smt_ext.hf.trainers import SMTSFTTrainer

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

PLAN = {"budget": "6 blocks", "block_size": 32, "plan_batches": 2}


def trainer(checkpoint, folder, rows=None, smt=None, **settings):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    data = datasets.Dataset.from_list(rows or sums())
    return SMTSFTTrainer(
        model,
        trl.SFTConfig(str(folder), **{**SETTINGS, **settings}),
        train_dataset=data,
        eval_dataset=data,
        smt_config=SMTConfig(**{**PLAN, **(smt or {})}),
    )


def losses(made):
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def same_weights(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """A run that was never stopped; dropout draws random numbers in it."""
    made = trainer(checkpoint, tmp_path_factory.mktemp("whole"))
    made.train()
    return made


def test_it_trains_blocks_and_nothing_else(checkpoint, whole):
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
    trained = whole.model.state_dict()
    for name, layer in whole.plan.layers.items():
        changed = base[f"{name}.weight"] != trained[f"{name}.weight"]
        size = layer.block_size
        for row, col in layer.blocks:
            block = changed[row * size : (row + 1) * size, col * size : (col + 1) * size]
            assert block.any()
            block.fill_(False)
        assert not changed.any()
    patched = {f"{name}.weight" for name in whole.plan.layers}
    assert all(torch.equal(v, trained[k]) for k, v in base.items() if k not in patched)
    assert losses(whole)[-1] < losses(whole)[0]


def test_logs_say_what_trains_and_what_it_costs(whole):
    first, second = whole.state.log_history[:2]
    assert first["smt_blocks"] == 6
    assert first["smt_trainable"] == whole.plan.num_parameters
    assert first["smt_saved_bytes_per_token"] > 0
    assert first["smt_peak_memory_mb"] > 1
    assert first["smt_skipped_steps"] == 0
    assert "smt_blocks" not in second
    assert all(entry["grad_norm"] > 0 for entry in whole.state.log_history if "loss" in entry)


def test_gradients_are_clipped_once_to_the_arguments_norm(checkpoint, tmp_path):
    made = trainer(checkpoint, tmp_path, max_grad_norm=1e-3, max_steps=1)
    made.train()
    assert made._fused().max_grad_norm == 1e-3
    assert made.state.log_history[0]["grad_norm"] > 1e-3  # the norm before clipping


def test_weight_decay_goes_to_the_values_before_training(checkpoint, tmp_path):
    made = trainer(checkpoint, tmp_path / "base", max_steps=1, weight_decay=0.5)
    made.train()
    group = made._fused().param_groups[0]
    assert (group["weight_decay"], group["decay_to"]) == (0.5, "base")
    settings = {"smt": {"decay_to": "zero"}, "max_steps": 2, "weight_decay": 0.5}
    with pytest.raises(CheckpointError, match="decay_to is 'zero'"):
        trainer(checkpoint, tmp_path, **settings).train(
            resume_from_checkpoint=str(tmp_path / "base" / "checkpoint-1")
        )
    with pytest.raises(DataError, match="decay_to is 'ground'"):
        SMTConfig(decay_to="ground")


def test_a_decay_that_the_optimizer_cannot_do_is_said(checkpoint, tmp_path, caplog):
    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.5, "weight_decay": 0.1}
    trainer(checkpoint, tmp_path / "base", **settings).train()
    assert "weight_decay=0.1 pulls the blocks to zero" in caplog.text
    caplog.clear()
    trainer(checkpoint, tmp_path / "zero", **settings, smt={"decay_to": "zero"}).train()
    assert "pulls the blocks" not in caplog.text


def test_planning_leaves_no_trace_in_training(checkpoint, tmp_path, whole):
    """Random numbers, TRL's averages and the order of rows are those of a run with a given plan."""
    whole.plan.save(tmp_path / "given.json")
    made = trainer(checkpoint, tmp_path / "run", smt={"plan": str(tmp_path / "given.json")})
    made.train()
    same_weights(made.model, whole.model)
    assert losses(made) == losses(whole)
    keys = ("mean_token_accuracy", "num_tokens")
    assert [[e.get(k) for k in keys] for e in made.state.log_history] == [
        [e.get(k) for k in keys] for e in whole.state.log_history
    ]


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_is_bit_for_bit_the_same(checkpoint, tmp_path, whole, step):
    """Nine rows in batches of two: step 2 is in the middle of an epoch, step 6 in the second one."""
    made = trainer(checkpoint, tmp_path)
    made.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
    same_weights(made.model, whole.model)
    assert losses(made) == losses(whole)


def test_a_checkpoint_loads_onto_the_base(checkpoint, whole):
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    smt_ext.load_blocks(base, f"{whole.args.output_dir}/checkpoint-6")
    same_weights(base, whole.model)
    assert not (Path(whole.args.output_dir) / "checkpoint-6" / "model.safetensors").exists()


def test_a_killed_run_goes_on_bit_for_bit(checkpoint, tmp_path, whole):
    """Killed while it writes its second checkpoint: the first is whole, and nothing else shows."""
    program = (
        "import os, signal, sys\n"
        "sys.path[:0] = sys.argv[3].split(':')\n"
        "import test_mixin\n"
        "from smt_ext.hf import saving\n"
        "plain = saving.seal_checkpoint\n"
        "def seal(folder, *rest):\n"
        "    if rest[1] == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    plain(folder, *rest)\n"
        "saving.seal_checkpoint = seal\n"
        "test_mixin.trainer(sys.argv[1], sys.argv[2]).train()\n"
    )
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", program, checkpoint, str(tmp_path), f"{here}:{here.parent}"]
    )
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    made = trainer(checkpoint, tmp_path)
    made.train(resume_from_checkpoint=True)
    same_weights(made.model, whole.model)
    left = {p.name for p in tmp_path.iterdir() if p.name.startswith((".", "_"))}
    assert not left


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"rows": sums(offset=2)}, "data"),
        ({"rows": [*sums(8), sums(9)[8] | {"completion": " 18"}]}, "data"),
        ({"learning_rate": 0.5}, "learning_rate"),
        ({"per_device_train_batch_size": 3}, "per_device_train_batch_size"),
        ({"seed": 7}, "seed"),
        ({"max_steps": 8}, "max_steps"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type"),
    ],
)
def test_a_resume_on_other_terms_is_refused_by_name(checkpoint, tmp_path, whole, change, name):
    made = trainer(checkpoint, tmp_path, **change)
    with pytest.raises(CheckpointError, match=rf"\b{name}\b.*checkpoint-2"):
        made.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")


def test_a_checkpoint_of_blocks_alone_is_no_place_to_go_on_from(checkpoint, tmp_path):
    trainer(checkpoint, tmp_path, max_steps=2, save_only_model=True).train()
    with pytest.raises(CheckpointError, match=r"has no optimizer\.pt.*save_only_model"):
        trainer(checkpoint, tmp_path, max_steps=4).train(resume_from_checkpoint=True)


def test_a_declared_change_holds_from_the_next_step(checkpoint, tmp_path, whole):
    smt = {"allow_changed": "learning_rate"}
    made = trainer(checkpoint, tmp_path, smt=smt, learning_rate=2e-2)
    made.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    before = [e["learning_rate"] for e in whole.state.log_history if "loss" in e]
    now = [e["learning_rate"] for e in made.state.log_history if "loss" in e]
    assert now[:4] == before[:4]
    assert now[4:] == pytest.approx([2 * rate for rate in before[4:]])


def test_another_tokenizer_is_refused(checkpoint, tmp_path, whole):
    made = trainer(checkpoint, tmp_path)
    made.processing_class.add_tokens(["<new>"])
    with pytest.raises(CheckpointError, match="tokenizer is another"):
        made.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")


def test_a_finished_run_can_be_extended(checkpoint, tmp_path, whole):
    made = trainer(checkpoint, tmp_path, max_steps=8)
    made.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-6")
    assert made.state.global_step == 8
    rates = [e["learning_rate"] for e in made.state.log_history if "loss" in e]
    assert rates[6] == pytest.approx(1e-2 * 2 / 8)  # the longer schedule's, and not the old one's 0


@pytest.mark.parametrize("name", ["optimizer.pt", "blocks.safetensors", "trainer_state.json"])
def test_a_damaged_checkpoint_is_refused_by_file(checkpoint, tmp_path, name):
    made = trainer(checkpoint, tmp_path / "run", max_steps=2)
    made.train()
    path = tmp_path / "run" / "checkpoint-2" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}.*damaged"):
        trainer(checkpoint, tmp_path / "run", max_steps=2).train(resume_from_checkpoint=True)


def test_another_run_in_the_folder_is_not_overwritten_unasked(checkpoint, tmp_path):
    trainer(checkpoint, tmp_path, max_steps=2).train()
    (tmp_path / "checkpoint-77").mkdir()
    (tmp_path / "checkpoint-77" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="holds a run already"):
        trainer(checkpoint, tmp_path, max_steps=2).train()
    again = trainer(checkpoint, tmp_path, smt={"overwrite": True}, max_steps=4, save_total_limit=1)
    again.train()
    assert not (tmp_path / "checkpoint-2").exists()
    assert (tmp_path / "checkpoint-77" / "thesis.txt").exists()  # neither removed nor rotated away


def test_a_folder_that_is_not_ours_is_not_replaced(checkpoint, tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "thesis.txt").write_text("precious")
    for settings in ({}, {"overwrite": True}):  # before anything is computed for nothing
        with pytest.raises(DataError, match=r"checkpoint-2' is no checkpoint of smt_ext's"):
            trainer(checkpoint, tmp_path, smt=settings).train()
    assert not (tmp_path / "plan.json").exists()
    assert (tmp_path / "checkpoint-2" / "thesis.txt").read_text() == "precious"


def test_two_processes_do_not_train_in_one_folder(checkpoint, tmp_path):
    program = (
        "import fcntl, os, sys, time\n"
        "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(DataError, match="another process trains"):
            trainer(checkpoint, tmp_path).train()
    finally:
        other.kill()
        other.wait()
    trainer(checkpoint, tmp_path, max_steps=1).train()


def test_the_best_checkpoint_stays_and_is_loaded(checkpoint, tmp_path):
    settings = {
        "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "loss",
    }  # fmt: skip
    begun, moved = tmp_path / "begun", tmp_path / "moved"
    made = trainer(checkpoint, begun, **settings)
    made.evaluate = lambda *args, **kwargs: {"eval_loss": abs(made.state.global_step - 2)}
    (begun / "checkpoint-77").mkdir()  # somebody else's
    made.train()
    assert made.state.best_model_checkpoint == str(begun / "checkpoint-2")
    found = sorted(p.name for p in begun.glob("checkpoint-*"))
    assert found == ["checkpoint-2", "checkpoint-6", "checkpoint-77"]
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    same_weights(smt_ext.load_blocks(base, begun / "checkpoint-2"), made.model)
    begun.rename(moved)
    again = trainer(checkpoint, moved, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(moved / "checkpoint-2")
    same_weights(again.model, made.model)


class PlainTrainer(SMTMixin, Trainer):
    """transformers' own."""


def plain_trainer(checkpoint, folder, steps=4):
    """transformers' own Trainer; the norms train beside the blocks."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    smt_ext.patch(model, smt_ext.make_plan(
        model, budget="6 blocks", block_size=32, metric="weight", progress=False))  # fmt: skip
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    rows = [{"input_ids": list(range(i, i + 9)), "labels": list(range(i, i + 9))} for i in range(9)]
    settings = {k: v for k, v in SETTINGS.items() if k not in ("max_length", "max_steps")}
    return PlainTrainer(
        model, TrainingArguments(str(folder), max_steps=steps, **settings), train_dataset=rows
    )


def test_other_trained_parameters_are_in_checkpoints(checkpoint, tmp_path):
    whole = plain_trainer(checkpoint, tmp_path / "whole")
    before = whole.model.model.norm.weight.detach().clone()
    whole.train()
    assert not torch.equal(before, whole.model.model.norm.weight)
    resumed = plain_trainer(checkpoint, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    same_weights(whole.model, resumed.model)
    other = plain_trainer(checkpoint, tmp_path / "other")
    other.model.model.norm.weight.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' trains in"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_save_model_writes_an_adapter_and_leaves_the_rest(checkpoint, whole):
    folder = Path(whole.args.output_dir)
    (folder / "notes.txt").write_text("mine")
    whole.save_model()
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    same_weights(smt_ext.load_blocks(base, folder), whole.model)
    card = (folder / "README.md").read_text()
    assert "SparseAdamW" in card
    assert checkpoint in card
    assert (folder / "notes.txt").exists()
    assert (folder / "checkpoint-6").is_dir()
    assert (folder / "tokenizer_config.json").exists()


def test_what_a_killed_save_leaves_goes_with_the_next_one(tmp_path, whole):
    if (child := os.fork()) == 0:
        try:
            saving.os.replace = lambda *paths: os._exit(9)
            whole.save_model(str(tmp_path))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    (left,) = tmp_path.iterdir()
    whole.save_model(str(tmp_path))
    assert (tmp_path / "smt_blocks.json").exists()
    assert not left.exists()


def test_peft_is_refused(checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    lora = peft.LoraConfig(target_modules=["q_proj"])
    rows = datasets.Dataset.from_list(sums())
    with pytest.raises(PatchError, match="peft_config"):
        SMTSFTTrainer(
            model, trl.SFTConfig(str(tmp_path), **SETTINGS), train_dataset=rows, peft_config=lora
        )
    adapted = peft.get_peft_model(model, lora)
    with pytest.raises(PatchError, match="PEFT"):
        SMTSFTTrainer(adapted, trl.SFTConfig(str(tmp_path), **SETTINGS), train_dataset=rows)


def test_an_adapter_of_another_trainer_on_a_patched_model_is_told_of(checkpoint, tmp_path, whole):
    """PEFT freezes the blocks, and TRL's own trainer knows nothing of them."""
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    smt_ext.patch(model, whole.plan)
    made = trl.SFTTrainer(
        model, trl.SFTConfig(str(tmp_path), **{**SETTINGS, "max_steps": 1}),
        train_dataset=datasets.Dataset.from_list(sums()),
        peft_config=peft.LoraConfig(target_modules=["q_proj"]),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="SMT blocks .* do not train"):
        made.train()


def test_an_optimizer_of_before_patching_is_refused(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    made = SMTSFTTrainer(
        model, trl.SFTConfig(str(tmp_path), **SETTINGS), optimizers=(optimizer, None),
        train_dataset=datasets.Dataset.from_list(sums()), smt_config=SMTConfig(**PLAN),
    )  # fmt: skip
    with pytest.raises(PatchError, match="made before the model was patched"):
        made.train()


def test_settings_that_a_patched_model_does_not_follow_are_refused(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.arange(2, 10)[None]
    batches = [{"input_ids": ids, "labels": ids}]
    plan = smt_ext.make_plan(model, batches, budget="6 blocks", block_size=32)
    smt_ext.patch(model, plan)

    def made(**config):
        return SMTSFTTrainer(
            model, trl.SFTConfig(str(tmp_path), **SETTINGS),
            train_dataset=datasets.Dataset.from_list(sums()), smt_config=SMTConfig(**config),
        )  # fmt: skip

    with pytest.raises(smt_ext.PlanError, match=r"budget is '12 blocks'.*made with '6 blocks'"):
        made(budget="12 blocks")
    assert made(budget="6 blocks", block_size=32).plan is plan


def test_an_optimizer_that_is_named_is_the_one_that_steps(checkpoint, tmp_path):
    made = trainer(checkpoint, tmp_path / "run", max_steps=1, optim="sgd", learning_rate=0.5)
    made.train()
    assert isinstance(made.optimizer.optimizer, torch.optim.SGD)
    assert made.state.log_history[0]["learning_rate"] == 0.5
    assert any(
        bool((m.blocks != m.original_blocks).any())
        for m in smt_ext.smt_modules(made.model).values()
    )
    made = trainer(checkpoint, tmp_path / "auto", max_steps=1, optim="sgd", smt={"lr": "auto"})
    with pytest.raises(DataError, match=r"optimizer is 'sgd'.*lr='auto' is for SparseAdamW"):
        made.train()


@pytest.mark.parametrize(("lr", "times"), [(None, 1), ("2x auto", 2)])
def test_the_automatic_rate_is_the_default(checkpoint, tmp_path, lr, times):
    made = trainer(checkpoint, tmp_path, max_steps=1, learning_rate=2e-5, smt={"lr": lr})
    made.train()
    from smt_ext.optim.learning_rate import auto_learning_rate

    assert made.state.log_history[0]["learning_rate"] == times * auto_learning_rate(made.plan)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_loss_is_trls(checkpoint, tmp_path, softcap):
    """Also where the model caps its logits; loss, gradient and TRL's metrics."""
    data = datasets.Dataset.from_list(sums())
    found = []
    for kind in (trl.SFTTrainer, SMTSFTTrainer):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        model.config.final_logit_softcapping = softcap
        with torch.no_grad():
            model.lm_head.weight.mul_(5)
        args = trl.SFTConfig(str(tmp_path), **SETTINGS)
        made = kind(model, args, train_dataset=data)
        batch = made._prepare_inputs(next(iter(made.get_train_dataloader())))
        model.eval()
        loss = made.compute_loss(model, dict(batch))
        loss.backward()
        metrics = [made._metrics["eval"][k][0] for k in ("entropy", "mean_token_accuracy")]
        found.append((loss.item(), model.model.layers[0].self_attn.v_proj.weight.grad, metrics))
    (one, gradient, metrics), (other, other_gradient, other_metrics) = found
    assert one == pytest.approx(other, rel=1e-5)
    assert metrics == pytest.approx(other_metrics, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(other_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_parameters_beside_the_blocks_train_with_the_same_optimizer(checkpoint, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
    made = trainer(checkpoint, tmp_path / "run", smt={"also_train": "*norm*"})
    made.train()
    optimizer = getattr(made.optimizer, "optimizer", made.optimizer)
    assert isinstance(optimizer, smt_ext.SparseAdamW)
    assert len(optimizer.param_groups) == 2
    names = list(made.plan.also_train)
    assert names == sorted(name for name in base if "norm" in name)
    trained = made.model.state_dict()
    assert not any(torch.equal(trained[name], base[name]) for name in names)
    fresh = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    made.save_model()
    same_weights(smt_ext.load_blocks(fresh, tmp_path / "run"), made.model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"preset": "best"}, "preset is 'best', expected one of paper, recommended"),
     ({"depth": 0.0}, "depth is 0.0"), ({"depth": 1.5}, "depth is 1.5")],
)  # fmt: skip
def test_bad_settings_are_named_before_anything_is_loaded(settings, message):
    with pytest.raises(smt_ext.PlanError, match=message):
        SMTConfig(**settings)


def test_the_upper_half_alone_is_planned(checkpoint, tmp_path):
    made = trainer(checkpoint, tmp_path / "run", smt={"depth": 0.5, "targets": "all-linear"})
    layers = made.model.config.num_hidden_layers
    assert {int(name.split(".")[2]) for name in made.make_plan().layers} == {
        *range(layers - layers // 2, layers)
    }


@pytest.mark.parametrize("length", [{"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 0.4}])
def test_a_finished_run_is_resumed_without_another_step(checkpoint, tmp_path, length):
    """0.4 epochs of nine rows in batches of two are two steps."""
    made = trainer(checkpoint, tmp_path, **length)
    made.train()
    again = trainer(checkpoint, tmp_path, **length)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == made.state.global_step == 2
    same_weights(made.model, again.model)
    again.save_model()
    assert "SparseAdamW" in (tmp_path / "README.md").read_text()


def test_a_resume_takes_no_other_plan(checkpoint, tmp_path):
    made = trainer(checkpoint, tmp_path / "run", max_steps=1)
    made.train()
    other = trainer(checkpoint, tmp_path / "other", max_steps=1, smt={"budget": "3 blocks"})
    other.make_plan().save(tmp_path / "other.json")
    again = trainer(checkpoint, tmp_path / "run", max_steps=1)
    again.smt_config = SMTConfig(plan=str(tmp_path / "other.json"))
    allowed = ["budget", "block_size", "num_batches"]
    again.smt_config.allow_changed = allowed
    with pytest.raises(CheckpointError, match="another plan than"):
        again.train(resume_from_checkpoint=True)
    (tmp_path / "other.json").unlink()  # the checkpoint has its plan
    again.train(resume_from_checkpoint=True)
    assert again.plan.fingerprint == made.plan.fingerprint
    with pytest.raises(CheckpointError, match=r"no whole checkpoint.* anew, without --resume"):
        trainer(checkpoint, tmp_path / "none").train(resume_from_checkpoint=True)


def test_a_resume_into_another_folder_asks_as_a_new_run_does(checkpoint, tmp_path):
    for name in ("one", "two"):
        trainer(checkpoint, tmp_path / name, max_steps=1).train()
    with pytest.raises(DataError, match="holds a run already"):
        trainer(checkpoint, tmp_path / "two", max_steps=2).train(
            resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-1")
        )
    (tmp_path / "link").symlink_to(tmp_path / "two")  # which is no other folder
    trainer(checkpoint, tmp_path / "two", max_steps=1, smt={"overwrite": True}).train(
        resume_from_checkpoint=str(tmp_path / "link" / "checkpoint-1")
    )
    assert (tmp_path / "two" / "checkpoint-1").is_dir()


def test_an_overwritten_run_leaves_no_blocks_of_before(checkpoint, tmp_path):
    made = trainer(checkpoint, tmp_path, max_steps=1)
    made.train()
    made.save_model()
    shutil.rmtree(tmp_path / "checkpoint-1")  # as with save_strategy="no"
    with pytest.raises(DataError, match=r"\(smt_blocks.json\). Choose .* overwrite=True"):
        trainer(checkpoint, tmp_path, max_steps=1).train()
    assert (tmp_path / "smt_blocks.json").exists()
    trainer(checkpoint, tmp_path, max_steps=1, smt={"overwrite": True}).train()
    assert not (tmp_path / "smt_blocks.json").exists()


def test_a_run_stays_until_another_can_begin(checkpoint, tmp_path):
    """A plan or a schedule that cannot be made costs nothing; nor does a kill until the last removal."""
    made = trainer(checkpoint, tmp_path / "run", max_steps=4)
    made.train()
    made.save_model()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    before = [path.read_bytes() for path in files if not path.name.startswith("plan.")]
    for smt, settings in (({"targets": "nosuch"}, {}), ({}, {"lr_scheduler_kwargs": {"no": 1}})):
        other = trainer(checkpoint, tmp_path / "run", smt={"overwrite": True, **smt}, **settings)
        with pytest.raises((smt_ext.PlanError, TypeError)):
            other.train()
        assert [p.read_bytes() for p in files if not p.name.startswith("plan.")] == before
    shutil.copytree(tmp_path / "run", tmp_path / "ended")
    with crash.Fault(0, "") as calls:
        resuming._end_run(tmp_path / "ended")
    assert calls.count > 20
    went_on = []
    for at in range(1, calls.count + 1):
        folder = shutil.copytree(tmp_path / "run", tmp_path / str(at))
        if (child := os.fork()) == 0:
            try:
                with crash.Fault(at, "before"):
                    resuming._end_run(folder)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        found = checkpoints_in(folder)
        assert [verify_checkpoint(last)["step"] for last in found[-1:]] == [4] * bool(found)
        went_on.append(bool(found))
    assert went_on[0]
    assert went_on == sorted(went_on, reverse=True)


def test_held_out_rows_that_would_see_each_other_are_refused(checkpoint, tmp_path):
    made = trainer(checkpoint, tmp_path, max_steps=1, eval_packing=True, max_length=32)
    with pytest.raises(DataError, match="eval_packing"):
        made.train()


def test_what_the_best_checkpoint_is_chosen_by_is_bound(checkpoint, tmp_path):
    best = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
    }
    trainer(checkpoint, tmp_path, max_steps=2, **best).train()
    made = trainer(checkpoint, tmp_path, max_steps=3, metric_for_best_model="eval_entropy", **best)
    with pytest.raises(CheckpointError, match="metric_for_best_model is 'eval_entropy'"):
        made.train(resume_from_checkpoint=True)


def test_every_row_of_a_list_is_bound():
    from smt_ext.hf.run_binding import _digest_of_rows

    rows = [{"input_ids": torch.arange(2000) + i} for i in range(100)]
    changed = [*rows[:90], {"input_ids": rows[90]["input_ids"].clone()}, *rows[91:]]
    assert _digest_of_rows(rows) == _digest_of_rows(changed)
    sets, others = {"a": rows, "b": rows}, {"a": rows, "b": changed}
    assert _digest_of_rows(sets) == _digest_of_rows(others)
    changed[90]["input_ids"][1000] = 0
    assert _digest_of_rows(rows) != _digest_of_rows(changed)
    assert _digest_of_rows(sets) != _digest_of_rows(others)


def test_targets_that_the_loss_reads_past_their_modules_are_left_out(checkpoint, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    made = SMTSFTTrainer(
        model, trl.SFTConfig(str(tmp_path), **SETTINGS),
        train_dataset=datasets.Dataset.from_list(sums()),
        smt_config=SMTConfig(**{**PLAN, "targets": ["lm_head", "v_proj"]}),
    )  # fmt: skip
    plan = made.make_plan()
    assert {name.rpartition(".")[2] for name in plan.layers} == {"v_proj"}
    assert "no gradient reached 1 of" in caplog.text
    assert "'lm_head'" in caplog.text


def test_planning_recomputes_activations_as_training_does(checkpoint, tmp_path, monkeypatch):
    made = trainer(checkpoint, tmp_path, max_steps=1, gradient_checkpointing=True)
    seen, loss = [], made.compute_loss

    def noted(*args, **more):
        seen.append(made.model.is_gradient_checkpointing)
        return loss(*args, **more)

    monkeypatch.setattr(made, "compute_loss", noted)
    made.make_plan()
    assert seen
    assert all(seen)


def test_save_model_leaves_what_it_has_not_written(checkpoint, tmp_path, caplog):
    made = trainer(checkpoint, tmp_path / "run", max_steps=1)
    made.train()
    (tmp_path / "project").mkdir()
    for name in ("README.md", "tokenizer.json"):
        (tmp_path / "project" / name).write_text("mine, about smt_ext")
        with pytest.raises(DataError, match=rf"{name}' is not smt_ext's"):
            made.save_model(str(tmp_path / "project"))
        assert (tmp_path / "project" / name).read_text() == "mine, about smt_ext"
        (tmp_path / "project" / name).unlink()
    for _ in range(2):
        made.save_model(str(tmp_path / "project"))
    card = tmp_path / "project" / "README.md"
    card.write_text(card.read_text() + "and my notes")
    made.save_model(str(tmp_path / "project"))
    assert card.read_text().endswith("and my notes")
    assert "README.md was edited" in caplog.text


def test_settings_keep_a_regular_expression_whole_and_refuse_an_endless_rate():
    assert SMTConfig(targets=["re:.*[.]\\d{1,2}[.].*", "v,o"]).targets == [
        "re:.*[.]\\d{1,2}[.].*", "v", "o"
    ]  # fmt: skip
    with pytest.raises(DataError, match="lr is 'inf'"):
        SMTConfig(lr="inf")


def on_rows(checkpoint, folder, kind, rows, held_out=None, **settings):
    """A trainer of rows as they are; ``kind``: SFT or transformers' own."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    settings = {**SETTINGS, "max_steps": 2, "save_strategy": "no", **settings}
    if kind is PlainTrainer:
        del settings["max_length"]
    made = TrainingArguments if kind is PlainTrainer else trl.SFTConfig
    return kind(
        model, made(str(folder), **settings), train_dataset=rows, eval_dataset=held_out,
        smt_config=SMTConfig(**PLAN),
    )  # fmt: skip


class OneShot(torch.utils.data.IterableDataset):
    """Goes on where it stopped."""

    def __init__(self, rows):
        self.left = iter(rows)

    def __iter__(self):
        return self.left


def numbers(count=40):
    return [{"input_ids": [i, i + 1, i + 2], "labels": [i, i + 1, i + 2]} for i in range(count)]


@pytest.mark.parametrize("kind", [SMTSFTTrainer, PlainTrainer])
def test_a_stream_that_cannot_begin_anew_is_refused(checkpoint, tmp_path, kind):
    """Its first rows would go to the digest and to planning."""
    left = iter(numbers())
    rows = datasets.IterableDataset.from_generator(lambda: left)
    with pytest.raises(DataError, match=r"train_dataset gives other rows when it is read again"):
        on_rows(
            checkpoint, tmp_path, kind, OneShot(numbers()) if kind is PlainTrainer else rows
        ).train()
    with pytest.raises(DataError, match="gives other rows"):
        on_rows(checkpoint, tmp_path, kind, rows).train()


def test_a_stream_that_may_change_is_read_for_training_alone(checkpoint, tmp_path, whole):
    whole.plan.save(tmp_path / "plan.json")
    made = on_rows(checkpoint, tmp_path / "run", PlainTrainer, OneShot(numbers(4)))
    made.smt_config = SMTConfig(plan=str(tmp_path / "plan.json"), allow_changed="data")
    made.train()
    assert made.state.global_step == 2
    with pytest.raises(DataError, match="gives other rows"):
        on_rows(checkpoint, tmp_path / "other", PlainTrainer, OneShot(numbers(4))).train()


def test_a_stream_is_trained_on_from_its_first_row(checkpoint, tmp_path, monkeypatch):
    rows = datasets.IterableDataset.from_generator(numbers)
    seen = []
    for kind in (SMTSFTTrainer, PlainTrainer):
        seen.clear()
        made = on_rows(checkpoint, tmp_path / kind.__name__, kind, rows)
        step = made.training_step
        made.training_step = lambda model, batch, *rest, step=step: (
            seen.extend(batch["input_ids"][:, 0].tolist()), step(model, batch, *rest)
        )[1]  # fmt: skip
        made.train()
        assert seen == [0, 1, 2, 3]


def test_held_out_rows_of_another_format_are_refused(checkpoint, tmp_path):
    answers = datasets.Dataset.from_list(sums())
    texts = answers.map(lambda row: {"text": row["prompt"]}, remove_columns=answers.column_names)
    for train, held_out in ((answers, texts), (texts, {"one": texts, "other": answers})):
        with pytest.raises(
            DataError, match=r"_dataset has '(text|prompt)' rows, and train_dataset"
        ):
            on_rows(checkpoint, tmp_path, SMTSFTTrainer, train, held_out)
    on_rows(checkpoint, tmp_path, SMTSFTTrainer, answers, {"one": answers})


@pytest.mark.parametrize("name", ["bf16_full_eval", "fp16_full_eval"])
def test_an_evaluation_that_rounds_the_model_is_refused(checkpoint, tmp_path, name):
    with pytest.raises(DataError, match=f"{name}: .* would round weights and blocks for good"):
        on_rows(checkpoint, tmp_path, PlainTrainer, numbers(), numbers(), **{name: True})


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("kind", [SMTSFTTrainer, PlainTrainer])
def test_a_stream_that_is_read_several_times_goes_on_where_it_was(
    checkpoint, tmp_path, kind, shuffled
):
    rows = datasets.IterableDataset.from_generator(lambda: numbers(5))
    rows = rows.shuffle(seed=1, buffer_size=5) if shuffled else rows

    def run(seen, **more):
        made = on_rows(checkpoint, tmp_path, kind, rows, max_steps=6, **more)
        step = made.training_step
        made.training_step = lambda model, batch, *rest: (
            seen.append(batch["input_ids"][:, 0].tolist()), step(model, batch, *rest)
        )[1]  # fmt: skip
        return made

    whole, rest = [], []
    run(whole, save_strategy="steps", save_steps=4).train()
    assert len({tuple(batch) for batch in whole}) == (5 if shuffled else 3)
    run(rest).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert rest == whole[4:]


BAD_ROWS = {
    "an id": ({"input_ids": [1, 128, 3]}, "input_ids holds 128 at position 1, expected .* below 128"),
    "a negative id": ({"input_ids": [1, 2, -1]}, "input_ids holds -1 at position 2"),
    "no id": ({"input_ids": [1, None, 3]}, "input_ids holds None at position 1, expected a token id"),
    "a label": ({"labels": [-100, 2, 128]}, "labels holds 128 at position 2, expected -100"),
    "a negative label": ({"labels": [-1, 2, 3]}, "labels holds -1 at position 0, expected -100"),
    "labels": ({"labels": [1, 2]}, "labels has 2 values and input_ids 3"),
    "a mask": ({"attention_mask": [1, 1, 1, 1]}, "attention_mask has 4 values and input_ids 3"),
}  # fmt: skip


def with_a_bad_row(bad):
    rows = [
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 1, 1]} for _ in range(5)
    ]
    return [*rows[:3], {**rows[3], **bad}, rows[4]]


@pytest.mark.parametrize("form", ["table", "stream"])
@pytest.mark.parametrize("kind", [SMTSFTTrainer, PlainTrainer])
@pytest.mark.parametrize(("bad", "says"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows_of_token_ids_that_the_model_cannot_take_are_named(
    checkpoint, tmp_path, kind, form, bad, says
):
    """In training and held-out rows, before the first step or as they are read."""
    good = with_a_bad_row({})
    for name, data, held_out in (
        ("training", with_a_bad_row(bad), good),
        ("held-out", good, with_a_bad_row(bad)),
    ):
        if kind is PlainTrainer and form == "table":
            sets = [data, held_out]
        elif form == "table":
            sets = [datasets.Dataset.from_list(rows) for rows in (data, held_out)]
        else:
            sets = [datasets.IterableDataset.from_generator(lambda rows=rows: iter(rows))
                    for rows in (data, held_out)]  # fmt: skip

        def run(sets=sets):
            made = on_rows(checkpoint, tmp_path, kind, *sets)
            made.train()
            made.evaluate()

        with pytest.raises(DataError, match=f"{name} row 3: {says}"):
            run()


def test_a_stream_of_torch_is_checked_as_it_is_read(checkpoint, tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(with_a_bad_row({"input_ids": [1, 200, 3]}))

    with pytest.raises(DataError, match="training row 3: input_ids holds 200 at position 1"):
        on_rows(checkpoint, tmp_path, PlainTrainer, Stream()).train()


def test_a_bad_row_is_named_by_its_own_number(checkpoint, tmp_path):
    """Rows before it were left out, or packed with others."""
    rows = [{"input_ids": [5] * 99, "labels": [-100] * 99}, *numbers(3)]
    rows[2] = {"input_ids": [1, 200], "labels": [1, 2]}
    for packing in (False, True):
        with pytest.raises(DataError, match="training row 2: input_ids holds 200"):
            on_rows(
                checkpoint, tmp_path, SMTSFTTrainer, datasets.Dataset.from_list(rows),
                packing=packing,
            )  # fmt: skip


@pytest.mark.parametrize("mask", [[0, 1, 1], [1, 0, 1], [1, 1, 0]])
def test_padding_that_trl_would_train_on_is_refused(checkpoint, tmp_path, mask):
    row = {"input_ids": [1, 2, 3], "attention_mask": mask}
    at = mask.index(0)
    with pytest.raises(DataError, match=rf"row 0: attention_mask holds 0 at position {at}"):
        on_rows(checkpoint, tmp_path, SMTSFTTrainer, datasets.Dataset.from_list([row]))
    row = {**row, "attention_mask": [1, 1, 0], "labels": [1, 2, -100]}  # which nothing sees
    on_rows(checkpoint, tmp_path, SMTSFTTrainer, datasets.Dataset.from_list([row])).train()


def test_a_label_that_is_a_class_is_none_of_a_token(checkpoint, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32)
    model.config.pad_token_id = 0
    rows = [{"input_ids": [i, 2, 3], "labels": i % 2} for i in range(4)]
    settings = {k: v for k, v in SETTINGS.items() if k != "max_length"} | {"max_steps": 1}
    args = TrainingArguments(str(tmp_path / "run"), **settings)
    plan = {**PLAN, "targets": ["v"]}
    frozen = PlainTrainer(model, args, train_dataset=rows, smt_config=SMTConfig(**plan))
    with pytest.raises(DataError, match=r"'score.weight' is not in the checkpoint.*does not train"):
        frozen.train()
    assert not (tmp_path / "run" / "plan.json").exists()
    config = SMTConfig(**plan, also_train="score.weight")
    PlainTrainer(model, args, train_dataset=rows, smt_config=config).train()


def test_a_grown_embedding_that_is_in_no_checkpoint_is_refused(checkpoint, tmp_path):
    """Unless the model is saved with it, and loaded from there."""
    made = trainer(checkpoint, tmp_path / "run")
    made.model.resize_token_embeddings(160)
    for patched in (False, True):
        if patched:
            smt_ext.patch(made.model, made.make_plan())
        with pytest.raises(DataError, match=r"'model.embed_tokens.weight' has 160 rows.* 128, and"):
            made.train()
    made.processing_class.save_pretrained(tmp_path / "grown")
    smt_ext.unpatch(made.model).save_pretrained(tmp_path / "grown")
    made = trainer(str(tmp_path / "grown"), tmp_path / "run", max_steps=1)
    made.train()
    made.save_model()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "grown", dtype=torch.float32)
    same_weights(smt_ext.load_blocks(base, tmp_path / "run"), made.model)


def test_a_model_that_comes_from_no_checkpoint_has_nothing_fresh():
    from models import tiny_llama
    from smt_ext.checkpoint.fresh_parameters import fresh_parameters

    assert not list(fresh_parameters(tiny_llama()))


def test_a_run_that_went_back_is_gone_on_with(checkpoint, tmp_path, whole):
    """What it had saved beyond is not deleted, and no checkpoint of the run any more."""
    trainer(checkpoint, tmp_path, save_total_limit=9).train()

    def stopped(made, at, resume):
        step = made.training_step

        def stopping(*args):
            if made.state.global_step == at:
                raise KeyboardInterrupt
            return step(*args)

        made.training_step = stopping
        with pytest.raises(KeyboardInterrupt):
            made.train(resume_from_checkpoint=resume)

    for step in (3, 5):
        stopped(trainer(checkpoint, tmp_path), step, str(tmp_path / "checkpoint-2"))
        names = {path.name for path in tmp_path.glob("*-*")}
        assert {"checkpoint-2", "checkpoint-4-superseded", "checkpoint-6-superseded"} <= names
        assert ("checkpoint-4" in names, "checkpoint-6" in names) == (step == 5, False)
    stopped(trainer(checkpoint, tmp_path), 3, str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "checkpoint-4-superseded-2").is_dir()
    made = trainer(checkpoint, tmp_path)
    made.train(resume_from_checkpoint=True)
    same_weights(made.model, whole.model)
    again = trainer(checkpoint, tmp_path / "other")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4-superseded"))
    same_weights(again.model, whole.model)


def test_uploads_are_of_what_is_whole_and_stays(checkpoint, tmp_path, monkeypatch):
    """The hub's client lists a folder, maybe while a checkpoint is written, and reads it later."""
    uploaded, listed = [], []

    def files_of(folder, ignored=None):
        names = [str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()]
        found = list(filter_repo_objects(names, ignore_patterns=ignored))
        listed.extend(Path(folder, name) for name in found)
        return found

    def upload(*, folder_path, path_in_repo="", ignore_patterns=None, **more):
        uploaded.append((path_in_repo, files_of(folder_path, ignore_patterns)))
        return SimpleNamespace(done=lambda: True)

    def seal(*args, plain=saving.seal_checkpoint):
        plain(*args)
        files_of(tmp_path, ["_*", "checkpoint-*"])  # an upload that began late

    repository = SimpleNamespace(repo_id="me/x")
    api = SimpleNamespace(create_repo=lambda *args, **more: repository, upload_folder=upload)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: api)
    monkeypatch.setattr(saving, "seal_checkpoint", seal)
    push = {"push_to_hub": True, "hub_strategy": "checkpoint"}
    trainer(checkpoint, tmp_path, max_steps=4, **push).train()
    assert [place for place, _ in uploaded] == ["", "last-checkpoint"] * 2
    for place, names in uploaded:
        assert "blocks.safetensors" in names
        assert all((name in names) == bool(place) for name in ("optimizer.pt", CHECKPOINT_INFO))
    assert [path for path in listed if not path.exists()] == []


def test_a_refused_resume_moves_nothing(checkpoint, tmp_path):
    trainer(checkpoint, tmp_path).train()
    with pytest.raises(CheckpointError, match="seed is 7"):
        trainer(checkpoint, tmp_path, seed=7).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )
    assert (tmp_path / "checkpoint-6").is_dir()


def test_a_copy_of_a_checkpoint_is_none_of_the_run(checkpoint, tmp_path):
    """Neither gone on from nor rotated away."""
    trainer(checkpoint, tmp_path, max_steps=2).train()
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-9-mine")
    made = trainer(checkpoint, tmp_path, max_steps=4, save_total_limit=1)
    made.train(resume_from_checkpoint=True)
    assert made.state.global_step == 4
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-9-mine"}


PLATEAU = {
    "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1,
    "metric_for_best_model": "loss", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_a_declared_change_holds_on_a_plateau_too(checkpoint, tmp_path, optim):
    def made(smt=None, **settings):
        made = trainer(checkpoint, tmp_path, smt=smt, optim=optim, **{**PLATEAU, **settings})
        made.evaluate = lambda *args, **kwargs: {"eval_loss": 1.0}  # never better: halved each time
        return made

    def rates(made):
        return [e["learning_rate"] for e in made.state.log_history if "loss" in e]

    whole = made()
    whole.train()
    checkpoint_2 = str(tmp_path / "checkpoint-2")
    same = made()
    same.train(resume_from_checkpoint=checkpoint_2)
    assert rates(same) == rates(whole)
    same_weights(same.model, whole.model)
    assert rates(whole)[5] < rates(whole)[2]
    double = made({"allow_changed": "learning_rate"}, learning_rate=2e-2)
    double.train(resume_from_checkpoint=checkpoint_2)
    assert rates(double)[2:] == pytest.approx([2 * rate for rate in rates(whole)[2:]])
    settings = {"lr_scheduler_kwargs": {"patience": 0, "factor": 0.1}, "weight_decay": 0.25}
    other = made({"allow_changed": ["lr_scheduler_kwargs", "weight_decay"]}, **settings)
    other.train(resume_from_checkpoint=checkpoint_2)
    assert rates(other)[4] == pytest.approx(rates(other)[3] / 10)
    assert {group["weight_decay"] for group in other.optimizer.param_groups} <= {0.25, 0.0}
    assert 0.25 in {group["weight_decay"] for group in other.optimizer.param_groups}


def test_rows_grouped_by_length_are_in_one_order_at_a_resume(checkpoint, tmp_path):
    rows = [{"prompt": "1" * (1 + i % 7), "completion": f" {i}"} for i in range(14)]
    settings = {"train_sampling_strategy": "group_by_length", "max_steps": 12, "save_steps": 3}
    runs = []
    for name in ("whole", "parts"):
        made = trainer(checkpoint, tmp_path / name, rows=rows, **settings)
        resume = str(tmp_path / "whole" / "checkpoint-9")  # in the middle of the second epoch
        made.train(resume_from_checkpoint=resume if name == "parts" else None)
        runs.append(made)
    assert losses(runs[0]) == losses(runs[1])
    same_weights(runs[0].model, runs[1].model)


def test_early_stopping_counts_on_where_it_was(checkpoint, tmp_path):
    """A run that goes on is not evaluated at its start once more."""
    from transformers import EarlyStoppingCallback

    settings = {
        "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "eval_on_start": True,
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 9,
    }  # fmt: skip
    steps = []
    for name in ("whole", "parts"):
        made = trainer(checkpoint, tmp_path / name, **settings)
        made.evaluate = lambda *args, made=made, **kwargs: made.callback_handler.on_evaluate(
            made.args, made.state, made.control, {"eval_loss": 1.0}
        ) and {"eval_loss": 1.0}  # fmt: skip
        made.add_callback(EarlyStoppingCallback(early_stopping_patience=3))
        made.train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3")
            if name == "parts"
            else None
        )
        steps.append(made.state.global_step)
        assert made.args.eval_on_start
    assert steps[0] == steps[1] < 6


def test_a_child_that_outlives_training_does_not_hold_the_folder(checkpoint, tmp_path):
    """A worker of a data loader, say: it has the lock's handle, too."""
    with one_run(tmp_path, True):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with one_run(tmp_path, True):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def flock(handle, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with one_run(tmp_path, True):
        pass
    assert "cannot be locked (Function not implemented)" in caplog.text


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-2}, {"rope_parameters": {
    "rope_type": "default", "rope_theta": 500.0}}])  # fmt: skip
def test_a_resume_on_a_base_that_computes_otherwise_is_refused(checkpoint, tmp_path, change):
    """Its values are the same, which is all that digests of weights see."""
    trainer(checkpoint, tmp_path / "run", max_steps=2).train()
    edited = shutil.copytree(checkpoint, tmp_path / "edited")
    config = json.loads((edited / "config.json").read_text())
    assert config.keys() >= change.keys()
    (edited / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match="the model_config is another"):
        trainer(edited, tmp_path / "run", max_steps=4).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_was_moved_and_linked_is_rotated_away(checkpoint, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    trainer(checkpoint, run, max_steps=2, save_steps=1).train()
    (run / "checkpoint-1").rename(other)
    (run / "checkpoint-1").symlink_to(other)
    trainer(checkpoint, run, max_steps=3, save_steps=1, save_total_limit=1).train(
        resume_from_checkpoint=True
    )
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not other.exists()


@pytest.mark.parametrize("name", ["config.json", "plan.scores.safetensors"])
def test_a_folder_of_a_model_or_of_others_scores_is_not_trained_into(checkpoint, tmp_path, name):
    made = trainer(checkpoint, tmp_path / "run", max_steps=1)
    made.train()
    folder = tmp_path / "project"
    folder.mkdir()
    if name == "config.json":  # of a model beside which a plan was written
        shutil.copy(tmp_path / "run" / "plan.json", folder)
    (folder / name).write_text("mine")
    with pytest.raises(DataError, match=f"{name}' is not smt_ext's"):
        trainer(checkpoint, folder, max_steps=1).train()
    with pytest.raises(DataError, match=f"{name}' is not smt_ext's"):
        made.save_model(str(folder))
    assert (folder / name).read_text() == "mine"


def test_a_resume_with_another_loss_function_is_refused(checkpoint, tmp_path):
    def halved(outputs, labels, num_items_in_batch=None):
        return outputs.loss / 2

    plain_trainer(checkpoint, tmp_path, steps=2).train()
    again = plain_trainer(checkpoint, tmp_path)
    again.compute_loss_func = halved
    with pytest.raises(CheckpointError, match=r"compute_loss_func is '.*halved'"):
        again.train(resume_from_checkpoint=True)
