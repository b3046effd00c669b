"""SMTMixin on two ranks: what one process trains, by DDP and by FSDP2, saved and resumed."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

import fsdp_on_cpu
import smt_ext
from models import llama_plan, tiny_llama, token_batch
from processes import run_ranks
from smt_ext import CheckpointError
from smt_ext.distributed import sharding
from smt_ext.errors import Interrupted
from smt_ext.hf import saving
from smt_ext.hf.mixin import SMTMixin

STEPS = 4
LR = 1e-2
# Of Adam. Gradients on several ranks differ by float32's rounding, at most 1e-6 here, and what a step
# moves by LR / EPS times that.
EPS = 1e-3
BOUND = STEPS * LR * 1e-6 / EPS


def rows(count=32):
    batch = token_batch(seed=1, batch=count)
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]


class MyTrainer(SMTMixin, Trainer):
    """Two lines."""


def trainer_of(folder, kind, *, dtype=torch.float32, dropout=0.0, **settings):
    model = tiny_llama(dtype, attention_dropout=dropout)
    smt_ext.patch(model, llama_plan(model))
    other = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": LR, "eps": EPS})}
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": LR,
        "optim": "adamw_torch",
        "adam_epsilon": EPS,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    return MyTrainer(
        model,
        TrainingArguments(folder, **arguments),
        train_dataset=rows(),
        eval_dataset=rows(4),
        **(other if kind == "AdamW" else {}),
    )


def whole_state(model):
    return {
        name.removeprefix("module."): sharding.full(value).detach().clone()
        for name, value in model.state_dict().items()
    }


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_rank(rank, folder, kind, fsdp, resume, settings):
    if fsdp is not None:
        fsdp_on_cpu.install()
        fsdp = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], **fsdp}
        settings = {**settings, "fsdp": True, "fsdp_config": fsdp}
    trainer = trainer_of(folder, kind, **settings)
    assert trainer.args.world_size == 2
    if fsdp is not None:
        assert trainer.accelerator.is_fsdp2
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2" if resume else None)
    sharded = [isinstance(parameter, DTensor) for parameter in trainer.model.parameters()]
    assert all(sharded) == any(sharded) == (fsdp is not None)
    trainer.save_model(f"{folder}/adapter")
    for module in smt_ext.smt_modules(trainer.model).values():
        assert torch.equal(
            module.read_blocks(), sharding.full(module.blocks).to(module.weight.dtype)
        )
    return whole_state(trainer.model), losses(trainer)


def assert_close(found, expected):
    (state, found_losses), (expected_state, expected_losses) = found, expected
    assert len(found_losses) == STEPS
    torch.testing.assert_close(found_losses, expected_losses, rtol=0, atol=1e-5)
    assert state.keys() == expected_state.keys()
    for name, value in expected_state.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=BOUND)


@pytest.mark.parametrize(
    ("kind", "state_dict"), [("SparseAdamW", "SHARDED_STATE_DICT"), ("AdamW", "FULL_STATE_DICT")]
)
def test_equals_ddp_and_one_process_and_resumes(tmp_path, kind, state_dict):
    folder, fsdp = str(tmp_path / "fsdp"), {"state_dict_type": state_dict}
    first, second = run_ranks(train_rank, 2, tmp_path / "ranks", folder, kind, fsdp, False, {})
    ddp = run_ranks(train_rank, 2, tmp_path / "ranks", str(tmp_path / "ddp"), kind, None, False, {})
    alone = trainer_of(tmp_path / "one", kind, per_device_train_batch_size=4)
    before = whole_state(alone.model)
    alone.train()
    expected = whole_state(alone.model), losses(alone)
    assert max(float((expected[0][n] - before[n]).abs().max()) for n in before) > LR
    assert_close(first, expected)
    assert_close(ddp[0], expected)
    for name, value in first[0].items():
        assert torch.equal(second[0][name], value), name

    names = {path.name for path in Path(folder, "checkpoint-2").iterdir()}
    if state_dict == "SHARDED_STATE_DICT":
        assert {"pytorch_model_fsdp_0", "optimizer_0"} < names
    else:
        assert {"pytorch_model_fsdp.bin", "optimizer.bin", "blocks.safetensors"} < names
    again = run_ranks(train_rank, 2, tmp_path / "ranks", folder, kind, fsdp, True, {})
    for (state, same), (straight, found) in zip(again, (first, second), strict=True):
        assert same == found
        for name, value in straight.items():
            assert torch.equal(state[name], value), name
    loaded = smt_ext.load_blocks(tiny_llama(), Path(folder, "adapter")).state_dict()
    for name, value in first[0].items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize(
    ("kind", "fsdp", "settings"),
    [
        ("SparseAdamW", {"activation_checkpointing": True}, {"gradient_accumulation_steps": 2}),
        ("AdamW", {"cpu_ram_efficient_loading": True}, {"bf16": True, "dtype": torch.bfloat16}),
    ],
    ids=["accumulation, checkpointing", "bf16, weights from rank 0"],
)
def test_variants_resume_bit_exact(tmp_path, kind, fsdp, settings):
    folder, settings = str(tmp_path / "run"), {**settings, "dropout": 0.2}
    straight = run_ranks(train_rank, 2, tmp_path / "ranks", folder, kind, fsdp, False, settings)
    again = run_ranks(train_rank, 2, tmp_path / "ranks", folder, kind, fsdp, True, settings)
    for (state, found), (same, same_losses) in zip(straight, again, strict=True):
        assert same_losses == found
        assert len(found) == STEPS
        for name, value in state.items():
            assert torch.equal(same[name], value), name


def best_rank(rank, folder):
    fsdp_on_cpu.install()
    trainer = trainer_of(
        folder, "SparseAdamW", learning_rate=LR, fsdp=True, eval_strategy="steps", eval_steps=1,
        save_steps=1, load_best_model_at_end=True,
        fsdp_config={"state_dict_type": "SHARDED_STATE_DICT"},
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history
    evaluated = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    return evaluated, trainer.state.best_global_step, trainer.evaluate()["eval_loss"]


def test_load_best_model_at_end(tmp_path):
    for evaluated, best, loss in run_ranks(best_rank, 2, tmp_path / "ranks", str(tmp_path / "run")):
        assert len(set(evaluated.values())) == STEPS
        assert evaluated[best] == min(evaluated.values()) < evaluated[STEPS]
        assert loss == evaluated[best]


def test_two_ranks_save_blocks_once_and_resume_bit_for_bit(tmp_path):
    """Random numbers of each rank are drawn by dropout."""
    folder, settings = str(tmp_path / "run"), {"dropout": 0.2, "dtype": torch.bfloat16}
    common = (tmp_path / "ranks", folder, "SparseAdamW", None)
    first = run_ranks(train_rank, 2, *common, False, settings)
    names = {path.name for path in Path(folder, "checkpoint-2").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "smt_checkpoint.json"} < names
    assert not [path for path in Path(folder).iterdir() if path.name.startswith(".")]
    again = run_ranks(train_rank, 2, *common, True, settings)
    for (state, found), (straight, expected) in zip(again, first, strict=True):
        assert found == expected
        for name, value in straight.items():
            assert torch.equal(state[name], value), name
    base = tiny_llama(torch.bfloat16, attention_dropout=0.2)
    loaded = smt_ext.load_blocks(base, f"{folder}/adapter").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in first[0][0].items())


def failing_rank(rank, folder, where):
    """One rank fails while it saves a checkpoint; both must end, and at once."""
    trainer = trainer_of(folder, "SparseAdamW")

    def fail(*args, **kwargs):
        raise CheckpointError("no space left")

    if where == "rank 1":
        if rank == 1:
            trainer._save_rng_state = fail
    elif rank == 0:
        setattr(saving, where, fail)
    with pytest.raises(CheckpointError) as told:
        trainer.train()
    return str(told.value)


@pytest.mark.parametrize("where", ["replace_directory", "seal_checkpoint", "rank 1"])
def test_a_rank_that_fails_while_saving_leaves_none_waiting(tmp_path, where):
    told = run_ranks(failing_rank, 2, tmp_path / "ranks", str(tmp_path / "run"), where, seconds=80)
    failed = int(where == "rank 1")
    assert told[failed] == "no space left"
    assert told[1 - failed] == f"failed on rank {failed}: CheckpointError: no space left"
    assert not list((tmp_path / "run").glob("*checkpoint*"))


def steps_of_a_stop(rank, trainer, callbacks, control):
    from smt_ext.cli.train import _stop_signals

    with _stop_signals(trainer):
        callbacks[0].on_step_end(trainer.args, trainer.state, control)
        assert not control.should_save
        if rank == 1:
            signal.raise_signal(signal.SIGTERM)
        callbacks[0].on_step_end(trainer.args, trainer.state, control)
        assert control.should_save
        assert control.should_training_stop
        if rank == 0:  # the same signal, which reaches this one later: it lets the save end
            signal.raise_signal(signal.SIGTERM)


def stop_rank(rank):
    callbacks = []
    trainer = SimpleNamespace(
        add_callback=callbacks.append,
        state=TrainerState(global_step=1, max_steps=4),
        args=SimpleNamespace(output_dir="run"),
    )
    with pytest.raises(Interrupted, match="stopped after step 1 of 4"):
        steps_of_a_stop(rank, trainer, callbacks, TrainerControl())


def test_a_signal_to_one_rank_ends_them_all(tmp_path):
    """With a checkpoint of the same step."""
    pytest.importorskip("trl")
    run_ranks(stop_rank, 2, tmp_path)
