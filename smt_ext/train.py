"""The main job: load, plan, patch, train, evaluate, save; stopped anywhere, it goes on exactly."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from ._signals import StopSignal, stop_signal
from .checkpoint.blocks import load_blocks, load_plan, save_blocks
from .checkpoint.training_state import load_training_state, save_training_state
from .cli.program import program
from .config import TrainConfig, load_config, make_config, save_config
from .data import BatchOrder, Example, Row, collate, encode_rows, pack, read_rows
from .errors import DataError, Interrupted
from .evaluate import Autocast, Quality, evaluate
from .evaluation_log import Evaluation, read_evaluations, write_evaluations
from .hf.loading import checkpoint_activations, load_model, load_tokenizer, resolve_model
from .loss import AnswerLoss
from .memory import SavedBytes, keep_freed_memory, peak_rss
from .nn.patching import patch, smt_modules, status, unpatch
from .optim.sparse_adamw import SparseAdamW
from .plan import BlockPlan
from .planning.budget import Budget
from .planning.make_plan import make_plan
from .planning.score_file import scores_path

__all__ = [
    "Results",
    "Workspace",
    "cosine_with_warmup",
    "evaluate_only",
    "load_for_evaluation",
    "plan_only",
    "resume",
    "train",
]


@dataclass(frozen=True)
class Results:
    """What a finished run reports.

    Attributes:
        before, after: quality on the held-out rows.
        evaluations: the same by step: before, every ``eval_every`` steps, after; empty without rows.
        trainable_percent: share of the model's parameters that train.
        seconds: of training alone, over all sittings; without loading, planning and evaluation.
        peak_memory_bytes: largest resident size of the process, everything included.
        saved_bytes: what autograd kept for backward in one micro-batch, in all.
        smt_saved_bytes: the part of it that SMT layers keep (gathered input columns).
        full_saved_bytes: what the same layers would keep in full fine-tuning (whole inputs).
        first_batch_rows, first_batch_length, first_batch_answers, first_batch_padded: that
            micro-batch's sequences, tokens of each with padding, answer tokens, and whether attention
            needs a mask (padding or packing).
    """

    before: Quality
    after: Quality
    evaluations: tuple[Evaluation, ...]
    steps: int
    skipped_steps: int
    train_loss: float
    trainable_percent: float
    trainable: int
    blocks: int
    tokens: int
    seconds: float
    peak_memory_bytes: int
    saved_bytes: int
    smt_saved_bytes: int
    full_saved_bytes: int
    first_batch_rows: int
    first_batch_length: int
    first_batch_answers: int
    first_batch_padded: bool
    output: str


@dataclass(frozen=True)
class _Measured:
    """A micro-batch, and the bytes that autograd kept for its backward."""

    saved_bytes: int
    rows: int
    length: int
    answers: int
    padded: bool


class Workspace:
    """The files of a run.

    plan.json, plan.scores.safetensors (where the plan was made here), config.yaml, state/ (for resume),
    metrics.jsonl (a line a step), evaluations.jsonl (a line an evaluation on the held-out rows),
    blocks/ (the result), answers.jsonl (generated answers after training, where they are scored),
    results.json.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.root = Path(directory)
        self.config = self.root / "config.yaml"
        self.plan = self.root / "plan.json"
        self.scores = scores_path(self.plan)
        self.state = self.root / "state"
        self.metrics = self.root / "metrics.jsonl"
        self.evaluations = self.root / "evaluations.jsonl"
        self.blocks = self.root / "blocks"
        self.answers = self.root / "answers.jsonl"
        self.results = self.root / "results.json"

    def start(self, *, overwrite: bool) -> None:
        """Make the directory; refuse one that holds another run."""
        if self.config.exists() and not overwrite:
            raise DataError(
                f"{str(self.root)!r} holds a run already. Continue it with `{program()} train "
                f"--resume {self.root}`, choose another --output, or pass --overwrite."
            )
        self.root.mkdir(parents=True, exist_ok=True)
        # Resuming must not take an earlier run's end or state for this one's.
        for file in (self.results, self.answers, self.evaluations, self.metrics):
            file.unlink(missing_ok=True)
        if self.state.exists():
            shutil.rmtree(self.state)


def train(config: TrainConfig, *, overwrite: bool = False, progress: bool = True) -> Results:
    """Run ``config`` from the start.

    Raises:
        DataError, PlanError, CheckpointError: see their messages; nothing trained is lost.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    files = Workspace(config.output)
    # All that is given is read and checked before anything is written.
    Budget.parse(config.budget)
    plan = load_plan(config.plan) if config.plan else None
    run = _Run(config, files, progress)
    if plan is not None:
        plan.validate(run.model)
    files.start(overwrite=overwrite)
    save_config(config, files.config)
    if plan is None:
        plan = run.make_plan(files.scores)
    elif config.plan is not None:
        _take_scores(scores_path(config.plan), files.scores)
    plan.save(files.plan)
    before, _ = run.evaluate()
    run.patch(plan)
    run.progress_state = {"step": 0, "tokens": 0, "seconds": 0.0}
    files.metrics.write_text("")
    run.evaluations = []
    run.record(before)
    run.save_state()
    return run.finish()


def resume(directory: str | os.PathLike[str], *, progress: bool = True) -> Results:
    """Continue the run in ``directory`` bit for bit from its last saved state.

    A finished run stays as it is, and its results are returned.

    Raises:
        DataError: there is no run, or it was stopped before its first state.
        CheckpointError: its state is damaged, or belongs to another model.
    """
    files = Workspace(directory)
    if not files.config.exists():
        raise DataError(f"{os.fspath(directory)!r} holds no run: config.yaml is missing")
    config = dataclasses.replace(
        make_config(load_config(files.config)), output=os.fspath(directory)
    )
    if not all(f.exists() for f in (files.plan, files.metrics, files.evaluations)):
        raise DataError(
            f"the run in {os.fspath(directory)!r} stopped before its first step. Start it again: "
            f"{program()} train --config {files.config} --overwrite"
        )
    if (finished := _finished(files)) is not None:
        return finished
    run = _Run(config, files, progress)
    run.patch(load_plan(files.plan))
    run.load_state()
    return run.finish()


def plan_only(
    config: TrainConfig, path: str | os.PathLike[str], *, progress: bool = True
) -> BlockPlan:
    """Write the plan that a run with these settings would make, and the scores beside it."""
    plan = _Run(config, Workspace(config.output), progress).make_plan(scores_path(path))
    plan.save(path)
    return plan


def evaluate_only(
    config: TrainConfig, blocks: str | os.PathLike[str] | None = None, *, progress: bool = True
) -> Quality:
    """Quality of a model, with trained blocks on it where given, on the rows of ``config.eval``."""
    assert config.eval is not None
    rows = read_rows(config.eval)
    tokenizer = load_tokenizer(resolve_model(config.model))
    rows, examples = _encode(rows, tokenizer, config)
    model, autocast = load_for_evaluation(config, blocks)
    quality, _ = evaluate(
        model, tokenizer, rows, examples, config, autocast=autocast, progress=progress
    )
    return quality


def load_for_evaluation(
    config: TrainConfig, blocks: str | os.PathLike[str] | None = None
) -> tuple[nn.Module, Autocast]:
    """The plain model on its device, trained blocks merged where given; and what it computes under."""
    if config.threads:
        torch.set_num_threads(config.threads)
    device = _device(config.device)
    model = load_model(resolve_model(config.model), _weight_dtype(config)).to(device)
    if blocks is not None:
        unpatch(load_blocks(model, blocks))
    return model, lambda: _autocast(config, device)


class _Run:
    """A model, its data and its optimizer; everything that a sitting needs."""

    def __init__(self, config: TrainConfig, files: Workspace, progress: bool) -> None:
        self.config = config
        self.files = files
        self.progress = progress
        self.progress_state: dict[str, Any] = {}
        self.evaluations: list[Evaluation] = []
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        rows = read_rows(config.data)
        eval_rows = read_rows(config.eval) if config.eval else []
        if config.score != "none" and not eval_rows:
            raise DataError(f"score = {config.score!r} needs held-out rows: pass --eval")
        if config.eval_every and not eval_rows:
            raise DataError(f"eval_every = {config.eval_every} needs held-out rows: pass --eval")
        name = resolve_model(config.model)
        self.tokenizer = load_tokenizer(name)
        self.sequences = self._sequences(_encode(rows, self.tokenizer, config)[1])
        self.eval_rows, self.eval_examples = _encode(eval_rows, self.tokenizer, config)
        self.device = _device(config.device)
        if config.keep_memory and self.device.type == "cpu":
            keep_freed_memory()
        self.model = load_model(name, _weight_dtype(config)).to(self.device)
        self._check_context()
        if config.gradient_checkpointing:
            checkpoint_activations(self.model)
        self.loss = AnswerLoss(self.model)
        lengths = [sum(map(len, sequence)) for sequence in self.sequences]
        self.order = BatchOrder(lengths, config.batch_size, config.seed)
        per_step = config.batch_size * config.accumulate
        self.steps = config.steps or max(1, round(config.epochs * len(self.sequences) / per_step))

    def make_plan(self, scores: Path) -> BlockPlan:
        config = self.config
        batches = (self._to_device(self._collate(b)) for b in self.order.from_batch(0))
        plan = make_plan(
            self.model,
            batches,
            budget=config.budget,
            block_size=config.block_size,
            targets=config.targets,
            metric=config.metric,
            allocation=config.allocation,  # type: ignore[arg-type]
            loss_fn=self._plan_loss,
            num_batches=config.plan_batches,
            seed=config.seed,
            progress=self.progress,
            scores_path=scores,
        )
        if self.progress:
            print(plan)
        return plan

    def patch(self, plan: BlockPlan) -> None:
        config = self.config
        patch(self.model, plan)
        for module in smt_modules(self.model).values():
            module.accumulate_in_place = config.accumulate > 1
        self.optimizer = SparseAdamW(
            self.model,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
        )
        self.scheduler = LambdaLR(self.optimizer, cosine_with_warmup(self.steps, config.warmup))

    def evaluate(self) -> tuple[Quality, list[str]]:
        """Quality on the held-out rows, and the generated answers; training does not notice."""
        if not self.eval_rows:
            return Quality(), []
        # Some models draw random numbers even without dropout.
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            return evaluate(
                self.model,
                self.tokenizer,
                self.eval_rows,
                self.eval_examples,
                self.config,
                autocast=self._autocast,
                progress=self.progress,
            )

    def record(self, quality: Quality) -> None:
        """Add the quality after the steps taken so far to the run's evaluations."""
        if quality.loss is not None:
            step = self.progress_state["step"]
            kept = [e for e in self.evaluations if e.step < step]
            self.evaluations = [*kept, Evaluation(step, quality.loss, quality.accuracy)]
        write_evaluations(self.files.evaluations, self.evaluations)

    def save_state(self) -> None:
        save_training_state(
            self.files.state, self.model, self.optimizer, self.scheduler, **self.progress_state
        )

    def load_state(self) -> None:
        self.progress_state = load_training_state(
            self.files.state, self.model, self.optimizer, self.scheduler
        )
        # Steps after the saved state will be taken again.
        lines = self.files.metrics.read_text(encoding="utf-8").splitlines()
        kept = lines[: self.progress_state["step"]]
        self.files.metrics.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        evaluations = read_evaluations(self.files.evaluations)
        self.evaluations = [e for e in evaluations if e.step <= self.progress_state["step"]]
        write_evaluations(self.files.evaluations, self.evaluations)

    def finish(self) -> Results:
        """The remaining steps, then evaluation and the artefacts."""
        train_loss, measured = self._train()
        padded = measured.rows * measured.length
        save_blocks(self.model, self.files.blocks, metadata={"model": self.config.model})
        after, answers = self.evaluate()
        self.record(after)
        if answers:
            _write_answers(self.files.answers, self.eval_rows, answers)
        what = status(self.model)
        state = self.progress_state
        results = Results(
            before=_quality(self.evaluations[0]) if self.evaluations else Quality(),
            after=after,
            evaluations=tuple(self.evaluations),
            steps=self.steps,
            skipped_steps=self.optimizer.skipped_steps,
            train_loss=train_loss,
            trainable_percent=what.percent,
            trainable=what.trainable,
            blocks=sum(m.num_blocks for m in what.modules),
            tokens=state["tokens"],
            seconds=state["seconds"],
            peak_memory_bytes=peak_rss(),
            saved_bytes=measured.saved_bytes,
            smt_saved_bytes=what.saved_bytes_per_token * padded,
            full_saved_bytes=_full_bytes_per_token(self.model) * padded,
            first_batch_rows=measured.rows,
            first_batch_length=measured.length,
            first_batch_answers=measured.answers,
            first_batch_padded=measured.padded,
            output=str(self.files.root),
        )
        self.files.results.write_text(
            json.dumps(dataclasses.asdict(results), indent=1) + "\n", encoding="utf-8"
        )
        return results

    def _train(self) -> tuple[float, _Measured]:
        state = self.progress_state
        process = psutil.Process()
        self.model.train()
        loss = _last_loss(self.files.metrics)
        measured = None
        bar = tqdm(total=self.steps, initial=state["step"], desc="training", unit="step",
                   disable=not self.progress)  # fmt: skip
        with stop_signal() as stop, self.files.metrics.open("a", encoding="utf-8") as metrics, bar:
            while state["step"] < self.steps:
                # Here, not after the step: a run that was stopped before this evaluation makes it too.
                if self._evaluation_due() and not self._evaluated():
                    self._evaluate_between_steps(stop, bar)
                begin = time.perf_counter()
                loss, tokens, first = self._step(state["step"], measure=measured is None)
                measured = measured or first
                seconds = time.perf_counter() - begin
                state["step"] += 1
                state["tokens"] += tokens
                state["seconds"] += seconds
                self._log(metrics, loss, tokens, seconds)
                memory = process.memory_info().rss / 1e9
                bar.set_postfix_str(
                    f"loss {loss:.3f}, {tokens / seconds:,.0f} tok/s, {memory:.1f} GB"
                )
                bar.update()
                due = state["step"] % self.config.save_every == 0 or state["step"] == self.steps
                # An evaluation that is cut off, or runs out of memory, loses no step.
                if due or stop.is_set() or self._evaluation_due():
                    metrics.flush()
                    self.save_state()
                if stop.is_set():
                    raise self._interrupted()
        if measured is None:  # all steps were taken in earlier sittings
            batch = self._collate(self.order[0])
            with SavedBytes(self.model) as saved:
                kept = self._summed_loss(self._to_device(batch))
            del kept
            measured = _measured(saved, batch)
        return loss, measured

    def _evaluation_due(self) -> bool:
        every, step = self.config.eval_every, self.progress_state["step"]
        return every > 0 and step > 0 and step % every == 0

    def _evaluated(self) -> bool:
        return any(e.step == self.progress_state["step"] for e in self.evaluations)

    def _evaluate_between_steps(self, stop: StopSignal, bar: tqdm) -> None:
        """Evaluate and record it; the state is saved, so that a signal may stop this anywhere."""
        try:
            with stop.at_once():
                quality, _ = self.evaluate()
        except KeyboardInterrupt:
            raise self._interrupted() from None
        self.record(quality)
        if self.progress:
            right = "" if quality.accuracy is None else f", right answers {quality.accuracy:.1%}"
            bar.write(f"step {bar.n}: held-out loss {quality.loss:.3f}{right}")

    def _interrupted(self) -> Interrupted:
        return Interrupted(
            f"stopped after step {self.progress_state['step']} of {self.steps}; the state is saved. "
            f"Continue with: {program()} train --resume {self.files.root}"
        )

    def _step(self, step: int, *, measure: bool) -> tuple[float, int, _Measured | None]:
        """One optimizer step; returns mean loss, tokens, and what the first batch kept."""
        first = step * self.config.accumulate
        batches = [self._collate(self.order[first + i]) for i in range(self.config.accumulate)]
        # Every answer token of the step weighs the same, in whichever micro-batch it is.
        answers = sum(_answer_tokens(batch) for batch in batches)
        total = 0.0
        saved = SavedBytes(self.model) if measure else None
        for index, batch in enumerate(batches):
            with saved if saved is not None and index == 0 else nullcontext():
                loss = self._summed_loss(self._to_device(batch)) / answers
            loss.backward()
            total += float(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        tokens = sum(_real_tokens(batch) for batch in batches)
        return total, tokens, None if saved is None else _measured(saved, batches[0])

    def _summed_loss(self, batch: dict[str, Tensor]) -> Tensor:
        with self._autocast():
            logits, labels = self.loss.answer_logits(batch)
        return F.cross_entropy(logits.float(), labels, reduction="sum")

    def _plan_loss(self, model: nn.Module, batch: Any) -> Tensor:
        with self._autocast():
            return self.loss(batch)

    def _log(self, metrics: TextIO, loss: float, tokens: int, seconds: float) -> None:
        line = {
            "step": self.progress_state["step"],
            "loss": loss,
            "lr": self.scheduler.get_last_lr()[0],
            "grad_norm": self.optimizer.last_grad_norm,
            "skipped_steps": self.optimizer.skipped_steps,
            "tokens": tokens,
            "seconds": round(seconds, 4),
        }
        metrics.write(json.dumps(line) + "\n")
        metrics.flush()

    def _autocast(self) -> AbstractContextManager[Any]:
        return _autocast(self.config, self.device)

    def _sequences(self, examples: list[Example]) -> list[list[Example]]:
        if self.config.packing:
            return pack(examples, self.config.max_length)
        return [[example] for example in examples]

    def _collate(self, indices: list[int]) -> dict[str, Tensor]:
        return collate([self.sequences[i] for i in indices], self.tokenizer.pad_token_id)

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in batch.items()}

    def _check_context(self) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        longest = max(sum(map(len, sequence)) for sequence in self.sequences)
        if limit is not None and longest > limit:
            raise DataError(
                f"a row has {longest} tokens, and the model's context is {limit}. Set max_length to "
                f"{limit} or less, with too_long = 'skip' or shorter rows."
            )


def cosine_with_warmup(steps: int, warmup: float) -> Callable[[int], float]:
    """Linear rise over the first ``warmup`` share of the steps, then half a cosine down to 0."""
    rising = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return factor


def _quality(evaluation: Evaluation) -> Quality:
    return Quality(evaluation.loss, evaluation.accuracy)


def _full_bytes_per_token(model: nn.Module) -> int:
    """Bytes a token of the whole inputs of the SMT layers, shared inputs counted once."""
    groups = {id(m._input_group): m for m in smt_modules(model).values()}
    return sum(m._input_group.in_features * m.weight.element_size() for m in groups.values())


def _answer_tokens(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"][:, 1:] >= 0).sum())


def _measured(saved: SavedBytes, batch: dict[str, Tensor]) -> _Measured:
    rows, length = batch["input_ids"].shape
    mask = batch["attention_mask"]
    padded = mask.ndim > 2 or not bool(mask.all())
    return _Measured(saved.bytes, rows, length, _answer_tokens(batch), padded)


def _real_tokens(batch: dict[str, Tensor]) -> int:
    mask = batch["attention_mask"]
    # Packed: a token is real if it attends to itself.
    return int((mask if mask.ndim == 2 else mask[:, 0].diagonal(dim1=1, dim2=2)).sum())


def _take_scores(source: Path, target: Path) -> None:
    """The scores of a plan that is given, if it has any, in place of an earlier run's."""
    if source.absolute() != target.absolute():
        target.unlink(missing_ok=True)
        if source.exists():
            shutil.copyfile(source, target)


def _last_loss(metrics: Path) -> float:
    lines = metrics.read_text(encoding="utf-8").splitlines()
    return float(json.loads(lines[-1])["loss"]) if lines else math.nan


def _encode(
    rows: Sequence[Row], tokenizer: Any, config: TrainConfig
) -> tuple[list[Row], list[Example]]:
    return encode_rows(
        rows,
        tokenizer,
        max_length=config.max_length,
        template=config.template,  # type: ignore[arg-type]
        too_long=config.too_long,  # type: ignore[arg-type]
    )


def _weight_dtype(config: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def _autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    if config.precision == "bf16-mixed":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise DataError("device = 'cuda', but torch finds no CUDA device. Use device = 'cpu'.")
    return torch.device(name)


def _finished(files: Workspace) -> Results | None:
    """What the run came to; None where it did not end, or was killed while it wrote that."""
    try:
        body = json.loads(files.results.read_text(encoding="utf-8"))
        return Results(
            **{
                **body,
                "before": Quality(**body["before"]),
                "after": Quality(**body["after"]),
                "evaluations": tuple(Evaluation(**line) for line in body["evaluations"]),
                "output": str(files.root),
            }
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _write_answers(path: Path, rows: Sequence[Row], answers: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row, answer in zip(rows, answers, strict=False):
            line = {"where": row.where, "answer": answer, "gold": row.answer or row.completion}
            file.write(json.dumps(line) + "\n")
