"""``smt-ext demo``: SmolLM2-135M on generated word problems, in minutes on a CPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..hf.score_callback import ScoreCallback
from ..hf.word_problems import equation_is_right, make_problems
from .program import make_output
from .summary import print_summary
from .train import build, finish, parse

__all__ = ["run"]

# Few enough steps for minutes on two cores; plan and rate are the command line's own.
_FLAGS = """
    --model smollm2 --budget 1% --max_steps 28 --max_length 192 --per_device_train_batch_size 8
    --per_device_eval_batch_size 32 --save_steps 14 --save_total_limit 1 --logging_steps 4
    --plan_batches 3 --lr_scheduler_type cosine --warmup_steps 4 --adam_beta2 0.99
    --gradient_checkpointing false --train_sampling_strategy group_by_length
    --overwrite true --report_to none --seed 0
"""
_ROWS, _HELD_OUT, _NEW_TOKENS = 224, 40, 20


def run(options: argparse.Namespace) -> None:
    """Write the problems, train, and show accuracy and loss before and after."""
    root = Path(options.output)
    data, held_out = root / "data" / "train.jsonl", root / "data" / "test.jsonl"
    make_output(data.parent)
    rows = make_problems(_HELD_OUT, split="test")
    for path, content in ((data, make_problems(_ROWS, split="train")), (held_out, rows)):
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    flags = [*_FLAGS.split(), "--data", str(data), "--eval", str(held_out), "--output", str(root)]
    if options.steps is not None:
        flags += ["--max_steps", str(options.steps)]
    if options.quiet:
        flags += ["--disable_tqdm", "true"]
    trainer = build(parse(flags))
    prompts = [f"Question: {row['instruction']}\nAnswer:" for row in rows]
    golds = [row["answer"] for row in rows]
    score = ScoreCallback(trainer, prompts, golds, equation_is_right, max_new_tokens=_NEW_TOKENS)
    trainer.add_callback(score)
    finish(trainer)
    print_summary(trainer, "smollm2")
