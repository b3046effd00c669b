"""``smt-ext demo``: SmolLM2-135M on generated word problems, in minutes on a CPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..hf.score_callback import ScoreCallback
from ..hf.word_problems import equation_is_right, write_problems
from .train import build, finish, parse, report

__all__ = ["run"]

# Chosen so that two cores need about three minutes.
_SETTINGS = {
    "model": "smollm2", "budget": "1%", "block_size": 64, "lr": 2e-3, "max_steps": 80,
    "plan_batches": 10, "max_length": 192, "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32, "save_steps": 20, "save_total_limit": 1, "logging_steps": 5,
    "lr_scheduler_type": "cosine", "warmup_steps": 4, "adam_beta2": 0.99,
    "gradient_checkpointing": "false", "train_sampling_strategy": "group_by_length",
    "overwrite": "true", "report_to": "none", "seed": 0,
}  # fmt: skip
_ROWS, _HELD_OUT, _NEW_TOKENS = 640, 96, 20


def run(options: argparse.Namespace) -> None:
    """Write the problems, train, and show accuracy and loss before and after."""
    root = Path(options.output)
    data, held_out = write_problems(root / "data", train=_ROWS, test=_HELD_OUT)
    settings = {**_SETTINGS, "data": data, "eval": held_out, "output": root}
    if options.steps is not None:
        settings["max_steps"] = options.steps
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    if options.quiet:
        arguments += ["--disable_tqdm", "true"]
    parsed = parse(arguments)
    trainer = build(parsed)
    rows = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    prompts = [f"Question: {row['instruction']}\nAnswer:" for row in rows]
    golds = [row["answer"] for row in rows]
    score = ScoreCallback(trainer, prompts, golds, equation_is_right, max_new_tokens=_NEW_TOKENS)
    trainer.add_callback(score)
    finish(trainer)
    report(trainer, parsed)
