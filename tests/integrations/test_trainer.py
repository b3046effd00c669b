"""transformers' Trainer on a patched model: optimizers, resume, small checkpoints, logs, adapter."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
import yaml
from transformers import Trainer, TrainerCallback, TrainingArguments

import smt_ext
from models import llama_plan, mask_of, tiny_llama, token_batch
from processes import run_ranks
from smt_ext import PatchError
from smt_ext.hf.trainer import SMTCallback, save_adapter, save_only_blocks

BUILT_IN = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd")


def patched(dtype=torch.float32, **config):
    model = tiny_llama(dtype, **config)
    return smt_ext.patch(model, llama_plan(model))


def rows(count=12):
    batch = token_batch(seed=1, batch=count)
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]


def arguments(folder, **overrides):
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **overrides,
    }
    return TrainingArguments(**settings)


def sparse_adamw(**kwargs):
    return {"optimizer_cls_and_kwargs": (smt_ext.SparseAdamW, {"lr": 1e-2, **kwargs})}


def trainer_of(model, folder, *, args=None, **kwargs):
    return Trainer(model, arguments(folder, **(args or {})), train_dataset=rows(), **kwargs)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_only_blocks_changed(model, before):
    """Blocks moved, the weights hold them, and no other bit of the model differs."""
    modules = smt_ext.smt_modules(model)
    for name, value in model.state_dict().items():
        owner = modules.get(name.removesuffix(".weight"))
        if owner is not None:
            mask = mask_of(owner.layer_plan)
            assert torch.equal(value[~mask], before[name][~mask])
            assert not torch.equal(value[mask], before[name][mask])
            assert torch.equal(owner.read_blocks(), owner.blocks.to(value.dtype))
        elif not name.endswith(".blocks"):
            assert torch.equal(value, before[name])


def test_both_ways_to_pass_sparse_adamw_train_alike(tmp_path):
    by_class = patched()
    before = state(by_class)
    trainer_of(by_class, tmp_path, **sparse_adamw()).train()
    assert_only_blocks_changed(by_class, before)

    by_object = patched()
    optimizer = smt_ext.SparseAdamW(by_object, lr=1e-2)
    trainer_of(by_object, tmp_path, optimizers=(optimizer, None)).train()
    assert_same(state(by_object), state(by_class))


@pytest.mark.parametrize("optimizer", BUILT_IN)
def test_built_in_optimizers_train_blocks_alone(tmp_path, optimizer):
    model = patched(torch.bfloat16)
    before = state(model)
    trainer = trainer_of(model, tmp_path, args={"optim": optimizer})
    trainer.train()
    assert_only_blocks_changed(model, before)
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history[:-1])


@pytest.mark.parametrize("only_blocks", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "bf16": True},
    ],
    ids=["plain", "accumulation, checkpointing, bf16"],
)
def test_resume_is_bit_exact(tmp_path, only_blocks, settings):
    settings = {"save_strategy": "steps", "save_steps": 2, **settings}

    def run(folder, **kwargs):
        model = patched(torch.bfloat16, attention_dropout=0.2)
        trainer = trainer_of(model, folder, args=settings, **sparse_adamw())
        if only_blocks:
            save_only_blocks(trainer)
        trainer.train(**kwargs)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return state(model), losses

    expected, losses = run(tmp_path)
    resumed, same_losses = run(tmp_path / "b", resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert_same(resumed, expected)
    assert same_losses == losses
    assert len(losses) == 4


def test_checkpoints_hold_blocks_and_optimizer_state_only(tmp_path):
    model = patched()
    args = {"save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(model, tmp_path, args=args, **sparse_adamw())
    assert save_only_blocks(trainer) is trainer
    assert save_only_blocks(trainer) is trainer  # twice is once
    trainer.train()
    checkpoint = tmp_path / "checkpoint-4"
    blocks = smt_ext.status(model).block_bytes
    # Blocks and two moments; headers, JSON and random states are what is left.
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    assert blocks < sizes.pop("blocks.safetensors") < blocks + 4096
    assert 2 * blocks < sizes.pop("optimizer.pt") < 2 * blocks + 16384
    assert sum(sizes.values()) < 64e3, sizes
    assert not {"model.safetensors", "config.json"} & sizes.keys()

    fresh = smt_ext.load_blocks(tiny_llama(), checkpoint)
    assert_same(state(fresh), state(model))


def test_save_only_blocks_still_loads_whole_checkpoints(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 2}
    model = patched()
    trainer_of(model, tmp_path, args=args, **sparse_adamw()).train()
    again = patched()
    trainer = save_only_blocks(trainer_of(again, tmp_path / "b", args=args, **sparse_adamw()))
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert_same(state(again), state(model))


def test_save_only_blocks_keeps_the_trainers_own_overrides(tmp_path):
    class Own(Trainer):
        def compute_loss(self, *args, **kwargs):
            self.called = True
            return super().compute_loss(*args, **kwargs)

    own = Own(patched(), arguments(tmp_path), train_dataset=rows(), **sparse_adamw())
    trainer = save_only_blocks(own)
    assert isinstance(trainer, Own)
    trainer.train()
    assert trainer.called


@pytest.mark.parametrize("only_blocks", [True, False])
def test_load_best_model_at_end(tmp_path, only_blocks):
    args = {
        # The highest loss is taken for the best, so that the last step surely is not.
        "metric_for_best_model": "loss",
        "greater_is_better": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
    }
    model = patched()
    trainer = trainer_of(
        model, tmp_path, args=args, eval_dataset=rows(4),
        optimizer_cls_and_kwargs=(smt_ext.SparseAdamW, {"lr": 1e-2}),
    )  # fmt: skip
    if only_blocks:
        save_only_blocks(trainer)
    trainer.train()
    best = trainer.state.best_global_step
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert best < 4
    assert losses[best] == max(losses.values()) > losses[4]
    assert trainer.evaluate()["eval_loss"] == losses[best]


class _BreakGradient(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            next(iter(smt_ext.smt_modules(model).values())).blocks.grad[0, 0, 0] = math.inf


@pytest.mark.parametrize("sparse", [True, False])
def test_callback_logs_budget_skipped_steps_and_memory(tmp_path, sparse):
    model = patched()
    callbacks = [SMTCallback(), *([_BreakGradient()] if sparse else [])]
    trainer = trainer_of(model, tmp_path, callbacks=callbacks, **(sparse_adamw() if sparse else {}))
    trainer.train()
    first, *others = [entry for entry in trainer.state.log_history if "loss" in entry]
    what = smt_ext.status(model)
    assert first["smt_trainable"] == what.trainable
    assert first["smt_percent"] == pytest.approx(what.percent, abs=1e-4)
    assert first["smt_blocks"] == sum(module.num_blocks for module in what.modules)
    assert "smt_trainable" not in others[0]
    assert all(entry["smt_peak_memory_mb"] > 50 for entry in (first, *others))
    skipped = [entry.get("smt_skipped_steps") for entry in (first, *others)]
    assert skipped == ([0, 1, 1, 1] if sparse else [None] * 4)


def test_a_model_that_is_not_patched_is_refused(tmp_path):
    model = tiny_llama()
    with pytest.raises(PatchError, match=r"SMTCallback.*smt_ext\.patch"):
        trainer_of(model, tmp_path, callbacks=[SMTCallback()]).train()
    with pytest.raises(PatchError, match=r"smt_ext\.patch"):
        save_only_blocks(trainer_of(model, tmp_path))


def test_save_only_blocks_refuses_what_it_cannot_do(tmp_path):
    trainer = trainer_of(patched(), tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(PatchError, match=r"FSDP.*save_blocks\(model, directory\) on all"):
        save_only_blocks(trainer)

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = patched()

    with pytest.raises(PatchError, match="Patch the model that the trainer gets"):
        save_only_blocks(trainer_of(Wrapper(), tmp_path))


def test_adapter_folder_with_a_model_card(tmp_path):
    model = patched()
    model.config._name_or_path = "acme/base-7b"
    trainer = trainer_of(
        model, tmp_path, args={"eval_strategy": "steps", "eval_steps": 4}, eval_dataset=rows(4),
        **sparse_adamw(),
    )  # fmt: skip
    trainer.train()
    save_adapter(trainer, tmp_path / "adapter", license="apache-2.0")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"README.md", "blocks.safetensors", "smt_blocks.json"}

    _, header, body = (tmp_path / "adapter" / "README.md").read_text().split("---\n", 2)
    about = yaml.safe_load(header)
    assert about["base_model"] == "acme/base-7b"
    assert about["library_name"] == "smt_ext"
    assert about["license"] == "apache-2.0"
    assert "sparse-matrix-tuning" in about["tags"]
    final = trainer.state.log_history[-2]["eval_loss"]
    assert f"| eval_loss | {final:.6g} |" in body
    assert "| optimizer | SparseAdamW |" in body
    assert "| learning rate | 0.01 |" in body
    assert str(smt_ext.plan_of(model)) in body
    fresh = smt_ext.load_blocks(tiny_llama(), tmp_path / "adapter")
    assert_same(state(fresh), state(model))


def test_the_cards_code_is_what_loads(tmp_path):
    """The code block of the card, run with the paths of this test."""
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = patched()
    trainer = trainer_of(model, tmp_path / "run", **sparse_adamw())
    trainer.train()
    save_adapter(trainer, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    text = (tmp_path / "adapter" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    scope: dict = {}
    exec(code.replace("path/to/this/folder", str(tmp_path / "adapter")), scope)
    ids = token_batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(scope["model"](ids).logits, model.eval()(ids).logits)


def test_trainer_with_only_blocks_survives_pickling_its_model(tmp_path):
    model = patched()
    save_only_blocks(trainer_of(model, tmp_path, **sparse_adamw())).train()
    again = pickle.loads(pickle.dumps(model))
    assert_same(state(again), state(model))


def train_rank(rank, folder, resume):
    model = patched(torch.bfloat16, attention_dropout=0.2)
    args = {"save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(model, folder, args=args, callbacks=[SMTCallback()], **sparse_adamw())
    save_only_blocks(trainer)
    assert trainer.args.world_size == 2
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2" if resume else None)
    save_adapter(trainer, f"{folder}/adapter")
    return state(model)


def test_two_ranks_save_blocks_once_and_resume_bit_exact(tmp_path):
    folder = tmp_path / "run"
    first = run_ranks(train_rank, 2, tmp_path / "ranks", str(folder), False)
    assert_same(first[0], first[1])
    assert "rng_state_1.pth" in {path.name for path in (folder / "checkpoint-2").iterdir()}
    again = run_ranks(train_rank, 2, tmp_path / "ranks", str(folder), True)
    assert_same(again[0], first[0])
    assert_same(again[1], first[0])
    loaded = smt_ext.load_blocks(tiny_llama(torch.bfloat16), folder / "adapter")
    assert_same(state(loaded), first[0])
