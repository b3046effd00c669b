"""``smt-ext train`` and ``plan``: TRL's ``SFTTrainer`` with SMT in it; its flags, YAML and formats."""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from datasets import disable_progress_bars
from huggingface_hub.errors import HfHubHTTPError
from transformers import TrainerCallback
from transformers.utils import logging
from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments, TrlParser, get_dataset
from trl.trainer.model_config import ModelConfig
from trl.trainer.sft_config import SFTConfig
from trl.trainer.utils import get_quantization_config

from .._files import replace_file, system_error, write_text
from ..checkpoint.blocks import load_plan
from ..distributed import ranks
from ..errors import CheckpointError, DataError, Interrupted, PatchError, PlanError
from ..hf.config import SMTConfig
from ..hf.loading import load_model, load_tokenizer, of_the_hub, resolve_model, revision_of
from ..hf.rows import load_rows, prepare_rows
from ..hf.run_binding import is_ours
from ..hf.trainers import SMTSFTTrainer
from ..memory import keep_freed_memory
from ..planning.score_file import load_scores, scores_path
from ..precision import training_dtype
from .program import COMMAND, begun_by, make_output, program
from .summary import print_summary

__all__ = ["build", "parse", "plan", "train"]

_ALIASES = {
    "--model": "--model_name_or_path", "--data": "--dataset_name", "--output": "--output_dir",
    "--eval": "--eval_data", "--steps": "--max_steps", "--epochs": "--num_train_epochs",
    "--batch_size": "--per_device_train_batch_size", "--batch-size": "--per_device_train_batch_size",
    "--accumulate": "--gradient_accumulation_steps", "--quiet": "--disable_tqdm",
}  # fmt: skip
_OF_OTHERS = (
    ArithmeticError, AssertionError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError, HfHubHTTPError,
)  # fmt: skip


# Flags that name files, as they stand in the folder where a run was begun.
_FILES = (
    "model_name_or_path", "dataset_name", "eval_data", "config", "plan", "chat_template_path"
)  # fmt: skip
_SAME = {"learning_rate": "lr", "num_train_epochs": "max_steps"}


@dataclass
class RunArguments:
    """What TRL has no name for."""

    eval_data: str | None = field(
        default=None, metadata={"help": "held-out rows, like dataset_name: loss before and after"}
    )
    template: str = field(
        default="plain",
        metadata={"help": "how instruction rows become text: plain, alpaca or chat"},
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads"})


@dataclass
class _SFTConfig(SFTConfig):
    """TRL's arguments; whether bfloat16 or a rate was asked for is kept apart from its own defaults."""

    def __post_init__(self) -> None:
        # Unless told of the CPU, accelerate leaves processes of torchrun unconnected, each alone.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        asked: bool | None = self.bf16
        self.bf16_asked = asked
        self.bf16 = bool(asked)
        self.rate_asked: float | None = self.learning_rate
        if self.rate_asked is None:  # see parse()
            default: Any = SFTConfig.__dataclass_fields__["learning_rate"].default
            self.learning_rate = default
        super().__post_init__()


class _Refusing(argparse.ArgumentParser):
    """Raises what argparse would print behind the usage of some hundred flags."""

    def error(self, message: str) -> NoReturn:
        raise DataError(message)


class _Flags(_Refusing, TrlParser):
    """TRL's parser."""


def parse(arguments: Sequence[str], prog: str = "smt-ext train") -> tuple[Any, ...]:
    """Script, training, model, mixture, SMT and run arguments, from flags and ``--config`` YAML.

    Raises:
        DataError: a flag, a value or a YAML key that cannot be used.
        SystemExit: of argparse: help.
    """
    found, given = _taken(arguments, "config")  # TRL looks for it without "="
    if found.config is not None:
        given += ["--config", found.config]
    kinds: Any = (
        ScriptArguments, _SFTConfig, ModelConfig, DatasetMixtureConfig, SMTConfig, RunArguments
    )  # fmt: skip
    parser = _Flags(kinds, prog=prog, allow_abbrev=False)
    for short, flag in _ALIASES.items():
        parser._option_string_actions[short] = action = parser._option_string_actions[flag]
        action.option_strings = [*action.option_strings, short]  # for --help
    action.nargs, action.const = "?", True  # of --quiet, the last, alone
    # Who names TRL's own default means it; who names none gets --lr's, --precision's and --eval's.
    parser.set_defaults(learning_rate=None, dtype=None, eval_on_start=None)
    try:
        parsed: tuple[Any, ...] = parser.parse_args_and_config(given)
    except (DataError, PlanError):
        raise
    except Exception as error:  # whatever a dataclass raises about a value
        said = _in_a_line(error)
        if "are not used by" in said and "['-" not in said:  # but values of the flag before
            said += "; several data files are one argument: --data a.jsonl,b.jsonl"
        raise DataError(said) from error
    # Two names of one thing: one on the command line, which overrules what a file says of the other.
    flags = _taken(given, *_SAME, *_SAME.values())[0]
    for settings in (vars(flags), _settings_of(found.config)):
        for name, ruling in _SAME.items():
            value, holds = settings.get(name), settings.get(ruling)
            if value is not None and str(holds) not in ("None", "-1"):  # as many as the epochs have
                _refuse_idle(name, value, holds, f"{ruling} rules")
    if flags.learning_rate is not None:
        parsed[4].lr = None
    if flags.num_train_epochs is not None:
        parsed[1].max_steps = -1
    return parsed


def _taken(arguments: Sequence[str], *names: str) -> tuple[argparse.Namespace, list[str]]:
    """The values of some flags, None where they are not given, and the other arguments."""
    parser = _Refusing(add_help=False, allow_abbrev=False)
    for name in names:
        spelt = [f"--{name}", f"--{name.replace('_', '-')}"]
        spelt += [short for short, flag in _ALIASES.items() if flag == f"--{name}"]
        parser.add_argument(*dict.fromkeys(spelt))
    return parser.parse_known_args(arguments)


def _settings_of(file: str | None) -> dict[str, Any]:
    """What a YAML file sets; TRL has read it."""
    return {} if file is None else yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}


def _refuse_idle(name: str, value: Any, holds: Any, why: str) -> NoReturn:
    """Refuse a setting that would have no effect."""
    raise DataError(f"{name} is {value!r}, and {why}: {holds!r} holds. Leave {name} away")


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _refusals(so_far: str) -> Iterator[None]:
    """What TRL, transformers and the hub refuse, as a message for the user."""
    try:
        yield
    except (DataError, PlanError, PatchError, CheckpointError, BrokenPipeError):
        raise
    except Exception as error:
        if not isinstance(error, _OF_OTHERS) and system_error(error) is None:
            raise
        raise DataError(f"{so_far}: {_in_a_line(error)}") from error


@_refusals("nothing has been trained")
def build(parsed: tuple[Any, ...]) -> SMTSFTTrainer:
    """The trainer of parsed arguments: data, tokenizer and model loaded, rows checked.

    Raises:
        DataError: see its messages; nothing has been written.
    """
    script, args, model_args, mixture, smt, run = parsed
    if smt.lr is None:
        smt.lr = "auto" if args.rate_asked is None else str(args.rate_asked)
        smt.__post_init__()  # which checks it
    if run.threads is not None:
        if run.threads < 1:
            raise DataError(f"threads is {run.threads}, expected at least 1")
        torch.set_num_threads(run.threads)
    if args.disable_tqdm:  # theirs are not the trainer's
        disable_progress_bars()
        logging.disable_progress_bar()
    if args.device.type == "cpu":
        keep_freed_memory()  # a quarter of a step's time was page faults
        args.dataloader_pin_memory = False  # torch warns of it where there is no GPU
    if model_args.model_name_or_path is None:
        raise DataError("no model was named: pass --model_name_or_path (--model)")
    for count, unset in (
        ("max_steps", -1), ("gradient_accumulation_steps", 1), ("max_length", None)
    ):  # fmt: skip
        if (value := getattr(args, count)) != unset and value < 1:
            raise DataError(f"{count} is {value}, expected at least 1")
    if not args.max_grad_norm >= 0:
        raise DataError(f"max_grad_norm is {args.max_grad_norm}, expected at least 0 (no clipping)")
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise DataError(f"num_train_epochs is {args.num_train_epochs:g}: nothing would be trained")
    if args.activation_offloading and args.device.type == "cpu":
        raise DataError("activation_offloading moves activations from a GPU, and there is none")
    name = resolve_model(model_args.model_name_or_path)
    init = dict(args.model_init_kwargs or {})
    args.model_init_kwargs = None  # they are used here
    if (dtype := init.pop("dtype", init.pop("torch_dtype", None))) is not None:
        if model_args.dtype not in (None, dtype):
            _refuse_idle("dtype", model_args.dtype, dtype, "model_init_kwargs rules")
        model_args.dtype = dtype
    # Who names none gets "main".
    revision = model_args.model_revision if model_args.model_revision != "main" else None
    source = {**revision_of(name, revision), "trust_remote_code": args.trust_remote_code}
    tokenizer = load_tokenizer(name, **{**source, **of_the_hub(init)})
    _take_template(tokenizer, args)
    if args.eos_token is not None:
        tokenizer.eos_token = args.eos_token
    data, held_out = _data(script, args, mixture, run)
    if held_out is None and (args.eval_on_start or args.eval_strategy != "no"):
        raise DataError("evaluation needs held-out rows: pass --eval_data, or --test_split_size")
    columns: set[str] = {*next(iter(data), ())}
    text_field, args.dataset_text_field = args.dataset_text_field, "text"

    def prepared(rows: Any, source: str) -> Any:
        if text_field != "text":
            if text_field not in next(iter(rows), ()):
                raise DataError(f"dataset_text_field is {text_field!r}, no field of {source!r}")
            rows = rows.map(lambda row: {"text": row[text_field]}, remove_columns=text_field)
        return prepare_rows(rows, tokenizer, template=run.template, name=source)

    data = prepared(data, script.dataset_name or "datasets")
    if run.template != "plain" and not columns >= {"instruction", "output"}:
        why = "no training row has 'instruction' and 'output'"
        _refuse_idle("template", run.template, "plain", why)
    if held_out is not None:
        held_out = prepared(held_out, run.eval_data or "the test split")
    if args.eval_on_start is None:
        args.eval_on_start = held_out is not None
    dtype = _precision(smt, args, model_args)
    settings = {
        **source,
        "attn_implementation": model_args.attn_implementation,
        # Which names the dtype that 4-bit layers compute in: float32 where none is named.
        "quantization_config": get_quantization_config(
            replace(model_args, dtype=str(dtype).removeprefix("torch."))
        ),
        **init,
    }
    if args.use_liger_kernel and find_spec("liger_kernel") is None:
        raise DataError("--use_liger_kernel needs another package: pip install liger-kernel")
    if model_args.use_peft:
        raise DataError("SMT trains blocks of the model's own weights: leave --use_peft away")
    model = load_model(name, dtype, **{k: v for k, v in settings.items() if v is not None})
    return SMTSFTTrainer(
        model, args, train_dataset=data, eval_dataset=held_out, processing_class=tokenizer,
        smt_config=smt,
    )  # fmt: skip


def train(
    arguments: Sequence[str], callback: Callable[[Any], TrainerCallback] | None = None
) -> None:
    """Plan, patch, train, evaluate and save; ``callback`` makes one more from the trainer.

    Raises:
        DataError, PlanError, PatchError, CheckpointError: see their messages.
        Interrupted: SIGINT or SIGTERM came; a checkpoint has been saved.
    """
    before = os.getcwd()
    try:
        _train(_resumed(arguments), callback)
    finally:
        os.chdir(before)


def _train(arguments: list[str], callback: Callable[[Any], TrainerCallback] | None) -> None:
    parsed = parse(arguments)
    args, smt = parsed[1], parsed[4]
    make_output(Path(args.output_dir))
    asked = smt.precision
    trainer = build(parsed)
    # "auto" is measured, and might come out otherwise when the run goes on.
    measured = [] if smt.precision == asked else ["--precision", smt.precision]
    trainer.add_callback(_KeepCommand([*arguments, *measured]))
    if callback is not None:
        trainer.add_callback(callback(trainer))
    resume = args.resume_from_checkpoint
    resume = {"true": True, "false": None}.get(str(resume).lower(), resume)
    with _refusals("the run could not be finished"):
        with _stop_signals(trainer):
            trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(_internal_call=True)  # pushes nothing
        if trainer.eval_dataset is not None:
            trainer.evaluate()
            trainer.create_model_card()  # with what was found
        trainer.save_state()
    if trainer.is_world_process_zero():
        print_summary(trainer, parsed[2].model_name_or_path)
    if args.push_to_hub:
        with _refusals(f"the trained blocks are in {args.output_dir!r}, and not on the hub"):
            trainer.push_to_hub(dataset_name=parsed[0].dataset_name)
    trainer.end()


def plan(arguments: Sequence[str]) -> None:
    """Choose the blocks and write the plan, with the scores beside it."""
    parsed = parse(["--output_dir", "plan.json", *arguments], "smt-ext plan")
    args, target = parsed[1], parsed[1].output_dir
    if Path(target).is_dir():
        raise DataError(f"{target!r} is a folder, expected a file to write the plan to")
    readers: Any = ((Path(target), load_plan), (scores_path(target), load_scores))
    for file, read in readers:
        try:
            if file.exists():
                read(file)
        except (PlanError, CheckpointError):
            raise DataError(f"{str(file)!r} is not smt_ext's: choose another --output") from None
    make_output(Path(target).absolute().parent)
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder  # a trainer makes one, and the plan is a file
        made = build(parsed).make_plan(scores_path(target))
    made.save(target)
    print(made)
    print(f"written to {target}; use it with: {program()} train --plan {target} ...")


def _take_template(tokenizer: Any, args: Any) -> None:
    """The chat template of a file; or of another tokenizer, with its end of text.

    TRL takes that one's other tokens too, and grows the model's embedding by random rows, which are
    in no checkpoint and do not train.
    """
    path = args.chat_template_path
    if path is None:
        return
    args.chat_template_path = None  # it is taken here, before rows are checked by it
    if path.endswith((".jinja", ".jinja2", ".j2")):
        tokenizer.chat_template = Path(path).expanduser().read_text(encoding="utf-8-sig")
        return
    other = load_tokenizer(path, trust_remote_code=args.trust_remote_code)
    template = other.chat_template
    if template is None:
        raise DataError(f"--chat_template_path {path!r}: that tokenizer has no chat template")
    known = tokenizer.get_vocab()
    special = {str(token) for token in other.added_tokens_decoder.values()} - known.keys()
    if lacking := sorted(t for t in special if t in str(template) or t == other.eos_token):
        raise DataError(
            f"--chat_template_path {path!r}: its template needs the token {lacking[0]!r}, which the "
            "model's tokenizer has not: its embedding would be random. Add it with tokenizer.add_tokens "
            "and model.resize_token_embeddings, save both and train that; or take another template."
        )
    tokenizer.chat_template = template
    args.eos_token = args.eos_token or other.eos_token


def _data(script: Any, args: Any, mixture: Any, run: RunArguments) -> tuple[Any, Any]:
    """Training rows and held-out ones, or None."""
    share = mixture.test_split_size
    if share is not None and run.eval_data:
        raise DataError("eval_data and test_split_size both name held-out rows: pass one of them")
    if mixture.datasets and script.dataset_name:
        raise DataError("dataset_name and datasets both name training rows: pass one of them")
    if mixture.datasets:
        # Split below: TRL would draw other rows in every process, and at every resume.
        data = get_dataset(replace(mixture, test_split_size=None))["train"]
    elif script.dataset_name:
        options = {"config": script.dataset_config, "streaming": script.dataset_streaming}
        data = load_rows(script.dataset_name, split=script.dataset_train_split, **options)
    else:
        raise DataError("no data was named: pass --dataset_name (--data), or datasets in YAML")
    if run.eval_data:
        config = script.dataset_config if run.eval_data == script.dataset_name else None
        return data, load_rows(run.eval_data, config=config, split=script.dataset_test_split)
    if share is None:
        return data, None
    if not hasattr(data, "train_test_split"):
        raise DataError("test_split_size needs data that is not streamed: pass eval_data (--eval)")
    parts = data.train_test_split(share, seed=args.seed)
    return parts["train"], parts["test"]


def _precision(smt: SMTConfig, args: Any, model_args: Any) -> torch.dtype:
    """The weights' dtype; sets ``args.bf16`` (autocast), and ``auto`` to what it came to.

    TRL's own flags win over ``auto``.
    """
    asked, named = smt.precision, model_args.dtype
    named = None if named in (None, "auto") else getattr(torch, str(named), named)
    if not isinstance(named, torch.dtype | None):
        raise DataError(f"dtype is {named!r}, expected one of torch's, such as bfloat16")
    if asked == "bf16" and args.deepspeed_plugin is not None:
        raise DataError(
            "--precision bf16: under DeepSpeed its configuration rules the weights' dtype. Pass --bf16 "
            'true, with "bf16": {"enabled": "auto"} there'
        )
    if asked == "auto":
        if args.bf16_asked or args.fp16 or args.deepspeed_plugin is not None or named is not None:
            return named or torch.float32
        asked = "bf16" if training_dtype(args.device) == torch.bfloat16 else "fp32"
        smt.precision = asked
    args.bf16 = asked == "bf16-mixed"
    dtype = torch.bfloat16 if asked == "bf16" else torch.float32
    for flag, value, holds in (("bf16", args.bf16_asked, args.bf16), ("dtype", named, dtype)):
        if value not in (None, holds):
            _refuse_idle(flag, value, holds, f"--precision {asked} rules")
    return dtype


def _resumed(arguments: Sequence[str]) -> list[str]:
    """``--resume DIR``: the command that began the run in DIR, and go on; further flags overrule it.

    DIR may be one of its checkpoints, to go back to.
    """
    given, rest = _taken(arguments, "resume", "output_dir", "resume_from_checkpoint")
    if given.resume is None:
        return list(arguments)
    run, checkpoint = os.path.expanduser(given.resume), "true"
    if is_ours(run):
        run, checkpoint = str(Path(run).absolute().parent), os.path.abspath(run)
    begun, folder = begun_by(run)
    for name, other in [*_SAME.items(), *((other, name) for name, other in _SAME.items())]:
        if getattr(_taken(rest, name)[0], name) is not None:
            begun = _taken(begun, other)[1]
    ruled = {"output_dir": run, "resume_from_checkpoint": checkpoint}
    for name, holds in ruled.items():
        value = getattr(given, name)
        if value is not None and Path(value).absolute() != Path(holds).absolute():
            _refuse_idle(name, value, holds, f"--resume {given.resume} rules")
    files, _ = _taken(begun, *_FILES)
    if folder.is_dir() and not any(map(_is_here, vars(files).values())):
        ruled["output_dir"] = os.path.abspath(run)
        new, rest = _taken(rest, *_FILES)
        for name, value in vars(new).items():
            if value is not None:
                rest += [f"--{name}", _from_here(value)]
        os.chdir(folder)
    return [*begun, *rest, *(f"--{name}={value}" for name, value in ruled.items())]


def _from_here(names: str) -> str:
    """Files of the folder that the user is in, by their whole names."""
    if os.path.exists(names):
        return os.path.abspath(names)
    each = names.split(",")
    return ",".join(os.path.abspath(name) if os.path.exists(name) else name for name in each)


def _is_here(names: str | None) -> bool:
    """Whether a value names a file, or several with commas, of the folder that the user is in."""
    each = [] if names is None else [names, *names.split(",")]
    return any(os.path.exists(name) and not os.path.isabs(name) for name in each)


class _KeepCommand(TrainerCallback):
    """Writes the command that ``--resume`` repeats, once it is sure that this run may write there.

    Without the hub's token: the file may be read by others, and is uploaded.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = _taken(arguments, "hub_token")[1]
        if any('"token"' in argument for argument in self.arguments):
            raise DataError(f"a token would be in {COMMAND}: set HF_TOKEN instead")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with replace_file(Path(args.output_dir) / COMMAND) as file:
                begun = {
                    "arguments": self.arguments,
                    "folder": os.path.relpath(".", args.output_dir),
                }
                write_text(file, json.dumps(begun, indent=1) + "\n")


class _Stop(TrainerCallback):
    """Ends training after the step at hand, with a checkpoint, once a signal came to any rank."""

    came = stopped = False

    def __call__(self, number: int, frame: Any) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """After each optimizer step, where all ranks meet: one that stops alone would be waited for."""
        self.stopped = any(ranks.gather_objects(self.came))
        if self.stopped:
            args.save_only_model = False  # this checkpoint is to go on from
            control.should_save = control.should_training_stop = True
        return control


@contextmanager
def _stop_signals(trainer: SMTSFTTrainer) -> Iterator[None]:
    stop = _Stop()
    trainer.add_callback(stop)
    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    state = trainer.state
    if stop.stopped and state.global_step < state.max_steps:
        raise Interrupted(
            f"stopped after step {state.global_step} of {state.max_steps}; a checkpoint "
            f"is saved. Go on with: {program()} train --resume {trainer.args.output_dir}"
        )
