"""For transformers' ``Trainer`` and all that derive from it (TRL's trainers do).

A patched model and ``SparseAdamW`` work with ``Trainer`` as they are::

    smt_ext.patch(model, plan)
    trainer = Trainer(
        model, args, train_dataset=rows,
        optimizer_cls_and_kwargs=(smt_ext.SparseAdamW, {"lr": 2e-3}),
        callbacks=[SMTCallback()],
    )
    save_only_blocks(trainer)      # checkpoints of a few megabytes
    trainer.train()
    save_adapter(trainer, "adapter")

What this module adds is optional: numbers in the logs, small checkpoints, and an adapter folder
with a model card.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from ..checkpoint.blocks import (
    BLOCKS_INFO,
    blocks_content,
    load_blocks,
    save_blocks,
    write_blocks_content,
)
from ..errors import PatchError
from ..memory import peak_rss
from ..nn.patching import plan_of, smt_modules, status
from .model_card import model_card

__all__ = ["SMTCallback", "save_adapter", "save_only_blocks"]

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


class SMTCallback(TrainerCallback):
    """Adds what SMT trains and costs to ``Trainer``'s logs.

    The first log line of a run also says what the budget is. Keys:

    - ``smt_trainable``, ``smt_percent``, ``smt_blocks``: parameters that train, their share of the
      model, number of blocks (once)
    - ``smt_skipped_steps``: steps without an update because a gradient was inf or NaN
      (``SparseAdamW`` counts them)
    - ``smt_peak_memory_mb``: largest resident size of the process so far, or on a GPU the most memory
      that torch had allocated there

    The progress bar, the console and ``trainer.state.log_history`` get them. Reporters that
    ``report_to`` names run before callbacks that are passed to a trainer; for those too, put it
    in front: ``trainer.callback_handler.callbacks.insert(0, SMTCallback())``.
    """

    def __init__(self) -> None:
        self._said = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse a model that is not patched: nothing of SMT would happen."""
        if model is None or not smt_modules(model):
            raise PatchError(
                "SMTCallback is for patched models, and this one has no SMT layer. Call "
                "smt_ext.patch(model, plan) before building the trainer."
            )
        self._said = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add the numbers to a training log line."""
        if logs is None or model is None or not ("loss" in logs or "train_loss" in logs):
            return
        numbers: dict[str, float] = {}
        if not self._said:
            what = status(model)
            numbers["smt_trainable"] = what.trainable
            numbers["smt_percent"] = round(what.percent, 4)
            numbers["smt_blocks"] = sum(module.num_blocks for module in what.modules)
            self._said = True
        optimizer = getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper
        if (skipped := getattr(optimizer, "skipped_steps", None)) is not None:
            numbers["smt_skipped_steps"] = skipped
        numbers["smt_peak_memory_mb"] = round(_peak_memory(args.device) / 1e6, 1)
        logs.update(numbers)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(numbers)


def save_only_blocks(trainer: AnyTrainer) -> AnyTrainer:
    """Make a trainer save and load blocks instead of whole models, in place.

    Its checkpoints then hold the blocks, the state of optimizer, scheduler and random numbers, and
    nothing of the frozen model: megabytes for a model of gigabytes. ``resume_from_checkpoint`` and
    ``load_best_model_at_end`` work as ever, and still take whole-model checkpoints too. Such a
    checkpoint is also a folder for :func:`smt_ext.load_blocks`. ``trainer.save_model(directory)``
    writes the same files; :func:`smt_ext.export` writes the whole model.

    The trainer's class becomes a subclass of what it was; every override of its own stays.

    Args:
        trainer: built with a patched model.

    Returns:
        ``trainer`` itself.

    Raises:
        PatchError: its model is not patched, or is trained with FSDP or DeepSpeed, whose checkpoints
            are written by those libraries.
    """
    model = _model_of(trainer)
    plan = plan_of(model)
    names = {name for name, layer in plan.layers.items() if layer.blocks}
    if smt_modules(model).keys() != names:
        raise PatchError(
            "the plan's modules have other names in this trainer's model: what was patched is a part "
            "of it. Patch the model that the trainer gets."
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise PatchError(
            "under FSDP and DeepSpeed the checkpoints are written by those libraries, whole. Leave "
            "save_only_blocks away; smt_ext.save_blocks(model, directory) on all ranks after "
            "training writes the blocks."
        )
    kind = type(trainer)
    if not issubclass(kind, _BlockCheckpoints):
        trainer.__class__ = type(kind.__name__, (_BlockCheckpoints, kind), {})
    return trainer


class _BlockCheckpoints(Trainer):
    """Trainer's three methods that write and read models, for blocks."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir or "")
        directory.mkdir(parents=True, exist_ok=True)
        model = _model_of(self)
        write_blocks_content(directory, blocks_content(model), {"base_model": _base_name(model)})
        if self.processing_class is not None:
            self.processing_class.save_pretrained(directory)
        torch.save(self.args, directory / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if _holds_blocks(resume_from_checkpoint):
            load_blocks(model or _model_of(self), resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and _holds_blocks(best):
            load_blocks(_model_of(self), best)
        else:
            super()._load_best_model()


def save_adapter(
    trainer: Trainer,
    directory: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    **card: Any,
) -> None:
    """Save the trained blocks and a model card that says how they came about.

    The folder appears whole or not at all, on the main process; push it with
    ``huggingface_hub.upload_folder(folder_path=directory, repo_id=...)``.

    Args:
        trainer: after training.
        directory: made if need be, replaced if it exists.
        base_model: name of the base model; default the one that the model was loaded from.
        card: further arguments of :func:`smt_ext.hf.model_card.model_card`; metrics and
            hyperparameters default to the trainer's.

    Raises:
        PatchError: the model is not patched.
        CheckpointError: the disk is full or not writable.
    """
    model = trainer.accelerator.unwrap_model(_model_of(trainer))
    args = trainer.args
    card.setdefault("metrics", _last_metrics(trainer.state))
    card.setdefault(
        "hyperparameters",
        {
            "optimizer": type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__,
            "learning rate": _learning_rate(trainer),
            "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "batch size": args.train_batch_size
            * args.gradient_accumulation_steps
            * args.world_size,
            "steps": trainer.state.global_step,
            "seed": args.seed,
        },
    )
    base_model = base_model or _base_name(model)
    readme = model_card(model, base_model=base_model, **card)
    sharded = trainer.is_fsdp_enabled
    if sharded or trainer.is_world_process_zero():
        save_blocks(model, directory, metadata={"base_model": base_model}, readme=readme)


def _model_of(trainer: Trainer) -> nn.Module:
    assert isinstance(trainer.model, nn.Module)
    return trainer.model


def _holds_blocks(directory: str) -> bool:
    return (Path(directory) / BLOCKS_INFO).is_file()


def _base_name(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "name_or_path", "") or None


def _last_metrics(state: TrainerState) -> dict[str, float]:
    """The last training loss and the last evaluation in the log."""
    found: dict[str, float] = {}
    for entry in state.log_history:
        for key, value in entry.items():
            if key in ("loss", "train_loss") or (
                key.startswith("eval_") and not key.endswith(_SPEED)
            ):
                found[key] = value
    return found


_SPEED = ("_runtime", "_per_second")


def _learning_rate(trainer: Trainer) -> float:
    """The peak: what the schedule multiplies."""
    if trainer.optimizer is None:
        return float(trainer.args.learning_rate)
    group = trainer.optimizer.param_groups[0]
    return float(group.get("initial_lr", group["lr"]))


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_rss()
