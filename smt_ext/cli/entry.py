"""The command line: smt-ext train | plan | eval | export | estimate | report | info | demo | env."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import CHOICES, TrainConfig, load_config, make_config
from ..errors import CheckpointError, DataError, Interrupted, PatchError, PlanError
from .program import program

if TYPE_CHECKING:
    from ..train import Results

__all__ = ["main"]

_USER_ERRORS = (DataError, PlanError, PatchError, CheckpointError)
_PLAN_SETTINGS = (
    "model", "data", "budget", "block_size", "targets", "metric", "allocation", "plan_batches",
    "precision", "template", "max_length", "too_long", "packing", "batch_size", "seed", "device",
    "threads",
)  # fmt: skip
_EVAL_SETTINGS = (
    "model", "precision", "template", "max_length", "too_long", "score", "max_new_tokens",
    "eval_batch_size", "device", "threads",
)  # fmt: skip
_SUITE_FLAGS = ("output", "sets", "limit", "overwrite")
# The demo: chosen so that two cores need about three minutes.
_DEMO = {
    "model": "smollm2",
    "budget": "1%",
    "block_size": 64,
    "lr": 2e-3,
    "steps": 80,
    "plan_batches": 10,
    "score": "equation",
    "max_length": 192,
    "max_new_tokens": 20,
    "save_every": 20,
}
_DEMO_ROWS, _DEMO_HELD_OUT = 640, 96


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 done, 2 bad input, 130 stopped, 141 nobody reads the output any more (``| head``).
    """
    parser = _parser()
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args([_dashed(argument) for argument in given])
    try:
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
    except Interrupted as stop:
        print(f"smt-ext: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("smt-ext: interrupted", file=sys.stderr)
        return 130
    return 0


def _train(options: argparse.Namespace) -> None:
    if options.resume is not None:
        if given := _given(options) or options.config:
            raise DataError(
                f"--resume goes on with the settings of the run in {options.resume!r}, and takes no "
                f"others (got {', '.join(given) if isinstance(given, dict) else '--config'}). To train "
                "on with others, export its blocks and start a new run from the exported model."
            )
        from ..train import resume

        results = resume(options.resume, progress=not options.quiet)
    else:
        from ..train import train

        values = load_config(options.config) if options.config else {}
        config = make_config({**values, **_given(options)})
        results = train(config, overwrite=options.overwrite, progress=not options.quiet)
    _print(results)


def _demo(options: argparse.Namespace) -> None:
    from ..task import write_problems
    from ..train import train

    root = Path(options.output)
    data, held_out = write_problems(root / "data", train=_DEMO_ROWS, test=_DEMO_HELD_OUT)
    values = {**_DEMO, "data": str(data), "eval": str(held_out), "output": str(root)}
    if options.steps is not None:
        values["steps"] = options.steps
    results = train(make_config(values), overwrite=True, progress=not options.quiet)
    _print(results)


def _print(results: Results) -> None:
    from .summary import print_results

    config = make_config(load_config(Path(results.output) / "config.yaml"))
    out = Path(results.output)
    base = ["--model", config.model, "--blocks", str(out / "blocks")]
    run = program()
    commands = [[run, "export", *base, "--output", str(out / "model")]]
    if config.eval:
        commands.append(
            [run, "eval", *base, "--data", config.eval, "--score", config.score,
             "--precision", config.precision, "--max-new-tokens", str(config.max_new_tokens),
             "--max-length", str(config.max_length), "--template", config.template]
        )  # fmt: skip
    commands.append([run, "info", str(out / "blocks")])
    print_results(results, [shlex.join(command) for command in commands])


def _plan(options: argparse.Namespace) -> None:
    from ..train import plan_only

    config = make_config(_given(options))
    plan = plan_only(config, options.output, progress=not options.quiet)
    print(plan)
    print(f"written to {options.output}; use it with: smt-ext train --plan {options.output} ...")


def _eval(options: argparse.Namespace) -> None:
    if options.suite is not None:
        _eval_suite(options)
        return
    from ..train import evaluate_only

    if given := [name for name in _SUITE_FLAGS if getattr(options, name) not in (None, False)]:
        raise DataError(f"--{given[0]} belongs to --suite, which is not given")
    # A config wants training data; there is none here but the rows to evaluate on.
    config = make_config({**_given(options), "data": options.data, "eval": options.data})
    quality = evaluate_only(config, options.blocks, progress=not options.quiet)
    print(f"loss {quality.loss:.4f} nats a token")
    if quality.accuracy is not None:
        print(f"right answers {quality.accuracy:.1%}")


def _eval_suite(options: argparse.Namespace) -> None:
    from . import eval as of_suites

    given = _given(options)
    if "score" in given:
        raise DataError("--score belongs to one file of rows; a suite has measures of its own")
    parser = argparse.ArgumentParser()
    of_suites.add_arguments(parser)
    known = parser.parse_args(["--suite", options.suite, "--model", given["model"]])
    flags = {"blocks": options.blocks, "data": options.data, "sets": options.sets,
             "limit": options.limit, "overwrite": options.overwrite}  # fmt: skip
    for name, value in {**given, **flags}.items():
        if name in vars(known):
            setattr(known, name, value)
    known.output = options.output or known.output
    known.batch_size = given.get("eval_batch_size", known.batch_size)
    of_suites.run(known)


def _export(options: argparse.Namespace) -> None:
    from ..checkpoint.blocks import load_blocks, read_blocks_info
    from ..checkpoint.delta import export_delta
    from ..checkpoint.merged import export
    from ..checkpoint.peft_lora import export_peft_lora
    from ..hf.loading import load_model, load_tokenizer, resolve_model

    if options.uniform_rank and options.format != "peft-lora":
        raise DataError(
            f"--uniform-rank is for --format peft-lora, and the format is {options.format!r}"
        )
    dtype = read_blocks_info(options.blocks)["base_dtype"]
    name = resolve_model(options.model)
    tokenizer = load_tokenizer(name) if options.format == "hf" else None
    model = load_blocks(load_model(name, dtype), options.blocks)
    out = options.output
    if options.format == "hf":
        export(model, out, tokenizer)
        print(f"written to {out}: a plain checkpoint for transformers' from_pretrained")
    elif options.format == "delta":
        exact = export_delta(model, out)
        print(
            f"written to {out}: the change of {len(exact)} modules, exact in {sum(exact.values())}"
        )
    else:
        adapter = export_peft_lora(model, out, base_model=name, uniform_rank=options.uniform_rank)
        print(
            f"written to {out}: a LoRA adapter for {len(adapter.ranks)} modules, ranks "
            f"{min(adapter.ranks.values())} to {adapter.max_rank}, {adapter.num_bytes / 1e6:.1f} MB "
            f"({adapter.delta_bytes / 1e6:.1f} MB of them trained values)"
        )


def _estimate(options: argparse.Namespace) -> None:
    from ..checkpoint.blocks import load_plan
    from ..estimation.table import estimate
    from ..planning.make_plan import DEFAULT_TARGETS

    result = estimate(
        options.model,
        batch=options.batch,
        length=options.seq,
        answers=options.answers,
        padded=options.padded,
        dtype=options.dtype,
        budget=options.budget,
        block_size=options.block_size,
        targets=options.targets or DEFAULT_TARGETS,
        plan=load_plan(options.plan) if options.plan else None,
        spread=options.spread,
        columns=options.columns,
        methods=options.methods,
        rank=options.rank,
        gradient_checkpointing=options.gradient_checkpointing,
        memory=options.gpu,
    )
    print(result.to_json() if options.json else result)


def _report(options: argparse.Namespace) -> None:
    from ..report.write import write_report

    page = write_report(
        options.path,
        options.output,
        compare=options.compare,
        model=options.model,
        batch=options.batch,
        length=options.seq,
    )
    print(f"written to {page}: open it in a browser")


def _info(options: argparse.Namespace) -> None:
    from .._files import printable

    path = Path(options.path)
    if path.is_dir() and not (path / "smt_blocks.json").exists() and (path / "plan.json").exists():
        _print_results(path / "results.json")
        path = path / "plan.json"  # the directory of a run
    if path.is_dir():
        from ..checkpoint.blocks import read_blocks_info

        info = read_blocks_info(path)
        made_by = printable(info["smt_ext"])
        size = sum(file.stat().st_size for file in path.iterdir())
        print(f"trained blocks, {size:,} bytes, by smt_ext {made_by}; checksum matches")
        for name, value in info["metadata"].items():
            print(f"{printable(name)}: {printable(value)}")
        plan = info["plan"]
    else:
        from ..checkpoint.blocks import load_plan

        plan = load_plan(path)
    print("\n".join(map(printable, str(plan).splitlines())))
    for name, value in plan.provenance.items():
        print(f"{printable(name)}: {printable(value)}")


def _print_results(path: Path) -> None:
    """What a run came to; nothing where it has not ended."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        print("this run has not ended\n")
        return
    except ValueError as error:
        raise DataError(f"{str(path)!r} is damaged or cut off: {error}") from None
    print(f"run of {results['steps']:,} steps, {results['seconds']:,.0f} s of training")
    for name, digits, words in (
        ("loss", ".3f", "held-out loss"),
        ("accuracy", ".1%", "right answers"),
    ):
        before, after = (results[when] and results[when][name] for when in ("before", "after"))
        if before is not None and after is not None:
            print(f"{words}: {before:{digits}} before, {after:{digits}} after")
    print()


def _env(options: argparse.Namespace) -> None:
    from .env import environment

    for name, value in environment().items():
        print(f"{name:<14}{value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="smt-ext", description="Sparse Matrix Tuning: train the blocks that matter."
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, *, quiet: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if quiet:
            sub.add_argument("--quiet", action="store_true", help="no progress bars")
        return sub

    sub = command("train", _train, "plan, patch, train, evaluate and save", quiet=True)
    sub.add_argument("--config", help="YAML file with settings; flags overrule it")
    sub.add_argument("--resume", metavar="DIR", help="continue the run in DIR exactly")
    sub.add_argument("--overwrite", action="store_true", help="replace a run in --output")
    _add_settings(sub, [f.name for f in dataclasses.fields(TrainConfig)])

    sub = command("plan", _plan, "choose the blocks and write the plan", quiet=True)
    sub.add_argument("--output", default="plan.json", help="where the plan goes")
    _add_settings(sub, _PLAN_SETTINGS)

    sub = command("eval", _eval, "held-out loss and accuracy of a model", quiet=True)
    sub.add_argument("--blocks", help="trained blocks to load onto the model")
    sub.add_argument(
        "--data", required=True, help="held-out rows, JSON lines; with --suite: folder of the sets"
    )
    _add_settings(sub, _EVAL_SETTINGS)
    suite = sub.add_argument_group("the paper's evaluation sets, resumable")
    suite.add_argument(
        "--suite", choices=("commonsense", "math"), help="8 or 6 sets of LLM-Adapters"
    )
    suite.add_argument("--output", help="folder of the results (default smt-eval)")
    suite.add_argument("--sets", nargs="+", metavar="NAME", help="only these sets")
    suite.add_argument("--limit", type=int, help="only so many rows of each set, the first ones")
    suite.add_argument(
        "--overwrite", action="store_true", help="replace another model's results in --output"
    )

    sub = command("export", _export, "write the trained model for others to load")
    sub.add_argument("--model", required=True, help="the base model")
    sub.add_argument("--blocks", required=True, help="directory with the trained blocks")
    sub.add_argument("--output", required=True, help="directory that is written")
    sub.add_argument(
        "--format", choices=("hf", "peft-lora", "delta"), default="hf",
        help="hf: a plain checkpoint, blocks merged (default); peft-lora: an exact LoRA adapter; "
        "delta: the changed blocks as safetensors",
    )  # fmt: skip
    sub.add_argument(
        "--uniform-rank", action="store_true",
        help="peft-lora: one rank for all modules, which llama.cpp needs",
    )  # fmt: skip

    sub = command("estimate", _estimate, "memory of each method before anything is downloaded")
    _add_estimate(sub)

    sub = command("report", _report, "a page with pictures of a plan or a run")
    sub.add_argument("path", help="plan.json, or a run directory")
    sub.add_argument("--output", help="folder of the page; replaced (default: report in the run)")
    sub.add_argument("--compare", nargs="+", default=[], metavar="DIR", help="runs to compare with")
    sub.add_argument("--model", help="for the estimate of memory (default: the run's own)")
    sub.add_argument("--batch", type=int, help="for the estimate (default: the run's first batch)")
    sub.add_argument("--seq", type=int, help="for the estimate (default: the run's first batch)")

    sub = command("info", _info, "what is in a plan, in trained blocks, or in a run")
    sub.add_argument("path", help="plan.json, a blocks directory, or a run directory")

    sub = command("demo", _demo, "fine-tune SmolLM2-135M on word problems, in minutes", quiet=True)
    sub.add_argument("--output", default="smt-demo", help="directory of the run; replaced")
    sub.add_argument("--steps", type=int, help=f"optimizer steps (default {_DEMO['steps']})")

    command("env", _env, "versions, CPU features, threads, CUDA kernels")
    return parser


def _add_estimate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--model",
        required=True,
        help="llama-7b, llama-13b, llama-3-8b, a folder with config.json, a hub name",
    )
    sub.add_argument("--batch", type=int, default=1, help="sequences of a step (default 1)")
    sub.add_argument("--seq", type=int, default=2048, help="tokens of a sequence (default 2048)")
    sub.add_argument(
        "--answers",
        type=int,
        help="tokens of the batch with a loss, the head computed for these alone",
    )
    sub.add_argument("--padded", action="store_true", help="sequences of different lengths")
    sub.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"], help="of weights")
    sub.add_argument("--gpu", metavar="SIZE", help="memory to fill, such as 24GB or 24GiB")
    sub.add_argument("--budget", default="0.84%", help="of SMT (default 0.84%%)")
    sub.add_argument("--block-size", type=int, default=256, help="of SMT (default 256)")
    sub.add_argument(
        "--targets", nargs="+", metavar="PATTERN", help="of SMT (default: query, key and value)"
    )
    sub.add_argument("--plan", help="a real plan; without it the spread of the blocks is assumed")
    sub.add_argument(
        "--spread",
        default="paper",
        choices=["paper", "uniform"],
        help="assume most blocks in value projections, or spread by size",
    )
    sub.add_argument(
        "--columns",
        default="distinct",
        choices=["distinct", "random"],
        help="assume the most input columns that the blocks can read, or random ones",
    )
    sub.add_argument("--rank", type=int, help="of LoRA and DoRA (default: as many parameters)")
    sub.add_argument(
        "--methods",
        nargs="+",
        choices=["full", "full-master", "lora", "dora", "smt"],
        help="default: all",
    )
    sub.add_argument(
        "--gradient-checkpointing", action="store_true", help="recompute activations in backward"
    )
    sub.add_argument("--json", action="store_true", help="everything, in bytes")  # fmt: skip


def _add_settings(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """A flag for each setting. Only flags that were given reach the namespace."""
    hints = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        if field.name not in names:
            continue
        hint = hints[field.name]
        kind = typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint
        default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
        shown = "" if default in (None, "") else f" (default {str(default).replace('%', '%%')})"
        arguments: dict[str, Any] = {
            "dest": f"setting_{field.name}",
            "default": argparse.SUPPRESS,
            "help": field.metadata["help"] + shown,
        }
        if kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        elif kind == tuple[str, ...]:
            arguments.update(nargs="+", metavar="PATTERN")
        else:
            choices = CHOICES.get(field.name)
            arguments.update(type=kind, choices=choices)
            arguments["metavar"] = None if choices else field.name.upper()
        parser.add_argument(f"--{field.name.replace('_', '-')}", **arguments)


def _dashed(argument: str) -> str:
    """``--block_size=64``, as the setting is named in YAML, means ``--block-size=64``."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _given(options: argparse.Namespace) -> dict[str, Any]:
    prefix = "setting_"
    return {k[len(prefix) :]: v for k, v in vars(options).items() if k.startswith(prefix)}
