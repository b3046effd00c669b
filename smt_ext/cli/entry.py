"""The command line: smt-ext train | plan | eval | export | estimate | report | info | demo | env."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._extras import require
from ..errors import CheckpointError, DataError, Interrupted, PatchError, PlanError

__all__ = ["main"]

# What trains here; psutil measures memory, rich prints TRL's tables.
_TRAINS = ("accelerate", "datasets", "gguf", "psutil", "rich", "transformers", "trl")
_USER_ERRORS = (DataError, PlanError, PatchError, CheckpointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 done, 2 bad input, 130 stopped, 141 nobody reads the output any more (``| head``).
    """
    parser = _parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    options, rest = parser.parse_known_args(given)
    # transformers and PEFT import torchao where it is installed: it warns of GPU code that it has not,
    # and torch of the way in which it registers its enums. bitsandbytes warns of kernels, of which an
    # estimate runs none.
    estimates = ("bitsandbytes",) if options.run is _estimate else ()
    for name in ("torchao", "torch.utils._pytree", *estimates):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("model", "blocks", "data", "output", "plan", "path"):
        value = getattr(options, name, None)
        if isinstance(value, str):  # --output=~/x, which no shell expands
            setattr(options, name, os.path.expanduser(value))
    if rest and options.run is not None:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if options.run is None:
            # A parser of its own, which takes seconds to load.
            require(f"smt-ext {options.command}", *_TRAINS)
            from . import demo, train

            run = {"train": train.train, "plan": train.plan, "demo": demo.demo}[options.command]
            run(given[given.index(options.command) + 1 :])
        else:
            options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered has no reader either; Python would complain of it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except _USER_ERRORS as error:
        if options.traceback:
            raise
        print(f"smt-ext: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"smt-ext: {stop or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


def _eval(options: argparse.Namespace) -> None:
    require("smt-ext eval", "lm_eval")
    from ..hf.config import comma_list
    from .eval import run

    options.sets, options.tasks = comma_list(options.sets), comma_list(options.tasks)
    run(options)


def _export(options: argparse.Namespace) -> None:
    from ..checkpoint.blocks import load_blocks, read_blocks_info
    from ..checkpoint.export import export
    from ..hf.loading import load_base, load_tokenizer_of, resolve_model, revision_of

    if options.uniform_rank and options.format != "peft-lora":
        raise DataError(f"--uniform_rank is for --format peft-lora, and it is {options.format!r}")
    info = read_blocks_info(options.blocks)
    name, out = resolve_model(options.model), options.output
    # Also with --overwrite: what is exported would be lost without its base or its blocks.
    for flag, source in (("--model", name), ("--blocks", options.blocks)):
        if Path(source).exists() and Path(source).resolve().is_relative_to(Path(out).resolve()):
            raise DataError(
                f"--output holds {source!r} ({flag}). Nothing was changed: choose another"
            )
    more: dict[str, Any] = {"overwrite": options.overwrite}
    source = revision_of(name, options.model_revision, info)
    if options.format == "hf":
        more["tokenizer"] = load_tokenizer_of(options.blocks, name, **source)
    elif options.format == "peft-lora":
        more |= {"base_model": name, "uniform_rank": options.uniform_rank}
    model = load_blocks(load_base(name, info, **source), options.blocks)
    if "tokenizer" in more:  # as the trainer did: what is generated ends where the run taught it to
        from transformers.trainer_utils import align_special_tokens

        align_special_tokens(model, more["tokenizer"])
    made: Any = export(model, out, options.format, **more)
    what = "a plain checkpoint for transformers' from_pretrained"
    if options.format == "delta":
        what = f"the change of {len(made)} modules, exact in {sum(made.values())}"
    elif options.format == "peft-lora":
        what = f"a LoRA adapter of rank {made.max_rank} at most, {made.num_bytes / 1e6:.1f} MB"
    print(f"written to {out}: {what}")


def _estimate(options: argparse.Namespace) -> None:
    from ..checkpoint.blocks import load_plan
    from ..estimation.table import estimate
    from ..hf.config import SMTConfig, comma_list, number

    ours = ("run", "traceback", "plan", "json")
    settings = {k: v for k, v in vars(options).items() if v is not None and k not in ours}
    for name in ("targets", "methods"):
        if name in settings:
            settings[name] = comma_list(settings[name])
    if "budget" in settings:
        settings["budget"] = number(settings["budget"])
    if options.plan:
        settings["plan"] = plan = load_plan(options.plan)
        asked = {k: settings[k] for k in ("budget", "block_size", "targets") if k in settings}
        SMTConfig(plan=options.plan, **asked).check_plan(plan)
    result = estimate(**settings)
    print(result.to_json() if options.json else result)


def _report(options: argparse.Namespace) -> None:
    from ..report.write import write_report

    print(f"written to {write_report(options.path, options.output)}: open it in a browser")


def _info(options: argparse.Namespace) -> None:
    from .._files import printable
    from ..checkpoint.blocks import load_plan, read_blocks_info

    path, facts = Path(options.path), {}
    if path.is_dir() and (path / "plan.json").exists():  # the directory of a run
        from ..report.run_record import read_record
        from .summary import print_quality

        print_quality(read_record(path)[-1])
        if not (path / "smt_blocks.json").exists():
            path = path / "plan.json"
    if path.is_dir():
        info = read_blocks_info(path)
        size = sum(file.stat().st_size for file in path.iterdir())
        made_by = printable(info["smt_ext"])
        print(f"trained blocks, {size:,} bytes, by smt_ext {made_by}; checksum matches")
        plan, facts = info["plan"], info["metadata"]
    else:
        plan = load_plan(path)
    print("\n".join(map(printable, str(plan).splitlines())))
    for name, value in {**facts, **plan.provenance}.items():
        print(f"{printable(name)}: {printable(value)}")


def _env(options: argparse.Namespace) -> None:
    from .env import environment

    for name, value in environment().items():
        print(f"{name:<14}{value}")


_YES = {"action": "store_true"}
_REVISION = {
    "help": "branch, tag or commit of a hub name (default: what the blocks were trained on, else main)"
}
# Command -> what it does, the function, and its arguments. Without a function: a parser of its own.
_COMMANDS: dict[str, tuple[str, Any, dict[str, dict[str, Any]]]] = {
    "train": ("plan, patch, train, evaluate and save", None, {}),
    "plan": ("choose the blocks and write the plan", None, {}),
    "eval": ("accuracy of a model on the paper's sets, or on lm-eval's tasks", _eval, {
        "--suite": {"choices": ("commonsense", "math"), "help": "the paper's 8 or 6 sets"},
        "--tasks": {"nargs": "+", "metavar": "NAME", "help": "tasks that lm-eval has itself"},
        "--model": {"required": True, "help": "the base model: a folder or hub name"},
        "--model_revision": _REVISION,
        "--blocks": {"help": "trained blocks to load onto it"},
        "--data": {"help": "folder of the paper's sets (default: $SMT_DATA)"},
        "--sets": {"nargs": "+", "metavar": "NAME", "help": "only these sets of the suite"},
        "--limit": {"type": int, "help": "only so many rows of each set, the first ones"},
        "--output": {"default": "smt-eval", "help": "folder of the results (smt-eval)"},
        "--precision": {
            "choices": ("auto", "bf16", "fp32"),
            "help": "dtype that the model runs in (default: that of the blocks' base; without blocks "
            "auto: bfloat16 where the device computes it at full rate, else float32)",
        },
        "--threads": {"type": int, "help": "CPU threads"},
        "--batch_size": {"type": int, "default": 16, "help": "prompts a batch (16)"},
        "--max_new_tokens": {"type": int, "help": "of a generated answer (256)"},
        "--template": {
            "choices": ("plain", "alpaca", "chat"),
            "help": "of a suite's prompts (default: that of the run whose blocks these are, or plain)",
        },
        "--apply_chat_template": {**_YES, "help": "prompts of tasks in the model's chat format"},
    }),
    "export": ("write the trained model for others to load", _export, {
        "--model": {"required": True, "help": "the base model"},
        "--model_revision": _REVISION,
        "--blocks": {"required": True, "help": "directory with the trained blocks"},
        "--output": {"required": True, "help": "directory that is written"},
        "--format": {
            "choices": ("hf", "peft-lora", "delta"), "default": "hf",
            "help": "hf: a plain checkpoint, blocks merged (default); peft-lora: an exact LoRA "
            "adapter; delta: the changed blocks as safetensors",
        },
        "--uniform_rank": {**_YES, "help": "peft-lora: one rank for all, which llama.cpp needs"},
        "--overwrite": {**_YES, "help": "replace a directory, whatever it holds"},
    }),
    "estimate": ("memory of each method before anything is downloaded", _estimate, {
        "--model": {
            "required": True,
            "help": "llama-7b, llama-3-8b, ..., a folder with config.json, a hub name",
        },
        "--batch": {"type": int, "default": 1, "help": "sequences of a step (default 1)"},
        "--seq": {
            "type": int, "default": 2048, "dest": "length",
            "help": "tokens of a sequence (default 2048)",
        },
        "--dtype": {"default": "bf16", "choices": ["bf16", "fp16", "fp32"], "help": "of weights"},
        "--gpu": {"metavar": "SIZE", "dest": "memory", "help": "to fill, such as 24GB or 24GiB"},
        "--budget": {"help": "of SMT (default 0.84%%)"},
        "--block_size": {"type": int, "help": "of SMT (default 64)"},
        "--targets": {"nargs": "+", "metavar": "PATTERN", "help": "of SMT (default: all-linear)"},
        "--plan": {"help": "a plan; default: blocks at random, as train chooses them"},
        "--rank": {"type": int, "help": "of the LoRAs (default: as many parameters)"},
        "--methods": {
            "nargs": "+", "metavar": "METHOD",
            "help": "of full, full-master, lora, dora, smt, qlora, smt-4bit (default: all)",
        },
        "--gradient_checkpointing": {**_YES, "help": "recompute activations in backward"},
        "--json": {**_YES, "help": "everything, in bytes"},
    }),
    "report": ("a page with pictures of a plan or a run", _report, {
        "path": {"help": "plan.json, or a run directory"},
        "--output": {"help": "folder of the page; replaced (default: report in the run)"},
    }),
    "info": ("what is in a plan, in trained blocks, or in a run", _info, {
        "path": {"help": "plan.json, a blocks directory, or a run directory"},
    }),
    "demo": ("fine-tune SmolLM2-135M on word problems, in minutes; flags of train", None, {}),
    "env": ("versions, CPU features, threads, CUDA kernels", _env, {}),
}  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="smt-ext", description="Sparse Matrix Tuning: train the blocks that matter."
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (text, run, flags) in _COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text, add_help=run is not None)
        sub.set_defaults(run=run)
        if run is None:
            sub.set_defaults(command=name)
        for flag, settings in flags.items():
            spelt = (flag, flag.replace("_", "-")) if "_" in flag else (flag,)  # as TRL's flags are
            sub.add_argument(*spelt, **settings)
    return parser
