"""The part of :class:`~smt_ext.hf.mixin.SMTMixin` that saves adapters and checkpoints."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from .._files import FILES, directory_inside, remove_listed, replace_directory, write_text
from ..checkpoint.blocks import BLOCKS_FILE, BLOCKS_INFO, save_blocks
from ..distributed import ranks
from ..errors import DataError
from ..optim.sparse_adamw import SparseAdamW
from ..plan import BlockPlan
from .model_card import is_as_written, model_card
from .run_binding import CHECKPOINT_INFO, checkpoints_in, seal_checkpoint

__all__ = ["SavesBlocks", "check_output", "remove_checkpoint"]

logger = logging.getLogger("smt_ext")


# Its methods override those of whichever Trainer it is mixed into.
if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class SavesBlocks(_Base):
    """Saves blocks instead of models, and nothing over files of others."""

    plan: BlockPlan | None
    _binding: dict[str, Any]
    _partial: Path | None = None

    if TYPE_CHECKING:
        args: Any

    @property
    def _smt_model(self) -> nn.Module:
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    def _fused(self) -> SparseAdamW | None:
        """The optimizer where it clips gradients itself."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer if isinstance(optimizer, SparseAdamW) else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The blocks, a model card and the tokenizer; files of others in the folder stay."""
        if self.plan is None:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save and not _is_ours(folder / BLOCKS_INFO):
            check_output(folder)
        self._save_adapter(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_adapter(self, folder: Path) -> None:
        model, writes = self._smt_model, self.args.should_save
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
        elif not self.is_fsdp_enabled:
            return
        with directory_inside(folder) if writes else tempfile.TemporaryDirectory() as temporary:
            blocks = Path(temporary) / "blocks"
            save_blocks(model, blocks, readme=self._card())
            if not writes:
                return
            if self.processing_class is not None:
                self.processing_class.save_pretrained(blocks)
            args = copy.copy(self.args)
            args.hub_token = None  # it would be uploaded
            torch.save(args, blocks / TRAINING_ARGS_NAME)
            # What makes the folder an artefact goes first and comes last: it is whole, or none.
            (folder / BLOCKS_INFO).unlink(missing_ok=True)
            for path in sorted(blocks.rglob("*"), key=lambda p: p.name == BLOCKS_INFO):
                # The list is of a folder that was written whole, and this one may hold other files.
                if path.is_file() and path.name != FILES:
                    target = folder / path.relative_to(blocks)
                    if path.name == "README.md" and not _may_write_card(target):
                        continue
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, target)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The adapter's own card, which says how to load the blocks."""
        if self.plan is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            card = Path(self.args.output_dir) / "README.md"
            if _may_write_card(card):
                write_text(card, self._card())

    def _card(self) -> str:
        args, fused, history = self.args, self._fused(), self.state.log_history
        group = self._groups()[0] if self._groups() else {}
        last = {key: value for entry in history for key, value in entry.items()}
        facts = {
            "optimizer": type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__,
            # What the schedule multiplies.
            "learning rate": group.get("initial_lr", group.get("lr")),
            "schedule": args.lr_scheduler_type.value,
            "batch size": self.get_total_train_batch_size(args),
            "steps": self.state.global_step,
            "skipped steps": None if fused is None else fused.skipped_steps,
            "seed": args.seed,
            **{key: last.get(key) for key in ("train_loss", "eval_loss", "eval_accuracy")},
        }
        return model_card(self._smt_model, facts)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Put the blocks where the trainer uploads from, as it does with weights that it knows."""
        if self._partial is not None:  # it is whole and has its name after this
            return
        if self.plan is not None and self.is_world_process_zero():
            for name in (BLOCKS_FILE, BLOCKS_INFO):
                if (path := Path(checkpoint_folder) / name).exists():
                    shutil.copy(path, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._partial) if self._partial is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.plan is None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._save_checkpoint(model, trial)
            return
        run, state = Path(super()._get_output_dir(trial)), self.state
        name = f"checkpoint-{state.global_step}"
        # A rank that fails says so where the others wait for it.
        with ExitStack() as new:
            main = ranks.is_main()
            partial = ranks.together(
                lambda: (
                    # transformers uploads neither _* nor checkpoint-*.
                    new.enter_context(replace_directory(run / name, "a checkpoint", mark="_"))
                    if main
                    else run
                )
            )[0]
            ranks.together(lambda: self._fill(partial, model, trial, run))
            ranks.together(lambda: self._finish(partial, new, run / name) if main else None)
        if self.args.should_save:
            _rotate(run, self.args.save_total_limit, state.best_model_checkpoint)

    def _fill(self, partial: Path, model: nn.Module, trial: Any, run: Path) -> None:
        """Let the trainer write its checkpoint into another place than the run's folder."""
        state, best = self.state, self.state.best_model_checkpoint
        if (step := state.best_global_step) and (
            step == state.global_step or (run / f"checkpoint-{step}").is_dir()
        ):
            best = str(run / f"checkpoint-{step}")
        self._partial = partial
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._partial = None
            state.best_model_checkpoint = best

    def _finish(self, partial: Path, new: ExitStack, target: Path) -> None:
        """Seal what all ranks have written, put it in its place, and upload it from there."""
        state = self.state
        inner = partial / target.name
        state.save_to_json(str(inner / TRAINER_STATE_NAME))
        for path in inner.iterdir():
            path.rename(partial / path.name)
        inner.rmdir()
        seal_checkpoint(partial, self._binding, state.global_step, state.max_steps)
        new.close()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))

    def _groups(self) -> list[dict[str, Any]]:
        return getattr(self.optimizer, "param_groups", [])


def check_output(folder: Path) -> None:
    """Refuse a folder with files of others that a run would write over: a model's, another trainer's.

    Raises:
        DataError: names the file.
    """
    card = folder / "README.md"
    foreign = [card] if card.is_file() and not is_as_written(card) else []
    # A run that was killed has left its plan; a model that one was made for has a configuration.
    begun = _is_ours(folder / "plan.json")
    names = ("config.json",) if begun else ("plan.json", "plan.scores.safetensors", *_WRITTEN)
    foreign += [folder / name for name in names if (folder / name).exists()]
    if foreign:
        raise DataError(
            f"{str(foreign[0])!r} is not smt_ext's, or was edited, and a run would write over files "
            "like it. Choose another output_dir."
        )


# Beside the blocks; "config.json" stands for a model, whose tokenizer the run's would replace.
_WRITTEN = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "trainer_state.json", "training_args.bin", "command.json", BLOCKS_INFO, BLOCKS_FILE,
)  # fmt: skip


def _is_ours(file: Path) -> bool:
    """Whether smt_ext has written a file, by its format's name."""
    return file.is_file() and b"smt_ext" in file.read_bytes()


def _may_write_card(card: Path) -> bool:
    """Whether a model card is absent, or as it was written; one that was edited stays."""
    if not card.exists() or is_as_written(card):
        return True
    logger.warning("%s was edited, or is not smt_ext's: it stays as it is", card)
    return False


def _rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest of our checkpoints beyond the limit; the last and the best one stay."""
    if not limit or limit <= 0:
        return
    found = checkpoints_in(run, use_mtime=True)
    kept = {Path(found[-1])} | ({Path(best)} if best else set())
    extra = len(found) - max(limit, len(kept))
    for path in [path for path in found if Path(path) not in kept][: max(0, extra)]:
        remove_checkpoint(path)


def remove_checkpoint(checkpoint: str) -> None:
    """Without its seal it is none, should this be killed half-way. Files of others stay."""
    (Path(checkpoint) / CHECKPOINT_INFO).unlink()
    remove_listed(Path(checkpoint))
