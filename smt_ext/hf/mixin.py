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
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.training_args import OptimizerNames

from ..checkpoint.blocks import BLOCKS_INFO, load_plan
from ..checkpoint.fresh_parameters import fresh_parameters
from ..checkpoint.training_state import random_state, set_random_state
from ..distributed import ranks
from ..errors import CheckpointError, DataError, PatchError
from ..memory import peak_rss
from ..nn.patching import other_parameters, parameters_beside, patch, plan_of, smt_modules, status
from ..optim.learning_rate import auto_factor, auto_learning_rate
from ..optim.sparse_adamw import SparseAdamW
from ..plan import BlockPlan
from ..planning.make_plan import make_plan
from ..planning.score_file import scores_path
from ..planning.targets import matches_name
from ..quantization import packed_weight
from .config import SMTConfig
from .loading import checkpoint_activations
from .resuming import ResumesRuns, one_run, set_aside
from .row_checks import ChecksRows
from .run_binding import binding_of, check_binding, is_ours, verify_checkpoint

__all__ = ["SMTMixin"]

logger = logging.getLogger("smt_ext")


class SMTMixin(ChecksRows, ResumesRuns):
    """Put in front of a ``Trainer``: plans, patches, optimizes and saves blocks instead of models.

    :meth:`train` makes the plan from the trainer's own batches and loss, unless ``smt_config.plan``
    names one or the model is patched already, and patches. The optimizer is
    :class:`smt_ext.SparseAdamW` with the trainer's weight decay, betas and ``max_grad_norm``, unless one
    was passed, ``optim`` names another than torch's AdamW, or parameters train that neither the plan nor
    :func:`smt_ext.train_also` names: then it is the trainer's own.

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
        PatchError: the model or the arguments bring a PEFT adapter, or ZeRO stage 3.
        PlanError: ``smt_config`` asks for another plan than the model is patched with.
        DataError: arguments that would change the model's values beside training.
    """

    if TYPE_CHECKING:
        _metrics: Any
        _total_train_tokens: Any

    def __init__(self, *args: Any, smt_config: SMTConfig | None = None, **kwargs: Any) -> None:
        self.smt_config = smt_config or SMTConfig()
        self.plan: BlockPlan | None = None
        self._told = False
        if kwargs.get("peft_config") is not None:
            raise PatchError(_NO_PEFT)
        with _trainable_if_quantized(kwargs.get("model", args[0] if args else None)):
            super().__init__(*args, **kwargs)
        if hasattr(self._smt_model, "peft_config"):
            raise PatchError(_NO_PEFT)
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(self.args, name):  # transformers casts the model itself, and not back
                raise DataError(
                    f"{name}: an evaluation after training would round weights and blocks for good. "
                    "Leave it away; bf16=True (--precision bf16-mixed) evaluates under autocast, too."
                )
        if self._deepspeed().get("zero_optimization", {}).get("stage") == 3:
            raise PatchError(
                "DeepSpeed's ZeRO stage 3 shards the weights that blocks are a part of. Take stage 1 or "
                "2, which shard the optimizer's state and gradients of blocks, or FSDP2."
            )
        if smt_modules(self._smt_model):
            self.plan = plan_of(self._smt_model)
            self.smt_config.check_plan(self.plan)

    def _deepspeed(self) -> dict[str, Any]:
        """The configuration of DeepSpeed; empty where it is not in use."""
        plugin: Any = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return {} if plugin is None else dict(plugin.hf_ds_config.config)

    # Planning

    def make_plan(self, scores: str | os.PathLike[str] | None = None) -> BlockPlan:
        """A plan from the first training batches and the trainer's loss; training does not notice.

        Args:
            scores: also write the score of every block there.
        """
        config, model = self.smt_config, self._smt_model
        self._check_rows()

        def loss(model: nn.Module, batch: Any) -> Tensor:
            with self.accelerator.autocast(), self.compute_loss_context_manager():
                value: Any = self.compute_loss(model, self._prepare_inputs(batch))
                return value

        batches: Any = self.get_train_dataloader()
        if not hasattr(self.train_dataset, "__len__"):
            batches = iter(batches)  # the loader has a length, and raises
        seen = getattr(self, "_total_train_tokens", None)
        if self.args.gradient_checkpointing and hasattr(model, "gradient_checkpointing_enable"):
            # As train() will, or planning would take more memory.
            checkpoint_activations(model, self.args.gradient_checkpointing_kwargs)
        with _as_in_training(model):
            self.current_gradient_accumulation_steps = 1
            plan = make_plan(
                model,
                batches,
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
        folder, file = Path(self.args.output_dir), self.smt_config.plan
        saved = checkpoint is not None and (Path(checkpoint) / BLOCKS_INFO).is_file()
        files = [os.fspath(path) for path in (checkpoint if saved else None, file) if path]
        plans = {path: load_plan(path) for path in files}
        if self.plan is not None:
            plans["the model, which is patched"] = self.plan
        for name, plan in plans.items():
            first = next(iter(plans))
            if plan.fingerprint != plans[first].fingerprint:
                raise (CheckpointError if saved else PatchError)(
                    f"{first!r} has another plan than {name!r}: leave one of them away, or start a "
                    "new run"
                )
        if plans:
            self.plan = next(iter(plans.values()))
        else:
            self.plan = self.make_plan(scores_path(folder / "plan.json"))
        if file is not None and not saved:
            self.smt_config.check_plan(self.plan)
            if self.args.should_save:
                _take_scores(Path(file), folder / "plan.json")
        if not smt_modules(self._smt_model):
            if self.optimizer is not None:
                raise PatchError(
                    "the optimizer was made before the model was patched: it has no blocks. Leave it "
                    "away, or call smt_ext.patch first."
                )
            logger.info("%s", self.plan)
            patch(self._smt_model, self.plan)
        if self.args.should_save:
            self.plan.save(folder / "plan.json")
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
            DataError: ``output_dir`` holds another run, or another process trains there; rows that the
                model cannot take, or other ones each time; parameters that are in no checkpoint.
            CheckpointError: a damaged checkpoint, or one of other data, tokenizer, plan or settings.
            PlanError: see :func:`smt_ext.make_plan`.
        """
        if "optimizer" in self._deepspeed() and self.learning_rate != self.args.learning_rate:
            raise DataError(
                "DeepSpeed's configuration names an optimizer, whose rate is the arguments': pass "
                "learning_rate and no lr; or leave that optimizer away for torch's AdamW."
            )
        folder = Path(self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
        with one_run(folder, self.is_world_process_zero()):
            self._check_rows()
            checkpoint = self._checkpoint_to_resume(folder, resume_from_checkpoint)
            self._binding = binding_of(self)
            done = 0
            if checkpoint is not None and is_ours(checkpoint):
                saved = verify_checkpoint(checkpoint)
                done = saved["step"]
                # transformers would begin anew with either, without a word.
                for name in ("optimizer.pt", "scheduler.pt"):
                    if not (Path(checkpoint) / name).is_file():
                        raise CheckpointError(
                            f"{checkpoint!r} has no {name} (save_only_model): the run cannot go on from "
                            "it. Load its blocks with smt_ext.load_blocks, or start anew."
                        )
                allowed = self.smt_config.allow_changed or []
                check_binding(self._binding, saved, checkpoint, allowed)
                if not Path(self.smt_config.plan or checkpoint).exists():
                    self.smt_config = replace(self.smt_config, plan=checkpoint)  # which has it
            self._check_base()
            self._patch(checkpoint)
            if checkpoint is not None and done:
                *_, steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
                if steps <= done:
                    return self._take_finished(checkpoint, steps)
                if self.args.should_save:
                    set_aside(folder, done, checkpoint)
            self._told = False
            if self.args.load_best_model_at_end and self.args.save_total_limit == 1:
                # At 1 transformers ends by removing all other checkpoint folders, whosever they are.
                self.args.save_total_limit = 2
            at_start = self.args.eval_on_start
            # A run that goes on has begun: early stopping would count its evaluation a second time.
            self.args.eval_on_start = at_start and checkpoint is None
            try:
                return super().train(checkpoint, *args, **kwargs)
            finally:
                self.args.eval_on_start = at_start

    def _check_base(self) -> None:
        """Refuse values that no artefact would hold, and a base that is not to be sharded."""
        model = self._smt_model
        if self.is_fsdp_enabled:
            for name, module in model.named_modules():
                if packed_weight(module) is not None:
                    raise PatchError(
                        f"{name!r} is quantised, and FSDP would shard it. Use DistributedDataParallel, "
                        "or a base in bfloat16."
                    )
        patterns = self.smt_config.also_train or []
        if self.plan is not None or self.smt_config.plan is not None:
            plan = self.plan or load_plan(str(self.smt_config.plan))
            patterns = list(plan.also_train)
        patched = bool(smt_modules(model))
        for name, why in fresh_parameters(model):
            trains = any(matches_name(pattern, name) for pattern in patterns)
            if not trains and not (patched and model.get_parameter(name).requires_grad):
                raise DataError(
                    f"{name!r} {why}, and does not train: it would be stored nowhere. Save model and "
                    "tokenizer, and load them from there; or let it train (also_train)."
                )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """``SparseAdamW`` over the blocks, unless another one was passed, is named by ``optim`` (any but
        torch's AdamW), or is needed: under DeepSpeed torch's AdamW.

        Raises:
            DataError: ``smt_config.lr`` is automatic, and the optimizer another.
        """
        args: Any = self.args
        patched: Any = self.model if model is None else model
        patched_model = self._smt_model
        others = other_parameters(patched_model).keys() - parameters_beside(patched_model).keys()
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            return super().create_optimizer(model)
        adamw = args.optim in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
        if adamw and not others and not self.is_deepspeed_enabled:
            self.optimizer = SparseAdamW(
                patched,
                lr=self.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                weight_decay=args.weight_decay,
                decay_to=self.smt_config.decay_to,
                max_grad_norm=args.max_grad_norm if args.max_grad_norm > 0 else None,
                seed=args.seed,
                process_group=ranks.process_group(),
            )
            return super().create_optimizer(model)
        why = f"{min(others)!r} trains beside plan and train_also" if others else "named by optim"
        name, rate = getattr(args.optim, "value", args.optim), self.smt_config.rate
        if adamw and not others:
            why, rate = "DeepSpeed's ZeRO shards flat copies of the blocks", self.learning_rate
            if factor := auto_factor(rate):
                rate = auto_learning_rate(plan_of(patched_model), factor)
        if auto_factor(rate):
            raise DataError(
                f"the optimizer is {name!r} ({why}), and lr={rate!r} is for SparseAdamW. Give lr a "
                "number."
            )
        args.learning_rate = args.learning_rate if rate is None else rate
        logger.info("the optimizer is %r (%s), its rate %g", name, why, args.learning_rate)
        if args.weight_decay and self.smt_config.decay_to == "base":
            logger.warning(
                "weight_decay=%g pulls the blocks to zero: decay_to='base' is SparseAdamW's, and the "
                "optimizer is %r (%s). decay_to='zero' says that this is meant.",
                args.weight_decay, name, why,
            )  # fmt: skip
        return super().create_optimizer(model)

    @property
    def learning_rate(self) -> Any:
        """``smt_config.lr``; else the arguments' where it is not their default; else ``"auto"``."""
        if self.smt_config.rate is not None:
            return self.smt_config.rate
        default = type(self.args).__dataclass_fields__["learning_rate"].default
        given = self.args.learning_rate
        return "auto" if given == default else given

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


_NO_PEFT = (
    "SMT trains blocks of the model's own weights, and a PEFT adapter would be trained beside them, or "
    "instead. Leave peft_config away, or use the trainer without SMTMixin."
)


@contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    """In training mode, in which alone activations are recomputed; random numbers go on as before."""
    state, evaluated = random_state(), [module for module in model.modules() if not module.training]
    model.train()
    try:
        yield
    finally:
        set_random_state(state)
        for module in evaluated:
            module.training = False


def _take_scores(source: Path, target: Path) -> None:
    """The scores of a plan that is given, if it has any, in place of an earlier run's."""
    if source.absolute() != target.absolute():
        scores_path(target).unlink(missing_ok=True)
        if scores_path(source).exists():
            shutil.copyfile(scores_path(source), scores_path(target))


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


def _peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss()
