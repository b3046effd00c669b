"""SMT in a trainer: planning, patching, the optimizer, logs, checkpoints and resuming."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import smt_ext
from quick_runs import SETTINGS, sums
from smt_ext import CheckpointError, DataError, PatchError
from smt_ext.hf.config import SMTConfig
from smt_ext.hf.mixin import SMTMixin
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
    left = {p.name for p in tmp_path.iterdir() if p.name.startswith(".")}
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
    with pytest.raises(
        CheckpointError, match=r"checkpoint-2' holds 'thesis.txt'.*Nothing was changed"
    ):
        trainer(checkpoint, tmp_path).train()
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
    made = trainer(
        checkpoint, tmp_path, eval_strategy="steps", eval_steps=1, save_steps=1,
        save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    made.evaluate = lambda *args, **kwargs: {"eval_loss": abs(made.state.global_step - 2)}
    (tmp_path / "checkpoint-77").mkdir()  # somebody else's
    made.train()
    assert made.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    found = sorted(p.name for p in tmp_path.glob("checkpoint-*"))
    assert found == ["checkpoint-2", "checkpoint-6", "checkpoint-77"]
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    same_weights(smt_ext.load_blocks(base, tmp_path / "checkpoint-2"), made.model)


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

    class MyTrainer(SMTMixin, Trainer):
        pass

    return MyTrainer(
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


def test_an_optimizer_of_before_patching_is_refused(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    made = SMTSFTTrainer(
        model, trl.SFTConfig(str(tmp_path), **SETTINGS), optimizers=(optimizer, None),
        train_dataset=datasets.Dataset.from_list(sums()), smt_config=SMTConfig(**PLAN),
    )  # fmt: skip
    with pytest.raises(PatchError, match="given an optimizer"):
        made.train()


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


def test_the_automatic_rate_is_the_default(checkpoint, tmp_path):
    made = trainer(checkpoint, tmp_path, max_steps=1, learning_rate=2e-5)
    made.train()
    from smt_ext.optim.learning_rate import auto_learning_rate

    assert made.state.log_history[0]["learning_rate"] == auto_learning_rate(made.plan)


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


def test_a_finished_run_is_resumed_without_another_step(checkpoint, tmp_path):
    made = trainer(checkpoint, tmp_path, max_steps=2)
    made.train()
    again = trainer(checkpoint, tmp_path, max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
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
    allowed = ["budget", "block_size", "plan_batches", "num_batches"]
    again.smt_config.allow_changed = allowed
    with pytest.raises(CheckpointError, match="another plan than"):
        again.train(resume_from_checkpoint=True)


def test_a_resume_into_another_folder_asks_as_a_new_run_does(checkpoint, tmp_path):
    for name in ("one", "two"):
        trainer(checkpoint, tmp_path / name, max_steps=1).train()
    with pytest.raises(DataError, match="holds a run already"):
        trainer(checkpoint, tmp_path / "two", max_steps=2).train(
            resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-1")
        )


def test_an_overwritten_run_leaves_no_blocks_of_before(checkpoint, tmp_path):
    made = trainer(checkpoint, tmp_path, max_steps=1)
    made.train()
    made.save_model()
    assert (tmp_path / "smt_blocks.json").exists()
    trainer(checkpoint, tmp_path, max_steps=1, smt={"overwrite": True}).train()
    assert not (tmp_path / "smt_blocks.json").exists()


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
    changed[90]["input_ids"][1000] = 0
    assert _digest_of_rows(rows) != _digest_of_rows(changed)


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
