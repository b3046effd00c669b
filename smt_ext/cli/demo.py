"""``smt-ext demo``: SmolLM2-135M on generated word problems, in minutes on a CPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._files import write_text
from ..errors import DataError
from ..hf.rows import to_trl
from ..hf.score_callback import ScoreCallback
from ..hf.word_problems import equation_is_right, make_problems
from .program import make_output
from .train import parse, train

__all__ = ["demo"]

# Few enough steps for minutes on two cores; plan and rate are the command line's own. Those of `train`:
# what is given overrules them.
_FLAGS = """
    --model smollm2 --budget 1% --max_steps 28 --max_length 192 --per_device_train_batch_size 8
    --per_device_eval_batch_size 32 --save_steps 14 --save_total_limit 1 --logging_steps 4
    --plan_batches 3 --lr_scheduler_type cosine --warmup_steps 4 --adam_beta2 0.99
    --gradient_checkpointing false --train_sampling_strategy group_by_length
    --report_to none --seed 0 --output smt-demo
"""
_ROWS, _HELD_OUT, _NEW_TOKENS = 224, 40, 20


def demo(arguments: Sequence[str]) -> None:
    """Write the problems, train, and show accuracy and loss before and after."""
    flags = [*_FLAGS.split(), *arguments]
    script, args, *_, run = parse(flags, "smt-ext demo")
    if script.dataset_name or run.eval_data:
        raise DataError(
            "the demo makes its rows itself: leave --data and --eval away, or use train"
        )
    out = Path(args.output_dir)
    folder = out / "data"
    problems = {"train": make_problems(_ROWS, split="train")}
    problems["test"] = make_problems(_HELD_OUT, split="test")
    texts = {
        folder / f"{split}.jsonl": "".join(json.dumps(row) + "\n" for row in rows)
        for split, rows in problems.items()
    }
    if all(file.is_file() and file.read_bytes() == text.encode() for file, text in texts.items()):
        flags = ["--overwrite", "true", *flags]  # an earlier demo's folder
    elif out.exists() and (held := next(filter(Path.is_file, out.rglob("*")), None)):
        raise DataError(
            f"{str(out)!r} is not the demo's: it holds {held.name!r}. Choose another --output"
        )
    make_output(folder)
    for file, text in texts.items():
        write_text(file, text)
    prompts = [to_trl(row, template=run.template)["prompt"] for row in problems["test"]]
    golds = [row["answer"] for row in problems["test"]]

    def score(trainer: Any) -> ScoreCallback:
        return ScoreCallback(trainer, prompts, golds, equation_is_right, max_new_tokens=_NEW_TOKENS)

    data = ["--data", str(folder / "train.jsonl"), "--eval", str(folder / "test.jsonl")]
    train([*flags, *data], score)
