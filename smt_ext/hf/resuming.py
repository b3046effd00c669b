"""The part of :class:`~smt_ext.hf.mixin.SMTMixin` that goes on from a checkpoint."""

from __future__ import annotations

import fcntl
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput, get_last_checkpoint, has_length

from ..checkpoint.blocks import BLOCKS_FILE, BLOCKS_INFO, load_blocks, read_blocks_info
from ..errors import CheckpointError, DataError
from ..nn.patching import other_parameters
from .config import SMTConfig
from .run_binding import checkpoints_in, is_ours, verify_checkpoint
from .saving import SavesBlocks, check_output, remove_checkpoint

__all__ = ["ResumesRuns", "one_run", "set_aside"]

logger = logging.getLogger("smt_ext")

# What may be declared to differ in a resume; all else in an optimizer or a schedule is its progress.
_OF_A_GROUP = ("initial_lr", "weight_decay", "decay_to", "betas", "eps")
_OF_A_SCHEDULE = (
    "factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lrs", "eps",
)  # fmt: skip


class _Passes(TrainerCallback, ExportableState):
    """Notes the steps at which a pass over a stream ended; checkpoints have them.

    transformers takes ``max_steps`` for the length of a stream: a resume in a later pass would skip
    as many batches of the first one, and go on from its beginning.
    """

    def __init__(self) -> None:
        self.ends: list[int] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(state.global_step)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"ends": self.ends}}


class ResumesRuns(SavesBlocks):
    """Finds the checkpoint of a run, and loads blocks, optimizer, schedule and callbacks from it."""

    smt_config: SMTConfig
    _ends: Path | None = None  # the folder of a run that another one takes the place of

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Passes that are done, and batches to skip in the next one; see :class:`_Passes`."""
        self.remove_callback(_Passes)
        passes = _Passes()
        if not has_length(self.train_dataset):
            self.add_callback(passes)
        found: tuple[int, int] = super()._init_training_state(*args, **kwargs)
        if not passes.ends or self.args.ignore_data_skip:
            return found
        steps = self.state.global_step - passes.ends[-1]
        return len(passes.ends), steps * self.args.gradient_accumulation_steps

    def _checkpoint_to_resume(self, folder: Path, wanted: str | bool | None) -> str | None:
        if wanted is True and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return get_last_checkpoint(str(folder))
        found = checkpoints_in(folder)
        if isinstance(wanted, (str, os.PathLike)):
            if not Path(wanted).is_dir():
                raise CheckpointError(f"there is no checkpoint {os.fspath(wanted)!r}")
            if not _lies_in(folder, wanted):  # another run's, to go on here
                self._take_room(folder, found)
            return os.fspath(wanted)
        if wanted:
            if not found:
                raise CheckpointError(
                    f"{str(folder)!r} holds no whole checkpoint to resume from. Begin the run anew, "
                    "without --resume (resume_from_checkpoint)."
                )
            return found[-1]
        self._take_room(folder, found)
        return None

    def _take_room(self, folder: Path, found: list[str]) -> None:
        """Refuse a folder that holds another run, unless told to ``overwrite``, or files of others."""
        blocks = [BLOCKS_INFO] if (folder / BLOCKS_INFO).is_file() else []
        if (held := found or blocks) and not self.smt_config.overwrite:
            go_on = "Go on with resume_from_checkpoint=True, choose" if found else "Choose"
            raise DataError(
                f"{str(folder)!r} holds a run already ({Path(held[-1]).name}). {go_on} another "
                "output_dir, or begin anew with overwrite=True (--overwrite true)."
            )
        check_output(folder)
        # Whose checkpoints are transformers' own.
        whole = self.is_fsdp_enabled or self.is_deepspeed_enabled
        most = self.args.max_steps if self.args.max_steps > 0 else math.inf
        for path in folder.glob("checkpoint-*"):
            number = path.name.removeprefix("checkpoint-")
            in_the_way = str(path) not in found and number.isdigit() and int(number) <= most
            if in_the_way and not (whole and self.smt_config.overwrite):
                raise DataError(
                    f"{str(path)!r} is no checkpoint of smt_ext's, and the run would save there. Choose "
                    "another output_dir, or move it away."
                )
        if self.args.should_save and self.smt_config.overwrite:
            self._ends = folder

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if is_ours(resume_from_checkpoint):
            self._load_blocks(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        # Where the run lies now; the path is of when it was saved.
        here = Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
        best = str(here) if is_ours(here) else self.state.best_model_checkpoint
        if best is not None and is_ours(best):
            self.state.best_model_checkpoint = best
            verify_checkpoint(best)
            self._load_blocks(best)
        else:
            super()._load_best_model()

    def _load_blocks(self, checkpoint: str) -> None:
        others = other_parameters(self._smt_model).keys()
        saved = set(read_blocks_info(checkpoint)["parameters"])
        if differing := others ^ (saved - dict(self._smt_model.named_buffers()).keys()):
            name = min(differing)
            raise CheckpointError(
                f"{name!r} trains {'here' if name in others else 'in ' + repr(checkpoint)} only. Let "
                "the same parameters train beside the blocks as when it was saved."
            )
        load_blocks(self._smt_model, checkpoint)

    def _load_callback_state(self) -> None:
        """Callbacks (early stopping) count on from the checkpoint, with the settings of now."""
        super()._load_callback_state()
        states: Any = self.state.stateful_callbacks
        for callback in self.callback_handler.callbacks:
            saved = states.get(type(callback).__name__)
            if isinstance(callback, ExportableState) and isinstance(saved, dict):
                vars(callback).update(saved["attributes"])

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The trainer's; the rates that it begins from are kept, which not every schedule does.

        Plan and optimizer are there: the run that this one takes the place of ends.
        """
        for group in self._groups():
            rate = group["lr"]
            group.setdefault("initial_lr", rate.clone() if isinstance(rate, Tensor) else rate)
        made = super().create_scheduler(num_training_steps, optimizer)
        if self._ends is not None:
            _end_run(self._ends)
            self._ends = None
        return made

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        scheduler: Any = self.lr_scheduler
        wanted = [{k: g[k] for k in _OF_A_GROUP if k in g} for g in self._groups()]
        steering = {k: v for k, v in vars(scheduler).items() if k in _OF_A_SCHEDULE}
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        # Settings that were declared to differ, and a longer schedule, hold from the next step on.
        vars(scheduler).update(steering)
        for index, (group, settings) in enumerate(zip(self._groups(), wanted, strict=True)):
            begun = group.get("initial_lr")
            group.update(settings)
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs[index] = group["initial_lr"]
            if hasattr(scheduler, "lr_lambdas"):
                factor = scheduler.lr_lambdas[index](scheduler.last_epoch)
                group["lr"] = group["initial_lr"] * factor
            elif begun and begun != group["initial_lr"]:  # as far down as the old rate has come
                group["lr"] = group["lr"] / begun * group["initial_lr"]
        scheduler._last_lr = [group["lr"] for group in self._groups()]

    def _take_finished(self, checkpoint: str, steps: int) -> TrainOutput:
        """The state of a run that has all its steps; transformers would take one more each time."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        state.is_local_process_zero = self.is_local_process_zero()
        state.is_world_process_zero = self.is_world_process_zero()
        self.state = state
        self._load_from_checkpoint(checkpoint)
        self.create_optimizer_and_scheduler(steps)
        self._load_optimizer_and_scheduler(checkpoint)
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        losses = [entry["train_loss"] for entry in state.log_history if "train_loss" in entry]
        return TrainOutput(state.global_step, losses[-1] if losses else float("nan"), {})


@contextmanager
def one_run(folder: Path, writes: bool) -> Iterator[None]:
    """A lock on the folder, which the system releases whenever the process ends."""
    if not writes:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another process trains in {str(folder)!r}. Wait for it, or choose another output_dir. "
                "Processes of one launcher on CPUs know of each other with use_cpu=True alone."
            ) from None
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): nothing keeps another process from training there",
                folder, error.strerror,
            )  # fmt: skip
        yield
    finally:
        with suppress(OSError):  # processes that were forked meanwhile hold it, too
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _end_run(folder: Path) -> None:
    """Remove blocks and log, then checkpoints, the last one last: killed, it goes on from that one."""
    for name in (BLOCKS_INFO, BLOCKS_FILE, TRAINER_STATE_NAME):
        (folder / name).unlink(missing_ok=True)
    for checkpoint in checkpoints_in(folder):
        remove_checkpoint(checkpoint)


def _lies_in(folder: Path, checkpoint: str | os.PathLike[str]) -> bool:
    return Path(checkpoint).absolute().parent.resolve() == folder.resolve()


def set_aside(folder: Path, step: int, checkpoint: str) -> None:
    """Rename what is beyond the checkpoint that a run goes back to, or its next resume would take it."""
    if not _lies_in(folder, checkpoint):
        return
    for path in map(Path, checkpoints_in(folder)):
        number = int(path.name.rpartition("-")[2])
        if number > step:
            target, taken = folder / f"{path.name}-superseded", 1
            while target.exists():
                taken += 1
                target = folder / f"{path.name}-superseded-{taken}"
            path.rename(target)
            logger.warning(
                "the run goes back to step %d: %s is not part of it any more, and now %s",
                step, path, target,
            )  # fmt: skip
