"""SMT for any transformers ``Trainer``, TRL's included.

::

    class MyTrainer(SMTMixin, Trainer): ...

    trainer = MyTrainer(model, args, train_dataset=rows, smt_config=SMTConfig(budget="1%"))
    trainer.train()
    trainer.save_model("adapter")  # a folder for smt_ext.load_blocks, with a model card
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from .._files import FILES, remove_listed, replace_directory, write_text
from ..checkpoint.blocks import BLOCKS_FILE, BLOCKS_INFO, load_blocks, load_plan, save_blocks
from ..distributed import ranks
from ..errors import CheckpointError, DataError, PatchError
from ..memory import peak_rss
from ..nn.patching import patch, plan_of, smt_modules, status
from ..optim.sparse_adamw import SparseAdamW
from ..plan import BlockPlan
from ..planning.make_plan import make_plan
from ..planning.score_file import scores_path
from .config import SMTConfig
from .loading import quantization_of
from .model_card import model_card
from .run_binding import CHECKPOINT_INFO, Binding, is_ours, seal_checkpoint, verify_checkpoint

__all__ = ["SMTMixin"]

logger = logging.getLogger("smt_ext")

_OTHERS = "other_parameters.safetensors"

# Its methods override those of whichever Trainer it is mixed into.
if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class SMTMixin(_Base):
    """Put in front of a ``Trainer``: plans, patches, optimizes and saves blocks instead of models.

    :meth:`train` makes the plan from the trainer's own batches and loss, unless ``smt_config.plan``
    names one or the model is patched already, and patches. The optimizer is
    :class:`smt_ext.SparseAdamW` with the trainer's weight decay, betas and ``max_grad_norm``, unless one
    was passed or other parameters train too: then it is the trainer's own.

    Checkpoints hold the blocks, every other parameter that trains, optimizer, scheduler, random and
    trainer state. They appear whole or not at all, and name data, tokenizer, plan and settings by
    digest: ``train(resume_from_checkpoint=...)`` goes on bit for bit, and refuses others by the
    first difference (``smt_config.allow_changed`` declares them). Under FSDP and DeepSpeed the
    checkpoints are transformers' own.

    Args:
        smt_config: default ``SMTConfig()``; all other arguments are the trainer's.

    Attributes:
        plan: what trains; None until :meth:`make_plan` or :meth:`train`.

    Raises:
        PatchError: the model or the arguments bring a PEFT adapter.
    """

    if TYPE_CHECKING:
        args: Any
        _metrics: Any
        _total_train_tokens: Any

    def __init__(self, *args: Any, smt_config: SMTConfig | None = None, **kwargs: Any) -> None:
        self.smt_config = smt_config or SMTConfig()
        self.plan: BlockPlan | None = None
        self._partial: Path | None = None
        self._told = False
        if kwargs.get("peft_config") is not None:
            raise PatchError(_NO_PEFT)
        with _trainable_if_quantized(kwargs.get("model", args[0] if args else None)):
            super().__init__(*args, **kwargs)
        if hasattr(self._smt_model, "peft_config"):
            raise PatchError(_NO_PEFT)
        if smt_modules(self._smt_model):
            self.plan = plan_of(self._smt_model)

    @property
    def _smt_model(self) -> nn.Module:
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    # Planning

    def make_plan(self, scores: str | os.PathLike[str] | None = None) -> BlockPlan:
        """A plan from the first training batches and the trainer's loss; training does not notice.

        Args:
            scores: also write the score of every block there.
        """
        config, model = self.smt_config, self._smt_model

        def loss(model: nn.Module, batch: Any) -> Tensor:
            with self.accelerator.autocast(), self.compute_loss_context_manager():
                value: Any = self.compute_loss(model, self._prepare_inputs(batch))
                return value

        seen = getattr(self, "_total_train_tokens", None)
        with _same_randomness(), _training_mode(model):
            self.current_gradient_accumulation_steps = 1
            plan = make_plan(
                model,
                self.get_train_dataloader(),
                **config.plan_arguments(),
                loss_fn=loss,
                seed=self.args.seed,
                progress=not self.args.disable_tqdm,
                scores_path=scores if self.is_world_process_zero() else None,
            )
        if seen is not None:  # TRL counts and averages what its loss has seen
            self._total_train_tokens = seen
            self._metrics["train"].clear()
        return plan

    def _patch(self, checkpoint: str | None) -> None:
        """Patch with the plan of the checkpoint, of the settings, or of one made now."""
        folder = Path(self.args.output_dir)
        if checkpoint is not None and (Path(checkpoint) / BLOCKS_INFO).is_file():
            plan = load_plan(checkpoint)
            if self.plan not in (None, plan):
                raise CheckpointError(
                    f"{checkpoint!r} was saved with another plan than the model is patched with. Give "
                    "the trainer a model that is not patched, or start a new run."
                )
            self.plan = plan
        elif self.plan is None and self.smt_config.plan is not None:
            self.plan = load_plan(self.smt_config.plan)
            if self.args.should_save:
                _take_scores(Path(self.smt_config.plan), folder / "plan.json")
        elif self.plan is None:
            self.plan = self.make_plan(scores_path(folder / "plan.json"))
        if self.args.should_save:
            self.plan.save(folder / "plan.json")
        if not smt_modules(self._smt_model):
            if self.optimizer is not None:
                raise PatchError(
                    "the trainer was given an optimizer, and its model was not patched then: the "
                    "blocks are not in it. Leave optimizers away, or call smt_ext.patch first."
                )
            logger.info("%s", self.plan)
            patch(self._smt_model, self.plan)
        for module in smt_modules(self._smt_model).values():
            module.accumulate_in_place = self.args.gradient_accumulation_steps > 1

    def call_model_init(self, trial: Any = None) -> Any:
        """A model of ``model_init``; patched, once there is a plan."""
        model = super().call_model_init(trial)
        return model if self.plan is None else patch(model, self.plan)

    # Training

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Plan, patch and train; see ``transformers.Trainer.train``.

        Args:
            resume_from_checkpoint: a checkpoint, or True: the last whole one in ``output_dir``.

        Raises:
            DataError: ``output_dir`` holds another run, or another process trains there.
            CheckpointError: a damaged checkpoint, or one of other data, tokenizer, plan or settings.
            PlanError: see :func:`smt_ext.make_plan`.
        """
        folder = Path(self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
        with _one_run(folder, self.is_world_process_zero()):
            checkpoint = self._checkpoint_to_resume(folder, resume_from_checkpoint)
            self._binding = Binding.of(self)
            if checkpoint is not None and is_ours(checkpoint):
                saved = verify_checkpoint(checkpoint)
                self._binding.check(saved, checkpoint, self.smt_config.allow_changed or [])
            self._check_tokens()
            self._patch(checkpoint)
            self._told = False
            return super().train(checkpoint, *args, **kwargs)

    def _check_tokens(self) -> None:
        """Refuse token ids without an embedding; on a GPU they would end in an assert of a kernel."""
        embedding = getattr(self._smt_model, "get_input_embeddings", lambda: None)()
        if not isinstance(embedding, nn.Embedding):
            return
        most = embedding.num_embeddings
        rows: Any = self.train_dataset
        columns = getattr(rows, "column_names", None) or ()
        known = hasattr(rows, "__len__") and "input_ids" in columns
        pad = getattr(self.processing_class, "pad_token_id", None) or 0
        largest = max([pad, *(max(ids, default=0) for ids in (rows["input_ids"] if known else []))])
        if largest >= most:
            raise DataError(
                f"the tokenizer gives the token id {largest}, and the model's embedding has {most} "
                "rows. Call model.resize_token_embeddings(len(tokenizer)) and save the model, or use "
                "its own tokenizer."
            )

    def _checkpoint_to_resume(self, folder: Path, wanted: str | bool | None) -> str | None:
        if wanted is True and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return get_last_checkpoint(str(folder))
        found = [path for path in sort_checkpoints(str(folder)) if is_ours(path)]
        if isinstance(wanted, (str, os.PathLike)):
            if not Path(wanted).is_dir():
                raise CheckpointError(f"there is no checkpoint {os.fspath(wanted)!r}")
            return os.fspath(wanted)
        if wanted:
            if not found:
                raise CheckpointError(
                    f"{str(folder)!r} holds no whole checkpoint to resume from. Train without "
                    "resume_from_checkpoint."
                )
            return found[-1]
        if found and not self.smt_config.overwrite:
            raise DataError(
                f"{str(folder)!r} holds a run already ({Path(found[-1]).name}). Go on with "
                "resume_from_checkpoint=True, choose another output_dir, or set overwrite."
            )
        if self.args.should_save:
            for path in found:
                _remove(path)
        return None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """``SparseAdamW`` over the blocks, unless another one was passed or is needed."""
        args: Any = self.args
        patched: Any = self.model if model is None else model
        others = self._other_parameters()
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None and not others:
            self.optimizer = SparseAdamW(
                patched,
                lr=self.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                weight_decay=args.weight_decay,
                max_grad_norm=args.max_grad_norm if args.max_grad_norm > 0 else None,
                seed=args.seed,
            )
        elif self.optimizer is None and others:
            logger.info(
                "%d other parameters train too, so the optimizer is %s", len(others), args.optim
            )
        return super().create_optimizer(model)

    @property
    def learning_rate(self) -> Any:
        """``smt_config.lr``; else the arguments' where it is not their default; else ``"auto"``."""
        if self.smt_config.rate is not None:
            return self.smt_config.rate
        default = type(self.args).__dataclass_fields__["learning_rate"].default
        given = self.args.learning_rate
        return "auto" if given == default else given

    def _fused(self) -> SparseAdamW | None:
        """The optimizer where it clips gradients itself."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer if isinstance(optimizer, SparseAdamW) else None

    # The norm is known after the step; log() fills it in.
    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return 0.0 if self._clips() else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return 0.0 if self._clips() else super()._get_grad_norm(model, grad_norm)

    def _clips(self) -> bool:
        fused, most = self._fused(), self.args.max_grad_norm
        return fused is not None and (fused.max_grad_norm is not None or not most > 0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what SMT trains and costs to a line of training.

        Once ``smt_trainable``, ``smt_percent``, ``smt_blocks`` and ``smt_saved_bytes_per_token``;
        ``smt_skipped_steps`` (inf or NaN gradients) and ``smt_peak_memory_mb`` (of the process, or of
        torch on a GPU).
        """
        if "loss" in logs or "train_loss" in logs:
            if not self._told:
                what = status(self._smt_model)
                logs["smt_trainable"] = what.trainable
                logs["smt_percent"] = round(what.percent, 4)
                logs["smt_blocks"] = sum(module.num_blocks for module in what.modules)
                logs["smt_saved_bytes_per_token"] = what.saved_bytes_per_token
                self._told = True
            if (fused := self._fused()) is not None:
                if "grad_norm" in logs:
                    logs["grad_norm"] = fused.last_grad_norm
                logs["smt_skipped_steps"] = fused.skipped_steps
            logs["smt_peak_memory_mb"] = round(_peak_memory(self.args.device) / 1e6, 1)
        super().log(logs, start_time)

    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The blocks, a model card and the tokenizer; files of others in the folder stay."""
        if self.plan is None or self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
            return
        self._save_adapter(Path(output_dir or self.args.output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_adapter(self, folder: Path) -> None:
        model, writes = self._smt_model, self.args.should_save
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
        elif not self.is_fsdp_enabled:
            return
        with tempfile.TemporaryDirectory(
            dir=folder if writes else None, prefix=".smt_"
        ) as temporary:
            blocks = Path(temporary) / "blocks"
            base = _base_name(model)
            about = {"base_model": base, **quantization_of(model)}
            save_blocks(model, blocks, metadata=about, readme=self._card())
            if not writes:
                return
            if others := self._other_parameters():
                values = {k: v.detach().cpu().contiguous() for k, v in others.items()}
                save_file(values, blocks / _OTHERS, metadata={"format": "pt"})
            if self.processing_class is not None:
                self.processing_class.save_pretrained(blocks)
            torch.save(self.args, blocks / TRAINING_ARGS_NAME)
            # What makes the folder an artefact goes first and comes last: it is whole, or none.
            (folder / BLOCKS_INFO).unlink(missing_ok=True)
            for path in sorted(blocks.rglob("*"), key=lambda p: p.name == BLOCKS_INFO):
                # The list is of a folder that was written whole, and this one may hold other files.
                if path.is_file() and path.name != FILES:
                    target = folder / path.relative_to(blocks)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, target)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The adapter's own card, which says how to load the blocks."""
        if self.plan is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            write_text(Path(self.args.output_dir) / "README.md", self._card())

    def _card(self) -> str:
        args, fused = self.args, self._fused()
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        settings = {
            "optimizer": type(optimizer).__name__,
            "learning rate": None if optimizer is None else _peak_rate(optimizer),
            "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "batch size": self.get_total_train_batch_size(args),
            "steps": self.state.global_step,
            "skipped steps": None if fused is None else fused.skipped_steps,
            "seed": args.seed,
        }
        model = self._smt_model
        return model_card(
            model,
            base_model=_base_name(model),
            metrics=_last_metrics(self.state.log_history),
            hyperparameters={k: v for k, v in settings.items() if v is not None},
        )

    def _other_parameters(self) -> dict[str, Tensor]:
        """Parameters that train beside the blocks, by name."""
        blocks = {id(module.blocks) for module in smt_modules(self._smt_model).values()}
        named = self._smt_model.named_parameters()
        return {n: p for n, p in named if p.requires_grad and id(p) not in blocks}

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Put the blocks where the trainer uploads from, as it does with weights that it knows."""
        if self.plan is not None and self.is_world_process_zero():
            for name in (BLOCKS_FILE, BLOCKS_INFO, _OTHERS):
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
        if ranks.is_main():
            with _new_checkpoint(run / name) as partial:
                ranks.gather_objects(partial)
                self._fill(partial, model, trial, run)
        else:
            self._fill(ranks.gather_objects(None)[0], model, trial, run)
        ranks.gather_objects(None)  # nobody goes on before it is there
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
        ranks.gather_objects(None)  # every rank has written its random state
        if self.args.should_save:
            inner = partial / f"checkpoint-{state.global_step}"
            state.save_to_json(str(inner / TRAINER_STATE_NAME))
            for path in inner.iterdir():
                path.rename(partial / path.name)
            inner.rmdir()
            seal_checkpoint(partial, self._binding, state.global_step, state.max_steps)

    # Loading

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if is_ours(resume_from_checkpoint):
            self._load_blocks(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and is_ours(best):
            verify_checkpoint(best)
            self._load_blocks(best)
        else:
            super()._load_best_model()

    def _load_blocks(self, checkpoint: str) -> None:
        load_blocks(self._smt_model, checkpoint)
        others = self._other_parameters()
        path = Path(checkpoint) / _OTHERS
        saved = load_file(path) if path.exists() else {}
        if saved.keys() != others.keys():
            name = min(saved.keys() ^ others.keys())
            raise CheckpointError(
                f"{name!r} trains {'here' if name in others else 'in ' + repr(checkpoint)} only. Let "
                "the same parameters train beside the blocks as when it was saved."
            )
        with torch.no_grad():
            for name, parameter in others.items():
                parameter.copy_(saved[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        scheduler: Any = self.lr_scheduler
        kept = ("initial_lr", "weight_decay", "betas", "eps")
        wanted = [{k: g[k] for k in kept if k in g} for g in self._groups()]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not hasattr(scheduler, "lr_lambdas"):
            return
        # Settings that were declared to differ, and a longer schedule, hold from the next step on.
        for index, (group, settings) in enumerate(zip(self._groups(), wanted, strict=True)):
            group.update(settings)
            scheduler.base_lrs[index] = group["initial_lr"]
            factor = scheduler.lr_lambdas[index](scheduler.last_epoch)
            group["lr"] = group["initial_lr"] * factor
        scheduler._last_lr = [group["lr"] for group in self._groups()]

    def _groups(self) -> list[dict[str, Any]]:
        return [] if self.optimizer is None else self.optimizer.param_groups


_NO_PEFT = (
    "SMT trains blocks of the model's own weights, and a PEFT adapter would be trained beside them, or "
    "instead. Leave peft_config away, or use the trainer without SMTMixin."
)


@contextmanager
def _same_randomness() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    """As in training; gradient checkpointing, which holds in this mode alone, included."""
    evaluated = [module for module in model.modules() if not module.training]
    model.train()
    try:
        yield
    finally:
        for module in evaluated:
            module.training = False


@contextmanager
def _one_run(folder: Path, writes: bool) -> Iterator[None]:
    """A lock on the folder, which the system releases whenever the process ends."""
    if not writes or os.name == "nt":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another process trains in {str(folder)!r}. Wait for it, or choose another output_dir."
            ) from None
        yield
    finally:
        os.close(handle)


@contextmanager
def _new_checkpoint(target: Path) -> Iterator[Path]:
    """A folder that becomes ``target`` once it is complete."""
    if target.exists() and not is_ours(target) and any(target.iterdir()):
        raise CheckpointError(
            f"{str(target)!r} is no checkpoint of smt_ext, and is not replaced. Move it away, or choose "
            "another output_dir."
        )
    with replace_directory(target) as partial:
        yield partial


def _rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest of our checkpoints beyond the limit; the last and the best one stay."""
    if not limit or limit <= 0:
        return
    found = [path for path in sort_checkpoints(str(run), use_mtime=True) if is_ours(path)]
    kept = {Path(found[-1])} | ({Path(best)} if best else set())
    extra = len(found) - max(limit, len(kept))
    for path in [path for path in found if Path(path) not in kept][: max(0, extra)]:
        _remove(path)


def _remove(checkpoint: str) -> None:
    """Without its seal it is none, should this be killed half-way. Files of others stay."""
    (Path(checkpoint) / CHECKPOINT_INFO).unlink()
    remove_listed(Path(checkpoint))


def _take_scores(source: Path, target: Path) -> None:
    """The scores of a plan that is given, if it has any, in place of an earlier run's."""
    if source.absolute() != target.absolute():
        scores_path(target).unlink(missing_ok=True)
        if scores_path(source).exists():
            shutil.copyfile(scores_path(source), scores_path(target))


def _base_name(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "name_or_path", "") or None


def _last_metrics(history: list[dict[str, float]]) -> dict[str, float]:
    """The last training loss and the last evaluation in the log."""
    found: dict[str, float] = {}
    for entry in history:
        for key, value in entry.items():
            if key in ("loss", "train_loss") or (
                key.startswith("eval_") and not key.endswith(("_runtime", "_per_second"))
            ):
                found[key] = value
    return found


@contextmanager
def _trainable_if_quantized(model: Any) -> Iterator[None]:
    """Inside, a quantised model is taken for one that adapters make trainable, as blocks will.

    TRL rounds what is trainable in a quantised model to bfloat16: meanwhile nothing is.
    """
    told = "_hf_peft_config_loaded"  # what Trainer looks at; nothing else is said by it
    if not getattr(model, "is_quantized", False) or getattr(model, told, False):
        yield
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    setattr(model, told, True)
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        setattr(model, told, False)
        for parameter in trained:
            parameter.requires_grad_(True)


def _peak_rate(optimizer: torch.optim.Optimizer) -> float:
    """What the schedule multiplies."""
    group = optimizer.param_groups[0]
    return float(group.get("initial_lr", group["lr"]))


def _peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss()
