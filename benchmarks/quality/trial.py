"""One trial from loading to its record. As a program: a process of its own for each trial.

    python -m benchmarks.quality.trial < request.json

The request has the trial, the folder of the data, the record's path, and how the learning rate was
chosen. Progress goes to standard output, a line a step: ``step <n> <loss>``.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import CudaMemory, HostMemory, commit
from benchmarks.quantized import quantize_
from smt_ext._files import replace_file
from smt_ext.cli.env import environment
from smt_ext.hf.loading import load_model, load_tokenizer, resolve_model
from smt_ext.layouts import shape_NK
from smt_ext.memory import SavedBytes, keep_freed_memory
from smt_ext.plan import BlockPlan, kind_of
from smt_ext.planning.score_file import load_scores
from smt_ext.planning.targets import select_targets
from smt_ext.quantization import logical_numel

from .general_text import General
from .matrix import Trial
from .methods import Trained, make_plan, prepare, targets_of
from .rows import AnswerLoss, BatchOrder, Example, collate, cosine_with_warmup
from .tasks import TaskData, load_task

__all__ = ["FORMAT", "VERSION", "run_trial", "write_record"]

FORMAT, VERSION = "smt_ext.quality", 1

Report = Callable[[str], None]


def run_trial(trial: Trial, folder: Path, report: Report = lambda line: None) -> dict[str, Any]:
    """Train, evaluate, and return the record; an exception leaves no record."""
    begin = time.perf_counter()
    torch.manual_seed(trial.seed)
    device = torch.device(trial.device)
    if device.type == "cpu":
        keep_freed_memory()
    name = resolve_model(trial.model)
    tokenizer = load_tokenizer(name)
    data = load_task(trial, folder, tokenizer)
    model = load_model(name, torch.float32).to(device)
    total = sum(p.numel() for p in model.parameters())
    if trial.base is not None:
        quantize_(model, trial.base)
    general = General(tokenizer)
    untrained = None if trial.split == "plan" else general.loss(model)
    run = _Run(trial, model, data, tokenizer.pad_token_id, device)
    record: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "id": trial.id,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "environment": environment(rates=False),
        "trial": dataclasses.asdict(trial),
        "data": data.checksums,
        "rows": {"train": len(data.train), "dev": len(data.dev)}
        | {name: len(rows) for name, rows in data.sets.items()},
        "model_parameters": total,
    }
    if trial.split == "plan":
        report("planning")
        record |= run.plan()
    else:
        record |= run.train(report)
        report("evaluating")
        mark = time.perf_counter()
        if trial.split == "dev":
            loss = data.loss(data.dev, model, tokenizer, run.autocast)
            record["held_out_loss"] = {"dev": _finite(loss)}
        else:
            found = data.judge(trial, model, tokenizer, run.autocast)
            record["held_out_loss"] = {group: _finite(loss) for group, loss in found.loss.items()}
            record["accuracy"] = found.accuracy()
            record["right"] = found.right
        record["general_text"] = {
            "sha256": general.sha256,
            "tokens": general.tokens,
            "before": untrained,
            "after": _finite(general.loss(model)),
        }
        record["seconds"]["evaluation"] = time.perf_counter() - mark
    record.setdefault("seconds", {})["all"] = time.perf_counter() - begin
    return record


class _Run:
    """A model with its batches, which are the same for every method."""

    def __init__(
        self, trial: Trial, model: nn.Module, data: TaskData, pad_id: int, device: torch.device
    ) -> None:
        self.trial = trial
        self.model = model
        self.examples: list[Example] = data.train
        self.pad_id = pad_id
        self.device = device
        self.order = BatchOrder([len(e) for e in data.train], trial.batch_size, trial.seed)
        self.loss = AnswerLoss(model)
        self.parameters = sum(logical_numel(p) for p in model.parameters())

    def autocast(self) -> AbstractContextManager[Any]:
        if self.trial.precision == "bf16-mixed":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def batch(self, number: int) -> dict[str, Tensor]:
        batch = collate([self.examples[i] for i in self.order[number]], self.pad_id)
        return {key: value.to(self.device) for key, value in batch.items()}

    def batches(self) -> Iterator[dict[str, Tensor]]:
        number = 0
        while True:
            yield self.batch(number)
            number += 1

    def mean_loss(self, model: nn.Module, batch: Any) -> Tensor:
        with self.autocast():
            logits, labels = self.loss.answer_logits(batch)
        return F.cross_entropy(logits.float(), labels)

    def plan(self) -> dict[str, Any]:
        """Only choose blocks; the record has all of them, and the mean score of each weight."""
        with tempfile.TemporaryDirectory() as folder:
            scores = Path(folder) / "scores.safetensors"
            begin = time.perf_counter()
            plan = make_plan(self.trial, self.model, self.batches(), self.mean_loss, scores)
            seconds = time.perf_counter() - begin
            modules = load_scores(scores).modules
        means = {name: _mean_of_entries(s.values, s.shape, s.block_size)
                 for name, s in modules.items()}  # fmt: skip
        return {
            "plan": self.about(plan),
            "blocks": {name: layer.blocks for name, layer in plan.layers.items()},
            "mean_score": means,
            "seconds": {"plan": seconds},
        }

    def about(self, plan: BlockPlan) -> dict[str, Any]:
        """Where a plan's budget went, beside what it could choose from; in parameters."""
        held: dict[str, int] = {}
        for name, module in select_targets(self.model, targets_of(self.trial)).items():
            held[kind_of(name)] = held.get(kind_of(name), 0) + math.prod(shape_NK(module))
        return {
            "fingerprint": plan.fingerprint,
            "blocks": plan.num_blocks,
            "by_kind": plan.share_by(kind_of),
            "targets_by_kind": held,
        }

    def train(self, report: Report) -> dict[str, Any]:
        """All steps; the part of the record that is about them."""
        trial = self.trial
        report("preparing")
        begin = time.perf_counter()
        trained = prepare(trial, self.model, self.batches(), self.mean_loss)
        seconds = {"preparation": time.perf_counter() - begin}
        curve, times, memory = self._steps(trained, report)
        seconds["training"] = sum(times)
        # The first step also makes the optimizer's state.
        seconds["step"] = statistics.median(times[1:] or times) if times else 0.0
        record: dict[str, Any] = {
            "trained": {
                "parameters": trained.count,
                "percent": 100 * trained.count / self.parameters,
                **trained.facts,
            },
            "loss_curve": [_finite(loss) for loss in curve],
            "seconds": seconds,
            "memory": memory,
        }
        if trained.rotation is not None:
            record["trained"]["rotation"] = trained.rotation.facts
        if trained.plan is not None:
            record["plan"] = self.about(trained.plan)
        return record

    def _steps(
        self, trained: Trained, report: Report
    ) -> tuple[list[float], list[float], dict[str, int]]:
        """Losses and seconds of the steps, and bytes of memory."""
        trial = self.trial
        if not trained.optimizers:
            return [], [], {}
        warmup = trial.warmup
        if trial.warmup_steps is not None:
            warmup = trial.warmup_steps / trial.steps
        schedule = cosine_with_warmup(trial.steps, warmup)
        memory = CudaMemory() if self.device.type == "cuda" else HostMemory()
        gc.collect()
        held = memory.held()
        memory.reset_peak()
        self.model.train()
        curve, times, saved_bytes = [], [], 0
        for step in range(trial.steps):
            batch = self.batch(step)
            begin = time.perf_counter()
            trained.before_step(step)
            trained.set_rate(schedule(step), step)
            if step == 0:
                with SavedBytes(self.model) as saved:
                    loss = self.mean_loss(self.model, batch)
                saved_bytes = saved.bytes
            else:
                loss = self.mean_loss(self.model, batch)
            loss.backward()
            if not trained.clips:
                nn.utils.clip_grad_norm_(trained.parameters, trial.max_grad_norm)
            for optimizer in trained.optimizers:
                optimizer.step()
            if trained.spiel is not None:
                trained.spiel.after_step(step)
            for optimizer in trained.optimizers:
                optimizer.zero_grad(set_to_none=True)
            curve.append(float(loss.detach()))  # waits for a GPU
            times.append(time.perf_counter() - begin)
            report(f"step {step + 1} {curve[-1]:.4f}")
        return curve, times, {
            "held_before": held, "peak": memory.peak(), "saved": saved_bytes,
        }  # fmt: skip


def write_record(path: Path, record: dict[str, Any]) -> None:
    """One JSON object; the file appears whole or not at all."""
    entries = [
        f" {json.dumps(key)}: {json.dumps(_rounded(value))}" for key, value in record.items()
    ]
    with replace_file(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")


def _mean_of_entries(values: np.ndarray, shape: tuple[int, int], size: int) -> float:
    """Mean over a weight's entries, from the means of its blocks; edge blocks are smaller."""
    height, width = (
        np.minimum(size, length - size * np.arange(count))
        for length, count in zip(shape, values.shape, strict=True)
    )
    return float(height @ values @ width / (shape[0] * shape[1]))


def _finite(value: float) -> float | None:
    """JSON has no inf or NaN."""
    return value if math.isfinite(value) else None


def _rounded(value: Any) -> Any:
    """Six digits: records are read by people and kept in git."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def fulfil(request: Mapping[str, Any]) -> None:
    """Run the trial that :mod:`.run` asks for, and write its record."""
    trial = Trial(**request["trial"])
    if request.get("threads"):
        torch.set_num_threads(request["threads"])
    record = run_trial(trial, Path(request["data"]), lambda line: print(line, flush=True))
    record["lr_choice"] = request["lr_choice"]
    write_record(Path(request["record"]), record)


if __name__ == "__main__":
    fulfil(json.load(sys.stdin))
